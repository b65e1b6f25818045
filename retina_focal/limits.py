"""What the values of a config can be, checked before anything is built of them.

A table of ranges and one of choices; `consistency` has what must fit together. The ranges are
wider than any use: what lies beyond is a slip, or a stranger's file that would take all memory.
"""

import math
from collections.abc import Iterator

from detectron2.config import CfgNode
from detectron2.layers import get_norm

from retina_focal.config import check_choice, flatten, get_cfg
from retina_focal.consistency import check_together
from retina_focal.errors import UserError

TINY, HUGE = 1e-6, 1e6
MANY = 10**9
SIDE = 10_000  # px that a picture is resized to

# The least and the most of a number, or of each number in a list.
RANGES = {
    "SEED": (-1, 2**31),
    "VIS_PERIOD": (0, MANY),
    "DATALOADER.NUM_WORKERS": (0, 256),
    "DATALOADER.REPEAT_THRESHOLD": (0, 1),
    "INPUT.MIN_SIZE_TRAIN": (0, SIDE),  # 0: not resized
    "INPUT.MAX_SIZE_TRAIN": (1, MANY),
    "INPUT.MIN_SIZE_TEST": (0, SIDE),
    "INPUT.MAX_SIZE_TEST": (1, MANY),
    "INPUT.CROP.SIZE": (TINY, SIDE),
    "SOLVER.MAX_ITER": (1, MANY),
    "SOLVER.BASE_LR": (0, HUGE),
    "SOLVER.BASE_LR_END": (0, HUGE),
    "SOLVER.MOMENTUM": (0, 1),
    "SOLVER.WEIGHT_DECAY": (0, HUGE),
    "SOLVER.WEIGHT_DECAY_NORM": (0, HUGE),
    "SOLVER.WEIGHT_DECAY_BIAS": (0, HUGE),
    "SOLVER.BIAS_LR_FACTOR": (0, HUGE),
    "SOLVER.GAMMA": (0, HUGE),
    "SOLVER.STEPS": (1, MANY),
    "SOLVER.NUM_DECAYS": (1, MANY),
    "SOLVER.WARMUP_FACTOR": (0, HUGE),
    "SOLVER.WARMUP_ITERS": (0, MANY),
    "SOLVER.CHECKPOINT_PERIOD": (1, MANY),
    "SOLVER.IMS_PER_BATCH": (1, 2**16),
    "SOLVER.REFERENCE_WORLD_SIZE": (0, 10**6),
    "SOLVER.CLIP_GRADIENTS.CLIP_VALUE": (0, math.inf),
    "SOLVER.CLIP_GRADIENTS.NORM_TYPE": (TINY, math.inf),
    "TEST.EVAL_PERIOD": (0, MANY),
    "TEST.DETECTIONS_PER_IMAGE": (1, 10**6),
    "TEST.PRECISE_BN.NUM_ITER": (1, MANY),
    "TEST.AUG.MIN_SIZES": (1, SIDE),
    "TEST.AUG.MAX_SIZE": (1, MANY),
    "MODEL.PIXEL_MEAN": (-HUGE, HUGE),
    "MODEL.PIXEL_STD": (TINY, HUGE),
    "MODEL.BACKBONE.FREEZE_AT": (0, 100),
    "MODEL.FPN.OUT_CHANNELS": (1, 10**5),
    "MODEL.RESNETS.NUM_GROUPS": (1, 10**5),
    "MODEL.RESNETS.WIDTH_PER_GROUP": (1, 10**5),
    "MODEL.RESNETS.STEM_OUT_CHANNELS": (1, 10**4),
    "MODEL.RESNETS.RES2_OUT_CHANNELS": (1, 10**5),
    "MODEL.RESNETS.RES5_DILATION": (1, 2),
    "MODEL.RESNETS.DEFORM_NUM_GROUPS": (1, 10**4),
    "MODEL.ANCHOR_GENERATOR.SIZES": (TINY, HUGE),
    "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS": (TINY, HUGE),
    "MODEL.ANCHOR_GENERATOR.ANGLES": (-360, 360),
    "MODEL.ANCHOR_GENERATOR.OFFSET": (0, 1 - TINY),
    "MODEL.RETINANET.NUM_CLASSES": (1, 10**6),
    "MODEL.RETINANET.NUM_CONVS": (0, 100),
    "MODEL.RETINANET.IOU_LABELS": (-1, 1),
    "MODEL.RETINANET.SCORE_THRESH_TEST": (-1, 1),
    "MODEL.RETINANET.TOPK_CANDIDATES_TEST": (1, MANY),
    "MODEL.RETINANET.NMS_THRESH_TEST": (0, 1),
    "MODEL.RETINANET.BBOX_REG_WEIGHTS": (TINY, HUGE),
    "MODEL.RETINANET.FOCAL_LOSS_ALPHA": (-HUGE, 1),  # below 0: no balance
    "MODEL.RETINANET.SMOOTH_L1_LOSS_BETA": (0, HUGE),
    "MODEL.RETINA_FOCAL.ANCHORS.BASE_SIZES": (TINY, HUGE),
    "MODEL.RETINA_FOCAL.ANCHORS.SCALES_PER_OCTAVE": (1, 100),
    "MODEL.RETINA_FOCAL.ACCUMULATE_STEPS": (1, 10**6),
    "MODEL.RETINA_FOCAL.HINGE.MARGIN": (-HUGE, HUGE),
    "MODEL.RETINA_FOCAL.FOCAL_STAR.BETA": (-HUGE, HUGE),
    "MODEL.RETINA_FOCAL.TRAIN.TIMEOUT": (1, MANY),
    "MODEL.RETINA_FOCAL.TRAIN.KEEP_CHECKPOINTS": (0, MANY),
    "MODEL.RETINA_FOCAL.TRAIN.PATIENCE": (0, MANY),
    "MODEL.RETINA_FOCAL.TEST.TILE": (0, MANY),
    "MODEL.RETINA_FOCAL.TEST.TILE_OVERLAP": (0, 0.9),
    "MODEL.RETINA_FOCAL.DATA.MAX_BAD_IMAGES": (0, MANY),
    "MODEL.RETINA_FOCAL.DATA.MAX_PIXELS": (1, 10**12),
}
CHOICES = {
    "INPUT.MIN_SIZE_TRAIN_SAMPLING": ("choice", "range"),
    "INPUT.RANDOM_FLIP": ("horizontal", "vertical", "none"),
    "INPUT.CROP.TYPE": ("relative_range", "relative", "absolute", "absolute_range"),
    "INPUT.FORMAT": ("BGR", "RGB", "L", "YUV-BT.601"),
    "INPUT.MASK_FORMAT": ("polygon", "bitmask"),
    "SOLVER.LR_SCHEDULER_NAME": (
        "WarmupMultiStepLR",
        "WarmupCosineLR",
        "WarmupStepWithFixedGammaLR",
    ),
    "SOLVER.WARMUP_METHOD": ("linear", "constant"),
    "SOLVER.CLIP_GRADIENTS.CLIP_TYPE": ("value", "norm"),
    "DATALOADER.SAMPLER_TRAIN": ("TrainingSampler", "RepeatFactorTrainingSampler"),
    "MODEL.FPN.FUSE_TYPE": ("sum", "avg"),
    "MODEL.RETINA_FOCAL.TEST.RESIZE": ("detectron2", "torchvision", "mmdetection", "detectron"),
}
MAY_BE_EMPTY = ("SOLVER.STEPS",)
LENGTHS = {"MODEL.RETINANET.BBOX_REG_WEIGHTS": 4, "INPUT.CROP.SIZE": 2}
MAY_BE_NONE = ("SOLVER.WEIGHT_DECAY_BIAS",)


def check_values(cfg: CfgNode) -> None:
    """Refuse a value that no training can have, or that takes memory without bound.

    Raises:
        UserError: a value has another type, or is out of its range, or doesn't fit another one;
            with the key, what it is, and what is expected.
    """
    check_types(cfg)
    check_ranges(cfg)
    values = flatten(cfg)
    for key, choices in CHOICES.items():
        check_choice(key, values[key], choices)
    for key, value in values.items():
        if key.endswith(".NORM") and not key.endswith("TIMM.NORM"):
            _check_norm(key, value)
    check_together(cfg)


def check_types(cfg: CfgNode) -> None:
    """Refuse None, which yacs takes for any value, and elements that a list can't have."""
    defaults = flatten(get_cfg())
    for key, value in flatten(cfg).items():
        default = defaults.get(key)
        if key == "OUTPUT_DIR" and not value:
            raise _unexpected(key, value, "the path of a folder")
        if any(isinstance(x, str) and "\0" in x for x in _leaves(value)):
            raise _unexpected(key, value, "a text without the character 0")
        if value is None and default is not None:
            raise _unexpected(key, value, f"a {type(default).__name__}, such as {default!r}")
        if isinstance(default, list):
            kind = next((type(x) for x in _leaves(default)), _kind_of_empty(key))
            kinds = (int, float) if kind in (int, float) else kind
            wrong = [x for x in _leaves(value) if kind and not _is_a(x, kinds)]
            if wrong:
                word = "numbers" if kind in (int, float) else f"{kind.__name__} values"
                raise _unexpected(key, value, f"a list of {word}; {wrong[0]!r} is none")


def check_ranges(cfg: CfgNode, names: dict[str, str] | None = None) -> None:
    """Refuse what is out of `RANGES`, of the keys that a config has.

    Args:
        names: what the user calls a key.
    """
    values = flatten(cfg)
    for key in RANGES.keys() & values.keys():
        value, (least, most) = values[key], RANGES[key]
        if value is None and key in MAY_BE_NONE:
            continue
        numbers = list(_leaves(value))
        name, each = (names or {}).get(key, key), "each " if isinstance(value, list) else ""
        for x in numbers:
            if not _is_a(x, (int, float)) or not least <= x <= most:
                is_open = most >= MANY
                bounds = f"of at least {least:g}" if is_open else f"from {least:g} to {most:g}"
                raise _unexpected(name, value, f"{each}a number {bounds}")
        lists = [value, *(x for x in value if isinstance(x, list))] if each else []
        if [] in lists and key not in MAY_BE_EMPTY:
            raise _unexpected(name, value, "at least one number")
        if key in LENGTHS and len(numbers) != LENGTHS[key]:
            raise _unexpected(name, value, f"{LENGTHS[key]} numbers")


def _check_norm(key: str, name: str) -> None:
    try:
        get_norm(name, 32)  # detectron2 lists its norms nowhere else
    except (KeyError, TypeError, ValueError) as error:
        raise _unexpected(key, name, "one of FrozenBN, BN, SyncBN, GN, LN, or ''") from error


def _leaves(value: object) -> Iterator[object]:
    if isinstance(value, (list, tuple)):
        for x in value:
            yield from _leaves(x)
    else:
        yield value


def _is_a(value: object, kinds: type | tuple[type, ...]) -> bool:
    return isinstance(value, kinds) and (kinds is bool or not isinstance(value, bool))


def _kind_of_empty(key: str) -> type | None:
    """The type of the elements of a list that is empty in detectron2's defaults."""
    return str if key.endswith(("FEATURES", "DATASETS.TRAIN", "DATASETS.TEST")) else None


def _unexpected(key: str, value: object, expected: str) -> UserError:
    return UserError(f"{key} is {value!r}; expected {expected}")
