"""Laws of the box tower at single cells: as whole maps, with their gradients and less work."""

import copy
import math

import pytest
import torch
from conftest import PLUGIN, pictures, small_cfg
from detectron2.modeling import build_model
from hypothesis import given
from hypothesis import strategies as st
from test_head import features, head, outputs_of
from torch import nn

import retina_focal.box_tower as tower
from retina_focal.box_tower import PendingDeltas, deltas_at, first_image
from retina_focal.places import Places


def random_places(shapes, num_anchors, counts, generator):
    """Anchors of each level, some of them more than once."""
    return [
        Places(
            *(
                torch.randint(size, (count,), generator=generator)
                for size in (shape[0], num_anchors, *shape[2:])
            )
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
            patch.setattr(tower, "COST_OF_A_CELL", cost)
            patch.setattr(tower, "CELLS_AT_ONCE", 7)
            _, deltas = module(inputs)
            chosen = deltas_at(deltas, places)
        gradients = torch.autograd.grad((chosen * weights).sum(), [*inputs, *parameters])
        found.append((chosen.detach(), *gradients))
    for at_cells, of_maps in zip(*found, strict=True):
        torch.testing.assert_close(at_cells, of_maps, rtol=1e-10, atol=1e-12)


def test_whole_maps_are_computed_where_that_costs_less(monkeypatch):
    computed = []
    whole = PendingDeltas.maps
    monkeypatch.setattr(PendingDeltas, "maps", lambda self: computed.append(1) or whole(self))
    maps = [torch.randn(1, 16, 24, 24), torch.randn(1, 16, 12, 12)]
    _, deltas = head()(maps)
    corner = Places(*(torch.tensor([0]) for _ in range(4)))
    deltas_at(deltas, [corner, corner])
    assert not computed
    everywhere = Places(*torch.ones(1, 3, 24, 24).nonzero(as_tuple=True))
    deltas_at(deltas, [everywhere, corner])
    assert computed == [1]


def test_the_first_image_is_cut_out_before_the_tower_runs():
    maps = features()
    _, deltas = head()(maps)
    (alone,) = (first_image(deltas),)
    assert isinstance(alone, PendingDeltas) and all(len(x) == 1 for x in alone.inputs)
    for x, whole in zip(alone.maps(), deltas.maps(), strict=True):
        torch.testing.assert_close(x, whole[:1])
    for x, whole in zip(first_image(deltas.maps()), deltas.maps(), strict=True):
        assert torch.equal(x, whole[:1])


def test_what_the_gathered_rows_cost_is_not_kept_for_the_gradient():
    """Nine rows per cell would be: they are gathered again in the backward pass."""
    maps = [torch.randn(1, 16, 24, 24, requires_grad=True)]
    _, deltas = head()(maps)
    saved = []

    def note(x):
        saved.append(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        place = Places(*(torch.tensor([i]) for i in (0, 1, 12, 12)))
        deltas_at(deltas, [place]).sum().backward()
    outputs = 5 * 5  # cells of the middle layer that the one box depends on
    assert outputs * 9 * 16 not in saved


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
        (lambda module: module.bbox_pred.register_full_backward_pre_hook(lambda *_: None), 0),
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
        "backward pre-hook",
        "norm",
        "other convolution",
    ],
)
def test_layers_after_the_last_that_needs_whole_maps_run_on_cells(change, num_at_cells):
    module = head()
    change(module)
    _, deltas = module(features())
    assert isinstance(deltas, PendingDeltas) == (num_at_cells > 0)
    assert num_at_cells == 0 or len(deltas.layers) == num_at_cells
    expected = [module.bbox_pred(module.bbox_subnet(x)) for x in features()]
    found = deltas.maps() if num_at_cells else deltas
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


def test_a_graph_holds_the_whole_maps():
    module = head().requires_grad_(False)

    def outputs(*maps):
        logits, deltas = outputs_of(module, list(maps))
        return *logits, *deltas

    traced = torch.jit.trace(outputs, tuple(features()))
    for x, y in zip(traced(*features(1)), outputs(*features(1)), strict=True):
        torch.testing.assert_close(x, y)


def test_deltas_keep_the_autocast_of_their_head():
    module, maps = head(), [torch.randn(1, 16, 24, 24), torch.randn(1, 16, 12, 12)]
    with torch.autocast("cpu", torch.bfloat16):
        _, deltas = module(maps)
    place = Places(*(torch.tensor([i]) for i in (0, 2, 5, 0)))
    chosen = deltas_at(deltas, [place, place])
    assert chosen.dtype == deltas.maps()[0].dtype == torch.bfloat16
    full = torch.stack([x[0, 8:12, 5, 0] for x in outputs_of(module, maps)[1]])
    torch.testing.assert_close(chosen.float(), full, rtol=0.05, atol=1e-3)


def test_a_training_step_runs_the_box_tower_at_few_cells(monkeypatch):
    """At less than a seventh here, with the gradients that whole maps give."""
    torch.manual_seed(0)
    model = build_model(small_cfg(**PLUGIN)).train()
    batch = pictures([(256, 320), (320, 256)], num_boxes=[2, 0])
    linear, rows = torch.nn.functional.linear, []
    monkeypatch.setattr(tower.F, "linear", lambda x, *rest: rows.append(len(x)) or linear(x, *rest))

    def gradients():
        copied = copy.deepcopy(model)
        sum(copied(batch).values()).backward()
        return {name: p.grad for name, p in copied.named_parameters()}

    found = gradients()
    cells = 2 * sum((320 // stride) ** 2 for stride in (8, 16, 32)) + 2 * 5**2 + 2 * 3**2
    assert 0 < sum(rows) / 2 < 5 * cells / 7  # each row twice: the backward pass gathers again
    rows.clear()
    monkeypatch.setattr(tower, "COST_OF_A_CELL", math.inf)
    for name, expected in gradients().items():
        error = (found[name] - expected).norm()
        assert error <= 1e-5 * expected.norm().clamp(min=1e-6), name
    assert not rows
