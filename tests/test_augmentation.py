"""Laws of the augmentations beyond `INPUT`."""

import pytest
import torch
from detectron2.structures import Boxes, Instances
from omegaconf import OmegaConf
from test_loading import seen
from test_resume import small
from test_resume import toy as toy

from retina_focal.data.augmentation import GREY, Mosaic, mosaic
from retina_focal.data.loading import build_train_loader
from retina_focal.errors import UserError

AUGMENT = "MODEL.RETINA_FOCAL.TRAIN.AUGMENT."
BLUE = torch.tensor([255, 0, 0])[:, None, None]  # of class 1, in BGR


def loader(cfg, end: int = 10**9):
    return build_train_loader(cfg, 1, mosaic=mosaic(cfg.MODEL.RETINA_FOCAL.TRAIN.AUGMENT, end))


def batches(cfg, count: int = 6, **options) -> list[dict]:
    samples = (x for batch in loader(cfg, **options) for x in batch)
    return [next(samples) for _ in range(2 * count)]


@pytest.mark.parametrize(
    "keys",
    [
        {"SCALE": [0.6, 1.6]},
        {"MOSAIC": 1.0},
        {"SCALE": [0.6, 1.6], "VERTICAL_FLIP": 0.5},
        {"SCALE": [0.6, 1.6], "MOSAIC": 0.5},
    ],
    ids=str,
)
def test_boxes_stay_on_their_objects(keys, toy, tmp_path):
    cfg = small(tmp_path, **{AUGMENT + key: value for key, value in keys.items()})
    num_boxes, sizes = [], set()
    for sample in batches(cfg):
        image, found = sample["image"].float(), sample["instances"]
        assert found.image_size == tuple(image.shape[-2:])
        num_boxes.append(len(found))
        # Blue is painted last: nothing lies on it.
        for x0, y0, x1, y1 in found.gt_boxes.tensor[found.gt_classes == 1].tolist():
            inside = image[:, round(y0) + 1 : round(y1) - 1, round(x0) + 1 : round(x1) - 1]
            if inside.numel():
                assert ((inside - BLUE).abs().amax(0) < 60).float().mean() > 0.9
            sizes.add(round(x1 - x0))
    assert len(sizes) > 4
    assert ("MOSAIC" in keys) == (max(num_boxes) > 2)


def test_pictures_are_upside_down_as_often_as_asked(toy, tmp_path):
    def images(probability):
        return [
            x["image"] for x in batches(small(tmp_path, **{AUGMENT + "VERTICAL_FLIP": probability}))
        ]

    upright, turned, half = map(images, (0.0, 1.0, 0.5))
    flips = [torch.equal(x.flip(1), y) for x, y in zip(upright, turned, strict=True)]
    assert all(flips) and not any(map(torch.equal, upright, turned))
    some = list(map(torch.equal, upright, half))
    assert any(some) and not all(some)


def test_every_pixel_and_box_of_a_mosaic_is_that_of_a_picture():
    def sample(value, height, width):
        instances = Instances((height, width), gt_classes=torch.tensor([value]))
        instances.gt_boxes = Boxes(torch.tensor([[0.0, 0.0, width, height]]))
        image = torch.full((3, height, width), value, dtype=torch.uint8)
        regions = Boxes(torch.tensor([[0.0, 0.0, width, height]]))
        return {
            "image": image,
            "instances": instances,
            "ignore_regions": regions,
            "file_name": value,
        }

    torch.manual_seed(0)
    samples = [sample(1, 40, 60), sample(2, 80, 80), sample(3, 40, 60), sample(4, 9, 7)]
    for _ in range(20):
        result = Mosaic(1.0, 1)(samples)
        image = result["image"]
        assert image.shape == (3, 40, 60) and result["file_name"] == 1
        assert set(image.unique().tolist()) == {1, 2, 3, 4, GREY}
        for x0, y0, x1, y1 in result["ignore_regions"].tensor.int().tolist():
            assert len(image[0, y0:y1, x0:x1].unique()) == 1
            assert (image == image[0, y0, x0]).sum() == 3 * (y1 - y0) * (x1 - x0)
        kept = result["instances"]
        for box, label in zip(kept.gt_boxes.tensor.int().tolist(), kept.gt_classes, strict=True):
            x0, y0, x1, y1 = box
            assert (image[0, y0:y1, x0:x1] == label).all()
            whole = samples[label - 1]["instances"].gt_boxes.area()
            assert (x1 - x0) * (y1 - y0) >= 0.25 * whole
        assert len(result["ignore_regions"]) == 4 and 4 in kept.gt_classes


def test_colours_change_and_boxes_do_not(toy, tmp_path):
    plain = batches(small(tmp_path))
    grey = batches(small(tmp_path, **{AUGMENT + "GREY": 1.0}))
    for sample in grey:
        channels = sample["image"].int()
        assert (channels - channels[:1]).abs().max() <= 1
    coloured = batches(small(tmp_path, **{AUGMENT + "COLOUR": 0.5}))
    for one, other in zip(plain, coloured, strict=True):
        assert one["image"].shape == other["image"].shape
        assert torch.equal(one["instances"].gt_boxes.tensor, other["instances"].gt_boxes.tensor)
        assert not torch.equal(one["image"], other["image"])


def test_a_resumed_run_sees_the_same_and_the_last_part_no_mosaic(toy, tmp_path):
    cfg = small(tmp_path, **{AUGMENT + "MOSAIC": 0.5, AUGMENT + "SCALE": [0.5, 2.0]})
    whole = seen(loader(cfg, end=10))
    assert seen(loader(cfg, end=10), first=2, count=4) == whole[2:]
    never = seen(loader(small(tmp_path, **{AUGMENT + "SCALE": [0.5, 2.0]})))
    # MOSAIC_OFF 0.2 of ten samples: positions from 8 on. Without a mosaic nothing else is drawn.
    assert whole[4:] == never[4:] and whole[:4] != never[:4]


@pytest.mark.parametrize(
    "key, value", [("SCALE", [2.0, 1.0]), ("COLOUR", 1.0), ("GREY", 1.1), ("MOSAIC", -0.1)]
)
def test_a_value_out_of_range_is_refused(key, value, toy, tmp_path):
    with pytest.raises(UserError, match=rf"TRAIN.AUGMENT has .*{key}"):
        loader(small(tmp_path, **{AUGMENT + key: value}))


def test_a_lazy_config_is_sent_to_its_mapper(toy, tmp_path):
    node = small(tmp_path, **{AUGMENT + "GREY": 0.5}).MODEL.RETINA_FOCAL
    with pytest.raises(UserError, match=r"all but mosaic are in dataloader.train.mapper.augm"):
        build_train_loader(OmegaConf.create({}), 1, node)
