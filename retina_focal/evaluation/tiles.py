"""Large pictures in tiles: where they are cut, and how boxes of tiles become those of the picture.

An object that a tile's edge cuts is left to another tile or scale, so nothing is glued together,
and a small box inside a large one is never taken for a part of it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from detectron2.structures import Boxes, Instances
from torch import Tensor

from retina_focal.postprocess import suppress

# A box that ends this near to an inner edge counts as cut by it, in parts of the tile's side.
EDGE = 0.01
# Between two scales. An object that the finer one's tiles cut, larger than their overlap, keeps
# at least a quarter of that many pixels in the coarser one.
RATIO = 4


@dataclass(frozen=True)
class Tile:
    """A part of a picture that the network sees as a picture."""

    window: tuple[float, float, float, float]  # XYXY in pixels of the picture
    size: tuple[int, int]  # (width, height) of the tile at its scale, pixels
    # Whether the left, top, right and bottom edge lie inside the picture.
    inner: tuple[bool, bool, bool, bool] = (False, False, False, False)


def tiles_of(width: int, height: int, side: int, overlap: float) -> list[Tile]:
    """The tiles of a picture at its own scale, at coarser ones, and last the whole picture.

    Objects of up to `side * (overlap - 2 * EDGE)` pixels lie whole in a tile of the finest scale.

    Args:
        width, height: of the picture, pixels.
        side: of a tile, pixels; 0, or a picture that is no larger, gives the whole picture alone.
        overlap: of neighbours, in parts of `side`, (2 * EDGE, 1); they may overlap more.
    """
    whole = Tile((0.0, 0.0, float(width), float(height)), (width, height))
    longest = max(width, height)
    if not 0 < side < longest:
        return [whole]
    num_scales = math.ceil(round(math.log(longest / side, RATIO), 9))
    tiles = []
    for i in range(num_scales):
        scale = (side / longest) ** (i / num_scales)
        level_width, level_height = (max(round(x * scale), 1) for x in (width, height))
        x_factor, y_factor = width / level_width, height / level_height
        for y0, y1 in _intervals(level_height, side, overlap):
            for x0, x1 in _intervals(level_width, side, overlap):
                window = (x0 * x_factor, y0 * y_factor, x1 * x_factor, y1 * y_factor)
                inner = (x0 > 0, y0 > 0, x1 < level_width, y1 < level_height)
                tiles.append(Tile(window, (x1 - x0, y1 - y0), inner))
    return [*tiles, whole]


def _intervals(length: int, side: int, overlap: float) -> list[tuple[int, int]]:
    """The fewest of `side` pixels that cover a length, evenly spread."""
    if length <= side:
        return [(0, length)]
    count = math.ceil((length - side) / max(math.floor(side * (1 - overlap)), 1))
    starts = [round(i * (length - side) / count) for i in range(count + 1)]
    return [(start, start + side) for start in starts]


def is_whole(tile: Tile, boxes: Tensor, side: int) -> Tensor:
    """(M,) bool: the boxes that no inner edge of the tile cuts.

    Args:
        boxes: (M, 4) XYXY in pixels of the tile.
        side: see `tiles_of`.
    """
    margin = side * EDGE
    near = boxes.new_tensor([margin, margin, tile.size[0] - margin, tile.size[1] - margin])
    touches = torch.cat([boxes[:, :2] <= near[:2], boxes[:, 2:] >= near[2:]], dim=1)
    return ~(touches & torch.tensor(tile.inner, device=boxes.device)).any(1)


def merge_tiles(
    tiles: Sequence[Tile],
    found: Sequence[Instances],
    side: int,
    nms_thresh: float,
    class_agnostic: bool = False,
) -> Instances:
    """The boxes of a picture: those that are whole in their tile, after NMS over all tiles.

    Args:
        tiles: of `tiles_of`, the whole picture last.
        found: for each tile `pred_boxes` in its pixels, `scores` and `pred_classes`.
        side: see `tiles_of`.
        nms_thresh: boxes with a higher IoU are the same object.
        class_agnostic: whether boxes of two classes can be the same object.
    Returns:
        Instances in pixels of the picture, by falling scores, without a limit to their number;
        those of the whole picture as they are where it has no other tile.
    """
    if len(tiles) == 1:
        return found[0]
    width, height = tiles[-1].size
    parts = []
    for tile, instances in zip(tiles, found, strict=True):
        kept = instances[is_whole(tile, instances.pred_boxes.tensor, side)]
        x0, y0, x1, y1 = tile.window
        scale = torch.tensor([(x1 - x0) / tile.size[0], (y1 - y0) / tile.size[1]] * 2)
        boxes = kept.pred_boxes.tensor
        boxes = boxes * scale.to(boxes) + boxes.new_tensor([x0, y0, x0, y0])
        parts.append((boxes, kept.scores, kept.pred_classes))
    boxes, scores, classes = (torch.cat(x) for x in zip(*parts, strict=True))
    rows = suppress(boxes, scores, classes, nms_thresh, class_agnostic)
    return Instances(
        (height, width),
        pred_boxes=Boxes(boxes[rows]),
        scores=scores[rows],
        pred_classes=classes[rows],
    )
