"""Kinds of errors, classes taken for each other, and labels to look at, on made cases."""

import numpy as np
import pytest
from made_detections import made
from test_matches import BOX, FAR, SMALLER, dataset_of, results_of

from retina_focal.evaluation import summary
from retina_focal.evaluation.detections import collect
from retina_focal.evaluation.mistakes import (
    confusion,
    error_types,
    kept_at,
    suspected_labels,
    worst_images,
)

NEAR = [20, 10, 20, 20]  # IoU 1/3 with BOX
NOTHING = [40, 85, 10, 10]


@pytest.mark.parametrize(
    ("kind", "results"),
    [
        ("Cls", results_of((2, BOX, 0.9), (1, FAR, 0.8))),
        ("Loc", results_of((1, NEAR, 0.9), (1, FAR, 0.8))),
        ("Both", results_of((2, NEAR, 0.97), (1, FAR, 0.8))),
        ("Dupe", results_of((1, BOX, 0.9), (1, BOX, 0.8), (1, FAR, 0.7))),
        ("Bkg", results_of((1, BOX, 0.9), (1, NOTHING, 0.8), (1, FAR, 0.7))),
        ("Miss", results_of((1, FAR, 0.8))),
    ],
)
def test_a_made_error_is_of_its_kind(kind, results):
    pytest.importorskip("hotcoco", reason="hotcoco is not installed: make setup")
    # A box of the second class, so that it has an AP; it is found.
    dataset = dataset_of([BOX, FAR, [0, 80, 9, 9]], [False] * 3, [1, 1, 2])
    results = results + results_of((2, [0, 80, 9, 9], 0.95))
    errors = error_types(dataset, results)
    # To TIDE a box is missed unless only the class, or only the place, of a detection is wrong.
    expected = {kind, "Miss"} if kind == "Both" else {kind}
    counts = {name: x["count"] for name, x in errors.items() if x["count"]}
    assert counts == dict.fromkeys(expected, 1)
    assert errors[kind]["dAP"] > 0


def test_errors_are_of_as_many_detections_as_count():
    pytest.importorskip("hotcoco", reason="hotcoco is not installed: make setup")
    boxes = [[k % 20 * 12, k // 20 * 12, 8, 8] for k in range(150)]
    dataset = dataset_of(boxes, [False] * 150)
    results = results_of(*((1, box, 0.9) for box in boxes))
    assert [error_types(dataset, results, x)["Miss"]["count"] for x in (100, 150)] == [50, 0]
    assert (
        summary.measure(summary.Subject("a", "b", dataset, results))["errors"]["Miss"]["count"] == 0
    )


def test_the_confusion_of_five_detections_is_known():
    dataset = dataset_of(
        [BOX, FAR, [0, 80, 9, 9], [80, 0, 20, 20]], [False, False, False, True], [1, 1, 2, 1]
    )
    results = results_of(
        (1, SMALLER, 0.9), (2, FAR, 0.8), (2, NOTHING, 0.7), (1, [82, 2, 9, 9], 0.6), (2, BOX, 0.1)
    )
    evaluated = collect(dataset, results)
    counts = confusion(kept_at(evaluated, {"class 2": 0.7}, 0.6))  # a score of 0.7 or 0.6 counts
    # rows: class 1, class 2, background; columns: class 1, class 2, missed
    assert counts.tolist() == [[1, 1, 0], [0, 0, 1], [0, 1, 0]]
    counts = confusion(kept_at(evaluated, {"class 2": 0.0}, 0.3))
    assert counts[2].tolist() == [0, 2, 0]


@pytest.mark.parametrize("seed", range(4))
def test_every_box_and_detection_is_in_the_confusion_once(seed):
    evaluated = kept_at(collect(*made(seed)), {"ant": 0.6}, 0.2)
    counts = confusion(evaluated)
    assert counts[:-1].sum(axis=1).tolist() == evaluated.num_boxes.tolist()
    found = np.bincount(evaluated.found.label, minlength=3)
    assert (counts[:, :-1].sum(axis=0) <= found).all()
    assert evaluated.found.score[evaluated.found.label == 0].min(initial=1) >= 0.6


@pytest.mark.parametrize("seed", range(4))
def test_without_crowds_the_confusion_is_hotcocos(seed):
    module = pytest.importorskip("hotcoco", reason="hotcoco is not installed: make setup")
    dataset, results = made(seed)
    dataset["annotations"] = [x for x in dataset["annotations"] if not x["iscrowd"]]
    truth = module.COCO(dataset)
    measured = module.COCOeval(truth, truth.load_res(results), "bbox")
    measured.evaluate()
    expected = measured.confusion_matrix(iou_thr=0.5, min_score=0.3)["matrix"]
    assert confusion(kept_at(collect(dataset, results), {}, 0.3)).tolist() == expected.tolist()


def test_a_suspected_label_is_of_its_kind():
    suspects = {
        "missing": (dataset_of([FAR], [False]), results_of((1, FAR, 0.9), (1, BOX, 0.8))),
        "class": (dataset_of([BOX], [False]), results_of((2, BOX, 0.8), (1, BOX, 0.3))),
        "box": (dataset_of([BOX], [False]), results_of((1, NEAR, 0.8), (1, [21, 10, 20, 20], 0.7))),
        "spurious": (dataset_of([BOX, FAR], [False] * 2), results_of((1, FAR, 0.9), (1, BOX, 0.2))),
    }
    for kind, (dataset, results) in suspects.items():
        (found,) = suspected_labels(collect(dataset, results))
        assert found["kind"] == kind and found["suspicion"] == pytest.approx(0.8)
        assert found["image_id"] == 1 and found["file_name"] == "a.png"
        assert (found["annotation_id"] is None) == (kind == "missing")
        assert (found["class"] is None) == (kind == "spurious")
        assert found["bbox"] == (NEAR if kind == "box" else BOX)


@pytest.mark.parametrize(
    ("dataset", "results"),
    [
        (
            dataset_of([BOX], [False]),
            results_of((1, BOX, 0.9), (2, BOX, 0.8)),
        ),  # surer of the label
        (dataset_of([BOX], [False]), results_of((1, NEAR, 0.9), (1, BOX, 0.8))),  # one that fits
        (dataset_of([BOX], [True]), results_of((2, BOX, 0.9))),
        (dataset_of([BOX], [False]), results_of((2, NEAR, 0.9))),  # on the box only in part
        (dataset_of([BOX], [True]), []),
        (dataset_of([], []), results_of((1, BOX, 0.4))),
        (dataset_of([], []), []),
        # Of a class that is never found, or has no other box.
        (dataset_of([BOX, FAR, [0, 80, 9, 9]], [False] * 3, [1, 2, 2]), results_of((1, BOX, 0.9))),
        (dataset_of([BOX], [False]), []),
    ],
)
def test_what_the_model_does_not_speak_against_is_no_suspect(dataset, results):
    assert suspected_labels(collect(dataset, results)) == []


def test_a_box_without_a_detection_is_suspect_as_far_as_its_class_is_found():
    boxes = [[x, 0, 10, 10] for x in range(0, 80, 20)]
    dataset = dataset_of([*boxes, [0, 50, 10, 10]], [False] * 4 + [True])
    found = results_of((1, boxes[0], 0.9), (1, boxes[1], 0.8), (1, boxes[2], 0.3))
    low, lowest = suspected_labels(collect(dataset, found))
    assert low["bbox"] == boxes[3] and low["suspicion"] == pytest.approx(2 / 3)
    assert lowest["bbox"] == boxes[2] and lowest["suspicion"] == pytest.approx(0.7 * 2 / 3)


def test_suspects_are_the_strongest_first_and_as_many_as_asked_for():
    evaluated = collect(*made(1))
    suspicions = [x["suspicion"] for x in suspected_labels(evaluated)]
    assert suspicions == sorted(suspicions, reverse=True) and len(suspicions) > 5
    assert suspected_labels(evaluated, count=3) == suspected_labels(evaluated)[:3]


def test_the_image_with_the_most_mistakes_is_first():
    dataset, results = made(2)
    evaluated = kept_at(collect(dataset, results), {}, 0.5)
    worst = worst_images(evaluated, count=100)
    mistakes = [x["wrong"] + x["missed"] for x in worst]
    assert mistakes == sorted(mistakes, reverse=True) and min(mistakes) > 0
    for row in worst:
        boxes = [
            x for x in dataset["annotations"]
            if x["image_id"] == row["image_id"] and not x["iscrowd"]
        ]  # fmt: skip
        assert row["right"] + row["missed"] == len(boxes)
    assert worst_images(kept_at(collect(dataset, []), {}, 0.5))[0]["wrong"] == 0
