"""What a run writes about itself, and what a refused command leaves of it."""

import errno
import io
import os
from argparse import Namespace
from contextlib import redirect_stdout
from types import SimpleNamespace

import pytest
from detectron2.config import CfgNode, LazyConfig
from test_train import train_command

from retina_focal.config import config_path
from retina_focal.errors import UserError
from retina_focal.tools.train import _check_folder, parse_args, run
from retina_focal.training.metrics import MetricsWriter, set_aside
from retina_focal.training.run_files import SavedConfig, open_log, seed_of_config
from retina_focal.training.seeds import saved_seed
from retina_focal.training.steps import StepTrainer
from retina_focal.training.words import words_only

ARCHITECTURE = ["MODEL.RETINANET.NUM_CONVS", "2"]


def run_here(data, output, *arguments, opts=()):
    """`train_net.py` in this process."""
    command, _ = train_command(data, output, *arguments, opts=opts)
    return run(parse_args(command[1:]))


@pytest.mark.parametrize(
    "arguments, opts, message",
    [
        ((), ["MODEL.RETINA_FOCAL.CLS_LOSS", "foacl"], "CLS_LOSS is 'foacl'"),
        (
            ("--resume",),
            ARCHITECTURE,
            r"model_final.pth is of another architecture: it lacks 4 \(head.bbox_subnet.2.bias, .*"
            r"MODEL.RETINANET.NUM_CONVS was 1 and is 2$",
        ),
        (
            ("--resume",),
            ["MODEL.RETINA_FOCAL.TRAIN.FREEZE", "['head.cls_subnet']"],
            r"2 \(head.cls_subnet.0.weight, head.cls_subnet.0.bias\) parameters are trained there "
            r"and frozen by the config .*TRAIN.FREEZE was \[\] and is \['head.cls_subnet'\]$",
        ),
        (("--eval-only", "--resume"), ARCHITECTURE, "another architecture"),
        ((), ["MODEL.WEIGHTS", "nowhere.pth"], "nowhere.pth"),
        ((), ["DATASETS.TRAIN", "()"], "DATASETS.TRAIN is empty"),
        ((), ["MODEL.RETINA_FOCAL.DATA.MAX_PIXELS", "100"], "MAX_PIXELS"),  # the first batch
    ],
)
def test_a_refused_command_leaves_the_files_of_a_run(arguments, opts, message, data, ran):
    before = {path: path.read_bytes() for path in ran.rglob("*") if path.is_file()}
    with pytest.raises(SystemExit, match=message):
        run_here(data, ran, *arguments, opts=opts)
    for path, content in before.items():
        is_log = path.name == "log.txt"
        assert path.read_bytes()[: len(content) if is_log else None] == content, path


@pytest.fixture(scope="module")
def ran(data, tmp_path_factory):
    """The folder of a run of two steps."""
    output, screen = tmp_path_factory.mktemp("ran"), io.StringIO()
    with redirect_stdout(screen):
        run_here(data, output)
    (output / "screen").write_text(screen.getvalue())
    return output


def test_an_evaluation_leaves_the_config_of_the_run(data, ran):
    before = (ran / "config.yaml").read_bytes()
    assert run_here(data, ran, "--eval-only", "--resume", opts=["TEST.DETECTIONS_PER_IMAGE", "7"])
    assert (ran / "config.yaml").read_bytes() == before


def test_settings_are_in_the_log_and_not_on_the_screen(ran):
    log, screen = (ran / "log.txt").read_text(), (ran / "screen").read_text()
    for words in ("WEIGHT_DECAY_NORM", "sys.platform", "eval_only=False", "(cls_subnet)"):
        assert words in log and words not in screen
    assert "World size: 1" in screen


def test_a_lazy_config_is_saved_as_it_was_given_once_a_step_is_made(tmp_path):
    cfg = LazyConfig.load(config_path("lazy/retinanet_R_50_FPN_1x.py"))
    hook = SavedConfig(cfg, str(tmp_path))
    cfg.optimizer.params.model = "as `build_optimizer` does"
    hook.trainer = SimpleNamespace(start_iter=3, iter=4)
    hook.after_step()
    assert not list(tmp_path.iterdir())
    hook.trainer.iter = 3
    hook.after_step()
    saved = LazyConfig.load(str(tmp_path / "config.yaml"))
    assert saved.train == cfg.train and "model" not in saved.optimizer.params


@pytest.mark.parametrize(
    "text, seed",
    [
        ("SEED: 5\nSOLVER: {MAX_ITER: 1}", 5),
        ("train: {max_iter: 1, seed: 7}\nmodel: !!python/tuple [1]", 7),
        ("train: {max_iter: 1}", None),
        ("SEED: -1", None),
        ("SEED: [1]", None),
        ("SEED: {", None),
        ("", None),
    ],
)
def test_the_seed_of_a_run_without_checkpoint_is_that_of_its_config(text, seed, tmp_path):
    assert saved_seed(str(tmp_path)) is None
    (tmp_path / "config.yaml").write_text(text)
    assert saved_seed(str(tmp_path)) == seed


def test_a_drawn_seed_survives_a_kill_before_the_first_checkpoint(data, tmp_path, monkeypatch):
    opts = ["SEED", "-1", "SOLVER.CHECKPOINT_PERIOD", "100", "SOLVER.MAX_ITER", "3"]

    def killed(trainer):
        if trainer.iter == 1:
            raise KeyboardInterrupt
        run_step(trainer)

    run_step = StepTrainer.run_step
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="130"):
        patch.setattr(StepTrainer, "run_step", killed)
        run_here(data, tmp_path, opts=opts)
    assert not list(tmp_path.glob("*.pth"))
    drawn = seed_of_config(str(tmp_path))
    assert drawn is not None
    run_here(data, tmp_path, "--resume", opts=opts)
    assert seed_of_config(str(tmp_path)) == drawn


@pytest.mark.parametrize("name", ["metrics.json", "log.txt", "metrics.json/", "log.txt/"])
def test_a_file_of_a_run_that_is_no_regular_file_is_refused_and_not_waited_for(name, tmp_path):
    path = tmp_path / name
    path.mkdir() if name.endswith("/") else os.mkfifo(path)
    with pytest.raises(UserError, match=f"{path}' is a"):
        if "metrics" in name:
            MetricsWriter(str(path))
        else:
            values = CfgNode({"OUTPUT_DIR": str(tmp_path)})
            open_log(values, Namespace(config_file="", eval_only=False))


@pytest.mark.parametrize("path", ["run", "run/metrics.json"])
def test_a_fault_of_the_folder_itself_is_told_in_words(path, tmp_path):
    error = FileExistsError(errno.EEXIST, "File exists", str(tmp_path / path))
    message = r"can't write to .*File exists.*checkpoint is none"
    with pytest.raises(UserError, match=message), words_only(str(tmp_path / "run"), lambda: ""):
        raise error
    with pytest.raises(FileExistsError), words_only(str(tmp_path / "other"), lambda: ""):
        raise error


@pytest.mark.parametrize("link", [os.link, os.symlink])
def test_metrics_that_are_set_aside_keep_their_other_names(link, tmp_path):
    other, path = tmp_path / "backup", tmp_path / "metrics.json"
    other.write_text("{}\n")
    link(other, path)
    (tmp_path / "metrics-1.json").touch()
    writer = MetricsWriter(str(path))
    set_aside(path, [writer])
    writer._file_handle.write("new\n")
    writer.close()
    assert [x.read_text() for x in (other, tmp_path / "metrics-2.json")] == ["{}\n"] * 2
    assert path.read_text() == "new\n"


def test_a_new_run_in_the_folder_of_another_says_so(ran, tmp_path, caplog):
    _check_folder(str(tmp_path))
    assert not caplog.text
    _check_folder(str(ran))
    assert "holds checkpoints of another run (model_final.pth" in caplog.text
