"""Laws of the head: detectron2's weights and outputs, and the prior (Sec. 3.3)."""

import math

import pytest
import torch
from conftest import small_cfg
from detectron2.layers import CycleBatchNormList, ShapeSpec
from detectron2.modeling.meta_arch.retinanet import RetinaNetHead
from torch import nn

from retina_focal import FocalRetinaNetHead
from retina_focal.box_tower import PendingDeltas
from retina_focal.head import build_dense_head, prior_bias

LEVELS = [ShapeSpec(channels=16, stride=stride) for stride in (8, 16, 32)]


def features(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, 16, *size, generator=generator) for size in ((6, 8), (3, 4), (1, 2))]


def outputs_of(module, maps):
    """Logits and deltas as whole maps."""
    logits, deltas = module(maps)
    return logits, deltas.maps() if isinstance(deltas, PendingDeltas) else deltas


def head(cls=FocalRetinaNetHead, seed=0, **kwargs):
    torch.manual_seed(seed)
    arguments = {"num_classes": 5, "num_anchors": 3, "conv_dims": [16, 16]}
    return cls(input_shape=LEVELS, **{**arguments, **kwargs})


@pytest.mark.parametrize("norm", ["", "GN", "BN"])
def test_one_seed_gives_stock_names_weights_and_outputs(norm):
    channels = 32 if norm == "GN" else 16  # GroupNorm has 32 groups
    ours = head(norm=norm, conv_dims=[channels])
    theirs = head(RetinaNetHead, norm=norm, conv_dims=[channels])
    state, expected = ours.state_dict(), theirs.state_dict()
    assert list(state) == list(expected)
    assert all(torch.equal(state[name], expected[name]) for name in state)
    for a, b in zip(outputs_of(ours, features()), theirs(features()), strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_weights_start_from_a_normal_of_deviation_001_and_zero_bias():
    module = head(conv_dims=[64, 64])
    weights = torch.cat([m.weight.flatten() for m in module.modules() if isinstance(m, nn.Conv2d)])
    # 108,000 draws: the deviation is known to 0.2%, the mean to 3e-5.
    assert weights.std().item() == pytest.approx(0.01, rel=0.02)
    assert abs(weights.mean().item()) < 2e-4
    for name, parameter in module.named_parameters():
        if name.endswith("bias") and name != "cls_score.bias":
            assert (parameter == 0).all()


@pytest.mark.parametrize("pi", [0.01, 0.5, 0.99])
def test_every_anchor_starts_near_a_score_of_pi(pi):
    module = head(prior_prob=pi)
    assert (module.cls_score.bias == torch.tensor(prior_bias(pi))).all()
    assert 1 / (1 + math.exp(-prior_bias(pi))) == pytest.approx(pi)
    scores = torch.cat([x.flatten() for x in module(features())[0]]).sigmoid()
    # Two layers of deviation 0.01 pass on a hundredth of the signal.
    assert scores.mean().item() == pytest.approx(pi, rel=0.01)


def test_the_towers_share_no_weight_but_levels_do():
    module = head()
    names = {id(p) for p in module.cls_subnet.parameters()}
    assert names.isdisjoint(id(p) for p in module.bbox_subnet.parameters())
    same = torch.ones(1, 16, 4, 4)
    logits, deltas = outputs_of(module, [same, same, same])
    assert torch.equal(logits[0], logits[2]) and torch.equal(deltas[0], deltas[2])


def test_boxes_are_class_agnostic():
    logits, deltas = outputs_of(head(num_classes=5, num_anchors=3), features())
    assert [x.shape for x in logits] == [(2, 15, 6, 8), (2, 15, 3, 4), (2, 15, 1, 2)]
    assert [x.shape for x in deltas] == [(2, 12, 6, 8), (2, 12, 3, 4), (2, 12, 1, 2)]


@pytest.mark.parametrize("norm, cls", [("BN", nn.BatchNorm2d), ("SyncBN", nn.SyncBatchNorm)])
def test_batch_statistics_are_kept_a_level(norm, cls):
    module = head(norm=norm)
    lists = [m for m in module.modules() if isinstance(m, CycleBatchNormList)]
    assert len(lists) == 4
    assert all(len(x) == 3 and all(isinstance(bn, cls) for bn in x) for x in lists)


def test_without_a_tower_the_head_is_its_two_outputs():
    assert sorted(dict(head(conv_dims=[]).named_parameters())) == [
        "bbox_pred.bias",
        "bbox_pred.weight",
        "cls_score.bias",
        "cls_score.weight",
    ]


def test_config_names_the_head_and_its_parts():
    cfg = small_cfg()
    cfg.MODEL.RETINANET.NUM_CONVS = 2
    module = build_dense_head(cfg, [ShapeSpec(channels=16, stride=s) for s in (8, 16, 32, 64, 128)])
    assert isinstance(module, FocalRetinaNetHead)
    assert (module.num_classes, module.num_anchors) == (3, 9)
    assert len([m for m in module.cls_subnet if isinstance(m, nn.Conv2d)]) == 2


def test_levels_with_different_numbers_of_anchors_are_refused():
    cfg = small_cfg()
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[32], [64, 80], [128]]
    with pytest.raises(ValueError, match=r"makes \[3, 6, 3\] anchors per cell"):
        build_dense_head(cfg, LEVELS)


@pytest.mark.parametrize("pi", [0.0, 1.0, -0.1])
def test_a_prior_outside_0_to_1_is_refused(pi):
    with pytest.raises(ValueError, match=f"PRIOR_PROB is {pi}; expected 0 < PRIOR_PROB < 1"):
        head(prior_prob=pi)
