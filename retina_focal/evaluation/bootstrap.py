"""How much an AP would differ with other images: the bootstrap over images, for one run or two.

Images are drawn with replacement; their matches stay what they are, so that nothing is matched
anew. An image that is drawn w times counts w times. Two runs are compared on the same draws.
"""

from collections.abc import Sequence

import numpy as np

from retina_focal.evaluation.detections import Evaluated
from retina_focal.evaluation.matches import Matches
from retina_focal.evaluation.precision_recall import EPS, RECALLS

BLOCK = 2**24  # numbers that are held at once: 64 MB per array
LEVEL = 0.95  # of the intervals


def draws(num_images: int, count: int = 1000, seed: int = 0) -> np.ndarray:
    """(B, N) int: how often each image is drawn in each of B draws of N images."""
    chance = np.full(num_images, 1 / num_images)
    drawn = np.random.default_rng(seed).multinomial(num_images, chance, size=count)
    return drawn.astype(np.int32)


def drawn_ap(evaluated: Evaluated, matches: Matches, weights: np.ndarray) -> np.ndarray:
    """(B, T, K) AP in [0, 1] of B draws; nan for a class of which no box is drawn.

    Args:
        weights: (B, N) of `draws`.
    """
    truth = evaluated.truth
    found = np.empty((len(weights), len(matches.box), len(evaluated.classes)))
    for label in range(len(evaluated.classes)):
        boxes = truth.image[(truth.label == label) & ~truth.crowd]
        per_image = np.bincount(boxes, minlength=weights.shape[1])
        mine = np.nonzero(evaluated.found.label == label)[0]
        size = max(1, BLOCK // max(len(mine), 1))
        for start in range(0, len(weights), size):
            part = weights[start : start + size]
            found[start : start + size, :, label] = _drawn_ap_of_class(
                part[:, evaluated.found.image[mine]],
                part @ per_image,
                matches.right[:, mine],
                matches.ignored[:, mine],
            )
    return found


def interval(values: np.ndarray, level: float = LEVEL) -> tuple[float, float] | None:
    """The middle `level` of B numbers, without those that are nan; None where all are."""
    values = values[~np.isnan(values)]
    if not len(values):
        return None
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def metrics(ap: np.ndarray, classes: Sequence[str]) -> dict[str, np.ndarray]:
    """COCO's means of (..., T, K) AP, in percent: AP, AP50, AP75, and the AP of each class.

    A class that is nan does not count in a mean; T are COCO's ten thresholds.
    """
    counted = ~np.isnan(ap)
    filled = np.where(counted, ap, 0)

    def mean(x: slice) -> np.ndarray:
        number = counted[..., x, :].sum(axis=(-2, -1))
        total = filled[..., x, :].sum(axis=(-2, -1))
        return 100 * np.divide(total, number, out=np.full(number.shape, np.nan), where=number > 0)

    named = {"AP": mean(slice(None)), "AP50": mean(slice(0, 1)), "AP75": mean(slice(5, 6))}
    per_class = 100 * ap.mean(axis=-2)
    return named | {f"AP-{name}": per_class[..., i] for i, name in enumerate(classes)}


def _drawn_ap_of_class(
    weights: np.ndarray, num_boxes: np.ndarray, right: np.ndarray, ignored: np.ndarray
) -> np.ndarray:
    """(B, T).

    Args:
        weights: (B, D) of each detection, by falling score.
        num_boxes: (B,).
        right, ignored: (T, D).
    """
    ap = np.zeros((len(weights), len(right)))
    needed = _needed(num_boxes)
    found = np.cumsum(weights, axis=1)
    for t in range(len(right)):
        places = np.nonzero(right[t])[0]  # the precision is highest where the last one is right
        if not len(places):
            continue
        all_found = np.cumsum(weights * ~ignored[t], axis=1) if ignored[t].any() else found
        right_found = np.cumsum(weights[:, places], axis=1, dtype=np.int64)
        precision = right_found / (all_found[:, places] + EPS)
        highest = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
        # One search for all draws: each row is lifted above the one before.
        lift = np.arange(len(weights))[:, None] * (int(num_boxes.max(initial=0)) + 1)
        at = np.searchsorted((right_found + lift).ravel(), (needed + lift).ravel())
        at = at.reshape(needed.shape) - np.arange(len(weights))[:, None] * len(places)
        reached = at < len(places)
        highest = np.take_along_axis(highest, np.minimum(at, len(places) - 1), axis=1)
        ap[:, t] = np.where(reached, highest, 0).mean(axis=1)
    return np.where(num_boxes[:, None] > 0, ap, np.nan)


def _needed(num_boxes: np.ndarray) -> np.ndarray:
    """(B, 101) the fewest right detections whose recall, as divided, reaches each of `RECALLS`."""
    counts, which = np.unique(num_boxes, return_inverse=True)
    rows = [np.searchsorted(np.arange(n + 1) / max(n, 1), RECALLS) for n in counts]
    return np.array(rows, dtype=np.int64)[which]
