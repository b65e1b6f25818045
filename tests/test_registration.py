"""Datasets from the config: registered once, refused in words."""

import json
from pathlib import Path

import pytest
from detectron2.config import get_cfg as detectron2_get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from pycocotools.coco import COCO

from retina_focal import get_cfg, register_datasets
from retina_focal.data.classes import difference, match_checkpoint, match_classes
from retina_focal.data.registration import (
    check_datasets,
    check_num_classes,
    register_coco_json,
    report_datasets,
    use_datasets,
)
from retina_focal.errors import UserError
from retina_focal.merging import merge_options

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
        ("[]", UserError, "holds a list; expected COCO format"),
        ('{"images": []}', UserError, "no 'categories'; expected COCO format"),
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
    with pytest.raises(UserError, match=r"is a folder; expected a regular file"):
        register_coco_json(row[0], str(tmp_path), row[2])


def write(row: list[str], **sections: object) -> dict:
    """The annotations of a row, with other sections."""
    content = json.loads(json.dumps(CONTENT)) | sections
    Path(row[1]).write_text(json.dumps(content))
    return content


def test_what_can_be_measured_with_but_not_trained_on_is_refused_for_training_alone(row):
    crowd = CONTENT["annotations"][0] | {"iscrowd": 1}
    write(row, annotations=[crowd])
    register_coco_json(*row)
    check_datasets([row[0]])
    with pytest.raises(UserError, match=r"1 of 1 annotations are crowds \(iscrowd 1\)"):
        check_datasets([row[0]], trained_on=[row[0]])


def test_pictures_alone_are_read_and_neither_trained_on_nor_measured_with(row):
    Path(row[1]).write_text(json.dumps({"images": CONTENT["images"]}))
    cfg = get_cfg()
    cfg.DATASETS.COCO_JSON, cfg.DATASETS.TEST = [row], (row[0],)
    use_datasets(cfg, [row[0]], measured=False)
    match_checkpoint([row[0]], {"classes": ["first"]}, "a.pth")
    (record,) = DatasetCatalog.get(row[0])
    assert record["annotations"] == []
    with pytest.raises(UserError, match="has no classes to measure by"):
        use_datasets(cfg, [row[0]])
    with pytest.raises(UserError, match="there are no 'annotations'"):
        use_datasets(cfg, [row[0]], trained_on=[row[0]])


@pytest.mark.parametrize(
    ("own", "words"),
    [
        (["a", "a"], "missing: b; only there: a"),
        (["a", "b", "b"], "only there: b"),
        (["a"], "missing: b"),
        (["\x1b[31m", "b"], "missing: a; only there: ?[31m"),
        (["a\u202eb", "b\u200c"], "missing: a, b; only there: a?b, b\u200c"),
    ],
)
def test_names_that_differ_are_named_as_often_as_they_are_there(own, words):
    assert difference(own, ["a", "b"]) == words


def test_what_is_mended_is_what_every_reader_sees(row, monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    annotation = {"id": 0, "image_id": 1, "category_id": 9, "bbox": [1, 2, 10, 8]}
    write(row, annotations=[{**annotation, "segmentation": [[1, 2]]}])
    Path(row[1]).write_bytes(b"\xef\xbb\xbf" + Path(row[1]).read_bytes())
    register_coco_json(*row)
    found = COCO(MetadataCatalog.get(row[0]).json_file).dataset["annotations"]
    assert found == [{**annotation, "id": 1, "area": 80, "iscrowd": 0}]
    assert len(DatasetCatalog.get(row[0])[0]["annotations"]) == 1
    report_datasets([row[0]])
    for words in ("id below 1", "no 'area'", "no 'iscrowd'", "neither polygons", "utf-8-sig"):
        assert words in caplog.text


def test_a_dataset_that_others_registered_is_not_measured_with_where_it_would_be_mended(row):
    """detectron2's closure reads the file as it stands."""
    annotation = {k: v for k, v in CONTENT["annotations"][0].items() if k != "area"}
    write(row, annotations=[annotation])
    register_coco_instances(row[0], {}, row[1], row[2])
    check_datasets([row[0]], trained_on=[row[0]])
    with pytest.raises(UserError, match=r"1 of 1 annotations have no 'area'.*--dataset NAME"):
        check_datasets([row[0]])


@pytest.fixture
def other(row, tmp_path):
    """The same names with other ids in another order, as a second dataset."""
    path = tmp_path / "other.json"
    content = json.loads(json.dumps(CONTENT))
    content["categories"] = [{"id": 9, "name": "first"}, {"id": 12, "name": "second"}]
    path.write_text(json.dumps(content))  # the annotation's 9 is "first" here
    name = f"other_than_{row[0]}"
    yield [name, str(path), row[2]]
    if name in DatasetCatalog:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def test_classes_in_another_order_are_matched_by_name_with_a_line(row, other, caplog):
    content = json.loads(Path(other[1]).read_text())
    content["categories"] = [{"id": 9, "name": "second"}, {"id": 12, "name": "first"}]
    Path(other[1]).write_text(json.dumps(content))
    register_coco_json(*row)
    register_coco_json(*other)
    match_classes([row[0], other[0]])
    metadata = MetadataCatalog.get(other[0])
    assert metadata.thing_classes == ["first", "second"]
    assert metadata.thing_dataset_id_to_contiguous_id == {12: 0, 9: 1}
    assert DatasetCatalog.get(other[0])[0]["annotations"][0]["category_id"] == 1
    report_datasets([row[0], other[0]])
    assert "second, first, are matched by name: first, second" in caplog.text


def test_other_names_of_the_same_number_are_refused(row, other):
    content = json.loads(Path(other[1]).read_text())
    content["categories"][0]["name"] = "third"
    Path(other[1]).write_text(json.dumps(content))
    register_coco_json(*row)
    register_coco_json(*other)
    with pytest.raises(UserError, match="missing: first; only there: third"):
        match_classes([row[0], other[0]])


def test_the_order_of_a_dataset_that_others_registered_is_refused(row, other):
    register_coco_json(*row)
    content = json.loads(Path(other[1]).read_text())
    content["categories"] = [{"id": 9, "name": "second"}, {"id": 12, "name": "first"}]
    Path(other[1]).write_text(json.dumps(content))
    register_coco_instances(other[0], {}, other[1], other[2])
    with pytest.raises(UserError, match="the order differs; number the categories alike"):
        match_classes([row[0], other[0]])


def test_the_classes_of_a_checkpoint_number_those_of_the_datasets(row, caplog):
    register_coco_json(*row)
    match_checkpoint([row[0]], {"classes": ["second", "first"]}, "a.pth")
    assert MetadataCatalog.get(row[0]).thing_classes == ["second", "first"]
    assert "first, second, are matched by name to those of 'a.pth': second, first" in caplog.text
    with pytest.raises(UserError, match=r"differs from that of 'a\.pth'"):
        match_checkpoint([row[0]], {"classes": ["first", "second"]}, "b.pth")
    with pytest.raises(UserError, match=r"and 'b\.pth' has first: only there: second;"):
        match_checkpoint([row[0]], {"classes": ["first"]}, "b.pth")
    caplog.clear()
    match_checkpoint([row[0]], {}, "c.pth")
    assert "'c.pth' does not name its classes" in caplog.text


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


def test_a_dataset_without_a_name_and_one_that_is_there_twice_are_told(row, caplog):
    with pytest.raises(UserError, match="names a dataset ''"):
        check_datasets([""])
    register_coco_json(*row)
    report_datasets([row[0]], trained_on=[row[0]])
    assert "times" not in caplog.text
    report_datasets([row[0]] * 2, trained_on=[row[0]] * 2)
    assert f"DATASETS.TRAIN has '{row[0]}' 2 times" in caplog.text


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


def test_pictures_outside_of_their_folder_are_refused_until_a_command_allows_them(row, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "link.png").symlink_to(tmp_path / "elsewhere.png")
    row[2] = str(folder)
    cfg = get_cfg()
    cfg.DATASETS.COCO_JSON, cfg.DATASETS.TRAIN = [row], (row[0],)
    for name in ("../a.png", "b/../../a.png", str(tmp_path / "a.png")):
        images = [{**CONTENT["images"][0], "file_name": name}]
        Path(row[1]).write_text(json.dumps({**CONTENT, "images": images}))
        with pytest.raises(
            UserError, match=r"outside the image folder.*ALLOW_OUTSIDE True .images\[0\]"
        ):
            register_datasets(cfg)
    merge_options(cfg, ["MODEL.RETINA_FOCAL.DATA.ALLOW_OUTSIDE", "True"])
    register_datasets(cfg)
    assert DatasetCatalog.get(row[0])[0]["file_name"] == str(tmp_path / "a.png")


@pytest.mark.parametrize("name", ["a.png", "b/a.png", "./a..png", "..a/b.png", "link.png"])
def test_pictures_inside_of_their_folder_and_links_are_taken(name, row):
    images = [{**CONTENT["images"][0], "file_name": name}]
    Path(row[1]).write_text(json.dumps({**CONTENT, "images": images}))
    register_coco_json(*row)
