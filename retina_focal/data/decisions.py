"""What a dataset and a time budget ask of a training: numbers in, settings with reasons out.

Nothing here looks at a picture, a clock or a machine: `retina-focal configure` measures, and this
decides. The rules are few and are written into the config that they make.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from retina_focal.data.anchor_search import Octaves
from retina_focal.data.fingerprint import (
    LEAST_SAVES,
    MANY_STEPS,
    SAVED_EVERY,
    SHORTEST,
    SPENT,
    TILE,
    Fingerprint,
    Machine,
    Pace,
    enough_steps,
    evaluation_seconds,
    grained,
    is_tiled,
    num_evaluations,
    padded_side,
    steps_within,
)
from retina_focal.errors import UserError

MOST_EPOCHS = 150
SEVERAL_SIZES_FROM = 20  # epochs; fewer learn more from one size
SIZES = (0.8, 0.9, 1.0, 1.1, 1.2)  # of the shorter side
LEAST_STEPS = 50
RATE_PER_PICTURE = 0.02 / 4  # configs/quick_start, SGD
GPU_RATE_PER_PICTURE = 0.01 / 16  # detectron2's
RARE = 0.1  # of the pictures: classes in fewer of them are shown more often
THRESHOLDS = (0.4, 0.5)  # of the paper
STRICTER = (0.5, 0.6)  # where the anchors reach nearly all boxes with the upper one
NEARLY_ALL = 0.97
# Steps until the learning rate is whole. Of 249 steps on the quick start's tree tiles 31 of them
# end at a class loss of 0.36 and an AP50 of 31, 80 of them at 0.25 and 56.
LEAST_WARMUP, MOST_WARMUP = 80, 500
AVERAGED = 8  # the average of the weights is over about this part of the steps


# The method, in the minutes that a user of two cores has: as stock, until a table of the same data,
# minutes and seeds shows what another value gains. Times of a step are measured with these.
METHOD: dict[str, tuple[object, str]] = {
    "MODEL.RETINA_FOCAL.ASSIGNMENT": ("detectron2", "atss instead gains no AP that is measured"),
    "MODEL.RETINA_FOCAL.CLS_LOSS": ("focal", "soft targets gain 0.5 AP on BCCD's val, 0.1 on test"),
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
    """Random tiles in training; val and what is predicted are cut into all. Nothing is resized."""
    why = (
        f"a tenth of the smallest class is below {found.small:.0f} px in pictures of "
        f"{found.shorter:.0f} px: too small when whole"
    )
    return {
        "INPUT.CROP.ENABLED": Setting(True, why),
        "INPUT.CROP.TYPE": Setting("absolute", "px of the picture's file"),
        "INPUT.CROP.SIZE": Setting([TILE, TILE], "a tile keeps the size of its objects"),
        "INPUT.MIN_SIZE_TRAIN": Setting([TILE], "of a tile"),
        "INPUT.MAX_SIZE_TRAIN": Setting(2 * TILE, "a small picture may be narrower than a tile"),
        "INPUT.MIN_SIZE_TEST": Setting(TILE, "of a tile; the whole picture is a second scale"),
        "INPUT.MAX_SIZE_TEST": Setting(math.ceil(TILE * found.aspect), "the same"),
        "MODEL.RETINA_FOCAL.TEST.TILE": Setting(TILE, "of the size that it learned from"),
    }


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
    why += "so the better ones" if thresholds == STRICTER else "too few; as in the paper"
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
            max(100, math.ceil(most * 1.5 / 50) * 50), f"a {of} has up to {most} boxes"
        ),
        "MODEL.RETINANET.NMS_THRESH_TEST": Setting(
            round(min(0.6, max(0.3, found.overlap + 0.15)), 2),
            f"99% of the boxes overlap others of their class by less than {found.overlap:.2f}",
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


def schedule_settings(
    found: Fingerprint, machine: Machine, pace: Pace, minutes: float, sides: Sequence[int]
) -> Settings:
    """Batch, learning rate, iterations, evaluations, and what depends on how many they are.

    Raises:
        UserError: the minutes don't suffice for a training.
    """
    shorter = padded = pace.shorter
    if not is_tiled(found):
        # Evaluated is the middle one; the lower of two, as smaller ones have become `SHORTEST`.
        shorter, padded = sides[(len(sides) - 1) // 2], padded_side(sides, pace.batch)
    steps = steps_within(found, pace, minutes, shorter, padded)
    step, evaluation = pace.step_at(padded), evaluation_seconds(found, pace, shorter)
    if steps < LEAST_STEPS:
        least = (LEAST_STEPS * step + pace.start + evaluation) / 60 / SPENT
        raise UserError(
            f"{minutes:g} minutes give {steps} steps of {step:.2g} s; expected "
            f"{LEAST_STEPS} or more: type --minutes {math.ceil(least)}"
        )
    most = math.ceil(MOST_EPOCHS * found.epoch / pace.batch)
    times = num_evaluations(evaluation, minutes * 60 * SPENT)
    fits = f"{SPENT:.0%} of {minutes:g} min, less {pace.start:.0f} s of start and "
    fits += f"{1 + times} times {evaluation:.0f} s of evaluation, at {step:.2g} s per step"
    fits += "" if padded == pace.shorter else f", from {pace.step:.2g} s at {pace.shorter} px"
    fits += ", measured here"
    if steps > max(most, enough_steps(found, pace.batch)):
        steps = max(most, enough_steps(found, pace.batch))
        fits = f"at most {MOST_EPOCHS}, or as many as {steps} steps need; the minutes give more"
    epochs = steps * pace.batch / found.epoch
    per_picture = GPU_RATE_PER_PICTURE if machine.has_gpu else RATE_PER_PICTURE
    of = "detectron2's 0.01 for 16" if machine.has_gpu else "0.02 for 4, of configs/quick_start"
    best = "no weights but the last are evaluated"
    if times:
        best = "the best of the evaluations on val is kept, in model_best.pth"
    settings = {
        "SOLVER.IMS_PER_BATCH": Setting(
            pace.batch,
            "as in configs/quick_start" if not machine.has_gpu else "what the GPU's memory holds",
        ),
        "SOLVER.BASE_LR": Setting(
            float(f"{per_picture * pace.batch:.3g}"), f"in proportion to the batch: {of}"
        ),
        "SOLVER.MAX_ITER": Setting(steps, f"{epochs:.3g} epochs: {fits}"),
        "SOLVER.LR_SCHEDULER_NAME": Setting("WarmupMultiStepLR", "as in quick_start/bccd.yaml"),
        "SOLVER.STEPS": Setting([int(steps * 0.8)], "at 80%, as in quick_start/bccd.yaml"),
        "MODEL.RETINA_FOCAL.TRAIN.EMA": Setting(
            round(1 - AVERAGED / steps, 4),
            "weights are averaged over about an eighth of the steps",
        ),
        "SOLVER.WARMUP_ITERS": Setting(*_warmup(steps)),
        "MODEL.RETINA_FOCAL.TRAIN.AUGMENT.VERTICAL_FLIP": Setting(*_upside_down(found, steps)),
        "SOLVER.CHECKPOINT_PERIOD": Setting(
            max(1, min(steps // LEAST_SAVES, round(60 * SAVED_EVERY / step))),
            f"each {SAVED_EVERY:g} min, or {LEAST_SAVES} in all, of {pace.save:.2g} s",
        ),
        "MODEL.RETINA_FOCAL.TRAIN.KEEP_CHECKPOINTS": Setting(2, "what a resumed run needs"),
        "TEST.EVAL_PERIOD": Setting(
            -(-steps // (times + 1)) if times else 0,
            f"{times} before the last: {evaluation:.0f} s each for {found.num_val} pictures",
        ),
        "MODEL.RETINA_FOCAL.TRAIN.BEST": Setting("bbox/AP" if times else "", best),
    }
    return settings


def _warmup(steps: int) -> tuple[int, str]:
    """Steps until the learning rate is whole, and why so many."""
    warmup = max(min(LEAST_WARMUP, steps // 3), min(MOST_WARMUP, steps // 8))
    share = {steps // 8: "an eighth", steps // 3: "a third, as there are few"}
    why = share.get(warmup, f"{'more' if warmup > steps // 8 else 'less'} than an eighth")
    return warmup, f"{why}; sooner the first large steps do harm"


def _upside_down(found: Fingerprint, steps: int) -> tuple[float, str]:
    """The share of pictures that are turned upside down, and why."""
    if found.has_up:
        return 0.0, "boxes are taller or wider, or others above than below: pictures have an up"
    no_up = "boxes are as tall as wide, and alike above and below: pictures have no up"
    if steps < MANY_STEPS:
        return 0.0, f"{no_up}, but it takes {MANY_STEPS} steps to learn from that"
    return 0.5, no_up


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
