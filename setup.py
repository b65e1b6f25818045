from setuptools import find_packages, setup

setup(
    name="retina_focal",
    version="0.1.0",
    description="RetinaNet and the focal loss (arXiv:1708.02002) as a detectron2 plugin",
    license="Apache-2.0",
    python_requires=">=3.10",
    # The configs stand beside the code in a clone and inside it in a wheel; see config_path().
    packages=[*find_packages(include=["retina_focal*"]), "retina_focal.configs"],
    package_dir={"retina_focal.configs": "configs"},
    package_data={
        "retina_focal.configs": ["**/*.yaml", "**/*.py", "**/*.md", "**/*.json"],
        "retina_focal.export": ["page.html", "page.js"],
        "retina_focal.tools.check": ["page.html"],
        "retina_focal.tools.fidelity": ["settings.yaml"],
        "retina_focal.tools.report": ["page.html"],
    },
    # Not detectron2: pip can't build it unaided, and would replace a user's own build.
    install_requires=[
        "torch>=2.10",  # before, a file read with weights_only could still run code or break memory
        "torchvision",
        "fvcore",
        "pycocotools",
        "opencv-python",
        "safetensors",
    ],
    extras_require={
        "timm": ["timm"],
        "ablate": ["submitit"],
        "evaluation": ["hotcoco==1.3.0"],  # the version whose numbers were compared
        "report": ["jinja2"],
        "export": ["onnx", "onnxscript", "onnxruntime"],
        "openvino": ["openvino==2026.4.1", "nncf==3.4.0"],  # the ones whose results were compared
        "test": [
            "jinja2",
            "timm",
            "submitit",
            "hotcoco==1.3.0",
            "onnx",
            "onnxscript",
            "onnxruntime",
            "pytest",
            "pytest-xdist",
            "hypothesis",
        ],
        "dev": ["ruff"],
    },
    entry_points={"console_scripts": ["retina-focal = retina_focal.tools.cli:main"]},
)
