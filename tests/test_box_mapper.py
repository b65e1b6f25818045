"""The mapper of boxes gives what detectron2's gives, to the last bit."""

import copy
import random

import numpy as np
import pytest
import torch
from conftest import PLUGIN, small_cfg
from detectron2.data import DatasetMapper
from detectron2.structures import BoxMode
from detectron2.utils.env import seed_all_rng
from PIL import Image

from retina_focal.data.box_mapper import BoxMapper

SIZE = 300, 200  # width, height in pixels


def record_of(folder, seed: int) -> dict:
    """A picture with up to 60 boxes, some of which are crowds, outside or without an area."""
    draw = np.random.default_rng(seed)
    path = folder / f"{seed}.png"
    pixels = draw.integers(0, 256, (SIZE[1], SIZE[0], 3), np.uint8)
    Image.fromarray(pixels).save(path)
    annotations = [
        {
            "bbox": [*draw.uniform(-20, 280, 2).tolist(), *draw.uniform(0, 90, 2).tolist()],
            "bbox_mode": BoxMode.XYWH_ABS,
            "category_id": int(draw.integers(3)),
            **({"iscrowd": int(draw.random() < 0.1)} if draw.random() < 0.7 else {}),
            **({"segmentation": [[1, 2, 3, 4, 5, 6]]} if draw.random() < 0.3 else {}),
        }
        for _ in range(draw.integers(0, 60))
    ]
    for annotation in annotations[::7]:
        annotation["bbox"][2] = 0.0
    record = {"file_name": str(path), "width": SIZE[0], "height": SIZE[1], "image_id": seed}
    return {**record, "annotations": annotations}


def sample_of(kind: type, cfg, record: dict, seed: int) -> dict:
    seed_all_rng(seed)
    random.seed(seed)
    before = copy.deepcopy(record)
    sample = kind(cfg, True)(record)
    assert record == before
    return sample


@pytest.mark.parametrize("crop", [False, True])
@pytest.mark.parametrize("flip", ["horizontal", "vertical"])
def test_samples_are_those_of_detectron2(tmp_path, crop, flip):
    cfg = small_cfg(**PLUGIN)
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.RANDOM_FLIP = (97, 130, 211), flip
    cfg.INPUT.CROP.ENABLED, cfg.INPUT.CROP.TYPE, cfg.INPUT.CROP.SIZE = crop, "absolute", [90, 90]
    number = 0
    for seed in range(30):
        record = record_of(tmp_path, seed)
        found, expected = (sample_of(x, cfg, record, seed) for x in (BoxMapper, DatasetMapper))
        assert found.keys() == expected.keys()
        assert torch.equal(found["image"], expected["image"])
        ours, theirs = found["instances"], expected["instances"]
        assert ours.image_size == theirs.image_size
        assert ours.get_fields().keys() == theirs.get_fields().keys()
        assert torch.equal(ours.gt_boxes.tensor, theirs.gt_boxes.tensor)
        assert ours.gt_boxes.tensor.dtype == theirs.gt_boxes.tensor.dtype == torch.float32
        assert torch.equal(ours.gt_classes, theirs.gt_classes)
        assert ours.gt_classes.dtype == theirs.gt_classes.dtype
        number += len(ours)
    assert number > 100


@pytest.mark.parametrize(
    ("key", "change"),
    [
        ("", {"bbox": [1, 2, 30, 40]}),  # whose fractions detectron2 cuts off
        ("", {"bbox": [10.0, 20.0, 50.0, 60.0], "bbox_mode": BoxMode.XYXY_ABS}),
        ("", {"bbox": [50.0, 60.0, 30.0, 20.0, 40.0], "bbox_mode": BoxMode.XYWHA_ABS}),
        ("MASK_ON", {"segmentation": [[10.0, 20.0, 90.0, 25.0, 50.0, 99.0]]}),
    ],
)
def test_what_is_not_four_decimals_alone_is_left_to_detectron2(tmp_path, key, change):
    cfg = small_cfg(**PLUGIN)
    if key:
        cfg.MODEL[key] = True
    record = record_of(tmp_path, 1)
    record["annotations"] = [{**x, "iscrowd": 0, **change} for x in record["annotations"]]
    found, expected = (
        DatasetMapper.__call__(kind(cfg, True), copy.deepcopy(record))["instances"]
        for kind in (BoxMapper, DatasetMapper)
        if seed_all_rng(3) is None
    )
    assert found.get_fields().keys() == expected.get_fields().keys()
    assert torch.equal(found.gt_boxes.tensor, expected.gt_boxes.tensor) and len(found)
