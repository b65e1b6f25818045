"""How long a training is, and what depends on that: a part of `decisions`."""

import math
from collections.abc import Sequence

from retina_focal.data.decisions import Setting, Settings
from retina_focal.data.fingerprint import (
    LEAST_SAVES,
    MANY_STEPS,
    SAVED_EVERY,
    SPENT,
    Fingerprint,
    Machine,
    Pace,
    enough_steps,
    evaluation_seconds,
    is_tiled,
    num_evaluations,
    padded_side,
    steps_within,
)
from retina_focal.errors import UserError

MOST_EPOCHS = 150
LEAST_STEPS = 50
RATE_PER_PICTURE = 0.02 / 4  # configs/quick_start, SGD
GPU_RATE_PER_PICTURE = 0.01 / 16  # detectron2's
# Steps until the learning rate is whole. Of 249 steps on the quick start's tree tiles 31 of them
# end at a class loss of 0.36 and an AP50 of 31, 80 of them at 0.25 and 56.
LEAST_WARMUP, MOST_WARMUP = 80, 500
AVERAGED = 8  # the average of the weights is over about this part of the steps


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
        least = math.ceil(minutes)
        while steps_within(found, pace, least, shorter, padded) < LEAST_STEPS:
            least += 1
        raise UserError(
            f"{minutes:g} minutes give {steps} steps of {step:.2g} s; expected "
            f"{LEAST_STEPS} or more: type --minutes {least}"
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
    of_tiles = f" of {found.epoch:,} tiles" if is_tiled(found) else ""
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
        "SOLVER.MAX_ITER": Setting(steps, f"{epochs:.3g} epochs{of_tiles}: {fits}"),
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
            f"every {SAVED_EVERY:g} min or {LEAST_SAVES} times; one takes {pace.save:.2g} s",
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
