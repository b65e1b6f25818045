"""`make gpu`: tests and benchmark of a GPU in one command, tried on a CPU."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(
    not all(map(shutil.which, ("bash", "make", "timeout"))), reason="needs bash, make and timeout"
)


def make_gpu(out: Path, **variables: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        command(out, **variables), env=environment(), capture_output=True, text=True
    )


def command(out: Path, **variables: object) -> list[str]:
    variables = {"PYTHON": sys.executable, "DEVICE": "cpu", "OUT": out, **variables}
    pairs = [f"{name}={value}" for name, value in variables.items()]
    return ["make", "--no-print-directory", "--directory", str(ROOT), "gpu", *pairs]


def environment() -> dict[str, str]:
    """Without what an outer make hands down, and what the command would take for its variables."""
    names = ("MAKE", "MFLAGS", "DEVICE", "PACKAGES", "TESTS", "OUT", "NVIDIA")
    return {name: value for name, value in os.environ.items() if not name.startswith(names)}


@pytest.mark.slow
def test_a_dry_run_leaves_tests_a_table_a_plot_and_profiles(tmp_path):
    result = make_gpu(tmp_path, TESTS="tests/test_gpu.py -k same_bits")
    assert result.returncode == 0, result.stdout + result.stderr
    names = ["benchmark.log", "environment.txt", "profile.txt", "results.json", "results.md"]
    assert sorted(x.name for x in tmp_path.iterdir()) == [*names, "results.png", "tests.log"]
    assert f"torch {metadata.version('torch')}" in (tmp_path / "environment.txt").read_text()
    assert "1 passed" in (tmp_path / "tests.log").read_text()
    assert (tmp_path / "results.md").read_text() in result.stdout
    assert "ours, training step, batch 2, ours-bf16" in (tmp_path / "profile.txt").read_text()
    report = json.loads((tmp_path / "results.json").read_text())
    assert report["finished"] and report["copied"] > 0
    steps = [row for row in report["rows"] if row["what"] == "training step"]
    assert [(x["precision"], x["model"], x["tf32"]) for x in steps] == [
        ("ieee-fp32", "stock", False),
        ("ieee-fp32", "ours", False),
        ("ours-bf16", "ours", True),
    ]
    assert all(x["step"][0] > 0 and x["latency"][0] > 0 and x["host"][0] > 0 for x in steps)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path):
    result = make_gpu(tmp_path, DEVICE="cuda")
    assert result.returncode != 0
    assert "torch finds no GPU on this machine; to try it all on the CPU type" in result.stderr
    assert not (tmp_path / "tests.log").exists()


@pytest.fixture
def python(tmp_path):
    """Makes a program in place of Python; what it does in each stage, in the shell's words."""

    def write(look: str = "", tests: str = "", benchmark: str = "") -> Path:
        path = tmp_path / "python"
        path.write_text(
            f'#!/bin/sh\ncase "$*" in\n*pytest\\ -v*) {tests or ":"} ;;\n'
            f"*benchmark\\ --device*) {benchmark or ':'} ;;\n*) {look or ':'} ;;\nesac\n"
        )
        path.chmod(0o755)
        return path

    return write


@pytest.mark.parametrize("broken", ["tests", "benchmark"])
def test_a_stage_that_fails_is_reported_and_the_other_runs(python, tmp_path, broken):
    stages = {"tests": "echo =1 passed in 3s", "benchmark": "echo measured"}
    stages[broken] = "echo what broke; exit 3"
    result = make_gpu(tmp_path / "out", PYTHON=python(**stages))
    assert result.returncode != 0
    assert f"{broken}: failed with status 3; see {tmp_path}/out/{broken}.log" in result.stdout
    (other,) = stages.keys() - {broken}
    assert f"{other}: done" in result.stdout and "what broke" in result.stdout


def test_a_stage_that_takes_too_long_is_stopped_and_the_other_runs(python, tmp_path):
    program = python(tests="echo begun; exec sleep 60", benchmark="echo measured")
    begin = time.monotonic()
    result = make_gpu(tmp_path / "out", PYTHON=program, TEST_SECONDS=1)
    assert time.monotonic() - begin < 30 and result.returncode != 0
    assert "tests: stopped after 1 s" in result.stdout and "benchmark: done" in result.stdout
    assert (tmp_path / "out" / "tests.log").read_text() == "begun\n"


def test_an_interrupt_ends_it(python, tmp_path):
    program = python(tests="echo begun; exec sleep 60", benchmark="echo measured")
    process = subprocess.Popen(
        command(tmp_path / "out", PYTHON=program),
        env=environment(),
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # A shell's background job ignores it, and so would all that it starts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    log = tmp_path / "out" / "tests.log"
    while not (log.exists() and log.read_text()):
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C does
    _, errors = process.communicate(timeout=30)
    assert process.returncode != 0 and "interrupted; what was measured is in" in errors
    assert not (tmp_path / "out" / "benchmark.log").exists()


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"DEVICE": "gpu"}, "DEVICE is 'gpu'; expected cuda or cpu"),
        ({"PACKAGES": "nowhere"}, "PACKAGES is 'nowhere', which is no folder; make packages makes"),
        ({"OUT": "/dev/null/x"}, "can't write to '/dev/null/x'; name another folder"),
    ],
)
def test_a_wrong_variable_is_named(variables, message, tmp_path):
    result = make_gpu(**{"out": tmp_path, **variables})
    assert result.returncode != 0 and message in result.stderr


def test_a_package_that_is_missing_is_named_with_what_to_type(python, tmp_path):
    trouble = "ModuleNotFoundError: No module named 'fvcore'"
    program = python(look=f'echo "Traceback\n{trouble}" >&2; exit 1')
    result = make_gpu(tmp_path, PYTHON=program)
    assert result.returncode != 0
    assert (
        f"lacks something: {trouble}; where there is a network type\n'make packages'"
        in result.stderr
    )


def test_no_variable_overrules_the_rows(python, tmp_path):
    """A user who has NVIDIA_TF32_OVERRIDE set would be refused by the benchmark."""
    program = python(benchmark="echo override ${NVIDIA_TF32_OVERRIDE-none}")
    make_gpu(tmp_path / "out", PYTHON=program, NVIDIA_TF32_OVERRIDE=0)
    assert (tmp_path / "out" / "benchmark.log").read_text() == "override none\n"


@pytest.mark.parametrize("as_wheels", [False, True])
def test_packages_of_a_folder_are_found_by_every_stage(python, tmp_path, as_wheels):
    packages, seen = tmp_path / "packages", tmp_path / "seen"
    packages.mkdir()
    if as_wheels:
        (packages / "a-1-py3-none-any.whl").touch()
    look = f'echo "$PYTHONPATH $*" >>{seen}'
    program = python(look=look, tests=look, benchmark=look)
    assert make_gpu(tmp_path / "out", PYTHON=program, PACKAGES=packages).returncode == 0
    lines = seen.read_text().splitlines()
    if as_wheels:
        pip, *lines = lines
        assert "pip install" in pip and "--no-index" in pip
        packages = pip.split("--target ")[1].split()[0]
    paths = [line.split()[0].split(":") for line in lines if line.startswith("/")]
    assert len(paths) == 3 and {tuple(x[:2]) for x in paths} == {(str(ROOT), str(packages))}
