"""All that is measured of detections, as plain data that JSON can hold."""

import contextlib
import io
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from detectron2.evaluation.coco_evaluation import COCOevalMaxDets
from pycocotools.coco import COCO

from retina_focal.errors import UserError
from retina_focal.evaluation import operating_points
from retina_focal.evaluation.bootstrap import LEVEL, drawn_ap, draws, interval, metrics
from retina_focal.evaluation.calibration import Reliability, cross_fitted, folds, reliability
from retina_focal.evaluation.detections import Evaluated, collect
from retina_focal.evaluation.evaluators import COCO_LIMIT
from retina_focal.evaluation.hotcoco_evaluator import box_ap, results_array
from retina_focal.evaluation.matches import Matches, match
from retina_focal.evaluation.mistakes import (
    BACKGROUND,
    confusion,
    error_types,
    kept_at,
    suspected_labels,
    worst_images,
)
from retina_focal.evaluation.operating_points import OperatingPoints
from retina_focal.evaluation.precision_recall import (
    RECALLS,
    average_precision,
    curves,
    interpolated_precision,
)

DEFAULT_THRESHOLD = 0.5  # score, where no operating point is chosen
Errors = tuple[float | None, float | None]  # of calibration, before and after; None: no detection
SIZES = ("APs", "APm", "APl")  # COCO's areas: below 32^2, below 96^2, above, in pixels


@dataclass(frozen=True)
class Subject:
    """Detections on a dataset: of a run, or of a file of results."""

    label: str
    data: str  # name of the dataset
    dataset: dict  # ground truth in COCO format
    results: Sequence[dict]  # in COCO format
    limit: int = 0  # detections per image and class that count; 0: see `limit_of`

    def __post_init__(self) -> None:
        if not self.limit:
            object.__setattr__(self, "limit", limit_of(self.results))

    @cached_property
    def evaluated(self) -> Evaluated:
        return collect(self.dataset, self.results, self.limit)

    @cached_property
    def matches(self) -> Matches:
        return match(self.evaluated)

    @cached_property
    def ap(self) -> np.ndarray:
        """(T, K) in [0, 1]."""
        return average_precision(self.evaluated, self.matches)


def limit_of(results: Sequence[dict]) -> int:
    """Detections that count: COCO's 100, or as many as the image with the most has."""
    return max([COCO_LIMIT, *Counter(x["image_id"] for x in results).values()])


def measure(
    subject: Subject,
    points: OperatingPoints | None = None,
    same_dataset: bool = False,
    num_draws: int = 1000,
    seed: int = 0,
) -> dict:
    """The report of one run or file.

    Args:
        points: without them a score of 0.5 counts.
        same_dataset: whether they were chosen on this dataset, so that their maps know it.
        num_draws: of images, for the intervals.
    Returns:
        "label", "dataset", "images", "boxes", "detections", "detections_counted";
        "metrics" and "intervals" (95%) by name, in percent, None where there is no box, and the
        latter where there is one image;
        "classes" by name, each with its AP, also by size, its boxes, "point" (threshold and what
        it gives here, as shares in [0, 1]), "best_f1" and calibration error "ece" (before, after;
        None without detections);
        "precision_recall"; "confusion"; "errors" (None without hotcoco); "calibration";
        "operating_points" (rule and dataset, None without); "suspected_labels"; "worst_images".
    """
    evaluated, matches = subject.evaluated, subject.matches
    sizes = _sizes(subject)
    named = _floats(metrics(subject.ap, evaluated.classes)) | {x: y[0] for x, y in sizes.items()}
    drawn = drawn_ap(evaluated, matches, draws(len(evaluated.images), num_draws, seed))
    several = len(evaluated.images) > 1  # one gives the same in each draw, which tells nothing
    named_draws = metrics(drawn, evaluated.classes)
    intervals = {k: interval(x) if several else None for k, x in named_draws.items()}
    thresholds = points.thresholds if points else {}
    kept = kept_at(evaluated, thresholds, DEFAULT_THRESHOLD)
    calibration, errors_of_classes = _calibration(subject, None if same_dataset else points)
    return {
        "label": subject.label,
        "dataset": subject.data,
        "images": len(evaluated.images),
        "boxes": int(evaluated.num_boxes.sum()),
        "detections": len(subject.results),
        "detections_counted": subject.limit,
        "metrics": named,
        "intervals": intervals,
        "classes": _classes(subject, thresholds, sizes, errors_of_classes),
        "precision_recall": _precision_recall(subject),
        "confusion": {
            "iou": 0.5,
            "classes": [*evaluated.classes, BACKGROUND],
            "counts": confusion(kept).tolist(),
        },
        "errors": _error_types(subject),
        "calibration": calibration,
        "operating_points": points
        and {
            "rule": points.content.get("rule"),
            "dataset": points.content.get("dataset"),
        },
        "suspected_labels": suspected_labels(evaluated),
        "worst_images": worst_images(kept),
    }


def compare(first: Subject, second: Subject, num_draws: int = 1000, seed: int = 0) -> dict:
    """The differences of two runs on one dataset, with intervals of the same drawn images.

    Returns:
        Of each metric "first", "second", "difference" (second minus first, in percentage points),
        its "interval" (95%), and "better": the share of the draws in which the second is higher.
    Raises:
        UserError: they are of other images or classes.
    """
    if [x["id"] for x in first.dataset["images"]] != [
        x["id"] for x in second.dataset["images"]
    ] or first.evaluated.classes != second.evaluated.classes:
        raise UserError(
            f"{first.label} and {second.label} are of other images or classes, so that they can't "
            "be compared; name one dataset for both: --data DATA"
        )
    limit = max(first.limit, second.limit)
    first, second = replace(first, limit=limit), replace(second, limit=limit)
    classes = first.evaluated.classes
    weights = draws(len(first.evaluated.images), num_draws, seed)
    values, drawn = [], []
    for subject in (first, second):
        values.append(_floats(metrics(subject.ap, classes)))
        drawn.append(metrics(drawn_ap(subject.evaluated, subject.matches, weights), classes))
    rows = {}
    for name, value in values[0].items():
        difference = drawn[1][name] - drawn[0][name]
        known = difference[~np.isnan(difference)] if len(first.evaluated.images) > 1 else []
        other = values[1][name]
        rows[name] = {
            "first": value,
            "second": other,
            "difference": None if None in (value, other) else other - value,
            "interval": interval(known) if len(known) else None,
            "better": float((known > 0).mean()) if len(known) else None,
        }
    about = {"first": first.label, "second": second.label, "dataset": first.data}
    about |= {"draws": num_draws, "seed": seed}
    return {**about, "level": LEVEL, "images": len(first.evaluated.images), "metrics": rows}


def coco_summary(subject: Subject) -> COCOevalMaxDets:
    """By hotcoco, or where that is not installed by pycocotools, whose numbers are the same."""
    limits = [1, 10, subject.limit]
    with contextlib.redirect_stdout(io.StringIO()):
        with contextlib.suppress(UserError):
            return box_ap(subject.dataset, results_array(subject.results), limits)
        truth = COCO()
        truth.dataset = subject.dataset
        truth.createIndex()
        found = truth.loadRes([dict(x) for x in subject.results])
        measured = COCOevalMaxDets(truth, found, "bbox")
        measured.params.maxDets = limits
        measured.evaluate()
        measured.accumulate()
        measured.summarize()
    return measured


def _sizes(subject: Subject) -> dict[str, list[float | None]]:
    """AP of small, medium and large boxes, in percent: of all classes, then of each."""
    classes = subject.evaluated.classes
    if not subject.results:
        return {name: [None] * (len(classes) + 1) for name in SIZES}
    precision = coco_summary(subject).eval["precision"][..., -1]  # (T, R, K, areas)
    found = {}
    for area, name in enumerate(SIZES, start=1):
        parts = [precision[:, :, k, area] for k in range(len(classes))]
        parts = [part[part > -1] for part in parts]
        of_all = np.concatenate(parts)
        found[name] = [_number(100 * x.mean()) if len(x) else None for x in (of_all, *parts)]
    return found


def _classes(subject: Subject, thresholds: dict, sizes: dict, errors: dict[str, Errors]) -> dict:
    drawn = curves(subject.evaluated, subject.matches)
    rows = {}
    for label, (name, curve) in enumerate(zip(subject.evaluated.classes, drawn, strict=True)):
        threshold = thresholds.get(name, DEFAULT_THRESHOLD)
        before, after = errors[name]
        ap = 100 * subject.ap[:, label]
        rows[name] = {
            "boxes": curve.num_boxes,
            **_floats({"AP": ap.mean(), "AP50": ap[0], "AP75": ap[5]}),
            **{size: x[label + 1] for size, x in sizes.items()},
            "point": {
                "threshold": _number(threshold),
                "chosen": name in thresholds,
                **operating_points.at_threshold(curve, threshold),
            },
            "best_f1": operating_points.point_of(curve, operating_points.choose(curve, "f1")),
            "ece": {"before": before, "after": after},
        }
    return rows


def _precision_recall(subject: Subject) -> dict:
    """Of each class with boxes the highest precision at 101 recalls, at the IoU 0.5 and 0.75."""
    precision = interpolated_precision(subject.evaluated, subject.matches)
    some = subject.evaluated.num_boxes > 0
    return {
        "recall": RECALLS.tolist(),
        "classes": {
            name: {"0.5": precision[0, i].tolist(), "0.75": precision[5, i].tolist()}
            for i, name in enumerate(subject.evaluated.classes)
            if some[i]
        },
    }


def _error_types(subject: Subject) -> dict | None:
    if not subject.results:
        return None
    try:
        return error_types(subject.dataset, subject.results, subject.limit)
    except UserError:  # hotcoco is not installed
        return None


def _calibration(
    subject: Subject, points: OperatingPoints | None
) -> tuple[dict, dict[str, Errors]]:
    """Calibration of all classes together, and the error of each class before and after.

    The maps are those of the operating points, which are of another dataset; without them, maps
    that are made of other images of this one.
    """
    evaluated, matches = subject.evaluated, subject.matches
    found, counted = evaluated.found, ~matches.ignored[0]
    before, right = found.score, matches.right[0]
    after = before.copy()
    fold = folds(len(evaluated.images))[found.image]
    errors = {}
    for label, name in enumerate(evaluated.classes):
        mine = counted & (found.label == label)
        if points is None:
            after[mine] = cross_fitted(before[mine], right[mine], fold[mine])
        else:
            after[mine] = points.calibrate(before[mine], [name] * int(mine.sum()))
        pair = (reliability(x[mine], right[mine]).ece for x in (before, after))
        errors[name] = tuple(pair)
    by = "cross-fitted" if points is None else f"maps of {points.content.get('dataset')}"
    whole = {
        key: _bins(reliability(x[counted], right[counted]))
        for key, x in (("before", before), ("after", after))
    }
    return {"by": by, **whole}, errors


def _bins(found: Reliability) -> dict:
    return {
        "ece": found.ece,
        "count": found.count.tolist(),
        "mean": found.mean.tolist(),
        "right": found.right.tolist(),
    }


def _floats(named: dict[str, np.ndarray]) -> dict[str, float | None]:
    return {name: _number(x) for name, x in named.items()}


def _number(value: float) -> float | None:
    """The number, or None where JSON can't write it."""
    return float(value) if math.isfinite(value) else None
