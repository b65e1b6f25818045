"""Laws of the class filter."""

import itertools
import json
import logging

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import COCOEvaluator
from detectron2.structures import Boxes, Instances
from test_resume import small

from retina_focal.data.registration import register_coco_json, register_datasets, use_datasets
from retina_focal.errors import UserError

NUMBER = itertools.count()
CLASSES = "MODEL.RETINA_FOCAL.DATA.CLASSES"


@pytest.fixture
def name(data, tmp_path, monkeypatch) -> str:
    """Six pictures, each with a red and a blue rectangle; of the first picture the blue is gone."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    content = json.loads((data / "a.json").read_text())
    del content["annotations"][1]
    path = tmp_path / "a.json"
    path.write_text(json.dumps(content))
    name = f"filtered {next(NUMBER)}"
    register_coco_json(name, str(path), str(data))
    return name


def test_only_the_named_classes_are_trained_on_and_measured(name, tmp_path, caplog):
    cfg = small(tmp_path, name, **{CLASSES: ["blue"], "MODEL.RETINANET.NUM_CLASSES": 1})
    with caplog.at_level(logging.INFO):
        use_datasets(cfg, (name,), (name,))
        register_datasets(cfg)
    assert caplog.text.count("5 of 11 annotations are of DATA.CLASSES blue; the others") == 1
    assert MetadataCatalog.get(name).thing_classes == ["blue"]
    records = DatasetCatalog.get(name)
    assert [[x["category_id"] for x in r["annotations"]] for r in records] == [[]] + [[0]] * 5
    # A detector that finds the blue ones, and them alone, is perfect.
    evaluator = COCOEvaluator(name, output_dir=None)
    evaluator.reset()
    for record in records:
        boxes = [x["bbox"] for x in record["annotations"]]
        if not boxes:
            continue
        found = Instances((64, 96))
        found.pred_boxes = Boxes([[x, y, x + w, y + h] for x, y, w, h in boxes])
        found.pred_classes = found.pred_boxes.tensor.new_zeros(len(found), dtype=int)
        found.scores = found.pred_boxes.tensor.new_ones(len(found))
        evaluator.process([record], [{"instances": found}])
    assert evaluator.evaluate()["bbox"]["AP"] == pytest.approx(100)


def test_classes_are_numbered_as_they_are_named(name, tmp_path):
    use_datasets(small(tmp_path, name, **{CLASSES: ["blue", "red"]}), (name,))
    assert MetadataCatalog.get(name).thing_classes == ["blue", "red"]
    categories = [x["category_id"] for x in DatasetCatalog.get(name)[1]["annotations"]]
    assert categories == [1, 0]  # red and blue


@pytest.mark.parametrize(
    "classes, message",
    [
        (["blu"], "it has not blu; its classes are: red, blue"),
        (["blue", "blue"], "a name is there twice"),
    ],
)
def test_a_filter_that_can_not_be_is_refused(classes, message, name, tmp_path):
    with pytest.raises(UserError, match=message):
        register_datasets(small(tmp_path, name, **{CLASSES: classes}))


def test_without_the_key_nothing_is_filtered_and_a_second_filter_is_refused(name, tmp_path):
    json_file = MetadataCatalog.get(name).json_file
    register_datasets(small(tmp_path, name))
    assert MetadataCatalog.get(name).json_file == json_file
    register_datasets(small(tmp_path, name, **{CLASSES: ["red"]}))
    with pytest.raises(UserError, match="filtered, once"):
        register_datasets(small(tmp_path, name, **{CLASSES: ["blue"]}))


def test_a_dataset_without_a_box_of_them_is_refused(name, tmp_path, data):
    content = json.loads((data / "a.json").read_text())
    content["categories"].append({"id": 7, "name": "green"})
    path = tmp_path / "green.json"
    path.write_text(json.dumps(content))
    register_coco_json(f"{name} green", str(path), str(data))
    cfg = small(tmp_path, f"{name} green", **{CLASSES: ["green"]})
    with pytest.raises(UserError, match=r"has no box of DATA.CLASSES green; name others"):
        register_datasets(cfg)
