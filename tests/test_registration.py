"""Datasets from the config: registered once, refused in words."""

import json
from pathlib import Path

import pytest
from detectron2.config import get_cfg as detectron2_get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog

from retina_focal import get_cfg, register_datasets
from retina_focal.data.registration import (
    check_datasets,
    check_num_classes,
    register_coco_json,
    use_datasets,
)
from retina_focal.errors import UserError

CONTENT = {
    "images": [{"id": 1, "file_name": "a.png", "height": 20, "width": 30}],
    "annotations": [
        {"id": 1, "image_id": 1, "category_id": 9, "bbox": [1, 2, 10, 8], "area": 80, "iscrowd": 0}
    ],
    "categories": [{"id": 9, "name": "second"}, {"id": 4, "name": "first"}],
}


@pytest.fixture
def row(tmp_path, request):
    """A row of ``DATASETS.COCO_JSON`` whose name is forgotten after the test."""
    path = tmp_path / "annotations.json"
    path.write_text(json.dumps(CONTENT))
    name = f"dataset_of_{request.node.name}"
    yield [name, str(path), str(tmp_path)]
    if name in DatasetCatalog:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def test_classes_follow_the_category_ids_as_in_the_loaded_records(row):
    register_coco_json(*row)
    metadata = MetadataCatalog.get(row[0])
    assert (metadata.thing_classes, metadata.evaluator_type) == (["first", "second"], "coco")
    record = DatasetCatalog.get(row[0])[0]  # asserts itself that the classes are the same
    assert record["annotations"][0]["category_id"] == metadata.thing_classes.index("second")


def test_rows_that_are_named_are_registered_and_the_same_again_changes_nothing(row):
    cfg = get_cfg()
    cfg.DATASETS.COCO_JSON = [row, list(row), ["not_named", "nowhere.json", "nowhere"]]
    cfg.DATASETS.TRAIN = (row[0],)
    register_datasets(cfg)
    register_datasets(cfg)
    assert "not_named" not in DatasetCatalog
    assert row[0] in DatasetCatalog


def test_the_same_name_with_other_files_is_an_error_naming_both(row, tmp_path):
    register_coco_json(*row)
    other = tmp_path / "other.json"
    other.write_text(json.dumps(CONTENT))
    with pytest.raises(UserError, match=r"annotations\.json.*other\.json"):
        register_coco_json(row[0], str(other), row[2])


def test_the_same_annotations_with_another_image_folder_are_an_error_naming_both(row, tmp_path):
    register_coco_json(*row)
    other = tmp_path / "other_images"
    other.mkdir()
    with pytest.raises(UserError, match=f"{row[2]}'.*other_images.*another name"):
        register_coco_json(row[0], row[1], str(other))
    register_coco_json(*row)


def test_only_the_datasets_that_are_asked_for_are_looked_for(row):
    cfg = get_cfg()
    cfg.DATASETS.COCO_JSON = [["not_read", "nowhere.json", "nowhere"], row]
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("not_read",), (row[0],)
    use_datasets(cfg, cfg.DATASETS.TEST)
    assert "not_read" not in DatasetCatalog
    with pytest.raises(UserError, match=r"'not_read': the annotation file 'nowhere\.json'"):
        use_datasets(cfg, cfg.DATASETS.TRAIN)


def test_a_config_without_the_key_registers_nothing():
    before = DatasetCatalog.list()
    register_datasets(detectron2_get_cfg())
    assert DatasetCatalog.list() == before


@pytest.mark.parametrize(
    "content, error, message",
    [
        (None, UserError, r"annotations\.json' does not exist"),
        ("{", UserError, "is not JSON"),
        ("[]", UserError, "no 'categories'; expected COCO format"),
        ('{"images": []}', UserError, "no 'categories'; expected COCO format"),
        ('{"categories": ["cell"]}', UserError, r"are \['cell'\]; expected a list of"),
        ('{"categories": [{"id": 1}]}', UserError, r"are \[{'id': 1}\]; expected a list of"),
    ],
)
def test_a_file_that_is_not_coco_is_refused_with_what_was_expected(row, content, error, message):
    path = row[1]
    with open(path, "w") as file:
        file.write(content or "")
    if content is None:
        Path(path).unlink()
    with pytest.raises(error, match=message):
        register_coco_json(*row)
    assert row[0] not in DatasetCatalog


def test_a_folder_in_place_of_the_annotations_is_refused(row, tmp_path):
    with pytest.raises(UserError, match=r"is not JSON: .*Is a directory"):
        register_coco_json(row[0], str(tmp_path), row[2])


@pytest.mark.parametrize("part, key", [("images", "id"), ("annotations", "category_id")])
def test_a_record_without_a_key_of_coco_is_refused_with_what_was_expected(row, part, key):
    content = json.loads(Path(row[1]).read_text())
    del content[part][0][key]
    Path(row[1]).write_text(json.dumps(content))
    register_coco_json(*row)
    with pytest.raises(UserError, match=f"annotations.json is not in COCO format .*{key}"):
        DatasetCatalog.get(row[0])


def test_a_missing_image_folder_is_named(row):
    with pytest.raises(UserError, match="image folder 'nowhere'"):
        register_coco_json(row[0], row[1], "nowhere")


def test_a_row_of_another_length_is_refused(row):
    cfg = get_cfg()
    cfg.DATASETS.COCO_JSON = [row[:2]]
    with pytest.raises(UserError, match=r"\[name, annotation json, image folder\]"):
        register_datasets(cfg)


def test_another_number_of_classes_is_refused_with_what_to_type(row):
    register_coco_json(*row)
    check_num_classes([row[0]], 2)
    with pytest.raises(UserError, match=r"2 classes.* is 80; add: MODEL\.RETINANET\.NUM_CLASSES 2"):
        check_num_classes([row[0]], 80)


def test_a_picture_in_place_of_the_annotations_is_refused(row):
    with open(row[1], "wb") as file:
        file.write(b"\x89PNG\xff")
    with pytest.raises(UserError, match=r"annotations\.json is not JSON"):
        register_coco_json(*row)


def test_an_unknown_dataset_lists_near_names_and_how_to_register(row):
    register_coco_json(*row)
    check_datasets([row[0]])
    with pytest.raises(UserError, match=f"near it: .*{row[0]}.*--dataset {row[0]}s JSON IMAGES"):
        check_datasets([f"{row[0]}s"])


def test_a_registered_dataset_without_its_file_names_detectron2s_folder(row, monkeypatch):
    register_coco_json(*row)
    Path(row[1]).unlink()
    monkeypatch.setenv("DETECTRON2_DATASETS", "/data")
    with pytest.raises(UserError, match=f"{row[1]}.*DETECTRON2_DATASETS names, now '/data'"):
        check_datasets([row[0]])
