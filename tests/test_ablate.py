"""Ablations through the command line: rows, resuming, results, clusters."""

import json
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from conftest import table_rows
from test_configs import ABLATIONS
from test_train import PYTHONPATH, ROOT, SMALL

from retina_focal.config import get_cfg
from retina_focal.errors import UserError
from retina_focal.tools import ablate
from retina_focal.tools.ablate import command as ablate_command
from retina_focal.tools.ablate import report as ablation_report
from retina_focal.tools.ablate import runs as ablation_runs
from retina_focal.tools.ablate.runs import Row, fingerprint, flatten, plan, read_row

GAMMA, ALPHA = "MODEL.RETINANET.FOCAL_LOSS_GAMMA", "MODEL.RETINANET.FOCAL_LOSS_ALPHA"


@pytest.fixture(scope="module")
def base(data, tmp_path_factory) -> Path:
    """A config that trains for four iterations on `data`."""
    cfg = get_cfg()
    cfg.merge_from_file(ROOT / "configs/COCO-Detection/retinanet_R_50_FPN_1x.yaml")
    cfg.merge_from_list(SMALL)
    cfg.merge_from_list(
        ["MODEL.DEVICE", "cpu", "SOLVER.MAX_ITER", 4, "DATASETS.TRAIN", ["rectangles"]]
    )
    cfg.DATASETS.TEST = ["rectangles"]
    cfg.DATASETS.COCO_JSON = [["rectangles", str(data / "a.json"), str(data)]]
    path = tmp_path_factory.mktemp("base") / "base.yaml"
    path.write_text(cfg.dump())
    return path


def ablate_process(base: Path, output: Path, *arguments: str, **kwargs) -> subprocess.Popen:
    """`retina-focal ablate` as a user runs it."""
    command = [sys.executable, "-W", "ignore", "-m", "retina_focal.tools.cli", "ablate"]
    command += [*arguments, "--base", str(base), "--output", str(output)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": PYTHONPATH}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, env=environment, **pipes, **kwargs)


def results_of(output: Path) -> list[dict]:
    path = output / "results.json"
    return json.loads(path.read_text())["runs"] if path.exists() else []


@pytest.mark.parametrize(("stem", "keys", "ap"), ABLATIONS, ids=[row[0] for row in ABLATIONS])
def test_a_row_is_its_own_keys_and_the_papers_numbers(stem, keys, ap, base, tmp_path):
    row = read_row(stem)
    assert ", ".join(map(str, row.paper)) == (ap or "")
    (run,) = plan([row], str(base), [], [], [1], tmp_path)[row.name]
    expected = get_cfg()
    expected.merge_from_file(base)
    expected.merge_from_list([part for pair in keys.items() for part in pair])
    expected.merge_from_list(["OUTPUT_DIR", run.cfg.OUTPUT_DIR, "MODEL.DEVICE", "cpu"])
    assert flatten(run.cfg) == flatten(expected)


def test_without_a_base_a_row_is_its_whole_file(tmp_path, base):
    path = tmp_path / "mine.yaml"
    path.write_text(f"_BASE_: {base}\nSOLVER:\n  MAX_ITER: 7\n")
    (run,) = plan([read_row(str(path))], None, [], [], [1], tmp_path)["mine"]
    assert run.cfg.SOLVER.MAX_ITER == 7
    assert run.cfg.MODEL.FPN.OUT_CHANNELS == 16


def test_without_a_base_options_count_more_than_the_file(tmp_path, base):
    path = tmp_path / "mine.yaml"
    path.write_text(f"_BASE_: {base}\nSOLVER:\n  MAX_ITER: 7\n")
    row = read_row(str(path))
    (run,) = plan([row], None, ["SOLVER.MAX_ITER", "3"], [], [1], tmp_path)["mine"]
    assert run.cfg.SOLVER.MAX_ITER == 3
    # Onto a base, a row stays what it is.
    (run,) = plan([row], str(base), ["SOLVER.MAX_ITER", "3"], [], [1], tmp_path)["mine"]
    assert run.cfg.SOLVER.MAX_ITER == 7


def test_a_row_allows_no_pictures_outside_and_no_pickles(tmp_path, base):
    path = tmp_path / "mine.yaml"
    path.write_text("MODEL: {RETINA_FOCAL: {DATA: {ALLOW_OUTSIDE: True}}}")
    (run,) = plan([read_row(str(path))], str(base), [], [], [1], tmp_path)["mine"]
    assert not run.cfg.MODEL.RETINA_FOCAL.DATA.ALLOW_OUTSIDE
    path.write_text("MODEL: {LOAD_PROPOSALS: True}")
    with pytest.raises(UserError, match="pickles"):
        plan([read_row(str(path))], str(base), [], [], [1], tmp_path)


@pytest.mark.parametrize("content", ["A: [1", "", "- 1", "A: !!python/object/apply:eval ['1']"])
def test_a_row_that_is_no_config_is_refused_by_name(tmp_path, base, content):
    path = tmp_path / "mine.yaml"
    path.write_text(content)
    with pytest.raises(SystemExit, match=r"mine\.yaml(, line 1:| is no YAML file of KEY: VALUE)"):
        ablate.main([str(path), "--base", str(base)])


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--grid", "A"], "'A' is not NAME=VALUE"),
        (["--grid", "A="], "'A=' is not NAME=VALUE"),
        (["--grid", "A=]"], "']' is not YAML"),
        (["hinge", "--cluster", "local", "--cluster-option", "name=[1"], "'[1' is not YAML"),
        (["hinge", "--jobs", "-1"], "'-1' is not a whole number of at least 1"),
        (["hinge", "--seeds", "1,x"], "'x' is not a whole number of at least 0"),
    ],
)
def test_a_wrong_argument_is_refused_in_words(argv, message, base, capsys):
    with pytest.raises(SystemExit) as stop:
        ablate.main([*argv, "--base", str(base)])
    assert stop.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize(
    "option, message",
    [("memory=1", "Parameter 'memory'"), ("timeout_min=long", 'Parameter "timeout_min"')],
)
def test_what_submitit_refuses_is_said_in_one_line(option, message, base, tmp_path):
    pytest.importorskip("submitit", reason="submitit is not installed: make setup")
    argv = ["hinge", "--base", str(base), "--output", str(tmp_path), "--cluster", "local"]
    with pytest.raises(SystemExit) as stop:
        ablate.main([*argv, "--cluster-option", option])
    assert message in stop.value.code and "\n" not in stop.value.code


def test_every_row_of_a_table_is_meant_by_its_pattern():
    assert len(ablation_runs.row_names("table_1a_*")) == 7
    assert len(ablation_runs.row_names("*")) == len(
        list((ROOT / "configs/ablations").glob("*.yaml"))
    )
    with pytest.raises(ValueError, match="no row matches 'table_9_"):
        ablation_runs.row_names("table_9_*")


def test_rows_that_come_to_the_same_settings_share_their_runs(base, tmp_path):
    rows = [read_row(name) for name in ("table_1a_alpha_0.75", "table_1b_gamma_0.0", "hinge")]
    planned = plan(rows, str(base), [], [], [1, 2], tmp_path)
    one, other, hinge = planned.values()
    assert one == other and len({*one, *other, *hinge}) == 4
    assert len({run.folder for run in {*one, *hinge}}) == 4


def test_settings_are_the_same_whatever_the_seed_and_the_folder_and_no_other_key():
    cfg = get_cfg()
    digest = fingerprint(cfg)
    cfg.merge_from_list(["SEED", 5, "OUTPUT_DIR", "elsewhere", "DATALOADER.NUM_WORKERS", 1])
    assert fingerprint(cfg) == digest
    cfg.SOLVER.MAX_ITER += 1
    assert fingerprint(cfg) != digest


def test_a_key_of_no_config_is_refused_in_words(base, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["retina-focal ablate"])
    with pytest.raises(SystemExit, match=r"MODEL\.RETINANET\.GAMA"):
        ablate.main(["--base", str(base), "--grid", "MODEL.RETINANET.GAMA=0,1"])


def test_a_key_given_twice_is_refused_rather_than_run_by_half(base, capsys):
    with pytest.raises(SystemExit):
        ablate.main(["--base", str(base), "--grid", f"{GAMMA}=0,1", "--grid", f"{GAMMA}=2"])
    assert f"keys {GAMMA}, {GAMMA}; give each key once" in capsys.readouterr().err


def test_a_sweep_killed_in_the_middle_repeats_no_finished_run_and_loses_none(
    base, tmp_path, monkeypatch
):
    grid = ("--grid", f"{GAMMA}=0,2")
    first = ablate_process(base, tmp_path, *grid)
    while len(results_of(tmp_path)) < 1:
        assert first.poll() is None, first.stdout.read()
        time.sleep(0.05)
    first.kill()
    first.communicate()
    finished = results_of(tmp_path)
    assert len(finished) == 1
    trained = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("result.json")}
    again = [*grid, "--base", str(base), "--output", str(tmp_path)]
    monkeypatch.setattr(ablate_command, "launcher", lambda args: in_this_process)
    ablate.main(again)
    assert results_of(tmp_path)[:1] == finished
    assert [result["row"] for result in results_of(tmp_path)] == [
        f"FOCAL_LOSS_GAMMA {g}" for g in (0, 2)
    ]
    assert all(path.stat().st_mtime_ns == written for path, written in trained.items())
    assert all("first step" in (path.parent / "log.txt").read_text() for path in trained)
    # Nothing is left to run: the third time only writes the tables.
    monkeypatch.setattr(ablate_command, "launcher", lambda args: None)
    tables = [tmp_path / name for name in ("table.md", "table.csv", "plot.png")]
    for table in tables:
        table.unlink()
    ablate.main(again)
    assert all(table.stat().st_size > 0 for table in tables)


def test_a_killed_sweep_leaves_nothing_running(base, tmp_path):
    sweep = ablate_process(base, tmp_path, "hinge", "--jobs", "2", "--iterations", "100000")
    while not list(tmp_path.rglob("metrics.json")):
        assert sweep.poll() is None, sweep.stdout.read()
        time.sleep(0.1)
    children = Path(f"/proc/{sweep.pid}/task/{sweep.pid}/children").read_text().split()
    sweep.send_signal(signal.SIGKILL)
    sweep.communicate()
    deadline = time.monotonic() + 10
    while any(is_running(child) for child in children):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def is_running(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_loss_that_is_not_finite_is_a_result_and_so_is_no_detection(base, tmp_path, monkeypatch):
    monkeypatch.setattr(ablate_command, "launcher", lambda args: in_this_process)
    common = ["--base", str(base), "--output", str(tmp_path)]
    ablate.main([*common, "--grid", "SOLVER.BASE_LR=1.0e6", "--grid", "SOLVER.WARMUP_ITERS=0"])
    ablate.main([*common, "--grid", "MODEL.RETINANET.SCORE_THRESH_TEST=0.99"])
    nan, none = results_of(tmp_path)
    assert nan["outcome"] == "nan" and "AP" not in nan and nan["iterations"] < 4
    assert none["outcome"] == "no detections" and none["AP"] == 0
    assert "1 no detections" in (tmp_path / "table.md").read_text()


class in_this_process:
    """A job that runs where it is asked for."""

    def __init__(self, run):
        self.value = ablation_runs.execute(run.cfg.dump())

    def done(self):
        return True

    def result(self):
        return self.value


def test_a_failed_run_is_said_and_does_not_stop_the_others(base, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ablate_command, "launcher", lambda args: in_this_process)
    monkeypatch.setattr(sys, "argv", ["retina-focal ablate"])

    class failing_once(in_this_process):
        def result(self):
            if self.value["seed"] == 1:
                raise MemoryError
            return super().result()

    monkeypatch.setattr(ablate_command, "launcher", lambda args: failing_once)
    with pytest.raises(SystemExit):
        ablate.main(["hinge", "--base", str(base), "--output", str(tmp_path), "--seeds", "1,2"])
    assert [result["seed"] for result in results_of(tmp_path)] == [2]
    assert "hinge, seed 1 failed: MemoryError" in capsys.readouterr().out


def test_a_failed_run_keeps_its_traceback_in_its_folder(base, tmp_path, monkeypatch):
    (run,) = plan([read_row("hinge")], str(base), [], [], [1], tmp_path)["hinge"]

    def fail(cfg):
        raise ZeroDivisionError("a fault")

    monkeypatch.setattr(ablation_runs, "_train", fail)
    with pytest.raises(ZeroDivisionError):
        ablation_runs.execute(run.cfg.dump())
    output = (run.folder / "output.txt").read_text()
    assert "Traceback" in output and "ZeroDivisionError: a fault" in output


def test_the_table_has_mean_least_and_most_beside_the_paper(base, tmp_path):
    rows = [read_row("table_1a_alpha_0.50"), Row("mine", {ALPHA: 0.3})]
    planned = plan(rows, str(base), [], [], [1], tmp_path)
    settings = planned["table_1a_alpha_0.50"][0].settings
    run = {"settings": settings, "outcome": "ok", "AP50": 50.0, "AP75": 10.0, "seconds": 60}
    results = [{**run, "seed": 1, "AP": 20.0}, {**run, "seed": 2, "AP": 23.0}]
    found = ablation_report.by_row(planned, results)
    heads, _, *lines = table_rows(ablation_report.markdown(rows, found))
    assert heads == ["row", "AP", "AP50", "AP75", "seeds", "min per run", "paper: AP, AP50, AP75"]
    measured = ["21.5 (20.0 to 23.0)", "50.0 (50.0 to 50.0)", "10.0 (10.0 to 10.0)"]
    assert lines[0] == ["table_1a_alpha_0.50", *measured, "2", "1.0", "30.2, 46.7, 32.8"]
    assert lines[1] == ["mine", "", "", "", "0", "", "-"]


def test_the_grids_sentence_is_the_mean_range_along_each_key(base, tmp_path):
    rows = ablation_runs.grid_rows({GAMMA: [0, 2], ALPHA: [0.25, 0.5]})
    planned = plan(rows, str(base), [], [], [1], tmp_path)
    aps = dict(zip(planned, (10.0, 12.0, 15.0, 16.0), strict=True))
    results = [
        {"settings": planned[name][0].settings, "outcome": "ok", "seed": 1, "AP": ap}
        for name, ap in aps.items()
    ]
    # gamma: (15 - 10 + 16 - 12) / 2; alpha: (12 - 10 + 16 - 15) / 2
    sentence = ablation_report.grid_sentence(rows, ablation_report.by_row(planned, results))
    assert f"by 4.5 with {GAMMA}, by 1.5 with {ALPHA}." in sentence


@pytest.fixture
def submit(base, tmp_path, monkeypatch) -> Callable[..., list[str]]:
    """Runs a row through submitit, whose jobs have this environment; the rows that have results."""
    pytest.importorskip("submitit", reason="submitit is not installed: make setup")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", PYTHONPATH)

    def run(*arguments: str) -> list[str]:
        output = tmp_path / "out"
        ablate.main(["hinge", "--base", str(base), "--output", str(output), *arguments])
        return [result["row"] for result in results_of(output)]

    return run


@pytest.mark.slow
def test_submitits_local_executor_runs_a_row(submit):
    assert submit("--cluster", "local") == ["hinge"]


def test_the_slurm_job_that_submitit_writes_runs_the_row(submit, tmp_path, monkeypatch):
    """`sbatch`, `srun` and `sacct` stand in for a cluster; the job is slurm's own script."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, lines in {
        "sbatch": f'cp "$1" {tmp_path}/job.sh; '
        f"SLURM_JOB_ID=12 SLURM_NTASKS=1 SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_NODEID=0 "
        f'SLURM_JOB_NUM_NODES=1 SLURM_JOB_NODELIST=here bash "$1" >{tmp_path}/slurm.txt 2>&1 & '
        "echo Submitted batch job 12",
        "srun": "while [[ $1 == -* ]]; do "
        '[[ $1 =~ ^--(output|error)$ ]] && shift; shift; done; "$@"',
        "sacct": "echo 'JobID|State'; echo '12|RUNNING'",
        "scontrol": "echo here",
    }.items():
        path = programs / name
        path.write_text(f"#!/bin/bash\n{lines}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    options = ["--cluster-option", "slurm_partition=gpu", "--cluster-option", "gpus_per_node=1"]
    assert submit("--cluster", "slurm", *options) == ["hinge"]
    job = (tmp_path / "job.sh").read_text()
    assert "#SBATCH --partition=gpu" in job and "#SBATCH --gpus-per-node=1" in job


def test_a_results_file_of_something_else_is_refused(tmp_path):
    path = tmp_path / "results.json"
    path.write_text("[1]")
    for wrong in (path, tmp_path):
        with pytest.raises(ValueError, match="is not a results file"):
            ablate_command.load_results(wrong)


def test_the_results_on_bccd_are_those_of_the_shipped_configs(tmp_path, monkeypatch):
    """The command beside the tables repeats none of their runs."""

    def load_without_data(path, opts, datasets):
        cfg = get_cfg()
        cfg.merge_from_file(path)
        return cfg

    monkeypatch.setattr(ablation_runs, "load_cfg", load_without_data)
    folder = ROOT / "configs/ablations/bccd"
    rows = [read_row(name) for name in ablation_runs.row_names("table_*")]
    planned = plan(rows, str(folder / "base.yaml"), [], [], [1], tmp_path)
    finished = {(run["settings"], run["seed"]) for run in results_of(folder)}
    assert len(planned) > 20
    for name, (run,) in planned.items():
        assert (run.settings, run.seed) in finished, name


def test_bccd_rows_build(tmp_path):
    """Each row on BCCD is its own file, merged onto what all share."""
    for path in sorted((ROOT / "configs/ablations/bccd").glob("*.yaml")):
        keys = yaml.safe_load(path.read_text())
        assert keys["_BASE_"] == (
            "../../quick_start/bccd.yaml" if path.stem == "base" else "base.yaml"
        )
