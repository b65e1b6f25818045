"""hotcoco computes what pycocotools does."""

import importlib
import json
import time

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes, Instances
from made_detections import CLASSES, made, of_pycocotools

from retina_focal.data.registration import register_coco_json
from retina_focal.errors import UserError
from retina_focal.evaluation.evaluators import build_evaluator
from retina_focal.evaluation.hotcoco_evaluator import box_ap, results_array

pytest.importorskip("hotcoco", reason="hotcoco is not installed: make setup")
EXACT = 1e-12


@pytest.mark.parametrize("seed", range(8))
def test_every_number_is_that_of_pycocotools(seed):
    """With crowds, three areas, tied scores, and more than 100 boxes of a class in an image."""
    limits = [1, 10, 300 if seed % 4 == 1 else 100]
    many = 900 if seed % 4 < 2 else 40
    dataset, results = made(seed, 8, many, digits=2 if seed % 2 else 9)
    expected = of_pycocotools(dataset, results, limits)
    found = box_ap(dataset, results_array(results), limits)
    np.testing.assert_allclose(found.stats, expected.stats, rtol=0, atol=EXACT)
    for name in ("precision", "recall"):
        np.testing.assert_allclose(found.eval[name], expected.eval[name], rtol=0, atol=EXACT)
    if many == 900:
        counts = np.unique(results_array(results)[:, [0, 6]], axis=0, return_counts=True)[1]
        assert counts.max() > 100


@pytest.fixture
def registered(tmp_path):
    dataset, results = made(3)
    (tmp_path / "a.json").write_text(json.dumps(dataset))
    register_coco_json("made", str(tmp_path / "a.json"), str(tmp_path))
    yield dataset, results
    DatasetCatalog.remove("made")
    MetadataCatalog.remove("made")


def evaluated(library: str, dataset: dict, results: list[dict], folder: str | None = None) -> dict:
    evaluator = build_evaluator("made", folder, library=library)
    evaluator.reset()
    for image in dataset["images"]:
        mine = [x for x in results if x["image_id"] == image["id"]]
        found = Instances((300, 300))
        boxes = torch.tensor([x["bbox"] for x in mine]).reshape(-1, 4)
        found.pred_boxes = Boxes(torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], dim=1))
        found.scores = torch.tensor([x["score"] for x in mine])
        found.pred_classes = torch.tensor([x["category_id"] // 10 - 1 for x in mine]).long()
        evaluator.process([{"image_id": image["id"]}], [{"instances": found}])
    return evaluator.evaluate()


def test_the_evaluator_gives_and_writes_what_detectron2s_does(registered, tmp_path):
    found, expected = (
        evaluated(x, *registered, str(tmp_path / x)) for x in ("hotcoco", "pycocotools")
    )
    assert found["bbox"] == pytest.approx(expected["bbox"], rel=0, abs=100 * EXACT)
    assert {f"AP-{name}" for name in CLASSES} < set(found["bbox"])
    written = [
        json.loads((tmp_path / x / "coco_instances_results.json").read_text())
        for x in ("hotcoco", "pycocotools")
    ]
    assert written[0] == written[1] and len(written[0]) == len(registered[1])


def test_no_detection_at_all_is_what_it_is_with_pycocotools(registered):
    """nan, which `explain_missing` puts in words."""
    found = evaluated("hotcoco", registered[0], [])
    assert np.isnan(found["bbox"]["AP"])


def test_what_is_not_installed_is_said_before_anything_is_detected(registered, monkeypatch):
    def missing(name: str):
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(UserError, match=r"pip install hotcoco==.*or leave .*EVALUATOR"):
        build_evaluator("made", None, library="hotcoco")


def test_another_library_is_refused_in_words(registered):
    with pytest.raises(UserError, match=r"TEST\.EVALUATOR is 'fast'; expected one of pycocotools"):
        build_evaluator("made", None, library="fast")


@pytest.mark.slow
def test_5000_pictures_with_100_detections_take_a_40th_of_the_time():
    """Loading and evaluation, beside each other; run it with -s to see the seconds."""
    dataset, results = crowd_of(5000, 100)
    start = time.perf_counter()
    found = box_ap(dataset, results_array(results))
    between = time.perf_counter()
    expected = of_pycocotools(dataset, results, [1, 10, 100])
    seconds = (between - start, time.perf_counter() - between)
    print("hotcoco {:.2f} s, pycocotools {:.1f} s".format(*seconds))
    np.testing.assert_allclose(found.stats, expected.stats, rtol=0, atol=EXACT)
    assert seconds[1] >= 40 * seconds[0]


def crowd_of(num_images: int, num_detections: int) -> tuple[dict, list[dict]]:
    """As many boxes of 80 classes as COCO has, 7 per image, and detections around them."""
    draw = np.random.default_rng(0)
    boxes = np.concatenate(
        [draw.uniform(0, 400, (num_images, 7, 2)), draw.uniform(8, 200, (num_images, 7, 2))], axis=2
    )
    labels = draw.integers(1, 81, (num_images, 7))
    near = draw.integers(0, 7, (num_images, num_detections))
    rows = np.arange(num_images)[:, None]
    found = boxes[rows, near] * draw.uniform(0.8, 1.2, (num_images, num_detections, 4))
    scores = draw.random((num_images, num_detections))
    images = [
        {"id": i, "file_name": f"{i}.jpg", "width": 640, "height": 480} for i in range(num_images)
    ]
    annotations = [
        {"image_id": i, "category_id": c, "bbox": box, "area": box[2] * box[3], "iscrowd": 0}
        for i, (row, classes) in enumerate(zip(boxes.tolist(), labels.tolist(), strict=True))
        for box, c in zip(row, classes, strict=True)
    ]
    annotations = [{**x, "id": i} for i, x in enumerate(annotations, start=1)]
    results = [
        {"image_id": i, "category_id": c, "bbox": box, "score": score}
        for i, (row, classes, values) in enumerate(
            zip(found.tolist(), labels[rows, near].tolist(), scores.tolist(), strict=True)
        )
        for box, c, score in zip(row, classes, values, strict=True)
    ]
    categories = [{"id": i, "name": str(i)} for i in range(1, 81)]
    dataset = {"images": images, "annotations": annotations, "categories": categories}
    return {"info": {}, **dataset}, results
