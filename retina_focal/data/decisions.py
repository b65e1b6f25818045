"""What a dataset and a time budget ask of a training: numbers in, settings with reasons out.

Nothing here looks at a picture, a clock or a machine: `retina-focal configure` measures, and this
decides. The rules are few and are written into the config that they make.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

from retina_focal.data.anchor_search import Octaves
from retina_focal.data.fingerprint import (
    LEAST_SIDE,
    LONGEST,
    SHORTEST,
    TILE,
    Fingerprint,
    Machine,
    Pace,
    grained,
    is_tiled,
    steps_within,
    wanted_shorter,
)
from retina_focal.data.images import MAX_PIXELS

SEVERAL_SIZES_FROM = 20  # epochs; fewer learn more from one size
SIZES = (0.8, 0.9, 1.0, 1.1, 1.2)  # of the shorter side
RARE = 0.1  # of the pictures: classes in fewer of them are shown more often
THRESHOLDS = (0.4, 0.5)  # of the paper
STRICTER = (0.5, 0.6)  # where the anchors reach nearly all boxes with the upper one
NEARLY_ALL = 0.97


# The method, in the minutes that a user of two cores has: as stock, until a table of the same data,
# minutes and seeds shows what another value gains. Times of a step are measured with these.
METHOD: dict[str, tuple[object, str]] = {
    "MODEL.RETINA_FOCAL.ASSIGNMENT": ("detectron2", "atss instead gains no AP that is measured"),
    "MODEL.RETINA_FOCAL.CLS_LOSS": ("focal", "soft targets changed the AP of BCCD's test by 0.1"),
    "MODEL.RETINA_FOCAL.TRAIN.AUGMENT.SCALE": ([1.0, 1.0], "sizes are those of MIN_SIZE_TRAIN"),
    "MODEL.RETINA_FOCAL.TRAIN.AUGMENT.COLOUR": (0.0, "no gain is measured"),
    "MODEL.RETINA_FOCAL.TRAIN.AUGMENT.MOSAIC": (0.0, "no gain is measured"),
    "MODEL.RETINA_FOCAL.TRAIN.CACHE_IMAGES": (False, "True keeps pictures in memory"),
}


class Setting(NamedTuple):
    """A value of a config and why it is that."""

    value: object
    reason: str


Settings = dict[str, Setting]  # by key


def input_settings(
    found: Fingerprint, pace: Pace, minutes: float, shorter: int
) -> tuple[Settings, list[int], int]:
    """Sizes of the pictures; beside the settings the shorter sides and the longer side's limit."""
    if is_tiled(found):
        return _tile_settings(found), [0], 0
    epochs = steps_within(found, pace, minutes, shorter) * pace.batch / max(found.num_pictures, 1)
    sides, why = [shorter], f"one size: the minutes give {epochs:.0f} epochs"
    if epochs >= SEVERAL_SIZES_FROM:
        sides = sorted({grained(shorter * x, SHORTEST) for x in SIZES})
        why = f"several sizes: the minutes would give {epochs:.0f} epochs of one"
    scale = shorter / found.shorter
    small = f"a tenth of the smallest class is below {found.small:.0f} px"
    of = f"{small}, {found.small * scale:.0f} px so"
    longer = grained(max(sides) * max(found.aspect, 1.34) * 1.1, SHORTEST)
    wanted = wanted_shorter(found)
    if shorter < wanted:
        of += f", for which {wanted} px take more minutes"
    limit = f"95% of the pictures are at most {found.aspect:.2f} times as long as wide"
    settings = {
        "INPUT.MIN_SIZE_TRAIN": Setting(sides, f"{of}; {why}"),
        "INPUT.MIN_SIZE_TRAIN_SAMPLING": Setting(
            "choice", "each of these as often" if len(sides) > 1 else "there is one"
        ),
        "INPUT.MAX_SIZE_TRAIN": Setting(longer, limit),
        "INPUT.MIN_SIZE_TEST": Setting(shorter, "as in training"),
        "INPUT.MAX_SIZE_TEST": Setting(longer, "as in training"),
    }
    return settings, sides, longer


def _tile_settings(found: Fingerprint) -> Settings:
    """Random tiles in training; val and what is predicted are cut into all."""
    why = (
        f"a tenth of the smallest class is below {found.small:.0f} px in pictures of "
        f"{found.shorter:.0f} px: below {LEAST_SIDE} px in whole ones of {LONGEST} px"
    )
    settings = {
        "INPUT.CROP.ENABLED": Setting(True, why),
        "INPUT.CROP.TYPE": Setting("absolute", "px of the picture's file"),
        "INPUT.CROP.SIZE": Setting([TILE, TILE], "a tile keeps the size of its objects"),
        "INPUT.MIN_SIZE_TRAIN": Setting([TILE], "of a tile"),
        "INPUT.MAX_SIZE_TRAIN": Setting(
            2 * TILE, "pictures narrower than a tile are enlarged, up to twice"
        ),
        "INPUT.MIN_SIZE_TEST": Setting(TILE, "of a tile; the whole picture is a second scale"),
        "INPUT.MAX_SIZE_TEST": Setting(2 * TILE, "as in training"),
        "MODEL.RETINA_FOCAL.TEST.TILE": Setting(TILE, "of the size that it learned from"),
    }
    if found.most_pixels > MAX_PIXELS:
        why = f"the largest picture has {found.most_pixels:,}"
        settings["MODEL.RETINA_FOCAL.DATA.MAX_PIXELS"] = Setting(found.most_pixels, why)
    return settings


def anchor_settings(octaves: Octaves, before: Mapping, after: Mapping) -> Settings:
    """Anchors, with the shares of boxes that they and the backbone's usual ones reach.

    Args:
        octaves: those that reach most boxes at the upper IoU of `STRICTER`: at the paper's 0.5 many
            a box would have a single anchor, barely.
        before, after: shares of the base's anchors and of these, at `STRICTER`.
    """
    gain = (
        f"boxes at IoU >= {STRICTER[1]}: {after['at_least_upper']:.1%}, mean of the best "
        f"{after['mean_best_iou']:.3f}; with the base's anchors {before['at_least_upper']:.1%}, "
        f"{before['mean_best_iou']:.3f}"
    )
    reasons = {"BASE_SIZES": gain, "NAME": "takes the three below"}
    return {
        key: Setting(value, reasons.get(key.rpartition(".")[2], "found with BASE_SIZES"))
        for key, value in octaves.settings().items()
    }


def threshold_settings(reached: float) -> Settings:
    """From which IoU on an anchor is positive.

    Args:
        reached: share of the boxes that the anchors reach with the upper one of `STRICTER`.
    """
    thresholds = STRICTER if reached >= NEARLY_ALL else THRESHOLDS
    why = f"{reached:.1%} of the boxes have an anchor at IoU >= {STRICTER[1]}: "
    better, fewer = "so the better ones", f"fewer than {NEARLY_ALL:.0%}, so as in the paper"
    why += better if thresholds == STRICTER else fewer
    return {"MODEL.RETINANET.IOU_THRESHOLDS": Setting(list(thresholds), why)}


def method_settings() -> Settings:
    """Assignment, loss, augmentation: `METHOD`."""
    return {key: Setting(*row) for key, row in METHOD.items()}


def data_settings(found: Fingerprint) -> Settings:
    """Classes, their imbalance, pictures without boxes, and how many boxes a picture has."""
    counts = ", ".join(
        f"{name} {count:,}" for name, count in zip(found.classes, found.boxes_of_class, strict=True)
    )
    most, of = found.most_boxes, "picture"
    if is_tiled(found):
        most, of = found.most_in_tile, "tile"
    settings = {
        "MODEL.RETINANET.NUM_CLASSES": Setting(len(found.classes), f"boxes: {_short(counts)}"),
        "DATALOADER.FILTER_EMPTY_ANNOTATIONS": Setting(
            False,
            f"{found.num_empty:,} of {found.num_pictures:,} pictures have no box; they are kept, "
            "as they show what is none",
        ),
        "TEST.DETECTIONS_PER_IMAGE": Setting(
            max(100, math.ceil(most * 1.5 / 50) * 50),
            f"a {of} has up to {'about ' * is_tiled(found)}{most} boxes",
        ),
        "MODEL.RETINANET.NMS_THRESH_TEST": Setting(
            round(min(0.6, max(0.3, found.overlap + 0.15)), 2),
            f"0.15 more than the IoU that 99% of the boxes have with others of their class, "
            f"{found.overlap:.2f}; 0.3 to 0.6",
        ),
    }
    shares = [x / found.num_pictures for x in found.pictures_of_class if x]
    sampler, why = (
        "TrainingSampler",
        f"every class that has boxes is in at least {min(shares):.0%} of the pictures",
    )
    if min(shares) < RARE and len(shares) > 1:
        rare = found.classes[found.pictures_of_class.index(round(min(shares) * found.num_pictures))]
        sampler = "RepeatFactorTrainingSampler"
        why = f"'{rare}' is in {min(shares):.1%} of the pictures: those come more often"
        settings["DATALOADER.REPEAT_THRESHOLD"] = Setting(RARE, "share below which a class is rare")
    settings["DATALOADER.SAMPLER_TRAIN"] = Setting(sampler, why)
    return settings


def machine_settings(machine: Machine, found: Fingerprint) -> Settings:
    """Device, precision, workers, and what measures."""
    workers = min(8, machine.cores) if machine.has_gpu else max(0, machine.cores // 4)
    why = f"{machine.cores} cores" + ("" if machine.has_gpu else ", which the network needs")
    settings = {
        "MODEL.DEVICE": Setting(
            "cuda" if machine.has_gpu else "cpu", "a GPU" if machine.has_gpu else "no GPU was found"
        ),
        "MODEL.RETINA_FOCAL.PRECISION": Setting("auto", "bf16 where the processor has it"),
        "DATALOADER.NUM_WORKERS": Setting(workers, why),
        "SEED": Setting(1, "the same command gives the same pictures in the same order"),
    }
    if is_tiled(found) and machine.has_hotcoco:
        why = "pycocotools takes long where a picture has thousands of detections"
        settings["MODEL.RETINA_FOCAL.TEST.EVALUATOR"] = Setting("hotcoco", why)
    return settings


def _short(text: str, length: int = 120) -> str:
    return text if len(text) <= length else f"{text[:length].rpartition(',')[0]}, ..."
