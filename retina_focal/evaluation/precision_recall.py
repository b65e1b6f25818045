"""Precision and recall of each class, and the AP that is their summary."""

from dataclasses import dataclass

import numpy as np

from retina_focal.evaluation.detections import Evaluated
from retina_focal.evaluation.matches import Matches

RECALLS = np.linspace(0, 1, 101)  # where COCO's AP reads the precision
EPS = np.spacing(1.0)  # pycocotools'


@dataclass(frozen=True)
class Curve:
    """Right and wrong detections of one class down to each of S scores, falling, no two equal."""

    score: np.ndarray  # (S,)
    right: np.ndarray  # (S,) detections with that score or more on a box of their own
    wrong: np.ndarray  # (S,) detections with that score or more on none
    num_boxes: int
    num_images: int

    @property
    def precision(self) -> np.ndarray:
        return self.right / (self.right + self.wrong)

    @property
    def recall(self) -> np.ndarray:
        """nan where there is no box."""
        return self.right / self.num_boxes if self.num_boxes else np.full(len(self.right), np.nan)

    @property
    def f1(self) -> np.ndarray:
        return 2 * self.right / (self.num_boxes + self.right + self.wrong)


def average_precision(evaluated: Evaluated, matches: Matches) -> np.ndarray:
    """(T, K) AP in [0, 1] at each threshold of the IoU; nan for a class without boxes."""
    num_boxes = evaluated.num_boxes
    precision = interpolated_precision(evaluated, matches)
    return np.where(num_boxes > 0, precision.mean(axis=2), np.nan)


def interpolated_precision(evaluated: Evaluated, matches: Matches) -> np.ndarray:
    """(T, K, 101) the highest precision at each recall of `RECALLS` or a higher one; 0 where the
    recall is not reached."""
    num_boxes = evaluated.num_boxes
    precision = np.zeros((len(matches.box), len(num_boxes), len(RECALLS)))
    for label, boxes in enumerate(num_boxes):
        if not boxes:
            continue
        mine = evaluated.found.label == label
        for t, (right, ignored) in enumerate(
            zip(matches.right[:, mine], matches.ignored[:, mine], strict=True)
        ):
            right_so_far = np.cumsum(right)
            all_so_far = np.cumsum(~ignored)
            highest = np.maximum.accumulate((right_so_far / (all_so_far + EPS))[::-1])[::-1]
            at = np.searchsorted(right_so_far / boxes, RECALLS)
            reached = at < len(highest)
            precision[t, label, reached] = highest[at[reached]]
    return precision


def curves(evaluated: Evaluated, matches: Matches, threshold: int = 0) -> list[Curve]:
    """The curve of each class at one of the matches' thresholds of the IoU."""
    found, num_images = evaluated.found, len(evaluated.images)
    counted = ~matches.ignored[threshold]
    made = []
    for label, num_boxes in enumerate(evaluated.num_boxes.tolist()):
        mine = counted & (found.label == label)
        score, is_right = found.score[mine], matches.right[threshold, mine]
        last = np.append(score[1:] != score[:-1], True)[: len(score)]
        right, all_found = np.cumsum(is_right)[last], np.arange(1, len(score) + 1)[last]
        made.append(Curve(score[last], right, all_found - right, num_boxes, num_images))
    return made
