"""The score of each class above which a detection counts, and what a score is worth.

Both are chosen on a dataset that is kept for choices, and lie in `operating_points.json` beside the
checkpoint:

    {"format": 1,
     "dataset": "bccd_val", "images": 73, "weights": "model_final.pth", "iou": 0.5,
     "rule": "f1", "classes": {
       "RBC": {"threshold": 0.47, "precision": 0.82, "recall": 0.93, "f1": 0.87,
               "false_positives_per_image": 2.3, "boxes": 802,
               "calibration": {"method": "platt", "scores": [...], "values": [...]}}}}

A threshold is of the model's own scores, not of calibrated ones; a detection of that score or more
counts. It is null where no score reaches the rule: then no detection of the class counts. A class
without a box in the dataset is left out. A calibrated score lies on the straight lines between the
points (scores, values).
"""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from retina_focal.errors import UserError
from retina_focal.evaluation.calibration import Map, fit, folds
from retina_focal.evaluation.detections import Evaluated
from retina_focal.evaluation.matches import Matches
from retina_focal.evaluation.precision_recall import Curve, curves
from retina_focal.files import open_regular, write_whole

FILE = "operating_points.json"
FORMAT = 1


@dataclass(frozen=True)
class OperatingPoints:
    """What `operating_points.json` says of a model."""

    thresholds: dict[str, float]  # by class; infinity where no score reaches the rule
    maps: dict[str, Map]
    content: dict  # of the file

    def calibrate(self, scores: np.ndarray, classes: Sequence[str]) -> np.ndarray:
        """(D,) probabilities in [0, 1] that detections are right.

        Args:
            scores: (D,) of the model.
            classes: (D,) names; the scores of a class that the file lacks stay as they are.
        """
        names = np.asarray(classes, dtype=object)
        calibrated = np.array(scores, dtype=np.float64)
        for name, mapped in self.maps.items():
            mine = names == name
            calibrated[mine] = mapped(calibrated[mine])
        return calibrated


def choose(curve: Curve, rule: str) -> int | None:
    """The point of a curve that a rule chooses, None where there is none.

    Args:
        rule: see `describe`.
    """
    kind, _, value = rule.partition("=")
    if not len(curve.score):
        return None
    if kind == "f1":
        best = int(np.argmax(curve.f1))  # of equals the highest score
        return best if curve.right[best] else None
    if kind == "precision":
        reached = curve.precision >= float(value)
    else:
        reached = curve.wrong <= float(value) * curve.num_images
    reached &= curve.right > 0
    if not reached.any():
        return None
    return int(np.argmax(np.where(reached, curve.right, -1)))


def check_rule(rule: str) -> str:
    """The rule, where it is one.

    Raises:
        UserError: it is none of f1, precision=P and fppi=F, or lacks its number.
    """
    kind, mark, value = rule.partition("=")
    if kind == "f1" and not mark:
        return rule
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if (kind == "precision" and 0 < number <= 1) or (kind == "fppi" and 0 < number < math.inf):
        return rule
    raise UserError(f"the rule '{rule}' is unknown; expected f1, precision=0.9 or fppi=0.5")


def describe(rule: str) -> str:
    """A rule in words."""
    kind, _, value = rule.partition("=")
    return {
        "f1": "the highest F1",
        "precision": f"the highest recall with a precision of at least {value}",
        "fppi": f"the highest recall with at most {value} false positives per image",
    }[kind]


def point_of(curve: Curve, index: int | None) -> dict:
    """What a curve says at one of its points, as JSON."""
    threshold = None if index is None else float(curve.score[index])
    right, wrong = (0, 0) if index is None else (int(curve.right[index]), int(curve.wrong[index]))
    return {"threshold": threshold, **measures(right, wrong, curve.num_boxes, curve.num_images)}


def measures(right: int, wrong: int, num_boxes: int, num_images: int) -> dict:
    """Precision, recall and F1, in [0, 1], None where they are 0 / 0."""
    found = right + wrong
    return {
        "precision": right / found if found else None,
        "recall": right / num_boxes if num_boxes else None,
        "f1": 2 * right / (num_boxes + found) if num_boxes + found else None,
        "false_positives_per_image": wrong / num_images if num_images else None,
        "boxes": num_boxes,
    }


def at_threshold(curve: Curve, threshold: float) -> dict:
    """`measures` of the detections of a curve with a score of `threshold` or more."""
    kept = int(np.searchsorted(-curve.score, -threshold, "right"))
    right, wrong = (int(curve.right[kept - 1]), int(curve.wrong[kept - 1])) if kept else (0, 0)
    return measures(right, wrong, curve.num_boxes, curve.num_images)


def make(evaluated: Evaluated, matches: Matches, rule: str, dataset: str, weights: str) -> dict:
    """The content of `operating_points.json`.

    Args:
        evaluated: of the dataset that choices are made on.
        matches: at the IoU 0.5 first.
        rule: see `check_rule`.
        weights: name of the file beside which it is written.
    """
    fold = folds(len(evaluated.images))[evaluated.found.image]
    counted = ~matches.ignored[0]
    classes = {}
    for label, curve in enumerate(curves(evaluated, matches)):
        if not curve.num_boxes:
            continue
        mine = counted & (evaluated.found.label == label)
        mapped = fit(evaluated.found.score[mine], matches.right[0, mine], fold[mine])
        calibration = {"method": mapped.method, "scores": mapped.scores.tolist()}
        classes[evaluated.classes[label]] = {
            **point_of(curve, choose(curve, rule)),
            "calibration": {**calibration, "values": mapped.values.tolist()},
        }
    about = {"format": FORMAT, "dataset": dataset, "images": len(evaluated.images)}
    return {**about, "weights": weights, "iou": 0.5, "rule": rule, "classes": classes}


def write(folder: str | Path, content: dict) -> Path:
    """Write `operating_points.json` whole into a folder; its path."""
    path = Path(folder, FILE)
    text = json.dumps(content, indent=1)
    # A list of numbers in one line, for whoever reads the thresholds.
    text = re.sub(r"\[[^\[\]]*\]", lambda x: " ".join(x[0].split()), text)
    write_whole(path, text + "\n")
    return path


def read(folder: str | Path) -> OperatingPoints | None:
    """The content of the folder's `operating_points.json`, None where there is none.

    Raises:
        UserError: it can't be read, or is no such file; what is wrong is named.
    """
    path = Path(folder, FILE)
    if not path.exists():
        return None
    with open_regular(path) as file:
        text = file.read()
    try:
        content = json.loads(text)
        found = content.get("format") if isinstance(content, dict) else None
        if found != FORMAT:
            raise ValueError(f"its format is {found!r}, expected {FORMAT}")
        return parse(content)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        reason = f"{error.args[0]} is missing" if isinstance(error, KeyError) else error
        raise UserError(
            f"'{path}' can't be used: {reason}; delete it, or write it anew: retina-focal evaluate "
            f"{folder}"
        ) from error


def parse(content: dict) -> OperatingPoints:
    """What the content of a file says; raises ValueError, TypeError or KeyError where it lies."""
    thresholds, maps = {}, {}
    for name, entry in content["classes"].items():
        threshold = entry["threshold"]
        thresholds[name] = math.inf if threshold is None else float(threshold)
        calibration = entry["calibration"]
        scores, values = (
            np.array(calibration[key], dtype=np.float64) for key in ("scores", "values")
        )
        is_map = scores.ndim == 1 and scores.shape == values.shape and len(scores) > 0
        if not is_map or math.isnan(thresholds[name]):
            raise ValueError(f"class '{name}' has no threshold or no map")
        for numbers, steps in ((scores, np.diff(scores) > 0), (values, np.diff(values) >= 0)):
            if not (steps.all() and numbers[0] >= 0 and numbers[-1] <= 1):
                raise ValueError(f"class '{name}' has a calibration that does not rise in [0, 1]")
        maps[name] = Map(str(calibration["method"]), scores, values)
    return OperatingPoints(thresholds, maps, content)
