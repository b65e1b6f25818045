"""The commands as they are typed, in a process of their own, on data of one's own."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from test_train import PYTHONPATH

from retina_focal.tools import cli

CONFIG = "quick_start/bccd.yaml"
WEIGHTS = "MODEL.WEIGHTS trained/model_final.pth"
# Each has a dataset of its own name, so that none is served by what an earlier one registered.
COMMANDS = {
    "train": "--config-file {config} {dataset} {small} MODEL.WEIGHTS '' OUTPUT_DIR trained",
    "draw": "--config-file {config} --output d.png {dataset} {small} {weights}",
    "anatomy": "--config-file {config} --output a {dataset} {small} {weights}",
    "speed": "--checkpoint {config} trained/model_final.pth --output s {dataset} {small} {weights}",
    # Of two jobs, each has one of two cores, and does not wait for the one of another test.
    "ablate": "table_1b_gamma_2.0 --jobs 2 --base {config} --output ablate {dataset} "
    "--opts {small} MODEL.WEIGHTS ''",
    "sample-data": "--help",
    "quick-start": "--help",
    "fidelity": "COCO-Detection/retinanet_R_50_FPN_1x.yaml",
    "benchmark": "--what loss --image-size 64x96 --rounds 1 --threads 1 --output b "
    "MODEL.RESNETS.DEPTH 18 MODEL.RESNETS.RES2_OUT_CHANNELS 64",
}
# A model as small as that config allows, two iterations, two classes.
SMALL = """
    DATASETS.TRAIN "('{name}',)" DATASETS.TEST "('{name}',)" DATALOADER.NUM_WORKERS 1
    MODEL.RETINANET.NUM_CLASSES 2 MODEL.RETINA_FOCAL.PRECISION fp32 INPUT.MIN_SIZE_TRAIN (64,)
    INPUT.MIN_SIZE_TEST 64 SOLVER.IMS_PER_BATCH 2 SOLVER.MAX_ITER 2 SOLVER.STEPS (1,)
"""
# Importing torch takes longer than a command. Each starts with Python's own warning filters.
IN_TURN = """
import shlex, sys, warnings
from retina_focal.tools import cli
for command in sys.argv[1:] if __name__ == "__main__" else ():
    name, *arguments = shlex.split(command)
    for stream in (sys.stdout, sys.stderr):
        print(f"\\n== {name}", file=stream, flush=True)
    with warnings.catch_warnings():
        try:
            cli.main([name, *arguments])
        except SystemExit as end:
            if end.code:
                raise
"""
DEPRECATION = re.compile("is deprecated|in an upcoming release")


@pytest.fixture(scope="module")
def done(data, tmp_path_factory) -> tuple[Path, dict[str, str], dict[str, str]]:
    """The folder in which all commands ran, and what each printed on stdout and stderr."""
    pytest.importorskip("timm", reason="timm is not installed: make setup")
    folder = tmp_path_factory.mktemp("commands")
    environment = {name: x for name, x in os.environ.items() if name != "PYTHONWARNINGS"}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": PYTHONPATH}
    (folder / "in_turn.py").write_text(IN_TURN)  # which the processes of a run import
    commands = []
    for name, arguments in COMMANDS.items():
        own = f"mine_{name}"
        dataset = f"--dataset {own} {shlex.quote(f'{data}/a.json')} {shlex.quote(str(data))}"
        small = " ".join(SMALL.format(name=own).split())
        values = {"config": CONFIG, "dataset": dataset, "small": small, "weights": WEIGHTS}
        commands.append(f"{name} {arguments.format(**values)}")
    result = subprocess.run(
        [sys.executable, "in_turn.py", *commands],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    printed = (
        dict(part.split("\n", 1) for part in text.split("\n== ")[1:])
        for text in (result.stdout, result.stderr)
    )
    return folder, *printed


@pytest.mark.parametrize(
    "written",
    ["trained/model_final.pth", "d.png", "a/anatomy.md", "s/speed.md", "ablate/table.md"],
)
def test_a_shipped_config_serves_data_of_ones_own_where_its_own_is_not(done, written):
    folder = done[0]
    assert (folder / written).stat().st_size > 0
    assert not (folder / "datasets").exists()


def test_the_runs_of_an_ablation_are_as_quiet(done):
    (output,) = (done[0] / "ablate").rglob("output.txt")
    assert "Total training time" in output.read_text()
    assert not DEPRECATION.search(output.read_text())


@pytest.mark.parametrize("name", COMMANDS)
def test_no_command_prints_deprecations_of_the_libraries(done, name):
    _, printed, errors = done
    assert printed[name].strip()
    assert not DEPRECATION.search(errors[name]), errors[name]


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
