"""The commands as they are typed, each in a process of its own, on data of one's own."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from test_train import ROOT

from retina_focal.tools import cli

CONFIG = "quick_start/bccd.yaml"
# A model as small as that config allows, two iterations, two classes.
SMALL = [
    *("DATASETS.TRAIN", "('mine',)", "DATASETS.TEST", "('mine',)", "DATALOADER.NUM_WORKERS", "1"),
    *("MODEL.RETINANET.NUM_CLASSES", "2", "MODEL.RETINA_FOCAL.PRECISION", "fp32"),
    *("INPUT.MIN_SIZE_TRAIN", "(64,)", "INPUT.MIN_SIZE_TEST", "64"),
    *("SOLVER.IMS_PER_BATCH", "2", "SOLVER.MAX_ITER", "2", "SOLVER.STEPS", "(1,)"),
]
WEIGHTS = "trained/model_final.pth"
DEPRECATION = re.compile("is deprecated|in an upcoming release")


def run(folder: Path, *arguments: str) -> str:
    """`retina-focal` in a folder, with Python's own warning filters; what it printed."""
    environment = {name: x for name, x in os.environ.items() if name != "PYTHONWARNINGS"}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, "-m", "retina_focal.tools.cli", *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert not DEPRECATION.search(result.stderr), result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory) -> Path:
    """A folder without the quick start's data, in which its config has been trained."""
    pytest.importorskip("timm", reason="timm is not installed: make setup")
    folder = tmp_path_factory.mktemp("commands")
    opts = [*SMALL, "MODEL.WEIGHTS", "", "OUTPUT_DIR", "trained"]
    run(folder, "train", "--config-file", CONFIG, *mine(data), *opts)
    assert not (folder / "datasets").exists()
    return folder


def mine(data: Path) -> list[str]:
    return ["--dataset", "mine", str(data / "a.json"), str(data)]


@pytest.mark.parametrize(
    "tool, arguments, written",
    [
        ("draw", ["--config-file", CONFIG, "--output", "d.png"], "d.png"),
        ("anatomy", ["--config-file", CONFIG, "--output", "a"], "a/anatomy.md"),
        ("speed", ["--checkpoint", CONFIG, WEIGHTS, "--output", "s"], "s/speed.md"),
    ],
)
def test_a_shipped_config_serves_data_of_ones_own_where_its_own_is_not(
    trained, data, tool, arguments, written
):
    run(trained, tool, *arguments, *mine(data), *SMALL, "MODEL.WEIGHTS", WEIGHTS)
    assert (trained / written).stat().st_size > 0


def test_so_it_does_in_an_ablation_whose_runs_are_as_quiet(trained, data):
    argv = ["table_1b_gamma_2.0", "--base", CONFIG, "--output", "ablate", *mine(data)]
    run(trained, "ablate", *argv, "--opts", *SMALL, "MODEL.WEIGHTS", "")
    (output,) = (trained / "ablate").rglob("output.txt")
    assert "Total training time" in output.read_text()
    assert not DEPRECATION.search(output.read_text())


@pytest.mark.parametrize(
    "command",
    [
        "sample-data --help",
        "quick-start --help",
        "fidelity COCO-Detection/retinanet_R_50_FPN_1x.yaml",
        # Memory is measured in processes of their own.
        "benchmark --what loss,memory --image-size 64x96 --rounds 1 --threads 1 --output b "
        "MODEL.RESNETS.DEPTH 18 MODEL.RESNETS.RES2_OUT_CHANNELS 64",
    ],
    ids=lambda command: command.split()[0],
)
def test_no_command_prints_deprecations_of_the_libraries(tmp_path, command):
    assert run(tmp_path, *command.split())


def test_the_list_of_tools_imports_no_more_than_the_package():
    script = """
import sys
import retina_focal
before = set(sys.modules)
from retina_focal.tools import cli
cli.main(["--help"])
new = set(sys.modules) - before
assert new <= {"retina_focal.tools", "retina_focal.tools.cli"}, new
"""
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, check=True
    )
    assert all(name in result.stdout for name in cli.TOOLS)
