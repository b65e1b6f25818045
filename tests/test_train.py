"""Training through the command line, as a user types it: files, resuming, several processes."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from test_processes import needs_cpu_processes

from retina_focal import FocalRetinaNet
from retina_focal.tools import cli, quick_start, train
from retina_focal.training.assembly import Trainer

ROOT = Path(__file__).parent.parent
# For a process of its own: this package and the detectron2 that this process has.
PYTHONPATH = os.pathsep.join([str(ROOT), *sys.path])
SMALL = """
    MODEL.WEIGHTS '' MODEL.BACKBONE.FREEZE_AT 0 MODEL.RESNETS.DEPTH 18
    MODEL.RESNETS.RES2_OUT_CHANNELS 64 MODEL.RESNETS.NORM BN MODEL.FPN.OUT_CHANNELS 16
    MODEL.RETINANET.NUM_CLASSES 2 MODEL.RETINANET.NUM_CONVS 1 INPUT.MIN_SIZE_TRAIN (64,)
    INPUT.MIN_SIZE_TEST 64 DATALOADER.NUM_WORKERS 0 SOLVER.IMS_PER_BATCH 2 SOLVER.MAX_ITER 2
    SOLVER.STEPS (1,) SOLVER.BASE_LR 1e-3 SOLVER.CHECKPOINT_PERIOD 1 SEED 1
""".replace("''", '""').split()
SMALL = ["" if word == '""' else word for word in SMALL]


def train_command(
    data: Path, output: Path, *arguments: str, opts: Sequence[str] = ()
) -> tuple[list[str], dict[str, str]]:
    """`train_net.py` and its arguments, behind the interpreter; and its environment."""
    command = [
        str(ROOT / "train_net.py"),
        "--config-file", "COCO-Detection/retinanet_R_50_FPN_1x.yaml",
        "--dataset", "rectangles", str(data / "a.json"), str(data), *arguments,
        "DATASETS.TRAIN", "('rectangles',)", "DATASETS.TEST", "('rectangles',)",
        "OUTPUT_DIR", str(output), *SMALL, *opts,
    ]  # fmt: skip
    return command, {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": PYTHONPATH}


def run_python(command: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess:
    command = [sys.executable, "-W", "ignore", *command]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def run_train(data: Path, output: Path, *arguments: str) -> str:
    """What a training in a process of its own, that ends well, prints."""
    result = run_python(*train_command(data, output, *arguments))
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return result.stdout + result.stderr


def train_here(data: Path, output: Path, *arguments: str, opts: Sequence[str] = ()) -> None:
    """The same in this process, since importing torch takes longer than the training."""
    train.main(train_command(data, output, *arguments, opts=opts)[0][1:])


def metrics(output: Path) -> dict[str, float]:
    """The last value of everything that was logged."""
    lines = (output / "metrics.json").read_text().splitlines()
    return {name: value for line in lines for name, value in json.loads(line).items()}


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory) -> Path:
    """The output folder of two iterations."""
    output = tmp_path_factory.mktemp("trained")
    run_train(data, output)
    return output


def test_training_leaves_config_weights_metrics_and_an_evaluation(trained):
    for name in ("config.yaml", "model_final.pth", "inference/coco_instances_results.json"):
        assert (trained / name).is_file(), name
    last = metrics(trained)
    assert {"loss_cls", "loss_box_reg", "num_pos_anchors", "bbox/AP"} <= set(last)
    assert last["num_pos_anchors"] > 0
    ratio = last["retina_focal/first_step/per_positive"]
    ratio /= last["retina_focal/first_step/per_positive_closed_form"]
    assert ratio == pytest.approx(1, rel=0.1)  # a head of 16 channels
    log = (trained / "log.txt").read_text()
    assert "INFO: first step: loss_cls per positive" in log
    assert log.endswith(f"to see what it learned: retina-focal report {trained}\n")


def test_evaluation_alone_gives_the_detections_of_the_training_run(data, trained, tmp_path):
    weights = ["MODEL.WEIGHTS", str(trained / "model_final.pth")]
    train_here(data, tmp_path, "--eval-only", opts=weights)
    results = [
        json.loads((folder / "inference/coco_instances_results.json").read_text())
        for folder in (trained, tmp_path)
    ]
    assert results[0] == results[1]


def test_resume_goes_on_after_the_last_checkpoint(data, trained, tmp_path):
    train_here(data, trained, "--resume", opts=["SOLVER.MAX_ITER", "3", "TEST.EVAL_PERIOD", "0"])
    assert "Starting training from iteration 2" in (trained / "log.txt").read_text()
    checkpoint = torch.load(trained / "model_final.pth", weights_only=True)
    assert checkpoint["iteration"] == 2


def test_two_processes_without_a_gpu_train_and_evaluate(data, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("--num-gpus then asks for GPUs")
    printed = run_train(data, tmp_path, "--num-gpus", "2")
    assert "World size: 2" in printed
    assert "bbox/AP" in metrics(tmp_path)


SUM = ["MODEL.RETINA_FOCAL.NORMALIZER", "sum"]
EXPECTED = "train_net.py: MODEL.RETINA_FOCAL.NORMALIZER is 'sum'; expected one of"


def test_a_wrong_value_ends_a_process_in_words(data, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["train_net.py"])
    with pytest.raises(SystemExit, match=EXPECTED):
        train_here(data, tmp_path, opts=SUM)


@pytest.mark.slow
@needs_cpu_processes
def test_a_wrong_value_ends_every_process_in_words(data, tmp_path):
    command, environment = train_command(data, tmp_path, "--num-gpus", "2", opts=SUM)
    result = run_python(command, environment)
    assert result.returncode == 1
    assert EXPECTED in result.stderr
    assert "Traceback" not in result.stdout + result.stderr


def test_a_fault_of_ours_keeps_its_traceback(data, tmp_path, monkeypatch):
    def broken(model, num_classes):
        raise KeyError("p3")

    monkeypatch.setattr(FocalRetinaNet, "_check_num_classes", broken)
    with pytest.raises(KeyError, match="p3"):
        train_here(data, tmp_path)


def test_a_lazy_config_trains_evaluates_and_resumes(data, tmp_path):
    path = tmp_path / "small.py"
    path.write_text(
        f"""
from detectron2.config import LazyCall as L
from detectron2.config import LazyConfig
from detectron2.data import transforms as T

cfg = LazyConfig.load({str(ROOT / "configs/lazy/retinanet_R_50_FPN_1x.py")!r})
model, optimizer, lr_multiplier = cfg.model, cfg.optimizer, cfg.lr_multiplier
train, dataloader = cfg.train, cfg.dataloader
for name in ("train", "test"):
    dataloader[name].dataset.names = "rectangles"
    dataloader[name].num_workers = 0
    dataloader[name].mapper.augmentations = [L(T.Resize)(shape=(64, 96))]
dataloader.train.total_batch_size = 2
dataloader.evaluator.dataset_name = "rectangles"
dataloader.evaluator.output_dir = train.output_dir = {str(tmp_path / "output")!r}
train.max_iter, train.init_checkpoint = 2, ""
optimizer.lr = 1e-6  # a random network with frozen norms has gradients of its own size
model.num_classes = 2
"""
    )
    common = ["--config-file", str(path)]
    common += ["--dataset", "rectangles", str(data / "a.json"), str(data)]
    results = train.run(train.parse_args(common))
    assert "bbox" in results
    assert (tmp_path / "output/model_final.pth").is_file()
    log = (tmp_path / "output/log.txt").read_text()
    assert "WARNING: first step: " in log and "frozen norms are without statistics" in log
    assert "bbox" in train.run(train.parse_args([*common, "--eval-only", "--resume"]))
    train.run(train.parse_args([*common, "--resume", "train.max_iter=3"]))
    assert "Starting training from iteration 2" in (tmp_path / "output/log.txt").read_text()
    with pytest.raises(SystemExit, match=r"NORMALIZER is 'sum'; expected one of"):
        train.run(train.parse_args([*common, "model.criterion.normalizer=sum"]))


TREES = ["--config-file", "quick_start/trees.yaml"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "--config-file is missing"),
        (["--config-file", "retinanet_R_50_1x.yaml"], "near it: "),
        (
            ["--config-file", "quick_start/trees.yaml", "--num-machines", "2"],
            "--dist-url tcp://ADDRESS:PORT",
        ),
        (
            [*TREES, "--num-machines", "2", "--machine-rank", "2"],
            "--machine-rank is 2 with --num-machines 2; expected 0 to 1",
        ),
        *(
            ([*TREES, "--num-machines", "2", "--dist-url", url], f"--dist-url is {url}; expected")
            for url in ("nonsense", "tcp://localhost", "tcp://x:99999", "file:///tmp/x")
        ),
        (
            [*TREES, "--num-machines", "0"],
            "expected at least one machine",
        ),
        (
            ["--config-file", "quick_start/trees.yaml", "SOLVER.MAX_ITER", "2", "--resume"],
            "--resume comes after the options SOLVER.MAX_ITER",
        ),
    ],
)
def test_arguments_that_cannot_run_are_refused_in_words(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        train.parse_args(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["MODEL.NOPE", "1"], "retina-focal train: there is no key 'MODEL.NOPE'"),
        (["DATASETS.TRAIN", "('nowhere',)"], "dataset 'nowhere' is not registered"),
        (
            ["--dataset", "cells", "nowhere.json", ".", "DATASETS.TRAIN", "('cells',)"],
            "'nowhere.json' does not exist",
        ),
        (["--dataset", "cells", "a.json", "."], r"add: DATASETS.TRAIN \"\('cells',\)\""),
        (["SOLVER.BASE_LR", "1000"], "type SOLVER.BASE_LR 1000.0"),
        (["--num-gpus", "3"], "IMS_PER_BATCH is 16, for 3 processes; expected a multiple"),
    ],
)
def test_a_wrong_config_ends_the_tool_in_words_and_makes_no_folder(
    arguments, message, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["retina-focal"])
    with pytest.raises(SystemExit, match=message):
        cli.main(
            ["train", "--config-file", "COCO-Detection/retinanet_R_50_FPN_1x.yaml", *arguments]
        )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["SOLVER.MAX_ITER", "2"], r"'SOLVER.MAX_ITER' changes nothing.*: train.max_iter=1000"),
        (["train.max_iter=[1"], r"train.max_iter=\[1: "),
        (["model.num_classes.x=2"], "model.num_classes is not a config"),
        (["dataloader.train.dataset.names=nowhere"], "dataset 'nowhere' is not registered"),
        (
            ["--eval-only", "dataloader.test.dataset.names=[nowhere]"],
            "dataset 'nowhere' is not registered",
        ),
        (
            ["dataloader.train.dataset.names=lazy_cells", "dataloader.test.dataset.names=[]"],
            r"'lazy_cells' has 2 classes.*model.num_classes is 80; add: model.num_classes=2",
        ),
    ],
)
def test_a_wrong_lazy_config_ends_the_tool_in_words_and_makes_no_folder(
    arguments, message, data, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["retina-focal"])
    config = ["--config-file", str(ROOT / "configs/lazy/retinanet_R_50_FPN_1x.py")]
    cells = ["--dataset", "lazy_cells", str(data / "a.json"), str(data)]
    with pytest.raises(SystemExit, match=message):
        cli.main(["train", *config, *cells, *arguments])
    assert not list(tmp_path.iterdir())


def test_a_quick_start_makes_a_killed_last_evaluation_again_and_does_not_train_anew(
    data, tmp_path, monkeypatch, capsys
):
    def killed(*_):
        raise KeyboardInterrupt

    for name, value in (("PREPARE", {"trees": print}), ("prepare_weights", print)):
        monkeypatch.setattr(quick_start, name, value)
    monkeypatch.setattr(quick_start, "draw_detections", lambda *_: None)
    argv = [
        *("trees", *SMALL, "MODEL.BACKBONE.NAME", "build_retina_focal_resnet_fpn_backbone"),
        *("MODEL.PIXEL_MEAN", "[100.,100.,100.]", "MODEL.RETINA_FOCAL.PRECISION", "fp32"),
        *("MODEL.RETINANET.NORM", "", "MODEL.RESNETS.OUT_FEATURES", "['res3', 'res4', 'res5']"),
        *("DATASETS.COCO_JSON", f"[['quick', '{data / 'a.json'}', '{data}']]"),
        *("DATASETS.TRAIN", "('quick',)", "DATASETS.TEST", "('quick',)"),
        *("OUTPUT_DIR", str(tmp_path)),
    ]
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="130"):
        patch.setattr(Trainer, "test", killed)
        quick_start.main(argv)
    weights = (tmp_path / "model_final.pth").read_bytes()
    capsys.readouterr()
    quick_start.main(argv)
    assert "trained before; to train anew: rm -r" in capsys.readouterr().out
    assert (tmp_path / "model_final.pth").read_bytes() == weights
    assert "bbox/AP" in metrics(tmp_path)


def test_every_tool_explains_itself(capsys):
    cli.main([])
    listed = capsys.readouterr().out
    for name in cli.TOOLS:
        assert name in listed
        with pytest.raises(SystemExit) as stopped:
            cli.main([name, "--help"])
        assert stopped.value.code == 0
        assert f"retina-focal {name}" in capsys.readouterr().out


def test_an_unknown_tool_is_answered_with_those_there_are():
    with pytest.raises(SystemExit, match=r"no tool 'trian'; it has .*train"):
        cli.main(["trian"])
