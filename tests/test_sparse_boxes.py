"""An exported box tower gives at the cells that are read what whole maps give."""

import onnx
import pytest
import torch
from detectron2.layers import ShapeSpec
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_detector import metadata_of, noise, tiny_cfg, tiny_model
from torch import nn

from retina_focal.errors import UserError
from retina_focal.export import operators, sparse_boxes
from retina_focal.export.network import ExportedNetwork
from retina_focal.export.onnx_format import write_onnx
from retina_focal.export.proof import TOLERANCES, differences
from retina_focal.export.runners import open_exported
from retina_focal.export.sparse_boxes import Pairs, SparseBoxTower
from retina_focal.head import FocalRetinaNetHead

CHANNELS, ANCHORS = 4, 3


def head(**arguments) -> FocalRetinaNetHead:
    torch.manual_seed(0)
    levels = [ShapeSpec(CHANNELS)] * 2
    arguments = {"conv_dims": [CHANNELS] * 2, "num_classes": 2, "num_anchors": ANCHORS} | arguments
    made = FocalRetinaNetHead(input_shape=levels, **arguments)
    for layer in made.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.normal_(layer.weight, std=0.3)
            nn.init.normal_(layer.bias)  # a cell outside of the map is zero, and no bias
    return made.eval()


@settings(max_examples=30)
@given(
    seed=st.integers(0, 2**31),
    num_convs=st.integers(1, 3),
    images=st.integers(1, 3),
    sizes=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=2, max_size=2),
    share=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
)
@torch.no_grad()
def test_deltas_at_cells_are_those_of_whole_maps(seed, num_convs, images, sizes, share):
    generator = torch.Generator().manual_seed(seed)
    own = head(conv_dims=[CHANNELS] * num_convs)
    tower = SparseBoxTower(own)
    features = [torch.randn(images, CHANNELS, *size, generator=generator) for size in sizes]
    _, inputs = own(features)  # what is left of the head's tower
    pairs, needed = [], []
    for height, width in sizes:
        drawn = (
            torch.randint(most, (images, 7), generator=generator)
            for most in (ANCHORS, height, width)
        )
        pairs.append(Pairs(*drawn, torch.zeros(images, 7), torch.zeros(images, 7)))
        needed.append(torch.rand(images, 7, generator=generator) < share)
    seen = {}

    def both(condition, cells, maps):
        seen.update(condition=condition, cells=cells, maps=maps)
        return cells

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(operators, "either", both)
        found = tower(inputs, pairs, needed)
    read = torch.cat(needed, 1)
    _, expected = head(conv_dims=[CHANNELS] * num_convs)(features)
    expected = torch.cat(
        [
            x.unflatten(1, (ANCHORS, 4))[
                torch.arange(images)[:, None], y.anchor, :, y.row, y.column
            ]
            for x, y in zip(expected.maps(), pairs, strict=True)
        ],
        1,
    )
    torch.testing.assert_close(seen["maps"], expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found[read], expected[read], rtol=1e-4, atol=1e-4)
    assert seen["condition"] or read.any()


def test_whole_maps_are_computed_where_most_cells_are_needed():
    """Of a map of 20 x 20 one cell needs 1 + 9 + 25 = 35 of 3 x 400, the 169 in a corner need
    169 + 196 + 225 = 590, and all need all. 800 would cost as much as whole maps, at 1.5 each."""
    own, chosen = head(), []
    tower = SparseBoxTower(own)
    inputs = [torch.zeros(1, CHANNELS, 20, 20)] * 2
    index = torch.arange(400)[None]
    everywhere = Pairs(*[torch.zeros_like(index), index // 20, index % 20], *[index] * 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(operators, "either", lambda condition, *_: chosen.append(bool(condition)))
        corner = (index // 20 < 13) & (index % 20 < 13)
        for needed in (index == 210, corner, index >= 0):
            tower(inputs, [everywhere] * 2, [needed] * 2)
    assert chosen == [True, True, False]


@pytest.mark.parametrize("made", [head(norm="GN", conv_dims=[32]), nn.Identity()])
def test_a_head_that_needs_whole_maps_is_refused(made):
    with pytest.raises(UserError, match="leave out: --sparse-boxes"):
        SparseBoxTower(made)


def test_the_file_detects_what_the_model_does_by_cells_and_by_maps(tmp_path, monkeypatch):
    cfg = tiny_cfg(MODEL__RETINANET__TOPK_CANDIDATES_TEST=600)
    monkeypatch.setattr(sparse_boxes, "COST_OF_A_CELL", 3)  # whole maps on full pictures of noise
    model, path = tiny_model(cfg), tmp_path / "model.onnx"
    metadata = metadata_of(cfg, tmp_path)
    write_onnx(model, metadata, path, sparse_boxes=True)
    onnx.checker.check_model(str(path), full_check=True)
    nodes = onnx.load(str(path)).graph.node
    (choice,) = [x for x in nodes if x.op_type == "If"]
    cells, maps = (
        [y.op_type for y in attribute.g.node]
        for name in ("then_branch", "else_branch")
        for attribute in choice.attribute
        if attribute.name == name
    )
    assert "Gemm" in cells and "Conv" not in cells
    # Two levels, two convolutions; beside them two of the backbone and four of the other tower.
    assert maps.count("Conv") == 4 and sum(x.op_type == "Conv" for x in nodes) == 6

    exported, chosen = open_exported(path, threads=1), []
    network = ExportedNetwork(model, metadata, sparse_boxes=True)
    either = operators.either

    def noted(condition, *sides):
        chosen.append(bool(condition))
        return either(condition, *sides)

    monkeypatch.setattr(operators, "either", noted)
    blank = model.pixel_mean.expand(3, 160, 224)
    for size in [(160, 224), (40, 64), (1, 1)]:
        images = []
        for image in noise(2, size):
            images.append(blank.clone())
            images[-1][:, : size[0], : size[1]] = image
        with torch.no_grad():
            network(torch.stack(images))
            expected = model([{"image": image} for image in images])
        found = exported([{"image": image} for image in images])
        for ours, theirs in zip(expected, found, strict=True):
            _, box, score, different = differences(
                ours["instances"], theirs["instances"], metadata, TOLERANCES["fp32"]
            )
            assert not different and box < 1e-3 and score < 1e-5
        assert size == (1, 1) or len(expected[0]["instances"]) > 10
    assert set(chosen) == {True, False}
