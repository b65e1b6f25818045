"""Datasets by URI: every format gives the same training dicts, and nothing leaves its folder."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json
from PIL import Image
from test_train import PYTHONPATH

from retina_focal.data import sources
from retina_focal.data.inspection import inspect
from retina_focal.data.registration import register, register_datasets
from retina_focal.data.uri import MAX_CLASSES, parse
from retina_focal.errors import UserError
from retina_focal.tools.arguments import add_config_arguments, tool_parser
from retina_focal.tools.common import load_cfg, load_lazy_cfg
from retina_focal.training.values import plain_values

pytestmark = pytest.mark.usefixtures("own_cache")

CLASSES = ("RBC", "WBC", "Platelets")
BCCD = Path(os.environ.get("DETECTRON2_DATASETS", "datasets"), "bccd")
# (picture, (width, height), [(class, corners in px)]); the last has no box.
SCENE = [
    ("a.jpg", (64, 48), [("RBC", (1, 2, 30, 40)), ("WBC", (10.5, 0, 64, 48))]),
    ("b.jpg", (33, 77), [("Platelets", (3, 3, 4, 76)), ("RBC", (0, 0, 33, 77))]),
    ("c.jpg", (50, 40), []),
]


def voc_xml(name, size, boxes, head="", difficult=0) -> str:
    objects = "".join(
        f"<object><name>{label}</name><difficult>{difficult}</difficult><bndbox>"
        + "".join(
            f"<{k}>{v}</{k}>" for k, v in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True)
        )
        + "</bndbox></object>\n"
        for label, box in boxes
    )
    size = f"<size><width>{size[0]}</width><height>{size[1]}</height><depth>3</depth></size>"
    return f"{head}<annotation><filename>{name}</filename>{size}\n{objects}</annotation>"


def write_pictures(folder: Path, scene=SCENE) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for i, (name, size, _) in enumerate(scene):
        noise = np.random.default_rng(i).integers(0, 255, (*size[::-1], 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / name)


def write_voc(folder: Path, scene=SCENE, split="train") -> str:
    write_pictures(folder / "JPEGImages", scene)
    (folder / "Annotations").mkdir(exist_ok=True)
    for name, size, boxes in scene:
        (folder / "Annotations" / f"{name[:-4]}.xml").write_text(voc_xml(name, size, boxes))
    (folder / "ImageSets/Main").mkdir(parents=True, exist_ok=True)
    names = "\n".join(name[:-4] for name, *_ in scene)
    (folder / f"ImageSets/Main/{split}.txt").write_text(names)
    return f"voc:{folder}?split={split}&classes={','.join(CLASSES)}"


def write_yolo(folder: Path, scene=SCENE, split="train", root="images/train") -> str:
    write_pictures(folder / root, scene)
    labels = folder / root.replace("images", "labels")
    labels.mkdir(parents=True, exist_ok=True)
    for name, (width, height), boxes in scene:
        rows = [
            (
                CLASSES.index(label),
                *((x0 + x1) / 2 / width, (y0 + y1) / 2 / height),
                *((x1 - x0) / width, (y1 - y0) / height),
            )
            for label, (x0, y0, x1, y1) in boxes
        ]
        if rows:
            text = "\n".join(" ".join(map(repr, row)) for row in rows)
            (labels / f"{name[:-4]}.txt").write_text(text)
    names = "\n".join(f"  {i}: {name}" for i, name in enumerate(CLASSES))
    (folder / "data.yaml").write_text(f"path: .\n{split}: {root}\nnames:\n{names}\n")
    return f"yolo:{folder}/data.yaml?split={split}"


def write_csv(folder: Path, scene=SCENE, header="image_path,xmin,ymin,xmax,ymax,label\n") -> str:
    write_pictures(folder / "images", scene)
    rows = [
        f"{name},{','.join(map(str, box))},{label}\n"
        for name, _, boxes in scene
        for label, box in boxes or [("", ("",) * 4)]
    ]
    (folder / "boxes.csv").write_text(header + "".join(rows))
    return f"csv:{folder}/boxes.csv?images={folder}/images&classes={','.join(CLASSES)}"


def write_coco(folder: Path, scene=SCENE) -> str:
    write_pictures(folder / "images", scene)
    annotations = [
        (i, CLASSES.index(label) + 1, (x0, y0, x1 - x0, y1 - y0))
        for i, (_, _, boxes) in enumerate(scene, start=1)
        for label, (x0, y0, x1, y1) in boxes
    ]
    content = {
        "images": [
            {"id": i, "file_name": name, "width": size[0], "height": size[1]}
            for i, (name, size, _) in enumerate(scene, start=1)
        ],
        "annotations": [
            {
                **{"id": k, "image_id": i, "category_id": c, "bbox": list(box), "iscrowd": 0},
                "area": box[2] * box[3],
            }
            for k, (i, c, box) in enumerate(annotations, start=1)
        ],
        "categories": [{"id": i, "name": name} for i, name in enumerate(CLASSES, start=1)],
    }
    (folder / "train.json").write_text(json.dumps(content))
    return f"coco:{folder}/train.json?images={folder}/images"


def write_csv_without_header(folder: Path, scene=SCENE) -> str:
    return write_csv(folder, scene, header="")


WRITERS = {
    "voc": write_voc,
    "yolo": write_yolo,
    "csv": write_csv,
    "csv without header": write_csv_without_header,
    "coco": write_coco,
}


def training_dicts(uri: str) -> list[dict]:
    """As detectron2 trains on them, with the picture's name alone in place of its path."""
    source = sources.load(uri)
    assert source.classes == CLASSES
    records = load_coco_json(str(source.json_file), str(source.image_root))
    for record in records:
        assert os.path.isfile(record["file_name"])
        record["file_name"] = os.path.basename(record["file_name"])
    return records


def expect_same(records: list[dict], others: list[dict], pixels: float) -> None:
    """Equal but for box coordinates, which differ by at most `pixels`."""
    assert len(records) == len(others)
    for record, other in zip(records, others, strict=True):
        boxes = [[a.pop("bbox") for a in x["annotations"]] for x in (record, other)]
        assert record == other
        np.testing.assert_allclose(*(np.reshape(x, (-1, 4)) for x in boxes), rtol=0, atol=pixels)


@pytest.mark.parametrize("format", [name for name in WRITERS if name != "coco"])
def test_every_format_gives_the_same_training_dicts(format, tmp_path):
    records = training_dicts(WRITERS[format](tmp_path / format))
    expected = training_dicts(write_coco(tmp_path / "coco"))
    expect_same(records, expected, 1e-9 if format == "yolo" else 0.0)


@pytest.mark.parametrize("format", WRITERS)
def test_a_registered_source_has_classes_and_is_registered_once(format, tmp_path):
    uri, name = WRITERS[format](tmp_path), f"source_{format}"
    try:
        register(name, uri)
        register(name, uri)
        assert MetadataCatalog.get(name).thing_classes == list(CLASSES)
        assert [len(x["annotations"]) for x in DatasetCatalog.get(name)] == [2, 2, 0]
        with pytest.raises(UserError, match="another name"):
            register(name, write_coco(tmp_path / "other"))
    finally:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def scene_of(names) -> list:
    return [(name, (64, 48), [("RBC", (1, 2, 30, 40))]) for name in names]


def names_of(uri: str) -> set[str]:
    source = sources.load(uri)
    return {x["file_name"] for x in json.loads(source.json_file.read_text())["images"]}


@pytest.mark.parametrize("format", WRITERS)
def test_a_split_that_is_made_divides_the_pictures_and_keeps_the_classes(format, tmp_path):
    scene = scene_of(f"{i}.jpg" for i in range(20))
    uri = WRITERS[format](tmp_path, scene).replace("split=train&", "").replace("?split=train", "")
    uri += f"{'&' if '?' in uri else '?'}val=0.25&split="
    train, val = names_of(f"{uri}train"), names_of(f"{uri}val")
    assert (len(train), len(val)) == (15, 5)
    assert not train & val
    assert names_of(f"{uri}val&seed=0") == val != names_of(f"{uri}val&seed=1")
    assert sources.load(f"{uri}val").classes == CLASSES


def test_near_duplicates_stay_together_in_a_split_that_is_made(tmp_path):
    scene = scene_of(f"{i:02}.png" for i in range(40))
    uri = write_coco(tmp_path, scene)
    rng = np.random.default_rng(0)
    for i in range(0, 40, 2):  # pairs: the second brighter, smaller by 4 px and saved as JPEG
        noise = rng.integers(0, 200, (6, 8, 3), dtype=np.uint8)
        picture = Image.fromarray(noise).resize((64, 48), Image.Resampling.BICUBIC)
        picture.save(tmp_path / "images" / f"{i:02}.png")
        brighter = picture.point(lambda x: x + 5).resize((60, 44)).resize((64, 48))
        brighter.save(tmp_path / "images" / f"{i + 1:02}.png", format="JPEG")
    for seed in range(5):
        val = {int(x[:2]) for x in names_of(f"{uri}&split=val&val=0.3&seed={seed}")}
        assert len(val) == 12
        assert val == {i ^ 1 for i in val}


def test_a_config_takes_sources_and_the_number_of_their_classes(tmp_path):
    uri = write_voc(tmp_path)
    rows = [["mine", uri, ""]]
    names = ["DATASETS.TRAIN", "('mine',)", "DATASETS.TEST", "()"]
    cfg = load_cfg("COCO-Detection/retinanet_R_50_FPN_1x.yaml", names, rows)
    assert cfg.MODEL.RETINANET.NUM_CLASSES == 3
    assert [["mine", uri]] == cfg.DATASETS.SOURCES
    try:
        register_datasets(cfg)
        assert len(DatasetCatalog.get("mine")) == 3
    finally:
        DatasetCatalog.remove("mine")
        MetadataCatalog.remove("mine")
    opts = [*names, "MODEL.RETINANET.NUM_CLASSES", "5"]
    cfg = load_cfg("COCO-Detection/retinanet_R_50_FPN_1x.yaml", opts, rows)
    assert cfg.MODEL.RETINANET.NUM_CLASSES == 5  # what is said is checked, not replaced
    cfg = load_cfg("COCO-Detection/retinanet_R_50_FPN_1x.yaml")
    assert cfg.MODEL.RETINANET.NUM_CLASSES == 80
    with pytest.raises(UserError, match="NUM_CLASSES is 0"):
        load_cfg("quick_start/trees.yaml", ["MODEL.RETINANET.NUM_CLASSES", "0"])


def test_a_lazy_config_takes_sources(tmp_path):
    uri = write_yolo(tmp_path)
    rows = f"train.retina_focal.sources=[[lazy_mine,'{uri}']]"
    try:
        cfg = load_lazy_cfg("lazy/retinanet_R_50_FPN_1x.py", [f"+{rows}"])
        assert len(DatasetCatalog.get("lazy_mine")) == 3
        plain_values(cfg)
    finally:
        DatasetCatalog.remove("lazy_mine")
        MetadataCatalog.remove("lazy_mine")


def test_the_command_line_takes_a_dataset_by_uri_beside_three_arguments():
    parser = tool_parser("x", "doc")
    add_config_arguments(parser)
    argv = "--config-file a --dataset m voc:x?split=train --dataset n a.json b DATASETS.TRAIN c"
    args = parser.parse_args(argv.split())
    assert args.dataset == [["m", "voc:x?split=train", ""], ["n", "a.json", "b"]]
    assert args.opts == ["DATASETS.TRAIN", "c"]
    args = parser.parse_args(["--config-file", "a", "--dataset", "m", "yolo:x"])
    assert args.dataset == [["m", "yolo:x", ""]]


@pytest.mark.skipif(not BCCD.is_dir(), reason="needs $DETECTRON2_DATASETS/bccd")
def test_bccd_from_its_folder_is_what_the_other_formats_give(tmp_path, monkeypatch):
    scene = []
    for name in (BCCD / "ImageSets/Main/val.txt").read_text().split():
        root = ElementTree.parse(BCCD / "Annotations" / f"{name}.xml").getroot()
        size = tuple(int(root.findtext(f"size/{x}")) for x in ("width", "height"))
        boxes = [
            (x.findtext("name"), tuple(int(y.text) for y in x.find("bndbox")))
            for x in root.iter("object")
        ]
        scene.append((f"{name}.jpg", size, boxes))

    def link(folder, scene):
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir()
        for name, *_ in scene:
            (folder / name).symlink_to(BCCD / "JPEGImages" / name)

    monkeypatch.setattr("test_sources.write_pictures", link)
    found = training_dicts(f"voc:{BCCD}?split=val&classes={','.join(CLASSES)}")
    assert sum(len(x["annotations"]) for x in found) == 1138
    for format in WRITERS:
        others = training_dicts(WRITERS[format](tmp_path / format, scene))
        expect_same(copy.deepcopy(found), others, 1e-9 if format == "yolo" else 0.0)


@pytest.mark.parametrize(
    ("option", "boxes"),
    [
        ("", [(1, 2, 29, 38, 0), (10.5, 0, 53.5, 48, 0)]),
        ("&offset=1", [(0, 1, 30, 39, 0), (9.5, -1, 54.5, 49, 0)]),
        ("&difficult=ignore", [(1, 2, 29, 38, 1), (10.5, 0, 53.5, 48, 1)]),
        ("&difficult=drop", []),
    ],
)
def test_voc_options(option, boxes, tmp_path):
    uri = write_voc(tmp_path)
    (tmp_path / "Annotations/a.xml").write_text(voc_xml(*SCENE[0], difficult=1))
    content = json.loads(sources.load(f"{uri}{option}").json_file.read_text())
    found = [x for x in content["annotations"] if x["image_id"] == 1]
    assert [(*x["bbox"], x["iscrowd"]) for x in found] == boxes
    assert all(x["difficult"] for x in found)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("WBC\n\n RBC \n", ("WBC", "RBC")),
        ("\ufeffRBC,1\r\nWBC,0\r\n", ("WBC", "RBC")),  # keras-retinanet's
        ("A,1\nB,2\n", ("A,1", "B,2")),  # these number nothing: they are names
    ],
)
def test_classes_may_stand_in_a_file(text, expected, tmp_path):
    write_csv(tmp_path)
    (tmp_path / "names.txt").write_text(text, encoding="utf-8")
    uri = f"csv:{tmp_path}/boxes.csv?classes=@{tmp_path}/names.txt"
    assert parse(uri).classes == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "names.txt' does not exist|no file .*names.txt|can't read .*names.txt"),
        ("A\nA\n", "each once"),
        ("", "or @FILE"),
        ("A" * (MAX_CLASSES + 1), "more than 1,000,000 bytes"),
    ],
)
def test_a_file_of_classes_that_can_not_be_used_is_refused(text, message, tmp_path):
    write_csv(tmp_path)
    if text is not None:
        (tmp_path / "names.txt").write_text(text)
    with pytest.raises(UserError, match=message):
        parse(f"csv:{tmp_path}/boxes.csv?classes=@{tmp_path}/names.txt")


def test_classes_of_all_splits_are_those_of_the_folder(tmp_path):
    write_voc(tmp_path)
    (tmp_path / "ImageSets/Main/val.txt").write_text("b\n")
    assert sources.load(f"voc:{tmp_path}?split=val").classes == ("Platelets", "RBC", "WBC")
    assert sources.splits(str(tmp_path)) == [f"{tmp_path}?split={x}" for x in ("train", "val")]


@pytest.mark.parametrize("format", WRITERS)
def test_a_bare_path_is_recognised(format, tmp_path):
    uri = WRITERS[format](tmp_path)
    assert [len(x["annotations"]) for x in records_of(str(tmp_path))] == [2, 2, 0]
    file = {"yolo": "data.yaml", "coco": "train.json"}.get(format, "boxes.csv")
    if format.startswith("csv"):
        (tmp_path / "images").rename(tmp_path / "photos")
        with pytest.raises(UserError, match=r"in another folder add \?images=FOLDER"):
            sources.load(str(tmp_path / file))
        assert len(records_of(f"{tmp_path / file}?images={tmp_path / 'photos'}")) == 3
    elif format != "voc":
        assert len(records_of(str(tmp_path / file))) == 3
    assert uri


@pytest.mark.parametrize("name", ["voc", "yolo"])
def test_a_folder_may_be_named_as_a_format(name, tmp_path, monkeypatch):
    WRITERS[name](tmp_path / name)
    monkeypatch.chdir(tmp_path)
    assert len(records_of(name)) == 3


def records_of(data: str) -> list[dict]:
    source = sources.load(data)
    return load_coco_json(str(source.json_file), str(source.image_root))


def test_the_cache_follows_the_content_and_is_written_once(tmp_path):
    uri = write_voc(tmp_path)
    first = sources.load(uri).json_file
    before = first.stat().st_mtime_ns
    assert sources.load(uri).json_file == first and first.stat().st_mtime_ns == before
    xml = tmp_path / "Annotations/a.xml"
    xml.write_text(xml.read_text().replace("<xmax>30<", "<xmax>31<"))
    second = sources.load(uri).json_file
    assert second != first
    assert json.loads(second.read_text())["annotations"][0]["bbox"] == [1, 2, 30, 38]
    assert not [x for x in second.parent.iterdir() if x.name.startswith(".")]


def test_every_process_finds_the_same_file_in_the_cache(tmp_path):
    """Python gives the texts of a set another order in each process."""
    uri = write_voc(tmp_path)
    script = "import sys; from retina_focal.data.sources import load\n"
    script += "print(load(sys.argv[1]).json_file)"
    found = set()
    for seed in "123":
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": PYTHONPATH}
        command = [sys.executable, "-W", "ignore", "-c", script, uri]
        found.add(subprocess.check_output(command, env=environment, text=True).strip())
    assert found == {str(sources.load(uri).json_file)}


REFUSED = {
    "no such path": ("voc:nowhere", "'nowhere' does not exist"),
    "unknown option": ("voc:{0}?splitt=train", "no option 'splitt'; expected split, classes"),
    "option twice": ("voc:{0}?split=a&split=b", "'split' is there twice"),
    "no such split": ("voc:{0}?split=val", r"no split 'val'.*found other, train; add &val=0.2"),
    "val out of range": ("voc:{0}?split=train&val=2", "val is '2'; expected the part"),
    "val without a split": ("voc:{0}?val=0.2", "add &split=train"),
    "seed without val": ("voc:{0}?seed=1", "add &val=0.2"),
    "class twice": ("voc:{0}?classes=A,A", "expected A,B,C, each once"),
    "a split that is there": ("voc:{0}/b?split=val&val=0.5", "there is a split 'val' already"),
    "split outside": ("voc:{0}?split=../../a", r"no split '\.\./\.\./a'"),
    "undeclared class": ("voc:{0}?classes=RBC", r"a\.xml, object\[1\] \(line 3\): WBC"),
    "no folder": ("voc:{0}/Annotations/a.xml", "is no folder"),
    "wrong format": ("yolo:{0}", r"has no data\.yaml"),
    "no dataset": ("{0}/JPEGImages", "no dataset that is known by its files"),
    "images": ("voc:{0}?images=nowhere", "image folder 'nowhere' does not exist"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_uri_gets_wrong_is_said(name, tmp_path):
    write_voc(tmp_path)
    (tmp_path / "ImageSets/Main/other.txt").write_text("a")
    write_voc(tmp_path / "b", split="val")
    uri, words = REFUSED[name]
    with pytest.raises(UserError, match=words):
        sources.load(uri.format(tmp_path))


BOMB = "<!DOCTYPE a [<!ENTITY a 'ha'><!ENTITY b '&a;&a;&a;&a;'>]>"
HOSTILE = {
    "entities": (voc_xml(*SCENE[0], head=BOMB), "DOCTYPE"),
    "external": (voc_xml(*SCENE[0], head="<!DOCTYPE a SYSTEM '/etc/passwd'>"), "DOCTYPE"),
    "deep": ("<annotation>" + "<a>" * 100_000, "nested deeper than 50"),
    "long text": (voc_xml("x" * 20_000, *SCENE[0][1:]), "<filename> has more than 10,000 letters"),
    "large": ("<annotation>" + " " * 10_000_001, "more than 10,000,000 bytes"),
    "no XML": ("not XML", "syntax error"),
    "encoding": ("<?xml version='1.0' encoding='x-evil'?><annotation/>", "unknown encoding"),
    "another": ("<b/>", "<b> in place of <annotation>"),
}


TWICE = {
    "name": ("</name>", "</name><name>WBC</name>", "object[0] (line 2): <name>", 1),
    "bndbox": ("</bndbox>", "</bndbox><bndbox><xmin>5</xmin></bndbox>", "object[0] (line 2): <", 1),
    "size": ("</size>", "</size><size><width>9</width></size>", "a.xml: <width>", 0),
    "the same": ("</name>", "</name><name>RBC</name>", None, 0),
}


@pytest.mark.parametrize("name", TWICE)
def test_an_element_of_voc_with_two_values_is_refused(name, tmp_path):
    uri = write_voc(tmp_path)
    old, new, record, faulty = TWICE[name]
    path = tmp_path / "Annotations/a.xml"
    path.write_text(path.read_text().replace(old, new, 1))
    check = inspect(uri, with_pictures=False).check
    found = [(x.severity, x.records[0]) for x in check.findings if x.kind == "twice"]
    assert [record in x for severity, x in found if severity == "error"] == [True] * bool(record)
    assert check.counts.get("faulty", 0) == faulty
    assert sum(check.counts.values()) == check.num_annotations == 4


HEADER = "image_path,xmin,ymin,xmax,ymax,label\n"


@pytest.mark.parametrize(
    ("header", "row", "words"),
    [
        ("image_path,xmin,xmin,ymin,xmax,ymax,label\n", "", "line 1: .* several are xmin"),
        ("image,path,xmin,ymin,xmax,ymax,class\n", "", "several are image_path"),
        (HEADER, "a.jpg,1,2,30,40,RBC,7,8\n", r"rows are not image_path.*line 2\)"),
        (HEADER.replace(",label", ",note,label"), "", "4 rows are not image_path"),
        (HEADER, "a.jpg,1,2,30,40,RBC,, \n", None),
        (f"{HEADER[:-1]},note\n", "a.jpg,1,2,30,40,RBC\n", None),
    ],
)
def test_what_a_csv_has_too_much_of_is_refused(header, row, words, tmp_path):
    uri = write_csv(tmp_path, header=header + row)
    if words is None:
        assert len(sources.load(uri).json_file.read_text().split('"bbox"')) == 6
    else:
        with pytest.raises(UserError, match=words):
            sources.load(uri)


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_xml_is_refused_with_its_file(name, tmp_path):
    uri = write_voc(tmp_path)
    text, words = HOSTILE[name]
    (tmp_path / "Annotations/a.xml").write_text(text)
    with pytest.raises(UserError, match=f"(?s)a.xml.*{words}|{words}.*a.xml"):
        sources.load(uri)


def test_paths_stay_in_their_folder_until_a_command_allows_them(tmp_path):
    outside = write_yolo(tmp_path / "other")
    assert outside
    folder = tmp_path / "inside"
    folder.mkdir()
    yaml = "train: ../other/images/train\nnames: [RBC, WBC, Platelets]\n"
    (folder / "data.yaml").write_text(yaml)
    with pytest.raises(UserError, match=r"outside of its folder.*ALLOW_OUTSIDE"):
        sources.load(f"yolo:{folder}/data.yaml?split=train")
    source = sources.load(f"yolo:{folder}/data.yaml?split=train", allow_outside=True)
    assert len(load_coco_json(str(source.json_file), str(source.image_root))) == 3
    (folder / "boxes.csv").write_text("../other/images/train/a.jpg,1,1,9,9,RBC\n")
    with pytest.raises(UserError, match=r"outside the image folder.*ALLOW_OUTSIDE"):
        sources.load(f"csv:{folder}/boxes.csv")
    assert sources.load(f"csv:{folder}/boxes.csv", allow_outside=True).classes == ("RBC",)


def test_yaml_of_exporters_is_read(tmp_path):
    write_yolo(tmp_path)
    names = "names: [RBC, WBC, Platelets]\nnc: 3\n"
    (tmp_path / "data.yaml").write_text(f"train: ../images/train\nval: ../images/train\n{names}")
    assert sources.splits(str(tmp_path))[1].endswith("?split=val")
    assert len(records_of(f"{tmp_path}?split=train")) == 3
    (tmp_path / "list.txt").write_text("images/train/a.jpg\n./images/train/b.jpg\n")
    (tmp_path / "data.yaml").write_text(f"train: list.txt\n{names}")
    assert [len(x["annotations"]) for x in records_of(str(tmp_path))] == [2, 2]
    (tmp_path / "data.yaml").write_text("train: list.txt\nnames: !!python/name:os.system\n")
    with pytest.raises(UserError, match=r"data\.yaml, line 2: the tag"):
        sources.load(str(tmp_path))


def test_yolo_polygons_become_the_boxes_around_them(tmp_path):
    uri = write_yolo(tmp_path)
    (tmp_path / "labels/train/a.txt").write_text("1 0.25 0.5 0.5 0.5 0.25 1\n")
    assert records_of(uri)[0]["annotations"][0]["bbox"] == [16, 24, 16, 24]


def test_a_turned_picture_has_the_size_that_detectron2_sees(tmp_path):
    uri = write_yolo(tmp_path, [("a.jpg", (64, 48), [("RBC", (1, 2, 30, 40))])])
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (48, 64)).save(tmp_path / "images/train/a.jpg", exif=exif)
    (record,) = records_of(uri)
    assert (record["width"], record["height"]) == (64, 48)
    np.testing.assert_allclose(record["annotations"][0]["bbox"], [1, 2, 29, 38])


def test_yolo_and_voc_are_what_supervision_reads(tmp_path):
    supervision = pytest.importorskip(
        "supervision", reason="supervision is not installed: pip install supervision"
    )
    write_voc(tmp_path / "voc")
    write_yolo(tmp_path / "yolo")
    voc = supervision.DetectionDataset.from_pascal_voc(
        str(tmp_path / "voc/JPEGImages"), str(tmp_path / "voc/Annotations")
    )
    yolo = supervision.DetectionDataset.from_yolo(
        *(str(tmp_path / "yolo" / x) for x in ("images/train", "labels/train", "data.yaml"))
    )
    records = records_of(f"voc:{tmp_path}/voc?classes={','.join(CLASSES)}")
    # It takes 1 from xmin and ymin of VOC, keeps YOLO's in fp32, and numbers classes by appearance.
    for other, shift, pixels in ((voc, [1, 1, 0, 0], 0), (yolo, 0, 1e-4)):
        theirs = {os.path.basename(path): found for path, _, found in other}
        for record in records:
            found = theirs[os.path.basename(record["file_name"])]
            boxes = np.array([x["bbox"] for x in record["annotations"]]).reshape(-1, 4)
            boxes[:, 2:] += boxes[:, :2]
            np.testing.assert_allclose(found.xyxy + shift, boxes, atol=pixels)
            classes = [other.classes[i] for i in found.class_id]
            assert classes == [CLASSES[x["category_id"] - 1] for x in record["annotations"]]


def test_images_are_in_the_order_of_their_names_and_follow_what_a_picture_becomes(tmp_path):
    uri = write_csv(tmp_path, SCENE[::-1])
    assert [Path(x["file_name"]).name for x in records_of(uri)] == ["a.jpg", "b.jpg", "c.jpg"]
    Image.new("RGB", (128, 96)).save(tmp_path / "images" / "a.jpg")
    assert records_of(uri)[0]["width"] == 128
    uri = write_yolo(tmp_path / "yolo")
    assert records_of(uri)[0]["width"] == 64
    Image.new("RGB", (128, 96)).save(tmp_path / "yolo/images/train/a.jpg")
    assert records_of(uri)[0]["width"] == 128
