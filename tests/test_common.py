"""What the commands share: how they end, their arguments, how they read a config."""

import argparse
import warnings

import pytest
import torch
from torch.utils.data import DataLoader

from retina_focal.errors import UserError
from retina_focal.tools import ablate
from retina_focal.tools.common import (
    command,
    ignore_deprecations,
    listed,
    load_cfg,
    load_lazy_cfg,
    number,
    tool_parser,
)

CONFIG = "COCO-Detection/retinanet_R_50_FPN_1x.yaml"


def broken(item: int) -> None:
    raise UserError(f"image {item} can't be used")


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_user_error_ends_a_command_in_one_line_from_a_worker_too(num_workers, monkeypatch):
    monkeypatch.setattr("sys.argv", ["retina-focal draw"])
    loader = DataLoader([7], num_workers=num_workers, collate_fn=lambda x: broken(*x))
    with pytest.raises(SystemExit) as stop:
        command(lambda: list(loader))()
    assert stop.value.code == "retina-focal draw: image 7 can't be used"


def test_any_other_error_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        command(lambda: 1 / 0)()


def test_deprecations_of_the_libraries_are_silent_and_those_of_others_are_not():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ignore_deprecations()
        torch.meshgrid(torch.arange(2), torch.arange(2))
        for module, message in (
            ("torch.jit", "`torch.jit.script` is deprecated"),
            ("detectron2.model_zoo", "pkg_resources is deprecated as an API"),
            ("torch.nn", "a loss is NaN"),
            ("torchless", "f is deprecated"),
        ):
            warnings.warn_explicit(message, FutureWarning, "x.py", 1, module)
    assert [str(w.message) for w in caught] == ["a loss is NaN", "f is deprecated"]


@pytest.mark.parametrize(
    "read, text, value",
    [
        (number(), "1", 1),
        (number(least=0), "0", 0),
        (number(float, 0), "1e7", 1e7),
        (listed(number()), "160,320", [160, 320]),
        (listed(number(float, 0)), "0.5", [0.5]),
    ],
)
def test_numbers_are_read_as_they_are_typed(read, text, value):
    assert read(text) == value


@pytest.mark.parametrize(
    "read, text, message",
    [
        (number(), "0", "'0' is not a whole number of at least 1"),
        (number(), "1.5", "'1.5' is not a whole number"),
        (number(float, 0), "-0.1", "'-0.1' is not a number of at least 0"),
        (number(float, 0), "nan", "'nan' is not a number"),
        (number(float, 0), "inf", "'inf' is not a number"),
        (listed(number()), "1,,2", "'' is not a whole number"),
        (listed(number()), "1,two", "'two' is not a whole number"),
    ],
)
def test_what_is_no_such_number_is_refused_in_words(read, text, message):
    with pytest.raises(argparse.ArgumentTypeError, match=message):
        read(text)


def test_a_file_in_place_of_the_output_folder_is_refused_before_any_work(tmp_path, capsys):
    (tmp_path / "file").touch()
    parser = tool_parser("speed", "Speed.", has_folder=True)
    for path in (tmp_path / "file", tmp_path / "file" / "new"):
        with pytest.raises(SystemExit) as stop:
            parser.parse_args(["--output", str(path)])
        assert stop.value.code == 2
        assert (
            f"'{tmp_path / 'file'}' is no folder that you may write to" in capsys.readouterr().err
        )
    for path in (tmp_path, tmp_path / "new" / "folder"):
        assert parser.parse_args(["--output", str(path)]).output == path
    assert not (tmp_path / "new").exists()
    assert str(parser.parse_args([]).output) == "output/speed"


@pytest.mark.parametrize(
    "opts, message",
    [
        (["MODEL.META_ARCHITECTURE", "Focal"], "expected one of FocalRetinaNet, GeneralizedRCNN"),
        (["MODEL.BACKBONE.NAME", "resnet"], r"MODEL\.BACKBONE\.NAME is 'resnet'"),
        (["MODEL.RETINANET", "3"], "no key 'MODEL.RETINANET'"),
        (["SOLVER", "{}"], "no key 'SOLVER'"),
        (["MODEL.RETINANET.NUM_CLASSES.X", "3"], r"near it: MODEL\.RETINANET\.NUM_CLASSES"),
        (["SOLVER.__class__", "3"], "no key 'SOLVER.__class__'"),
        (["OUTPUT_DIR", ""], "OUTPUT_DIR is ''; expected the path of a folder"),
        (["OUTPUT_DIR", "a\0b"], "OUTPUT_DIR is .*; expected a text without"),
        (["MODEL.DEVICE", "meta"], "MODEL.DEVICE is 'meta'"),
        (["MODEL.DEVICE", "gpu"], "MODEL.DEVICE is 'gpu'.* expected cpu or cuda"),
        (["MODEL.DEVICE", "cpu", "--output", "x"], "--output comes after the options MODEL.DEVICE"),
    ],
)
def test_options_that_cannot_be_are_refused_with_what_to_type(opts, message):
    with pytest.raises(UserError, match=message):
        load_cfg(CONFIG, opts)


@pytest.mark.parametrize(
    "code, message",
    [
        ("def f(:", r"mine\.py: .*invalid syntax.*line 1"),
        ("model = {}", r"mine\.py has no dataloader, .*train; expected model, dataloader"),
    ],
)
def test_a_lazy_config_that_is_none_is_named(code, message, tmp_path):
    (tmp_path / "mine.py").write_text(code)
    with pytest.raises(UserError, match=message):
        load_lazy_cfg(str(tmp_path / "mine.py"))


def test_a_dataset_that_the_config_does_not_use_is_refused():
    with pytest.raises(UserError, match=r"add: DATASETS\.TRAIN \"\('mine',\)\""):
        load_cfg(CONFIG, datasets=[["mine", "a.json", "."]])


@pytest.mark.parametrize(
    "environment",
    [
        {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "x", "MASTER_PORT": "1"},
        {
            **{"SLURM_NTASKS": "2", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"},
            **{"SLURM_STEP_ID": "0", "SLURM_NODELIST": "a"},
        },
    ],
)
def test_a_command_of_one_process_is_refused_to_launchers(environment, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit, match="started 2 processes, each of which would do all of ret"):
        ablate.main(["hinge"])


def test_in_a_job_of_several_tasks_a_command_without_srun_is_meant(monkeypatch):
    monkeypatch.setenv("SLURM_NTASKS", "2")
    assert tool_parser("ablate", "Ablate.")
