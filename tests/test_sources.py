"""Datasets by URI: every format gives the same training dicts, and nothing leaves its folder."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json
from PIL import Image

from retina_focal.data import sources
from retina_focal.data.registration import register
from retina_focal.errors import UserError

CLASSES = ("RBC", "WBC", "Platelets")
# (picture, (width, height), [(class, corners in px)]); the last has no box.
SCENE = [
    ("a.jpg", (64, 48), [("RBC", (1, 2, 30, 40)), ("WBC", (10.5, 0, 64, 48))]),
    ("b.jpg", (33, 77), [("Platelets", (3, 3, 4, 76)), ("RBC", (0, 0, 33, 77))]),
    ("c.jpg", (50, 40), []),
]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


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
