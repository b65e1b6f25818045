"""What the commands share: how they end, and how they read a config."""

import warnings

import pytest
import torch
from torch.utils.data import DataLoader

from retina_focal.errors import UserError
from retina_focal.tools.common import command, ignore_deprecations, load_cfg, load_lazy_cfg

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


def test_a_dataset_that_nothing_uses_is_not_to_replace_another():
    rows = [["mine_train", "a.json", "a"], ["mine_val", "b.json", "b"]]
    train = ["DATASETS.TRAIN", "('mine_train',)", "DATASETS.TEST", "()"]
    with pytest.raises(UserError, match=r"mine_val is used .* add: DATASETS.TEST \"\('mine_v"):
        load_cfg("quick_start/lite0.yaml", train, rows)
    with pytest.raises(UserError, match=r"mine_train is used .* add: DATASETS.TRAIN \"\('mine_t"):
        load_cfg("quick_start/lite0.yaml", [], rows)
