"""Which detection has which box: COCO's greedy matching, for all images and thresholds at once."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from retina_focal.evaluation.detections import Evaluated, Found, Truth, rank_among_equals

THRESHOLDS = np.linspace(0.5, 0.95, 10)  # of the IoU, which COCO's AP is the mean over
BLOCK = 2**21  # pairs whose IoU is computed at once: 64 MB per array of corners


@dataclass(frozen=True)
class Matches:
    """Of D detections with G boxes at T thresholds of the IoU."""

    box: np.ndarray  # (T, D) index of the matched box, -1 without one
    truth: Truth

    @cached_property
    def ignored(self) -> np.ndarray:
        """(T, D) bool: on a crowd, so that it counts neither as right nor as wrong."""
        return (self.box >= 0) & np.append(self.truth.crowd, False)[self.box]

    @cached_property
    def right(self) -> np.ndarray:
        """(T, D) bool: on a box that is no crowd."""
        return (self.box >= 0) & ~self.ignored


def match(
    evaluated: Evaluated, thresholds: np.ndarray = THRESHOLDS, by_class: bool = True
) -> Matches:
    """Each detection, by falling score, takes the free box of the highest IoU.

    As in pycocotools, only boxes of its class are candidates, and of boxes with the same IoU it
    takes the last. A crowd is taken where no other box is free, and stays free; its IoU is the
    share of the detection that lies on it.

    Args:
        thresholds: (T,) of the IoU that a match reaches.
        by_class: else boxes of all classes are taken.
    """
    truth, found = evaluated.truth, evaluated.found
    num_classes = len(evaluated.classes) if by_class else 0
    thresholds = thresholds[:, None]
    which, box, iou = pairs(truth, found, num_classes, thresholds.min())
    free = np.ones((len(thresholds), len(truth.image)), dtype=bool)
    matched = np.full((len(thresholds), len(found.image)), -1)
    # Detections of one group (image and class) are matched one after another; groups do not depend
    # on each other. So the first of every group are matched at once, then the second, and so on.
    candidates, first = np.unique(which, return_index=True)
    turn = rank_among_equals(_groups(found, num_classes)[candidates])
    counts = np.diff(np.append(first, len(which)))
    order = np.argsort(np.repeat(turn, counts), kind="stable")
    which, box, iou = which[order], box[order], iou[order]
    ends = np.cumsum(np.bincount(turn, counts).astype(int)) if len(turn) else []
    for start, end in zip([0, *ends], ends, strict=False):
        part = slice(start, end)
        _match_one_of_each_group(
            matched, free, truth.crowd, thresholds, which[part], box[part], iou[part]
        )
    return Matches(matched, truth)


def pairs(
    truth: Truth, found: Found, num_classes: int, least: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Detections with boxes of the same image (and class) whose IoU is at least `least`, above 0.

    Args:
        num_classes: K; 0: boxes of all classes.
    Returns:
        (P,) indices of detections, rising; (P,) of boxes, rising for each; (P,) IoU, with a crowd
        the share of the detection that lies on it.
    """
    groups, own = _groups(truth, num_classes), _groups(found, num_classes)
    order = np.argsort(groups, kind="stable")
    start = np.searchsorted(groups[order], own, "left")
    counts = np.searchsorted(groups[order], own, "right") - start
    blocks = (np.cumsum(counts) // BLOCK).astype(int) if len(counts) else counts
    parts = [np.empty((3, 0))]
    for block in np.unique(blocks):
        which = np.nonzero(blocks == block)[0]
        n = counts[which]
        offset = np.arange(n.sum()) - np.repeat(np.cumsum(n) - n, n)
        box = order[np.repeat(start[which], n) + offset]
        which = np.repeat(which, n)
        iou = box_iou(found.boxes[which], truth.boxes[box], truth.crowd[box])
        kept = (iou >= least) & (iou > 0)
        parts.append(np.stack([which[kept], box[kept], iou[kept]]))
    which, box, iou = np.concatenate(parts, axis=1)
    return which.astype(int), box.astype(int), iou


def box_iou(found: np.ndarray, boxes: np.ndarray, crowd: np.ndarray) -> np.ndarray:
    """(P,) IoU of (P, 4) and (P, 4) boxes, XYWH; of a crowd the share of `found` that it covers."""
    low = np.maximum(found[:, :2], boxes[:, :2])
    high = np.minimum(found[:, :2] + found[:, 2:], boxes[:, :2] + boxes[:, 2:])
    size = np.maximum(high - low, 0)
    both = size[:, 0] * size[:, 1]
    area = found[:, 2] * found[:, 3]
    union = np.where(crowd, area, area + boxes[:, 2] * boxes[:, 3] - both)
    return np.divide(both, union, out=np.zeros_like(both), where=both > 0)


def _groups(x: Truth | Found, num_classes: int) -> np.ndarray:
    return x.image * num_classes + x.label if num_classes else x.image


def _match_one_of_each_group(
    matched: np.ndarray,
    free: np.ndarray,
    crowd: np.ndarray,
    thresholds: np.ndarray,
    which: np.ndarray,
    box: np.ndarray,
    iou: np.ndarray,
) -> None:
    """Write into `matched` (T, D) and `free` (T, G) what P pairs, no two detections of one group,
    become."""
    first = np.nonzero(np.append(True, which[1:] != which[:-1]))[0]
    counts = np.diff(np.append(first, len(which)))
    is_high = iou >= thresholds
    best = np.full((len(thresholds), len(first)), -1)
    for kind in (~crowd[box], crowd[box]):  # a crowd only where there is no other
        value = np.where(is_high & kind & free[:, box], iou, -1)
        top = np.maximum.reduceat(value, first, axis=1)
        is_top = (value >= 0) & (value == np.repeat(top, counts, axis=1))
        last = np.maximum.reduceat(np.where(is_top, box, -1), first, axis=1)
        best = np.where(best < 0, last, best)
    matched[:, which[first]] = best
    threshold, column = np.nonzero(best >= 0)
    taken = best[threshold, column]
    used = ~crowd[taken]
    free[threshold[used], taken[used]] = False
