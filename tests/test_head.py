"""Laws of the head: detectron2's weights and outputs, and the prior (Sec. 3.3)."""

import copy
import math

import pytest
import torch
from conftest import PLUGIN, pictures, small_cfg
from detectron2.layers import CycleBatchNormList, ShapeSpec
from detectron2.modeling import build_model
from detectron2.modeling.meta_arch.retinanet import RetinaNetHead
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import retina_focal.head as head_module
from retina_focal import FocalRetinaNetHead
from retina_focal.head import LazyDeltas, build_dense_head, deltas_at, prior_bias

LEVELS = [ShapeSpec(channels=16, stride=stride) for stride in (8, 16, 32)]


def features(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, 16, *size, generator=generator) for size in ((6, 8), (3, 4), (1, 2))]


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
    for a, b in zip(ours(features()), theirs(features()), strict=True):
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
    logits, deltas = module([same, same, same])
    assert torch.equal(logits[0], logits[2]) and torch.equal(deltas[0], deltas[2])


def test_boxes_are_class_agnostic():
    logits, deltas = head(num_classes=5, num_anchors=3)(features())
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
    with pytest.raises(ValueError, match=r"makes \[3, 6, 3\] anchors a cell"):
        build_dense_head(cfg, LEVELS)


@pytest.mark.parametrize("pi", [0.0, 1.0, -0.1])
def test_a_prior_outside_0_to_1_is_refused(pi):
    with pytest.raises(ValueError, match=f"PRIOR_PROB is {pi}; expected 0 < PRIOR_PROB < 1"):
        head(prior_prob=pi)


# Boxes where they are needed


def random_places(shapes, num_anchors, counts, generator):
    """Anchors of each level, some of them more than once."""
    return [
        tuple(
            torch.randint(size, (count,), generator=generator)
            for size in (shape[0], *shape[2:], num_anchors)
        )
        for shape, count in zip(shapes, counts, strict=True)
    ]


@given(
    seed=st.integers(0, 99),
    num_images=st.integers(1, 3),
    sizes=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=3),
    num_convs=st.integers(0, 3),
    norm=st.sampled_from(["", lambda channels: nn.GroupNorm(1, channels)]),
    most=st.integers(0, 4),
)
def test_deltas_of_some_anchors_equal_those_of_whole_maps(
    seed, num_images, sizes, num_convs, norm, most
):
    generator = torch.Generator().manual_seed(seed)
    module = head(seed=seed, conv_dims=[5, 7, 6][:num_convs], norm=norm).double()
    for name, parameter in module.named_parameters():
        if name.endswith("bias"):  # what stands outside of a map must not look like 0
            nn.init.normal_(parameter)
    maps = [
        torch.randn(num_images, 16, *size, generator=generator, dtype=torch.float64)
        for size in sizes
    ]
    counts = torch.randint(most + 1, (len(sizes),), generator=generator).tolist()
    places = random_places([x.shape for x in maps], 3, counts, generator)
    weights = torch.randn(sum(counts), 4, generator=generator, dtype=torch.float64)
    found = []
    for cost in (0, math.inf):
        inputs = [x.clone().requires_grad_() for x in maps]
        parameters = [*module.bbox_subnet.parameters(), *module.bbox_pred.parameters()]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(head_module, "COST_OF_A_CELL", cost)
            patch.setattr(head_module, "CELLS_AT_ONCE", 7)
            _, deltas = module(inputs)
            chosen = deltas_at(deltas, places)
        gradients = torch.autograd.grad((chosen * weights).sum(), [*inputs, *parameters])
        found.append((chosen.detach(), *gradients))
    for at_cells, of_maps in zip(*found, strict=True):
        torch.testing.assert_close(at_cells, of_maps, rtol=1e-10, atol=1e-12)


def test_whole_maps_are_computed_where_that_costs_less(monkeypatch):
    computed = set()
    dense = LazyDeltas.__getitem__
    monkeypatch.setattr(
        LazyDeltas, "__getitem__", lambda self, i: computed.add(i) or dense(self, i)
    )
    maps = [torch.randn(1, 16, 24, 24), torch.randn(1, 16, 12, 12)]
    _, deltas = head()(maps)
    corner = tuple(torch.tensor([0]) for _ in range(4))
    deltas_at(deltas, [corner, corner])
    assert not computed
    everywhere = torch.ones(1, 24, 24, 3).nonzero(as_tuple=True)
    deltas_at(deltas, [everywhere, corner])
    assert computed >= {0, 1}


class OtherTower(nn.Sequential):
    pass


@pytest.mark.parametrize(
    ("change", "num_at_cells"),
    [
        (lambda module: None, 5),
        (lambda module: module.bbox_pred.register_forward_hook(lambda *_: None), 0),
        (lambda module: nn.utils.parametrizations.weight_norm(module.bbox_pred), 0),
        (lambda module: module.bbox_subnet.register_forward_pre_hook(lambda *_: None), 1),
        (lambda module: setattr(module, "bbox_subnet", OtherTower(*module.bbox_subnet)), 1),
        (lambda module: module.bbox_subnet[2].register_full_backward_hook(lambda *_: None), 2),
        (lambda module: module.bbox_subnet.insert(3, nn.GroupNorm(2, 16)), 2),
        (lambda module: module.bbox_subnet.__setitem__(0, nn.Conv2d(16, 16, 5, padding=2)), 4),
    ],
    ids=[
        "as built",
        "hook on the last",
        "parametrized",
        "pre-hook on the tower",
        "other tower",
        "backward hook",
        "norm",
        "other convolution",
    ],
)
def test_layers_after_the_last_that_needs_whole_maps_run_on_cells(change, num_at_cells):
    module = head()
    change(module)
    _, deltas = module(features())
    assert isinstance(deltas, LazyDeltas) == (num_at_cells > 0)
    assert num_at_cells == 0 or len(deltas.layers) == num_at_cells
    expected = [module.bbox_pred(module.bbox_subnet(x)) for x in features()]
    assert all(torch.equal(x, y) for x, y in zip(deltas, expected, strict=True))


def test_a_graph_holds_the_whole_maps():
    module = head().requires_grad_(False)

    def outputs(*maps):
        logits, deltas = module(list(maps))
        return *logits, *deltas

    traced = torch.jit.trace(outputs, tuple(features()))
    for x, y in zip(traced(*features(1)), outputs(*features(1)), strict=True):
        torch.testing.assert_close(x, y)


def test_deltas_keep_the_autocast_of_their_head():
    module, maps = head(), [torch.randn(1, 16, 24, 24), torch.randn(1, 16, 12, 12)]
    with torch.autocast("cpu", torch.bfloat16):
        _, deltas = module(maps)
    place = tuple(torch.tensor([i]) for i in (0, 5, 0, 2))
    chosen = deltas_at(deltas, [place, place])
    assert chosen.dtype == deltas[0].dtype == torch.bfloat16
    full = torch.stack([x[0, 8:12, 5, 0] for x in module(maps)[1]])
    torch.testing.assert_close(chosen.float(), full, rtol=0.05, atol=1e-3)


def test_a_training_step_runs_the_box_tower_at_few_cells(monkeypatch):
    """At less than a seventh here, with the gradients that whole maps give."""
    torch.manual_seed(0)
    model = build_model(small_cfg(**PLUGIN)).train()
    batch = pictures([(256, 320), (320, 256)], num_boxes=[2, 0])
    linear, rows = torch.nn.functional.linear, []
    monkeypatch.setattr(
        head_module.F, "linear", lambda x, *rest: rows.append(len(x)) or linear(x, *rest)
    )

    def gradients():
        copied = copy.deepcopy(model)
        sum(copied(batch).values()).backward()
        return {name: p.grad for name, p in copied.named_parameters()}

    found = gradients()
    cells = 2 * sum((320 // stride) ** 2 for stride in (8, 16, 32)) + 2 * 5**2 + 2 * 3**2
    assert 0 < sum(rows) / 2 < 5 * cells / 7  # each row twice: the backward pass gathers again
    rows.clear()
    monkeypatch.setattr(head_module, "COST_OF_A_CELL", math.inf)
    for name, expected in gradients().items():
        error = (found[name] - expected).norm()
        assert error <= 1e-5 * expected.norm().clamp(min=1e-6), name
    assert not rows
