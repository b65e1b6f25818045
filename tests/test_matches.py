"""Our matches are COCO's, and the AP that follows from them is pycocotools'."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_detections import made, of_pycocotools

from retina_focal.evaluation import matches as matches_module
from retina_focal.evaluation.detections import collect
from retina_focal.evaluation.matches import THRESHOLDS, match
from retina_focal.evaluation.precision_recall import (
    average_precision,
    curves,
    interpolated_precision,
)

EXACT = 1e-12


@pytest.mark.parametrize("seed", range(6))
def test_the_precision_of_our_matches_is_pycocotools(seed, monkeypatch):
    """With crowds, tied scores and more than 100 detections of a class in an image."""
    monkeypatch.setattr(matches_module, "BLOCK", 50)
    dataset, results = made(seed, 8, 900 if seed < 2 else 40, digits=2 if seed % 2 else 9)
    evaluated = collect(dataset, results)
    found = interpolated_precision(evaluated, match(evaluated))
    expected = of_pycocotools(dataset, results, [1, 10, 100]).eval["precision"][:, :, :, 0, 2]
    np.testing.assert_allclose(found, expected.transpose(0, 2, 1), rtol=0, atol=EXACT)


def dataset_of(boxes: list, crowds: list[bool], classes: list[int] | None = None) -> dict:
    classes = classes or [1] * len(boxes)
    rows = zip(boxes, crowds, classes, strict=True)
    return {
        "images": [{"id": 1, "file_name": "a.png", "width": 100, "height": 100}],
        "categories": [{"id": i, "name": f"class {i}"} for i in (1, 2)],
        "annotations": [
            {"id": i, "image_id": 1, "category_id": c, "bbox": box, "iscrowd": int(crowd)}
            for i, (box, crowd, c) in enumerate(rows, start=1)
        ],
    }


def results_of(*rows: tuple) -> list[dict]:
    return [{"image_id": 1, "category_id": c, "bbox": b, "score": s} for c, b, s in rows]


BOX, SMALLER, FAR = [10, 10, 20, 20], [10, 10, 20, 15], [60, 60, 20, 20]  # IoU 0.75, 0


@pytest.mark.parametrize(
    ("results", "ap"),
    [
        # One of two boxes found: precision 1 up to the recall 1/2, 51 of the 101 points.
        (results_of((1, BOX, 0.9)), 51 / 101),
        # A false one first: precision 1/2 at the recall 1/2, 2/3 at 1, which is taken for both.
        (results_of((1, [0, 0, 5, 5], 0.9), (1, BOX, 0.8), (1, FAR, 0.7)), 2 / 3),
        (results_of((1, BOX, 0.9), (1, BOX, 0.8), (1, FAR, 0.7)), (51 + 50 * 2 / 3) / 101),
        (results_of((2, BOX, 0.9), (2, FAR, 0.8)), 0),
        ([], 0),
    ],
)
def test_the_ap_of_two_boxes_is_known(results, ap):
    evaluated = collect(dataset_of([BOX, FAR], [False, False]), results)
    found = average_precision(evaluated, match(evaluated))
    np.testing.assert_allclose(found[:, 0], ap, rtol=0, atol=EXACT)
    assert np.isnan(found[:, 1]).all()


def test_a_match_ends_where_the_iou_does():
    evaluated = collect(dataset_of([BOX], [False]), results_of((1, SMALLER, 0.9)))
    assert (match(evaluated).box[:, 0] == np.where(THRESHOLDS <= 0.75, 0, -1)).all()
    assert match(evaluated, np.array([0.75])).box[0, 0] == 0


def test_a_crowd_counts_neither_for_nor_against_and_is_never_used_up():
    results = results_of((1, FAR, 0.9), (1, [62, 62, 5, 5], 0.8), (1, BOX, 0.7))
    evaluated = collect(dataset_of([BOX, FAR], [False, True]), results)
    matches = match(evaluated)
    assert matches.ignored[0].tolist() == [True, True, False]
    assert average_precision(evaluated, matches)[0, 0] == pytest.approx(1, abs=EXACT)
    (curve, _) = curves(evaluated, matches)
    assert (curve.right.tolist(), curve.wrong.tolist()) == ([1], [0])


def test_without_classes_the_nearest_box_of_any_is_taken():
    evaluated = collect(dataset_of([BOX, SMALLER], [False] * 2, [1, 2]), results_of((1, BOX, 0.9)))
    assert match(evaluated, by_class=False).box[0, 0] == 0
    evaluated = collect(dataset_of([BOX], [False], [2]), results_of((1, SMALLER, 0.9)))
    assert match(evaluated).box[0, 0] == -1
    assert match(evaluated, by_class=False).box[0, 0] == 0


def test_a_curve_takes_equal_scores_at_once():
    """Half of two equal scores is no threshold: F1 is 2 x 2 / (2 + 3) at 0.5, 2 / 3 at 0.9."""
    results = results_of((1, BOX, 0.9), (1, [0, 0, 5, 5], 0.5), (1, FAR, 0.5))
    evaluated = collect(dataset_of([BOX, FAR], [False] * 2), results)
    curve, other = curves(evaluated, match(evaluated))
    assert curve.score.tolist() == [0.9, 0.5]
    assert (curve.right.tolist(), curve.wrong.tolist()) == ([1, 2], [0, 1])
    assert curve.recall.tolist() == [0.5, 1] and curve.precision.tolist() == [1, 2 / 3]
    assert curve.f1.tolist() == [2 / 3, 4 / 5]
    assert len(other.score) == 0 and other.num_boxes == 0


@settings(max_examples=60)
@given(st.integers(0, 10**6), st.integers(1, 3), st.integers(0, 3), st.booleans())
def test_matches_are_those_of_a_loop(seed, num_images, digits, by_class):
    """Written down as the rule is read: one detection and one threshold after another."""
    dataset, results = made(seed, num_images, 12, digits)
    for record in [*dataset["annotations"], *results]:  # equal IoUs
        record["bbox"] = [40 * (x // 40) + 1 for x in record["bbox"]]
    evaluated = collect(dataset, results)
    truth, found = evaluated.truth, evaluated.found
    thresholds = np.array([0.1, 0.5, 0.9, 1.0])
    for t, row in zip(thresholds, match(evaluated, thresholds, by_class).box, strict=True):
        used = set()
        for d in range(len(found.image)):
            best = (False, 0.0, -1)  # no crowd, IoU, number
            for g in range(len(truth.image)):
                same = truth.label[g] == found.label[d] or not by_class
                if truth.image[g] != found.image[d] or not same or g in used:
                    continue
                x, y, w, h = found.boxes[d]
                a, b, c, e = truth.boxes[g]
                both = max(min(x + w, a + c) - max(x, a), 0) * max(min(y + h, b + e) - max(y, b), 0)
                iou = both / (w * h if truth.crowd[g] else w * h + c * e - both)
                if iou >= t:
                    best = max(best, (not truth.crowd[g], iou, g))
            assert row[d] == best[2]
            if best[0]:
                used.add(best[2])
