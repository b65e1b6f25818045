"""What a stranger gets: the wheel, used outside the clone, and `make` on a fresh machine."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

ROOT = Path(__file__).parent.parent
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    # A copy: setuptools builds in place, and would pack what an earlier build left in build/.
    for name in ("retina_focal", "configs"):
        shutil.copytree(ROOT / name, folder / name)
    for name in ("setup.py", "pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    command = [*PIP, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", "dist", "."]
    subprocess.run(command, cwd=folder, check=True)
    (path,) = folder.glob("dist/*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("installed")
    subprocess.run([*PIP, "install", "--no-deps", "--target", folder, wheel], check=True)
    return folder


def run_outside(installed: Path, cwd: Path, *command: str | Path) -> str:
    """Output of a command that finds the installed package before the clone's."""
    paths = [str(installed), *filter(None, [os.environ.get("PYTHONPATH")])]
    result = subprocess.run(
        command,
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_wheel_holds_every_config_and_module_unchanged(wheel):
    with zipfile.ZipFile(wheel) as archive:
        packed = {
            name: archive.read(name)
            for name in archive.namelist()
            if name.startswith("retina_focal/")
        }
    files = {
        (prefix / path.relative_to(ROOT / folder)).as_posix(): path.read_bytes()
        for folder, prefix in (
            ("retina_focal", Path("retina_focal")),
            ("configs", Path("retina_focal/configs")),
        )
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    assert packed == files


def test_wheel_leaves_detectron2_to_the_user(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        metadata = archive.read(name).decode()
    required = [line for line in metadata.splitlines() if line.startswith("Requires-Dist")]
    assert required and not any("detectron2" in line for line in required)


def test_installed_wheel_trains_two_iterations_from_a_config_name(installed, tmp_path):
    write_data_set(tmp_path)
    name = "COCO-Detection/retinanet_R_50_FPN_1x.yaml"
    flags = ["--config-file", name, "--dataset", "squares", "squares.json", "images"]
    opts = {
        "MODEL.WEIGHTS": "",
        "MODEL.RESNETS.DEPTH": 18,
        "MODEL.RESNETS.RES2_OUT_CHANNELS": 64,
        # A random network with frozen norms sends activations of 1e5 into the head.
        "MODEL.RESNETS.NORM": "BN",
        "MODEL.BACKBONE.FREEZE_AT": 0,
        "MODEL.FPN.OUT_CHANNELS": 32,
        "MODEL.RETINANET.NUM_CLASSES": 1,
        "DATASETS.TRAIN": "('squares',)",
        "DATASETS.TEST": "('squares',)",
        "DATALOADER.NUM_WORKERS": 0,
        "INPUT.MIN_SIZE_TRAIN": "(64,)",
        "INPUT.MIN_SIZE_TEST": 64,
        "SOLVER.IMS_PER_BATCH": 2,
        "SOLVER.MAX_ITER": 2,
        "SOLVER.STEPS": "()",
        "OUTPUT_DIR": "output",
    }
    pairs = [str(x) for pair in opts.items() for x in pair]
    run_outside(installed, tmp_path, installed / "bin" / "retina-focal", "train", *flags, *pairs)
    output = tmp_path / "output"
    config = installed / "retina_focal" / "configs" / name
    assert f"config_file='{config}'" in (output / "log.txt").read_text()
    assert torch.load(output / "model_final.pth", weights_only=True)["iteration"] == 1
    lines = (output / "metrics.json").read_text().splitlines()
    assert any("bbox/AP" in json.loads(line) for line in lines)


def write_data_set(folder: Path) -> None:
    """``squares.json`` and ``images``: four pictures of 64x64 px with one white square each."""
    coco = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "square"}]}
    (folder / "images").mkdir()
    for i in range(1, 5):
        picture = np.full((64, 64, 3), 100, np.uint8)
        picture[10 : 10 + 8 * i, 5 : 5 + 8 * i] = 255
        cv2.imwrite(str(folder / "images" / f"{i}.png"), picture)
        coco["images"].append({"id": i, "file_name": f"{i}.png", "height": 64, "width": 64})
        box = {"bbox": [5, 10, 8 * i, 8 * i], "area": 64 * i * i, "iscrowd": 0}
        coco["annotations"].append({"id": i, "image_id": i, "category_id": 1, **box})
    (folder / "squares.json").write_text(json.dumps(coco))


def pins(path: Path) -> list[str]:
    """name==version of each requirement of a file."""
    lines = path.read_text().replace("\\\n", " ").splitlines()
    return [line.split()[0].rstrip(";") for line in lines if line.strip() and line[0] != "#"]


def test_every_file_that_make_setup_fetches_is_known_by_its_hash():
    for path in ROOT.glob("requirements*.txt"):
        lines = path.read_text().replace("\\\n", " ").splitlines()
        assert all("--hash=sha256:" in line for line in lines if line.strip() and line[0] != "#")
    commands = (ROOT / "Makefile").read_text().replace("\\\n", " ").splitlines()
    fetching = [line for line in commands if "$(PIP) install" in line]
    assert len(fetching) == 7  # setup: 5, packages: 2
    for line in fetching:
        assert "--require-hashes" in line or "--no-deps --no-build-isolation --editable ." in line


def test_the_hashes_are_of_the_versions_that_are_asked_for():
    locked = set(pins(ROOT / "requirements.txt"))
    assert set(pins(ROOT / "requirements.in")) <= locked
    (opencv,) = (x for x in locked if x.startswith("opencv-python"))
    headless = opencv.replace("opencv-python", "opencv-python-headless")
    assert pins(ROOT / "requirements-opencv-headless.txt") == [headless]


@pytest.fixture
def fresh_machine(tmp_path) -> Path:
    """A clone without .venv, with programs that stand for Pythons of three versions."""
    for path in (ROOT / "Makefile", *ROOT.glob("requirements*.txt")):
        shutil.copy(path, tmp_path)
    for version in ("3.9", "3.10", "3.13"):
        write_program(tmp_path / f"python{version}", f'[ "$1" = -c ] && echo {version} || echo $@')
    write_program(tmp_path / "broken", "exit 127")
    return tmp_path


def write_program(path: Path, script: str) -> None:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def make(folder: Path, target: str, python: str) -> subprocess.CompletedProcess:
    # The outer make of `make test` hands its flags down in the environment.
    env = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    command = ["make", target, f"PYTHON={python}"]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)


@pytest.mark.parametrize("version", ["3.9", "3.13"])
def test_another_python_is_refused_with_what_was_found_and_expected(fresh_machine, version):
    result = make(fresh_machine, "setup", f"./python{version}")
    assert result.returncode != 0
    assert f"./python{version}: {version}\n" in result.stderr
    assert "expected Python 3.10, 3.11 or 3.12" in result.stderr
    assert "make setup PYTHON=" in result.stderr
    assert not (fresh_machine / ".venv").exists()


def test_a_python_that_does_not_run_is_passed_over(fresh_machine):
    result = make(fresh_machine, ".venv/bin/python", "./broken ./python3.13 ./python3.10")
    assert result.returncode == 0, result.stderr
    assert result.stdout == "-m venv --clear --without-pip .venv\n"


def test_a_python_of_another_version_in_the_environment_is_refused(fresh_machine):
    (fresh_machine / ".venv" / "bin").mkdir(parents=True)
    shutil.copy(fresh_machine / "python3.13", fresh_machine / ".venv" / "bin" / "python")
    result = make(fresh_machine, ".venv/bin/pip", "./python3.10")
    assert result.returncode != 0
    assert "found Python 3.13 in .venv, expected 3.10, 3.11 or 3.12" in result.stderr
    assert "rm -r .venv" in result.stderr
