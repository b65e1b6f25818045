"""The evaluator is that of the dataset's type."""

import json
import math
import re

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes, BoxMode, Instances

from retina_focal.data.coco import coco_file
from retina_focal.data.registration import register_coco_json
from retina_focal.errors import UserError
from retina_focal.evaluation import evaluators


@pytest.fixture
def dataset():
    yield MetadataCatalog.get("typed")
    MetadataCatalog.remove("typed")


@pytest.mark.parametrize(
    ("evaluator_type", "name"),
    [
        ("coco", "COCOEvaluator"),
        ("lvis", "LVISEvaluator"),
        ("pascal_voc", "PascalVOCDetectionEvaluator"),
    ],
)
def test_each_type_of_dataset_has_its_own_evaluator(dataset, evaluator_type, name, monkeypatch):
    dataset.evaluator_type = evaluator_type
    for each in ("COCOEvaluator", "LVISEvaluator", "PascalVOCDetectionEvaluator"):
        monkeypatch.setattr(
            evaluators, each, lambda *args, each=each, **options: (each, args, options)
        )
    output = {} if evaluator_type == "pascal_voc" else {"output_dir": "out"}
    assert evaluators.build_evaluator("typed", "out") == (name, ("typed",), output)


def test_a_type_without_an_evaluator_is_refused_in_words(dataset):
    dataset.evaluator_type = "sem_seg"
    with pytest.raises(UserError, match="'typed' has evaluator_type 'sem_seg'; expected coco"):
        evaluators.build_evaluator("typed", "out")


def test_more_detections_than_cocos_100_all_count(tmp_path):
    """150 boxes of one picture, all found: with COCO's limit two thirds of them would."""
    boxes = [[k % 15 * 10, k // 15 * 12, 8, 8] for k in range(150)]
    annotations = [
        {"id": i, "image_id": 1, "category_id": 1, "bbox": box, "area": 64, "iscrowd": 0}
        for i, box in enumerate(boxes, start=1)
    ]
    content = {
        "info": {},
        "images": [{"id": 1, "file_name": "a.png", "height": 128, "width": 160}],
        "annotations": annotations,
        "categories": [{"id": 1, "name": "cell"}],
    }
    (tmp_path / "a.json").write_text(json.dumps(content))
    register_coco_json("crowded", str(tmp_path / "a.json"), str(tmp_path))
    corners = [[x, y, x + w, y + h] for x, y, w, h in boxes]
    found = Instances((128, 160), pred_boxes=Boxes(torch.tensor(corners).float()))
    found.scores, found.pred_classes = torch.linspace(0.9, 0.5, 150), torch.zeros(150).long()
    aps = []
    try:
        for limit in (100, 300):
            evaluator = evaluators.build_evaluator("crowded", None, limit)
            evaluator.reset()
            evaluator.process([{"image_id": 1}], [{"instances": found}])
            aps.append(evaluator.evaluate()["bbox"]["AP"])
    finally:
        DatasetCatalog.remove("crowded")
        MetadataCatalog.remove("crowded")
    assert aps[0] < 70 and aps[1] > 99.9


def test_ground_truth_that_is_not_finite_is_refused_whoever_registered_it(tmp_path):
    """detectron2 writes the records of any dataset as a json of COCO."""
    box = {"bbox": [1, 2, math.nan, 4], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 0}
    record = {"file_name": "a.png", "image_id": 1, "height": 9, "width": 9, "annotations": [box]}
    DatasetCatalog.register("of_functions", lambda: [record])
    MetadataCatalog.get("of_functions").set(evaluator_type="coco", thing_classes=["cell"])
    try:
        with pytest.raises(UserError, match=r"annotations\[0\] \(id 1\): bbox \[1.*nan"):
            evaluators.build_evaluator("of_functions", str(tmp_path))
    finally:
        DatasetCatalog.remove("of_functions")
        MetadataCatalog.remove("of_functions")


def test_what_can_not_be_trained_on_can_be_measured_with(tmp_path):
    """A test set of which nobody has annotated anything."""
    image = {"id": 1, "file_name": "a.png", "height": 9, "width": 9}
    content = {"images": [image], "annotations": [], "categories": [{"id": 1, "name": "cell"}]}
    (tmp_path / "a.json").write_text(json.dumps(content))
    register_coco_json("bare", str(tmp_path / "a.json"), str(tmp_path))
    try:
        file = coco_file("bare")
        with pytest.raises(UserError, match=r"'bare': .*can't be used"):
            file.refuse("bare", trained_on=True)
        assert evaluators.build_evaluator("bare", str(tmp_path))
    finally:
        DatasetCatalog.remove("bare")
        MetadataCatalog.remove("bare")


NAN = math.nan


@pytest.mark.parametrize(
    ("numbers", "words"),
    [
        ({"AP": NAN, "AP50": NAN}, "no box to measure with, or no detection"),
        ({"AP": 5.0, "APs": 1.0, "AP-cat": NAN, "AP-dog": 5.0}, "1 classes have no box .*: cat"),
        ({"AP": 5.0, "APs": NAN, "APl": 5.0}, "APs nan: no box of that size"),
        ({"AP": 5.0, "APs": 5.0, "AP-cat": 5.0}, None),
    ],
)
def test_a_number_that_is_nan_is_explained(numbers, words, caplog):
    evaluators.explain_missing({"bbox": numbers})
    evaluators.explain_missing({"first": {"bbox": numbers}})
    assert len(caplog.records) == (0 if words is None else 2)
    assert all(re.search(words, record.getMessage()) for record in caplog.records)
