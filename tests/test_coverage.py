"""The closed form of the best IoU against all anchors, and the boxes against `DatasetMapper`."""

import copy
import itertools
import json
import resource
import time
from unittest.mock import patch

import cv2
import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, DatasetMapper
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.structures import Boxes, BoxMode, pairwise_iou

from retina_focal.anchors import OctaveAnchorGenerator
from retina_focal.data import coverage
from retina_focal.data.coverage import (
    AnchorLayout,
    BoxTable,
    anchors_of,
    best_anchors,
    best_ious,
    box_table,
    cover,
    policy_of,
    resize,
    shorter_sides,
    size_classes,
)
from retina_focal.data.registration import register_coco_json
from retina_focal.data.resizing import mapper_with_boxes
from retina_focal.data.sample import prepare_bccd
from retina_focal.tools.common import load_cfg

THRESHOLDS = 0.4, 0.5


@pytest.fixture(scope="module")
def bccd(tmp_path_factory) -> list[dict]:
    """The training records of BCCD."""
    folder = tmp_path_factory.mktemp("bccd")
    try:
        prepare_bccd(folder)
    except ValueError as error:
        pytest.skip(str(error))
    name = "bccd_of_coverage"
    register_coco_json(name, str(folder / "train.json"), str(folder / "images"))
    yield DatasetCatalog.get(name)
    DatasetCatalog.remove(name)


def all_anchors(layout: AnchorLayout, size: np.ndarray) -> np.ndarray:
    """(R, 4) float64: every anchor of one picture."""
    anchors = []
    for cells, stride, grid in zip(
        layout.cells, layout.strides, layout.grids(size[None]), strict=True
    ):
        rows, columns = (np.arange(x) + layout.offset for x in grid[0])
        for y, x in itertools.product(rows, columns):
            anchors.append(cells + np.array([x, y, x, y]) * stride)
    return np.concatenate(anchors)


def all_ious(anchors: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """(M, R): the IoU of every box with every anchor, in float64."""
    (ax0, ay0, ax1, ay1), (bx0, by0, bx1, by1) = anchors.T, boxes.T[:, :, None]
    width = (np.minimum(ax1, bx1) - np.maximum(ax0, bx0)).clip(min=0)
    height = (np.minimum(ay1, by1) - np.maximum(ay0, by0)).clip(min=0)
    intersection = width * height
    return intersection / ((ax1 - ax0) * (ay1 - ay0) + (bx1 - bx0) * (by1 - by0) - intersection)


def test_the_best_iou_is_exactly_that_of_all_anchors_of_every_picture_of_bccd(bccd):
    generator, layout = anchors_of(load_cfg("quick_start/lite0.yaml"))
    table = box_table(bccd)
    boxes, kept, sizes = resize(table, 240, 1000)
    found = best_ious(layout, boxes, sizes[table.pictures[kept]])
    assert len(found) == len(table) == 2804
    assert len(np.unique(sizes, axis=0)) == 1  # so all pictures have the same anchors
    every = all_anchors(layout, sizes[0])
    blocks = np.array_split(boxes, 100)
    expected = np.concatenate([all_ious(every, x).max(1) for x in blocks])
    assert (found == expected).all()
    # The generator's own anchors, by detectron2's IoU in fp32.
    anchors = Boxes.cat(generator([torch.empty(1, 0, *x[0].tolist()) for x in layout.grids(sizes)]))
    assert len(anchors) == len(every)
    blocks = (pairwise_iou(Boxes(torch.tensor(x)), anchors).amax(1) for x in blocks)
    of_detectron2 = torch.cat(list(blocks)).numpy()
    np.testing.assert_allclose(found, of_detectron2, rtol=0, atol=1e-6)
    counts = cover(table, layout, [240], 1000).shares(THRESHOLDS)
    assert counts["at_least_upper"] * 2804 == pytest.approx((of_detectron2 >= 0.5).sum())
    assert counts["below_lower"] * 2804 == pytest.approx((of_detectron2 < 0.4).sum())


@pytest.mark.parametrize("offset", [0.0, 0.5])
@pytest.mark.parametrize("square", [0, 256])
def test_it_is_exact_for_boxes_of_any_shape_and_place(offset, square):
    generator = np.random.default_rng(0)
    sizes, ratios = [[8, 20], [32], [100, 300]], [[0.5, 1, 2]]
    anchors = DefaultAnchorGenerator(
        sizes=sizes, aspect_ratios=ratios, strides=[8, 16, 64], offset=offset
    )
    layout = AnchorLayout.of(anchors, 32, {"square_size": square})
    size = np.array([100, 200])
    low = generator.random((300, 2)) * size[::-1]
    side = generator.random((300, 2)) ** 3 * size[::-1]
    boxes = np.concatenate([low, np.minimum(low + side, size[::-1])], 1)
    boxes = boxes.astype(np.float32).astype(np.float64)
    expected = all_ious(all_anchors(layout, size), boxes)
    every = np.tile(size, (300, 1))
    assert (best_ious(layout, boxes, every) == expected.max(1)).all()
    best = best_anchors(layout, boxes, every)
    assert (all_ious(best, boxes).diagonal() == expected.max(1)).all()


@pytest.mark.parametrize("limits", [([320], 1000), ([480, 200], 400), ([0], 100)])
def test_boxes_are_those_that_the_mapper_gives_the_model(bccd, limits):
    cfg = load_cfg("quick_start/lite0.yaml").clone()
    cfg.defrost()
    cfg.INPUT.RANDOM_FLIP = "none"
    records = copy.deepcopy(bccd[:3])
    crowd = {**records[0]["annotations"][0], "iscrowd": 1}
    line = {**crowd, "iscrowd": 0, "bbox": [5.0, 5.0, 0.0, 20.0]}
    outside = {**line, "bbox": [600.0, 5.0, 80.0, 20.0]}
    corners = {**line, "bbox": [1, 2, 11, 33], "bbox_mode": BoxMode.XYXY_ABS}
    records[0]["annotations"] += [crowd, line, outside, corners]
    table = box_table(records)
    for shorter in limits[0]:
        cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN = (shorter,), limits[1]
        boxes, kept, sizes = resize(table, shorter, limits[1])
        corners["bbox"] = list(map(float, corners["bbox"]))  # detectron2 would cut integers off
        for i, sample in enumerate(map(DatasetMapper(cfg), records)):
            mine = table.pictures[kept] == i
            assert (boxes[mine] == sample["instances"].gt_boxes.tensor.numpy()).all()
            assert (table.classes[kept[mine]] == sample["instances"].gt_classes.numpy()).all()
            assert tuple(sizes[i]) == sample["image"].shape[1:]


def test_the_boxes_of_a_middle_tile_are_those_that_the_network_sees_whole(bccd):
    opts = ["MODEL.RETINA_FOCAL.TEST.TILE", "200", "INPUT.MIN_SIZE_TEST", "0"]
    mapper = mapper_with_boxes(load_cfg("quick_start/bccd.yaml", opts))
    records, number = copy.deepcopy(bccd[:5]), 0
    for sides in ((480, 640), (150, 640), (150, 120)):
        for record in records:
            record["height"], record["width"] = sides
        table = box_table(records).middle_tiles(200)
        for i, record in enumerate(records):
            picture = np.zeros((*sides, 3), np.uint8)
            with patch("detectron2.data.detection_utils.read_image", return_value=picture):
                seen = mapper(record)
            mine = table.pictures == i
            assert tuple(table.sizes[i]) == seen["image"].shape[1:]
            found = seen["instances"].gt_boxes.tensor.numpy()
            height, width = sides
            cut = ((found[:, 0] <= 0) | (found[:, 2] >= 200)) & (width > 200)
            cut |= ((found[:, 1] <= 0) | (found[:, 3] >= 200)) & (height > 200)
            assert np.allclose(table.boxes[mine], found[~cut], atol=1e-4)
            assert (table.classes[mine] == seen["instances"].gt_classes.numpy()[~cut]).all()
            number += len(found[~cut])
    assert number > 10


def test_tiles_that_keep_their_size_are_not_resized():
    crop = ["INPUT.CROP.ENABLED", "True", "INPUT.CROP.TYPE", "absolute"]
    crop += ["INPUT.CROP.SIZE", "[640, 640]", "INPUT.MIN_SIZE_TRAIN_SAMPLING", "choice"]
    for added, expected in {
        ("INPUT.MIN_SIZE_TRAIN", "(640,)"): ([0], 0),
        ("INPUT.MIN_SIZE_TRAIN", "(320,)"): ([320], 1000),
        ("INPUT.MIN_SIZE_TRAIN", "(640,)", "INPUT.CROP.ENABLED", "False"): ([640], 1000),
        ("INPUT.MIN_SIZE_TRAIN", "(640,)", "INPUT.CROP.SIZE", "[640, 320]"): ([640], 1000),
    }.items():
        assert policy_of(load_cfg("quick_start/bccd.yaml", [*crop, *added])) == expected


def test_boxes_of_integers_are_resized_as_those_of_decimals(tmp_path):
    """detectron2's resizing cuts integers off: 10 px at 2/3 would become 6."""
    image = {"id": 1, "file_name": "a.png", "height": 480, "width": 640}
    box = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [10, 10, 33, 33], "iscrowd": 0}
    content = {"images": [image], "annotations": [{**box, "area": 1089}]}
    content["categories"] = [{"id": 1, "name": "x"}]
    (tmp_path / "a.json").write_text(json.dumps(content))
    cv2.imwrite(str(tmp_path / "a.png"), np.zeros((480, 640, 3), np.uint8))
    register_coco_json("integer_boxes", str(tmp_path / "a.json"), str(tmp_path))
    try:
        cfg = load_cfg("quick_start/bccd.yaml", ["INPUT.RANDOM_FLIP", "none"])
        records = DatasetCatalog.get("integer_boxes")
        (found,) = DatasetMapper(cfg)(records[0])["instances"].gt_boxes.tensor.tolist()
        x, y = 10 * 427 / 640, 10 * 320 / 480
        assert found == pytest.approx([x, y, 4.3 * x, 4.3 * y])
        assert resize(box_table(records), 320, 1000)[0][0].tolist() == found
    finally:
        DatasetCatalog.remove("integer_boxes")


def test_a_policy_of_several_sides_counts_each_alike(bccd):
    _, layout = anchors_of(load_cfg("quick_start/lite0.yaml"))
    table = box_table(bccd)
    both = cover(table, layout, [60, 320], 1000).shares(THRESHOLDS)
    each = [cover(table, layout, [side], 1000).shares(THRESHOLDS) for side in (60, 320)]
    assert both["boxes"] == sum(x["boxes"] for x in each) == 2 * 2804
    for key in ("mean_best_iou", "at_least_upper", "between", "below_lower"):
        assert both[key] == pytest.approx(np.mean([x[key] for x in each]))
    assert each[0]["below_lower"] > each[1]["below_lower"]
    assert shorter_sides(640, "choice") == [640]
    assert shorter_sides([640, 320], "choice") == [320, 640]
    assert shorter_sides([320, 640], "range") == [320, 400, 480, 560, 640]
    cfg = load_cfg("quick_start/bccd.yaml", ["INPUT.MIN_SIZE_TRAIN", "[300, 400]"])
    assert policy_of(cfg) == ([300, 400], 1000)


def test_every_box_is_in_one_class_of_size():
    sides = np.array([0.5, 8, 15.99, 16, 511, 512, 4000])
    found = [name for x in sides for name, mask in size_classes(np.array([x])) if mask[0]]
    assert found == [
        *("< 8 px", "8 to 16 px", "8 to 16 px", "16 to 32 px"),
        *("256 to 512 px", ">= 512 px", ">= 512 px"),
    ]


def test_no_box_and_no_picture_are_no_fault():
    _, layout = anchors_of(load_cfg("quick_start/lite0.yaml"))
    for records in ([], [{"height": 10, "width": 20, "annotations": []}]):
        found = cover(box_table(records), layout, [320], 1000)
        assert found.shares(THRESHOLDS)["boxes"] == 0
        assert found.shares(THRESHOLDS)["mean_best_iou"] is None


def test_860_000_boxes_take_seconds_and_little_memory():
    num_boxes, num_pictures = 860_000, 118_000  # COCO's
    generator = np.random.default_rng(0)
    low = generator.random((num_boxes, 2)) * [640, 480]
    side = np.exp(generator.normal(4, 1, (num_boxes, 2)))
    table = BoxTable(
        np.concatenate([low, low + side], 1),
        generator.integers(0, 80, num_boxes),
        np.sort(generator.integers(0, num_pictures, num_boxes)),
        np.tile([[480, 640]], (num_pictures, 1)),
        ("",) * num_pictures,
    )
    octaves = OctaveAnchorGenerator(
        base_sizes=[32, 64, 128, 256, 512],
        scales_per_octave=3,
        aspect_ratios=[[0.5, 1, 2]],
        strides=[8, 16, 32, 64, 128],
    )
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    found = cover(table, AnchorLayout.of(octaves, 32), [800], 1333)
    seconds = time.process_time() - start
    assert len(found.ious) == num_boxes
    assert seconds < 15  # 2.1 alone on one core
    # Not the 800 MB of 45 IoUs for each box and their intermediate values.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400_000


def test_chunks_change_nothing(bccd, monkeypatch):
    _, layout = anchors_of(load_cfg("quick_start/lite0.yaml"))
    table = box_table(bccd[:20])
    whole = cover(table, layout, [320], 1000).ious
    monkeypatch.setattr(coverage, "CHUNK", 7)
    assert (cover(table, layout, [320], 1000).ious == whole).all()
