"""Imports point down, and importing the package registers names and does nothing else."""

import ast
import subprocess
import sys
from pathlib import Path

import retina_focal

PACKAGE = Path(retina_focal.__file__).parent
LAYERS = [
    {"config", "losses", "box_losses", "matching", "precision", "folding"},
    {"sampling", "anchors", "assigner", "head", "backbone"},
    {"criterion", "postprocess"},
    {"retinanet", "proposals", "checkpoint", "datasets", "accumulation", "first_step"},
    {"engine"},
]
LAYER = {name: layer for layer, names in enumerate(LAYERS) for name in names}


def own_imports(path: Path) -> set[str]:
    """Modules of the package that a file imports, at any depth of its code."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
        elif isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
    return {name.split(".")[1] for name in found if name.startswith("retina_focal.")}


def test_a_module_never_imports_from_a_higher_layer():
    for path in PACKAGE.glob("[!_]*.py"):
        if path.stem in LAYER:
            for name in own_imports(path):
                assert LAYER.get(name, 5) <= LAYER[path.stem], f"{path.stem} imports {name}"


def test_importing_the_package_changes_nothing_global():
    script = """
import logging, sys, torch
import detectron2.modeling, detectron2.config, detectron2.evaluation, detectron2.utils.events
def state():
    return (torch.save, torch.load, torch.get_default_dtype(), torch.get_num_threads(),
            torch.backends.cudnn.benchmark, torch.backends.mkldnn.enabled,
            torch.get_float32_matmul_precision(), torch.is_grad_enabled(),
            detectron2.config.get_cfg().dump(), logging.getLogger().level,
            list(logging.getLogger().handlers))
before, modules = state(), set(sys.modules)
import retina_focal
assert state() == before
new = {name.split(".")[0] for name in set(sys.modules) - modules}
assert not new & {"timm", "onnx", "matplotlib"}, new
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", script], check=True)
