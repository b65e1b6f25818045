"""Values that no training can have are refused by their key, before anything is built."""

import math
from contextlib import nullcontext
from functools import cache
from pathlib import Path

import detectron2.model_zoo
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.config import get_cfg as detectron2_get_cfg
from detectron2.modeling import build_model
from test_train import SMALL

from retina_focal.config import config_path, flatten, get_cfg
from retina_focal.errors import UserError
from retina_focal.limits import CHOICES, MAY_BE_NONE, RANGES, check_values
from retina_focal.tools.common import load_cfg, load_lazy_cfg

CONFIG = "COCO-Detection/retinanet_R_50_FPN_1x.yaml"
ZOO = Path(detectron2.model_zoo.__file__).parent / "configs"
# Nodes of which each number has a range; and numbers that the part itself refuses.
RANGED = ("SOLVER.", "INPUT.", "DATALOADER.", "MODEL.RETINANET.", "MODEL.ANCHOR_GENERATOR.")
BY_THE_PART = {
    "MODEL.RETINANET.IOU_THRESHOLDS",
    "MODEL.RETINANET.PRIOR_PROB",
    "MODEL.RETINANET.FOCAL_LOSS_GAMMA",
}


@cache
def small_cfg() -> CfgNode:
    return load_cfg(CONFIG, [*SMALL, "MODEL.DEVICE", "cpu"])


def cfg_with(**keys: object) -> CfgNode:
    cfg = small_cfg().clone()
    cfg.defrost()
    for key, value in keys.items():
        *nodes, name = key.split(".")
        node = cfg
        for x in nodes:
            node = node[x]
        node[name] = value
    return cfg


def kind_of(value: object) -> type:
    while isinstance(value, (list, tuple)) and value:
        value = value[0]
    return type(value)


def test_every_config_that_is_shipped_here_or_by_detectron2_is_taken():
    ours = Path(config_path(CONFIG)).parent.parent.rglob("*.yaml")
    paths = [*ours, *ZOO.rglob("*.yaml")]
    assert len(paths) > 100
    for path in paths:
        opts = ["MODEL.LOAD_PROPOSALS", "False", "MODEL.DEVICE", "cpu"]
        load_cfg(str(path), opts)


def test_every_number_of_the_nodes_that_people_change_has_a_range():
    cfg = flatten(detectron2_get_cfg())
    numbers = {
        key for key, x in cfg.items() if key.startswith(RANGED) and kind_of(x) in (int, float)
    }
    assert numbers - BY_THE_PART <= RANGES.keys()
    assert RANGES.keys() | CHOICES.keys() <= flatten(get_cfg()).keys()


@pytest.mark.parametrize("key", RANGES)
def test_what_is_beyond_a_range_is_refused_by_its_key(key):
    value, (least, most) = flatten(get_cfg())[key], RANGES[key]
    beyond = [least - 1, math.nan, True, *([most + 1] if math.isfinite(most) else [])]
    for x in beyond:
        wrong = [x] if isinstance(value, list) else x
        with pytest.raises(UserError, match=f"{key} is .*; expected "):
            check_values(cfg_with(**{key: wrong}))


def test_none_and_lists_of_another_kind_are_refused():
    for key, value in flatten(get_cfg()).items():
        if value is not None and key not in MAY_BE_NONE:
            with pytest.raises(UserError, match=f"{key} is None; expected"):
                check_values(cfg_with(**{key: None}))
        if isinstance(value, list) and kind_of(value) is not list:
            with pytest.raises(UserError, match=f"{key} is .*; expected a list of"):
                check_values(cfg_with(**{key: [object()]}))


@pytest.mark.parametrize("key", CHOICES)
def test_an_unknown_name_is_refused_with_those_there_are(key):
    with pytest.raises(UserError, match=f"{key} is 'nope'; expected one of {CHOICES[key][0]}"):
        check_values(cfg_with(**{key: "nope"}))


@pytest.mark.parametrize(
    "keys",
    [
        {"SOLVER.STEPS": [5, 3], "SOLVER.MAX_ITER": 10},
        {"SOLVER.STEPS": [3, 3], "SOLVER.MAX_ITER": 10},
        {"SOLVER.STEPS": [2]},  # the last iteration
        {"SOLVER.BASE_LR": 0.0, "SOLVER.LR_SCHEDULER_NAME": "WarmupCosineLR"},
        {"SOLVER.MOMENTUM": 0.0, "SOLVER.NESTEROV": True},
        {"SOLVER.IMS_PER_BATCH": 2, "SOLVER.REFERENCE_WORLD_SIZE": 3},
        {"INPUT.MIN_SIZE_TRAIN": [64, 32], "INPUT.MIN_SIZE_TRAIN_SAMPLING": "range"},
        {"INPUT.MIN_SIZE_TRAIN": []},
        {"INPUT.MIN_SIZE_TRAIN": [64, 1]},
        {"INPUT.CROP.SIZE": [0.5, 2.0], "INPUT.CROP.ENABLED": True},
        {"INPUT.CROP.SIZE": [0.5, 9], "INPUT.CROP.ENABLED": True, "INPUT.CROP.TYPE": "absolute"},
        {"INPUT.CROP.SIZE": [0.5]},
        {"MODEL.RETINA_FOCAL.TEST.TILE": 31},
        {"INPUT.FORMAT": "YUV-BT.601", "MODEL.RETINA_FOCAL.TEST.TILE": 640},
        {"MODEL.PIXEL_MEAN": [1.0, 1.0]},
        {"MODEL.PIXEL_STD": [1.0, 1.0, 1.0], "INPUT.FORMAT": "L", "MODEL.PIXEL_MEAN": [1.0]},
        {"DATASETS.COCO_JSON": [1]},
        {"DATASETS.COCO_JSON": [["name", "a.json", 3]]},
        {"DATASETS.TRAIN": [1]},
        {"TEST.EXPECTED_RESULTS": [["bbox", "AP", "40", 1]]},
        {"MODEL.RESNETS.DEPTH": 19},
        {"MODEL.RESNETS.RES2_OUT_CHANNELS": 256},  # of a ResNet-18
        {"MODEL.RESNETS.DEFORM_ON_PER_STAGE": [True] * 4},
        {"MODEL.RESNETS.DEFORM_ON_PER_STAGE": [False]},
        {"MODEL.RESNETS.NORM": "nope"},
        {"MODEL.RETINANET.NORM": "GN"},  # of 16 channels
        {"MODEL.FPN.NORM": "GN", "MODEL.FPN.OUT_CHANNELS": 80},
        {"MODEL.RETINANET.BBOX_REG_WEIGHTS": [1.0]},
        {"MODEL.RETINANET.IN_FEATURES": [3]},
        {"MODEL.ANCHOR_GENERATOR.NAME": "RotatedAnchorGenerator"},
        {"MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS": [[]]},
        {"MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS": []},
    ],
    ids=lambda keys: next(iter(keys)),
)
def test_what_does_not_fit_is_refused_by_its_key_and_with_what_is_expected(keys):
    first = next(iter(keys))
    with pytest.raises(UserError, match=rf"{first} is .*; expected \w"):
        check_values(cfg_with(**keys))


def test_steps_beyond_the_end_are_left_to_detectron2_which_ignores_them():
    check_values(cfg_with(**{"SOLVER.STEPS": [1, 60000, 80000], "SOLVER.MAX_ITER": 10}))


def test_the_smallest_tile_is_taken():
    check_values(cfg_with(**{"MODEL.RETINA_FOCAL.TEST.TILE": 32, "INPUT.FORMAT": "RGB"}))


@pytest.mark.parametrize(
    "yaml",
    [
        "MODEL: {RETINANET: {NUM_CONVS: 100000000}}",
        "MODEL: {RETINANET: {NUM_CLASSES: 900000}}",
        "MODEL: {FPN: {OUT_CHANNELS: 90000}}",
        "MODEL: {RESNETS: {RES2_OUT_CHANNELS: 90000}}",
        "MODEL: {RESNETS: {WIDTH_PER_GROUP: 90000}}",
        "MODEL: {RESNETS: {NUM_GROUPS: 90000}}",
        "MODEL: {RETINA_FOCAL: {ANCHORS: {SCALES_PER_OCTAVE: 100000000}}}",
        "MODEL: {ANCHOR_GENERATOR: {ASPECT_RATIOS: [[" + "1.0, " * 1000 + "]]}}",
        "INPUT: {MIN_SIZE_TRAIN: [1000000]}",
        "DATALOADER: {NUM_WORKERS: 1000000}",
    ],
)
def test_what_would_take_all_memory_is_refused_without_taking_it(yaml, attacked):
    path = attacked / "huge.yaml"
    path.write_text(f"_BASE_: {config_path(CONFIG)}\n{yaml}\n")
    with pytest.raises(UserError, match=r"expected .*(from|at most)"):
        load_cfg(str(path))


@pytest.mark.parametrize(
    "override, name",
    [
        ("train.max_iter=0", "train.max_iter is 0"),
        ("train.checkpointer.period=0", "train.checkpointer.period is 0"),
        ("train.eval_period=-1", "train.eval_period is -1"),
        ("train.retina_focal.train.patience=-1", "PATIENCE is -1"),
    ],
)
def test_values_of_a_lazy_config_are_refused_by_their_own_names(override, name):
    with pytest.raises(UserError, match=f"{name}; expected"):
        load_lazy_cfg("lazy/retinanet_R_50_FPN_1x.py", [override])


@pytest.mark.parametrize("key", ["FPN", "RETINANET"])
@pytest.mark.parametrize("side", [32, 33, 128, 129])
@pytest.mark.parametrize("channels", [32, 64])
def test_groups_of_one_value_are_refused_where_the_model_fails_alone(key, side, channels):
    cfg = cfg_with(
        **{f"MODEL.{key}.NORM": "GN", "MODEL.FPN.OUT_CHANNELS": channels},
        **{"INPUT.MIN_SIZE_TEST": side, "MODEL.WEIGHTS": ""},
    )
    fails = channels == 32 and side <= {"FPN": 32, "RETINANET": 128}[key]
    model = build_model(cfg).eval()
    with torch.no_grad(), pytest.raises(ValueError) if fails else nullcontext():
        model([{"image": torch.zeros(3, side, side)}])
    with pytest.raises(UserError, match="one cell") if fails else nullcontext():
        check_values(cfg)


def test_a_training_of_one_picture_per_step_is_looked_at_too():
    keys = {"MODEL.RETINANET.NORM": "GN", "MODEL.FPN.OUT_CHANNELS": 32, "INPUT.MIN_SIZE_TEST": 200}
    keys["INPUT.MIN_SIZE_TRAIN"] = [64, 200]
    check_values(cfg_with(**keys, **{"SOLVER.IMS_PER_BATCH": 2}))
    with pytest.raises(UserError, match="one cell"):
        check_values(cfg_with(**keys, **{"SOLVER.IMS_PER_BATCH": 1}))
