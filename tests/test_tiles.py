"""Laws of tiles: every object that fits into one is found once, and nothing else is."""

import itertools

import pytest
import torch
from detectron2.structures import Boxes, Instances, pairwise_iou
from hypothesis import given, settings
from hypothesis import strategies as st

from retina_focal.evaluation.tiles import EDGE, Tile, is_whole, merge_tiles, tiles_of

SIDE, OVERLAP, SCENE = 1024, 0.2, 4000
SMALLEST = 8  # pixels of an object, after scaling, that the oracle finds in the whole picture


def scene(count: int, largest: float, seed: int) -> torch.Tensor:
    """(M, 4) XYXY boxes of 12 px to `largest` in the scene, every third inside an earlier one.

    None has an IoU above 0.5 with another, which is what NMS takes for the same object.
    """
    generator = torch.Generator().manual_seed(seed)
    boxes = torch.empty(0, 4)
    while len(boxes) < count:
        random = torch.rand(6, generator=generator)
        side = 12 * (largest / 12) ** random[0]
        ratio = 3 ** (random[1] - 0.5)
        size = torch.stack([side * ratio, side / ratio]).clamp(12, largest)
        low, high = torch.zeros(2), torch.full((2,), float(SCENE))
        if len(boxes) % 3 == 2:
            outer = boxes[int(random[4] * len(boxes))]
            low, high = outer[:2], outer[2:]
            size = torch.minimum(size, (high - low) * (0.2 + 0.5 * random[5]))
        corner = low + (high - low - size) * random[2:4]
        box = torch.cat([corner, corner + size])[None]
        if size.min() >= 4 and (pairwise_iou(Boxes(box), Boxes(boxes)) <= 0.45).all():
            boxes = torch.cat([boxes, box])
    return boxes


def oracle(tile: Tile, boxes: torch.Tensor, is_last: bool) -> Instances:
    """The true boxes clipped to the tile; in the whole picture those that are large enough."""
    x0, y0, x1, y1 = tile.window
    scale = torch.tensor([tile.size[0] / (x1 - x0), tile.size[1] / (y1 - y0)] * 2)
    inside = (boxes - torch.tensor([x0, y0, x0, y0])) * scale
    if is_last:
        shrunk = (boxes[:, 2:] - boxes[:, :2]) * SIDE / SCENE
        inside = inside[(shrunk >= SMALLEST).all(1)]
    seen = Boxes(inside)
    seen.clip(tile.size[::-1])
    seen = seen[seen.nonempty()]
    scores = 0.5 + 0.5 * torch.rand(len(seen), generator=torch.Generator().manual_seed(7))
    classes = torch.zeros(len(seen), dtype=torch.int64)
    return Instances(tile.size[::-1], pred_boxes=seen, scores=scores, pred_classes=classes)


def find(boxes: torch.Tensor) -> torch.Tensor:
    tiles = tiles_of(SCENE, SCENE, SIDE, OVERLAP)
    found = [oracle(tile, boxes, tile is tiles[-1]) for tile in tiles]
    return merge_tiles(tiles, found, SIDE, nms_thresh=0.5).pred_boxes.tensor


@pytest.mark.parametrize("largest", [190, 400, SIDE])
def test_all_objects_up_to_the_size_of_a_tile_are_found_and_none_twice(largest):
    boxes = scene(640, largest, seed=0)
    found = find(boxes)
    nearest = pairwise_iou(Boxes(boxes), Boxes(found)).max(0)
    assert (nearest.values > 0.999).all()  # nothing else is found, such as a part of an object
    assert sorted(nearest.indices.tolist()) == list(range(len(boxes)))


def test_the_scene_has_boxes_inside_boxes_and_some_that_no_tile_holds():
    boxes = scene(640, SIDE, 0)
    inside = (boxes[:, None, :2] >= boxes[None, :, :2]) & (boxes[:, None, 2:] <= boxes[None, :, 2:])
    assert inside.all(2).sum() - len(boxes) > 200
    alone = [x for x in tiles_of(SCENE, SCENE, SIDE, OVERLAP) if any(x.inner)]
    windows = torch.tensor([x.window for x in alone])
    fits = (boxes[:, None, :2] >= windows[:, :2]) & (boxes[:, None, 2:] <= windows[:, 2:])
    assert (~fits.all(2).any(1)).sum() > 10


@settings(max_examples=50)
@given(
    size=st.tuples(st.integers(1, 5000), st.integers(1, 5000)),
    side=st.integers(50, 1500),
    overlap=st.floats(0.05, 0.6),
    place=st.tuples(st.floats(0, 1), st.floats(0, 1)),
)
def test_a_box_that_fits_into_the_overlap_is_whole_in_a_tile_of_the_finest_scale(
    size, side, overlap, place
):
    tiles = tiles_of(*size, side, overlap)
    width, height = size
    finest = [x for x in tiles if x.window[2] - x.window[0] == x.size[0] <= side] or tiles
    # Edges of tiles are whole pixels: two of them may lie one pixel nearer to each other.
    length = max(side * (overlap - 2 * EDGE) - 2, 0)
    box = [min(length, width), min(length, height)]
    corner = [place[0] * (width - box[0]), place[1] * (height - box[1])]
    x0, y0, x1, y1 = (*corner, corner[0] + box[0], corner[1] + box[1])
    whole = []
    for tile in finest:
        left, top, right, bottom = tile.window
        if left <= x0 and top <= y0 and x1 <= right and y1 <= bottom:
            inside = torch.tensor([[x0 - left, y0 - top, x1 - left, y1 - top]], dtype=torch.double)
            whole.append(bool(is_whole(tile, inside, side)))
    assert any(whole)


@settings(max_examples=30)
@given(st.integers(1, 9000), st.integers(1, 9000), st.integers(200, 1500))
def test_tiles_are_no_larger_than_their_side_and_the_last_is_the_whole_picture(width, height, side):
    *tiles, whole = tiles_of(width, height, side, OVERLAP)
    assert whole == Tile((0, 0, width, height), (width, height))
    assert all(max(x.size) <= side for x in tiles)
    assert bool(tiles) == (max(width, height) > side)
    for x in tiles:
        assert 0 <= x.window[0] < x.window[2] <= width + 1e-6
        assert 0 <= x.window[1] < x.window[3] <= height + 1e-6
    assert tiles_of(width, height, 0, OVERLAP) == [whole]


def test_scales_are_a_quarter_or_finer_of_one_another():
    factors = {(x.window[2] - x.window[0]) / x.size[0] for x in tiles_of(12000, 9000, 320, 0.2)}
    factors = sorted([*factors - {1.0}, 1.0, 12000 / 320])
    factors = [x for x, y in zip(factors, [0, *factors], strict=False) if x - y > 0.1]
    assert factors[0] == 1 and factors[-1] == 37.5
    assert max(b / a for a, b in itertools.pairwise(factors)) <= 4.01


def instances(rows: list[tuple[list[float], float, int]], size=(100, 100)) -> Instances:
    boxes = torch.tensor([x[0] for x in rows]).reshape(-1, 4)
    return Instances(
        size,
        pred_boxes=Boxes(boxes),
        scores=torch.tensor([x[1] for x in rows]),
        pred_classes=torch.tensor([x[2] for x in rows], dtype=torch.int64),
    )


def test_a_picture_of_one_tile_keeps_its_boxes_as_they_are():
    found = instances([([0, 0, 9, 9], 0.9, 0), ([0, 0, 9, 9.1], 0.8, 0)])
    tiles = tiles_of(100, 100, 100, OVERLAP)
    assert merge_tiles(tiles, [found], 100, nms_thresh=0.5) is found


@pytest.mark.parametrize("class_agnostic, kept", [(False, [0.9, 0.8]), (True, [0.9])])
def test_two_classes_are_one_object_only_where_classes_do_not_count(class_agnostic, kept):
    tiles = tiles_of(200, 100, 100, 0.2)
    found = [instances([]) for _ in tiles]
    found[0] = instances([([10, 10, 40, 40], 0.8, 1)])
    found[-1] = instances([([10, 10, 40, 40], 0.9, 0)])
    result = merge_tiles(tiles, found, 100, 0.5, class_agnostic)
    assert result.scores.tolist() == pytest.approx(kept) and result.image_size == (100, 200)


def test_edges_of_the_picture_cut_nothing():
    tiles = tiles_of(200, 100, 100, 0.2)
    found = [instances([]) for _ in tiles]
    found[0] = instances([([0, 0, 30, 100], 0.9, 0), ([60, 20, 100, 60], 0.8, 0)])
    result = merge_tiles(tiles, found, 100, 0.5)
    assert result.pred_boxes.tensor.tolist() == [[0, 0, 30, 100]]
