"""Laws of the octave anchors (Sec. 4, "Anchors")."""

import pytest
import torch
from detectron2.config import get_cfg as detectron2_get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator, build_anchor_generator
from pretend import Counting, to_device

from retina_focal import OctaveAnchorGenerator, get_cfg

STRIDES = [8, 16, 32, 64, 128]
SHAPES = [ShapeSpec(channels=256, stride=stride) for stride in STRIDES]
FEATURES = [torch.zeros(1, 1, 40 // 2**i + 1, 56 // 2**i + 1) for i in range(5)]
# The sizes that detectron2's own Base-RetinaNet.yaml computes in its config.
STOCK_SIZES = [[x, x * 2 ** (1.0 / 3), x * 2 ** (2.0 / 3)] for x in [32, 64, 128, 256, 512]]


def octave_cfg(get=get_cfg):
    cfg = get()
    cfg.MODEL.ANCHOR_GENERATOR.NAME = "OctaveAnchorGenerator"
    cfg.MODEL.ANCHOR_GENERATOR.OFFSET = 0.0
    return cfg


def test_default_is_nine_anchors_a_cell_from_32_to_813_pixels():
    generator = build_anchor_generator(octave_cfg(), SHAPES)
    assert generator.num_anchors == [9] * 5
    sizes = torch.cat([(a[:, 2:] - a[:, :2]).prod(1).sqrt() for a in generator.cell_anchors])
    torch.testing.assert_close(sizes.min(), torch.tensor(32.0))
    torch.testing.assert_close(sizes.max(), torch.tensor(812.7493))  # 512 * 2^(2/3)
    for anchors in generator.cell_anchors:
        width, height = (anchors[:, 2:] - anchors[:, :2]).unbind(1)
        torch.testing.assert_close(height / width, torch.tensor([0.5, 1.0, 2.0]).repeat(3))


@pytest.mark.parametrize("offset", [0.0, 0.5])
def test_equal_to_detectron2_for_the_same_sizes_to_the_last_bit(offset):
    cfg = octave_cfg()
    cfg.MODEL.ANCHOR_GENERATOR.OFFSET = offset
    ours = build_anchor_generator(cfg, SHAPES)
    theirs = DefaultAnchorGenerator(
        sizes=STOCK_SIZES, aspect_ratios=[[0.5, 1.0, 2.0]], strides=STRIDES, offset=offset
    )
    for a, b in zip(ours(FEATURES), theirs(FEATURES), strict=True):
        assert torch.equal(a.tensor, b.tensor)


def test_a_config_without_our_node_makes_the_default_anchors():
    ours = build_anchor_generator(octave_cfg(detectron2_get_cfg), SHAPES)
    assert ours.num_anchors == [9] * 5


def test_one_feature_map_carries_all_sizes():
    generator = build_anchor_generator(octave_cfg(), SHAPES[2:3])
    assert generator.num_anchors == [45]
    cells = torch.cat(list(build_anchor_generator(octave_cfg(), SHAPES).cell_anchors))
    assert torch.equal(next(iter(generator.cell_anchors)), cells)


def test_anchors_are_not_saved():
    assert not build_anchor_generator(octave_cfg(), SHAPES).state_dict()


def test_scales_divide_the_octave_evenly():
    generator = OctaveAnchorGenerator(
        base_sizes=[16], scales_per_octave=4, aspect_ratios=[1.0], strides=[8]
    )
    sizes = (next(iter(generator.cell_anchors))[:, 2:] * 2)[:, 0]
    torch.testing.assert_close(sizes[1:] / sizes[:-1], torch.full((3,), 2**0.25))


@pytest.mark.parametrize("sizes", [STOCK_SIZES, [[32, 64, 128, 256, 512]]])
def test_stock_sizes_in_the_config_are_accepted(sizes):
    cfg = octave_cfg()
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = sizes
    assert build_anchor_generator(cfg, SHAPES).num_anchors == [9] * 5


def test_sizes_that_would_be_ignored_are_refused():
    cfg = octave_cfg()
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[16], [32], [64], [128], [256]]
    with pytest.raises(ValueError, match=r"SIZES is \[\[16\].*ANCHORS.BASE_SIZES"):
        build_anchor_generator(cfg, SHAPES)


def test_base_sizes_that_fit_no_levels_are_refused():
    cfg = octave_cfg()
    cfg.MODEL.RETINA_FOCAL.ANCHORS.BASE_SIZES = [32, 64]
    with pytest.raises(ValueError, match=r"2 sizes .* for 5 feature levels"):
        build_anchor_generator(cfg, SHAPES)


def test_no_scale_at_all_is_refused():
    cfg = octave_cfg()
    cfg.MODEL.RETINA_FOCAL.ANCHORS.SCALES_PER_OCTAVE = 0
    with pytest.raises(ValueError, match="SCALES_PER_OCTAVE is 0"):
        build_anchor_generator(cfg, SHAPES)


def test_anchors_are_made_on_the_device_once_for_a_size():
    generator = build_anchor_generator(octave_cfg(), SHAPES)
    expected = [level.tensor for level in generator(FEATURES)]
    to_device(generator)
    with Counting() as counted:
        found = generator(FEATURES)
    assert not counted.waits and counted.operations
    assert all(torch.equal(x.tensor.held, y) for x, y in zip(found, expected, strict=True))
    with Counting() as counted:
        again = generator(FEATURES)
        others = generator([x[..., 1:, :] for x in FEATURES])
    assert not counted.waits
    assert all(x.tensor is y.tensor for x, y in zip(again, found, strict=True))
    assert len(others[0]) == len(found[0]) // 41 * 40


def test_inference_mode_leaves_anchors_that_training_can_use():
    generator = build_anchor_generator(octave_cfg(), SHAPES)
    with torch.inference_mode():
        generator(FEATURES)
    assert not any(level.tensor.is_inference() for level in generator(FEATURES))
