"""Annotation files from strangers: each fault is named with its record, and counts add up."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retina_focal.data.check import check_coco
from retina_focal.data.coco import mend, read_coco
from retina_focal.data.repeated import loads
from retina_focal.errors import UserError

NUM_IMAGES, NUM_BOXES = 4, 12
HUGE = 10**400


def good() -> dict:
    """Four images of three boxes, ids from 1, two classes."""
    images = [
        {"id": i, "file_name": f"{i}.png", "height": 100, "width": 120}
        for i in range(1, NUM_IMAGES + 1)
    ]
    annotations = [
        {
            **{"id": k, "image_id": (k - 1) // 3 + 1, "category_id": k % 2 + 1},
            **{"bbox": [5 * k, 10, 20, 30.5], "area": 610, "iscrowd": 0},
        }
        for k in range(1, NUM_BOXES + 1)
    ]
    categories = [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]
    return {"images": images, "annotations": annotations, "categories": categories}


def edited(section: str, index: int, **values: object) -> str:
    content = good()
    content[section][index] |= values
    return json.dumps(content)


def without(section: str, index: int, key: str) -> str:
    content = good()
    del content[section][index][key]
    return json.dumps(content)


def of(section: str, value: object) -> str:
    return json.dumps(good() | {section: value})


def box(*values: object) -> str:
    return edited("annotations", 7, bbox=list(values))


A7 = r"annotations\[7\] \(id 8\)"
TEXT = json.dumps(good())
# What is refused: the file's text or bytes, and what the message says.
REFUSED = {
    "empty file": ("", "is not JSON"),
    "half a file": (TEXT[:500], "is not JSON"),
    "picture": (b"\x89PNG\r\n\x1a\n\xff\xfe", "is not JSON"),
    "deep nesting": ('{"images": ' + "[" * 100_000, "nested too deeply"),
    "deep extra": ('{"info": ' + "[" * 5_000 + "]" * 5_000 + ", " + TEXT[1:], "nested too deeply"),
    "number of 5,000 digits": (TEXT.replace("610", "9" * 5000, 1), "is not JSON: .*digits"),
    "list": ("[1, 2]", "holds a list; expected COCO format"),
    "null": ("null", "holds a null"),
    "number": ("3", "holds a number"),
    "images null": (of("images", None), "'images' is None"),
    "images object": (of("images", {"id": 1}), "'images' is {'id': 1}"),
    "no images": (of("images", []), r"'images' is \[\]"),
    "annotations text": (of("annotations", "none"), "'annotations' is none"),
    "no categories": (of("categories", []), r"'categories' is \[\]"),
    "annotations twice": ('{"annotations": [], ' + TEXT[1:], "annotations twice, of which"),
    "images twice, escaped": ('{"im\\u0061ges": [1], ' + TEXT[1:], "images twice, of which"),
    "box twice": (
        TEXT.replace('"bbox": [40,', '"bbox": [1, 2, 3, 4], "bbox": [40,'),
        rf"1 of 12 annotations have a key twice.*{A7}",
    ),
    "annotation list": (of("annotations", [[1]]), r"are no objects \(annotations\[0\]\)"),
    "category text": (of("categories", ["cat"]), r"are no objects \(categories\[0\]\)"),
    "category without name": (without("categories", 1, "name"), r"no 'name'.*categories\[1\]"),
    "category name a number": (
        edited("categories", 1, name=3),
        r"categories\[1\].*: name 3",
    ),
    "category name that moves the cursor": (
        edited("categories", 1, name="c\x1b[31m\n"),
        r"categories\[1\] \(id 2\): name c\?\[31m\?\)",
    ),
    "category name with NUL": (edited("categories", 1, name="c\0"), "name c[?]"),
    "category name of a megabyte": (edited("categories", 1, name="c" * 10**6), "name ccc"),
    "category id twice": (edited("categories", 1, id=1), r"categories\[0\] \(id 1\)"),
    "category id text": (edited("categories", 1, id="2"), r"categories\[1\] \(id 2\): id 2"),
    "image without id": (without("images", 2, "id"), r"no 'id'.*images\[2\]"),
    "image id text": (edited("images", 2, id="3"), r"images\[2\] \(id 3\): id 3"),
    "image id twice": (edited("images", 2, id=2), r"share their id .*images\[1\] \(id 2\)"),
    "image id huge": (edited("images", 2, id=2**60), r"images\[2\] \(id 1152921504606846976\)"),
    "image without file_name": (without("images", 2, "file_name"), r"no 'file_name'.*images\[2\]"),
    "file_name a number": (edited("images", 2, file_name=7), r"images\[2\] \(id 3\): file_name 7"),
    "file_name empty": (edited("images", 2, file_name=" "), r"images\[2\] \(id 3\): file_name"),
    "file_name with NUL": (edited("images", 2, file_name="a\0b"), r"images\[2\].* a\?b"),
    "no height": (without("images", 2, "height"), r"no 'height'.*images\[2\]"),
    "height 0": (edited("images", 2, height=0), r"images\[2\] \(id 3\): height 0"),
    "height negative": (edited("images", 2, height=-5), r"images\[2\] \(id 3\): height -5"),
    "height half": (edited("images", 2, height=9.5), r"images\[2\] \(id 3\): height 9.5"),
    "height NaN": (edited("images", 2, height=math.nan), r"images\[2\] \(id 3\): height nan"),
    "width text": (edited("images", 2, width="120"), r"images\[2\] \(id 3\): width 120"),
    "no bbox": (without("annotations", 7, "bbox"), rf"no 'bbox'.*{A7}"),
    "bbox null": (edited("annotations", 7, bbox=None), rf"{A7}: bbox None"),
    "bbox of 3": (box(1, 2, 3), rf"{A7}: bbox \[1, 2, 3\]"),
    "bbox of 5": (box(1, 2, 3, 4, 5), rf"{A7}: bbox"),
    "bbox of texts": (box("1", "2", "3", "4"), rf"{A7}: bbox \['1'"),
    "bbox of lists": (box([1], 2, 3, 4), rf"{A7}: bbox \[\[1\]"),
    "bbox of true": (box(True, 2, 3, 4), rf"{A7}: bbox \[True"),
    "bbox an object": (edited("annotations", 7, bbox={"x": 1}), rf"{A7}: bbox {{'x': 1}}"),
    "bbox NaN": (box(1, 2, math.nan, 4), rf"{A7}: bbox \[1, 2, nan"),
    "bbox Infinity": (box(1, 2, math.inf, 4), rf"{A7}: bbox \[1, 2, inf"),
    "bbox -Infinity": (box(-math.inf, 2, 3, 4), rf"{A7}: bbox \[-inf"),
    "bbox 1e400": (box(1, 2, 3, 98765).replace("98765", "1e400"), rf"{A7}: bbox \[1, 2, 3, inf"),
    "bbox of 400 digits": (box(1, 2, HUGE, 4), rf"not finite.*{A7}: bbox"),
    "bbox of minus 400 digits": (box(1, -HUGE, 3, 4), rf"not finite.*{A7}: bbox"),
    "bbox 1e30": (box(1e30, 2, 3, 4), rf"{A7}: bbox \[1e\+30"),
    "bbox negative": (box(50, 2, -30, 4), rf"negative width or height.*{A7}: bbox"),
    "annotation without id": (without("annotations", 7, "id"), r"no 'id'.*annotations\[7\]"),
    "annotation id null": (edited("annotations", 7, id=None), r"annotations\[7\]: id None"),
    "annotation id real": (
        edited("annotations", 7, id=8.5),
        r"annotations\[7\].*: id 8.5",
    ),
    "annotation id twice": (edited("annotations", 7, id=3), r"annotations\[2\].*annotations\[7\]"),
    "annotation id huge": (
        edited("annotations", 7, id=HUGE),
        r"annotations\[7\].*id 1000",
    ),
    "image_id text": (edited("annotations", 7, image_id="3"), rf"{A7}: image_id 3"),
    "no image_id": (without("annotations", 7, "image_id"), rf"no 'image_id'.*{A7}"),
    "no category_id": (without("annotations", 7, "category_id"), rf"no 'category_id'.*{A7}"),
    "category undeclared": (edited("annotations", 7, category_id=5), rf"{A7}: category_id 5"),
    "iscrowd text": (edited("annotations", 7, iscrowd="0"), rf"{A7}: iscrowd 0"),
    "iscrowd 2": (edited("annotations", 7, iscrowd=2), rf"{A7}: iscrowd 2"),
    "ignore": (edited("annotations", 7, ignore=1), rf"{A7}: ignore 1"),
    "area NaN": (edited("annotations", 7, area=math.nan), rf"{A7}: area nan"),
    "area negative": (edited("annotations", 7, area=-1), rf"{A7}: area -1"),
    "area text": (edited("annotations", 7, area="big"), rf"{A7}: area big"),
}


def written(tmp_path: Path, text: str | bytes) -> str:
    path = tmp_path / "a.json"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return str(path)


@pytest.mark.parametrize("name", REFUSED)
def test_what_can_not_be_used_is_refused_with_file_and_record(name, tmp_path):
    text, words = REFUSED[name]
    path = written(tmp_path, text)
    with pytest.raises(UserError, match=f"(?s){words}") as caught:
        read_coco(path).refuse("mine", trained_on=False)
    assert path in str(caught.value) and len(str(caught.value)) < 1000


def all_boxes(**values: object) -> str:
    content = good()
    for annotation in content["annotations"]:
        annotation |= values
    return json.dumps(content)


def corners() -> str:
    content = good()
    for k, annotation in enumerate(content["annotations"]):
        annotation["bbox"] = [60, 50, 110 - k / 2, 90]
    return json.dumps(content)


def without_boxes_of_image_2() -> str:
    content = good()
    del content["annotations"][3:6]
    return json.dumps(content)


def polygons_alone() -> str:
    content = json.loads(without("annotations", 7, "bbox"))
    content["annotations"][7]["segmentation"] = [[1, 2, 30, 2, 1, 40]]
    return json.dumps(content)


def test_the_box_of_polygons_is_around_them():
    content = json.loads(polygons_alone())
    mend(content)
    assert content["annotations"][7]["bbox"] == [1, 2, 29, 38]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (all_boxes(iscrowd=1), r"12 of 12 annotations are crowds \(iscrowd 1\)"),
        (all_boxes(bbox=[0, 0, 0, 0]), "12 of 12 annotations have a box without area"),
        (all_boxes(bbox=[500, 0, 9, 9]), "12 of 12 annotations have a box outside its picture"),
        (all_boxes(image_id=77), "12 of 12 annotations are of images that 'images' does not"),
        (of("annotations", []), "there is no box to train on"),
        (json.dumps({k: v for k, v in good().items() if k != "annotations"}), "no 'annotations'"),
    ],
)
def test_what_has_nothing_to_train_on_is_refused_for_training_alone(tmp_path, text, words):
    file = read_coco(written(tmp_path, text))
    file.refuse("mine", trained_on=False)
    with pytest.raises(UserError, match=words):
        file.refuse("mine", trained_on=True)


@pytest.mark.parametrize(
    ("text", "kind", "counts"),
    [
        (TEXT, None, {"boxes": 12}),
        (box(5, 5, 0, 9), "empty", {"boxes": 11, "empty": 1}),
        (box(120, 5, 9, 9), "outside", {"boxes": 11, "outside": 1}),
        (box(-9, 5, 9, 9), "outside", {"boxes": 11, "outside": 1}),
        (box(5, 100, 9, 9), "outside", {"boxes": 11, "outside": 1}),
        (box(-9, 5, 9.1, 9), None, {"boxes": 12}),
        (edited("annotations", 7, image_id=9), "image-undeclared", {"boxes": 11, "elsewhere": 1}),
        (edited("annotations", 7, iscrowd=1), "crowds", {"boxes": 11, "crowds": 1}),
        (corners(), "box-xyxy", {"boxes": 12}),
        (box(5, 5, 0.5, 9), "box-subpixel", {"boxes": 12}),
        (
            edited("annotations", 8, bbox=good()["annotations"][6]["bbox"]),
            "duplicate",
            {"boxes": 12},
        ),
        (without_boxes_of_image_2(), "image-empty", {"boxes": 9}),
        (all_boxes(category_id=1), "class-without-boxes", {"boxes": 12}),
        (edited("categories", 1, name="cat"), "name-twice", {"boxes": 12}),
        ('{"info": {"a": 1, "a": 2}, ' + TEXT[1:], "twice", {"boxes": 12}),
        ('{"info": {"a": 1, "a": 1}, ' + TEXT[1:], None, {"boxes": 12}),
    ],
)
def test_what_is_used_with_a_warning_is_counted(text, kind, counts):
    content, repeated = loads(text.encode())
    check = check_coco(content, repeated=repeated)
    assert [x.kind for x in check.findings] == ([kind] if kind else [])
    assert {k: v for k, v in check.counts.items() if v} == counts
    assert sum(check.counts.values()) == check.num_annotations


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        (without("annotations", 7, "area"), "area-missing"),
        (without("annotations", 7, "iscrowd"), "iscrowd-missing"),
        (edited("annotations", 7, id=0), "id-zero"),
        (polygons_alone(), "box-of-polygons"),
        (edited("annotations", 7, segmentation=[[1, 2, 3, 4]]), "segmentation"),
        (edited("annotations", 7, segmentation=[5]), "segmentation"),
        (edited("annotations", 7, segmentation={"counts": [-1], "size": [9, 9]}), "segmentation"),
        (edited("annotations", 7, segmentation="polygon"), "segmentation"),
    ],
)
def test_what_is_mended_is_a_finding_once_and_none_afterwards(text, kind):
    content = json.loads(text)
    (finding,) = check_coco(content).findings
    assert (finding.kind, finding.severity) == (kind, "mended")
    assert "annotations[7]" in finding.records[0]
    mend(content)
    assert not check_coco(content).findings
    assert len(content["annotations"]) == NUM_BOXES


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_text_with_a_byte_order_mark_is_read_and_written_anew(tmp_path, monkeypatch, encoding):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = read_coco(written(tmp_path, TEXT.encode(encoding)))
    file.refuse("mine", trained_on=True)
    assert json.loads(Path(file.mended).read_text()) == good()


def test_findings_of_a_kind_are_counted_and_the_first_are_shown():
    content = good()
    for annotation in content["annotations"][2:]:
        annotation["bbox"] = [1, 2, 3, math.nan]
    (finding,) = check_coco(content).findings
    assert len(finding.records) == 10
    assert str(finding).startswith("10 of 12 annotations have a bbox that is not finite")
    shown = str(finding)
    assert "annotations[4] (id 5)" in shown and "annotations[5]" not in shown
    assert shown.endswith("; and 7 more)")


def test_faults_of_all_kinds_are_found_in_one_pass():
    content = good()
    content["images"][0]["height"] = 0
    content["annotations"][0]["category_id"] = 9
    content["annotations"][1]["bbox"] = [1, 2, 3, math.inf]
    content["annotations"][2]["iscrowd"] = "no"
    kinds = {x.kind for x in check_coco(content).of("error")}
    assert kinds == {"height", "category-undeclared", "box-infinite", "iscrowd"}


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda x: st.lists(x, max_size=5) | st.dictionaries(st.text(max_size=3), x, max_size=2),
    max_leaves=6,
)
KEYS = ["id", "image_id", "category_id", "bbox", "area", "iscrowd", "segmentation", "ignore"]


@settings(max_examples=150)
@given(st.lists(st.tuples(st.integers(0, 11), st.sampled_from(KEYS), VALUES), max_size=4))
def test_any_value_anywhere_is_a_finding_or_is_counted(edits):
    content = good()
    for index, key, value in edits:
        content["annotations"][index][key] = value
    check = check_coco(content)
    assert all(str(x) for x in check.findings)
    assert sum(check.counts.values()) == NUM_BOXES
    if not check.of("error"):
        mend(content)
        assert not check_coco(content).of("error", "mended")


@settings(max_examples=100)
@given(VALUES, st.sampled_from(["images", "annotations", "categories", None]))
def test_any_structure_is_a_finding(value, section):
    content = value if section is None else good() | {section: value}
    assert all(str(x) for x in check_coco(content).findings)


@pytest.mark.parametrize("kind", ["folder", "fifo", "device", "missing"])
def test_only_a_regular_file_is_read(tmp_path, kind):
    path = tmp_path / "a.json"
    if kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        path = Path("/dev/zero")
    with pytest.raises(UserError, match=str(path)):
        read_coco(str(path))


MEMORY = """
import hostile, os, resource, sys
from pathlib import Path
from detectron2.data import DatasetMapper
from retina_focal.data.images import map_record
from retina_focal.data.coco import read_coco
from retina_focal.errors import UserError
mapper = DatasetMapper(is_train=False, augmentations=[], image_format="BGR")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in sys.argv[2:]:
    try:
        read_coco(path).refuse("mine", trained_on=True)
        sys.exit(f"{path} was not refused")
    except UserError:
        pass
os.chdir(sys.argv[1])
for kind, (make, _) in hostile.PICTURES.items():
    make(Path(kind))
    try:
        map_record(mapper, {"file_name": kind, "height": 20, "width": 30})
        sys.exit(f"{kind} was not refused")
    except UserError:
        pass
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.mark.slow
def test_hostile_files_take_less_than_a_gigabyte(tmp_path):
    hostile = {
        "nested": "[" * 20_000_000,
        "long": '{"images": "' + "x" * 50_000_000 + '"}',
        "wide": json.dumps(good() | {"annotations": [{"id": "x" * 100}] * 50_000}),
        "ids": json.dumps(good() | {"annotations": [{"id": 10**4000}] * 1_000}),
    }
    paths = []
    for name, text in hostile.items():
        paths.append(str(tmp_path / f"{name}.json"))
        Path(paths[-1]).write_text(text)
    (tmp_path / "pictures").mkdir()
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", MEMORY, str(tmp_path / "pictures"), *paths],
        **{"capture_output": True, "text": True, "env": {**os.environ, "PYTHONPATH": path}},
    )
    assert run.returncode == 0, run.stderr
    assert int(run.stdout.split()[-1]) < 1000
