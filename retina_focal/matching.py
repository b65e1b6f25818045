"""Exact matching of anchors to boxes without an anchors x boxes matrix.

Anchors of one shape stand on a grid, so those that reach a given IoU with a box are a window of it.
The window has to reach the lowest threshold or, where that is lower, the best IoU of the box, which
the anchor nearest to the box's centre shows for each shape.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from detectron2.structures import Boxes
from torch import Tensor

# Pairs of a box and an anchor that are held at a time.
MAX_PAIRS = 1 << 20
# Boxes whose windows are computed at a time.
MAX_BOXES = 512
# How far, in steps, an anchor may stand from where an exact grid has it.
GRID_TOLERANCE = 1e-3
# fp32 rounds an IoU by less than one part in 10^6; windows are computed in float64.
ROUNDING = 1e-5
# Anchors among which the first one of the second row is looked for.
MAX_ROW = 1 << 14
INT32_MAX = 2**31 - 1


class Matches(NamedTuple):
    """All anchors whose IoU with some box reaches a threshold or is that box's best, and others."""

    anchor_idxs: Tensor  # (P,) each anchor once
    ious: Tensor  # (P,) its highest IoU with any box; exact for the anchors meant above
    box_idxs: Tensor  # (P,) that box, the first of equals
    is_best: Tensor  # (P,) bool: no anchor overlaps some box better (ties included)


class AnchorGrid(NamedTuple):
    """R anchors as C shapes (those of all levels), each on a grid of its own.

    The anchor of shape c in column x and row y is number first[c] + [x, y] . stride[c], and spans
    columns[:, c, x] by rows[:, c, y]. Tables of columns and rows: no copy of the R anchors.
    """

    levels: list[Tensor]  # (Hi x Wi x A, 4) anchors a level
    columns: Tensor  # (2, C, W) x0 and x1, as the anchors have them; short grids end in zeros
    rows: Tensor  # (2, C, H) y0 and y1
    size: Tensor  # (C, 2) int64 columns, rows
    step: Tensor  # (C, 2) float64 pixels between columns, between rows
    smallest: Tensor  # (C, 2) float64 least width and height; they differ in the last bits
    largest: Tensor  # (C, 2) float64
    first: Tensor  # (C,) int64
    stride: Tensor  # (C, 2) int64 from column to column, from row to row

    @property
    def num_anchors(self) -> int:
        return sum(len(level) for level in self.levels)

    @property
    def origin(self) -> Tensor:
        """(C, 4) float64 XYXY of the anchors in the first column and row."""
        x, y = self.columns[..., 0], self.rows[..., 0]
        return torch.stack([x[0], y[0], x[1], y[1]], 1).double()

    def at(self, shape: Tensor, column: Tensor, row: Tensor) -> tuple[Tensor, ...]:
        """x0, y0, x1, y1 of the anchors in these places."""
        (x0, x1), (y0, y1) = self.columns[:, shape, column], self.rows[:, shape, row]
        return x0, y0, x1, y1

    def take(self, anchor_idxs: Tensor) -> Boxes:
        """The anchors of rising numbers."""
        taken, first = [], 0
        for level in self.levels:
            inside = (anchor_idxs >= first) & (anchor_idxs < first + len(level))
            taken.append(level[anchor_idxs[inside] - first])
            first += len(level)
        return Boxes(torch.cat(taken))


def match_dense(anchors: Boxes, gt_boxes: Boxes) -> Matches:
    """All anchors by their highest IoU, in blocks of boxes so that memory stays bounded."""
    ious = anchors.tensor.new_zeros(len(anchors))
    box_idxs = torch.zeros_like(ious, dtype=torch.int64)
    is_best = torch.zeros_like(ious, dtype=torch.bool)
    columns = anchors.tensor.t().contiguous()[:, None]
    first = 0
    for boxes in gt_boxes.tensor.split(max(1, MAX_PAIRS // max(1, len(anchors)))):
        block = _iou(columns, boxes.t()[:, :, None])  # (boxes, R)
        block_ious, block_idxs = block.max(dim=0)
        better = block_ious > ious
        ious = torch.where(better, block_ious, ious)
        box_idxs = torch.where(better, block_idxs + first, box_idxs)
        best_of_box = block.amax(dim=1, keepdim=True)
        is_best |= ((block == best_of_box) & (best_of_box > 0)).any(dim=0)
        first += len(boxes)
    return Matches(torch.arange(len(anchors), device=ious.device), ious, box_idxs, is_best)


def match_on_grid(grid: AnchorGrid, gt_boxes: Boxes, min_iou: float) -> Matches:
    """The same for anchors on a grid, without those that overlap no box by `min_iou` or best."""
    num_anchors, boxes = grid.num_anchors, gt_boxes.tensor
    # An IoU is not negative, so its bits order as it does: one maximum finds the highest IoU and,
    # of equals, the first box.
    packed = torch.zeros(num_anchors, dtype=torch.int64)
    is_best = torch.zeros(num_anchors, dtype=torch.bool)
    for box, anchor, iou in _pairs(grid, boxes, min_iou):
        rank = (iou.view(torch.int32).long() << 32) + (INT32_MAX - box)
        packed.scatter_reduce_(0, anchor, rank, "amax")
        best_of_box = iou.new_zeros(len(boxes)).scatter_reduce_(0, box, iou, "amax")
        is_best[anchor[iou == best_of_box[box]]] = True
    anchor_idxs = packed.nonzero().squeeze(1)
    packed, is_best = packed[anchor_idxs], is_best[anchor_idxs]
    ious = (packed >> 32).int().view(torch.float32)
    box_idxs = INT32_MAX - (packed & INT32_MAX)
    # A low-quality match may overlap another box more, though that box has no use for it.
    low = (is_best & (ious < min_iou)).nonzero().squeeze(1)
    if len(low):
        exact = match_dense(grid.take(anchor_idxs[low]), gt_boxes)
        ious[low], box_idxs[low] = exact.ious, exact.box_idxs
    return Matches(anchor_idxs, ious, box_idxs, is_best)


def _pairs(
    grid: AnchorGrid, boxes: Tensor, min_iou: float, first: int = 0
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(box, anchor, IoU > 0) of all pairs that reach `min_iou` or a box's best; no box is split."""
    if len(boxes) > MAX_BOXES:
        pieces = boxes.split(MAX_BOXES)
    else:
        shape, box, low, count = _windows(grid, boxes, min_iou)
        num_pairs = count.prod(1)
        total = int(num_pairs.sum())
        if total <= MAX_PAIRS or len(boxes) == 1:
            window = torch.repeat_interleave(num_pairs)
            start = num_pairs.cumsum(0) - num_pairs
            cell = torch.arange(total) - start[window]
            shape, box, (column, row) = shape[window], box[window], low.t()[:, window]
            width = count[:, 0][window]
            below = cell.div(width, rounding_mode="floor")
            column, row = column + cell - below * width, row + below
            column_stride, row_stride = grid.stride.t()[:, shape]
            anchor = grid.first[shape] + column * column_stride + row * row_stride
            iou = _iou(grid.at(shape, column, row), boxes.t()[:, box])
            overlap = (iou > 0).nonzero().squeeze(1)
            yield box[overlap] + first, anchor[overlap], iou[overlap]
            return
        pieces = boxes.split((len(boxes) + 1) // 2)
    for piece in pieces:
        yield from _pairs(grid, piece, min_iou, first)
        first += len(piece)


def _windows(
    grid: AnchorGrid, boxes: Tensor, min_iou: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Windows of the grid outside which no anchor reaches `min_iou` or the best IoU of the box.

    Args:
        boxes: (M, 4).
    Returns:
        shape, box: (V,) index of the anchor shape and of the box of each window.
        low: (V, 2) first column and row.
        count: (V, 2) columns and rows, at least 1.
    """
    iou = _nearest_iou(grid, boxes).amax(0).double().clamp(max=min_iou) * (1 - ROUNDING)  # (M,)
    boxes = boxes.double()
    sides = boxes[:, 2:] - boxes[:, :2]
    # IoU = I / (area + anchor area - I) >= iou needs an intersection I of at least this, (C, M).
    areas = grid.smallest.prod(1)[:, None] + sides.prod(1)
    intersection = iou / (1 + iou) * areas
    # I is at most this wide and high, (C, M, 2), so it is at least so high and wide.
    most = torch.minimum(sides, grid.largest[:, None])
    shape, box = (intersection <= most.prod(2)).nonzero(as_tuple=True)
    least = intersection[shape, box][:, None] / most[shape, box].flip(1)
    least = least.nan_to_num(0.0)  # 0 / 0: a box without an area
    origin, step, size = grid.origin[shape], grid.step[shape], grid.size[shape]
    low = (boxes[box, :2] + least - origin[:, 2:]) / step - GRID_TOLERANCE
    high = (boxes[box, 2:] - least - origin[:, :2]) / step + GRID_TOLERANCE
    low = low.ceil().clamp(min=0)
    count = torch.minimum(high.floor(), size - 1.0) - low + 1
    kept = (count > 0).all(1).nonzero().squeeze(1)
    return shape[kept], box[kept], low[kept].long(), count[kept].long()


def _nearest_iou(grid: AnchorGrid, boxes: Tensor) -> Tensor:
    """(C, M) IoU of each box with the anchor of each shape nearest to its centre."""
    centers = (boxes[:, :2] + boxes[:, 2:]).double() / 2
    first_centers = (grid.origin[:, :2] + grid.origin[:, 2:]) / 2
    cell = ((centers - first_centers[:, None]) / grid.step[:, None]).round()  # (C, M, 2)
    cell = torch.minimum(cell.clamp(min=0), grid.size[:, None] - 1.0).long()
    shape = torch.arange(len(cell))[:, None]
    return _iou(grid.at(shape, *cell.unbind(2)), boxes.t()[:, None])


def _iou(anchors: Iterable[Tensor], boxes: Iterable[Tensor]) -> Tensor:
    """IoU of x0, y0, x1, y1 that broadcast, by `pairwise_iou`'s operations in their order."""
    ax0, ay0, ax1, ay1 = anchors
    bx0, by0, bx1, by1 = boxes
    width = (torch.minimum(bx1, ax1) - torch.maximum(bx0, ax0)).clamp_(min=0)
    height = (torch.minimum(by1, ay1) - torch.maximum(by0, ay0)).clamp_(min=0)
    intersection = width.mul_(height)
    box_area, anchor_area = (bx1 - bx0) * (by1 - by0), (ax1 - ax0) * (ay1 - ay0)
    iou = intersection / (box_area + anchor_area).sub_(intersection)
    return torch.where(intersection > 0, iou, 0.0)


def find_grid(anchors: list[Boxes]) -> AnchorGrid | None:
    """The grid that anchors stand on, read off their coordinates; None where they stand on none.

    Args:
        anchors: one Boxes a level, rows of cells, a cell's anchors next to each other.
    """
    first, shapes = 0, []
    for level in anchors:
        layout = _layout(level.tensor, first)
        if layout is None:
            return None
        shapes.append(layout)
        first += len(level)
    columns, rows, *rest = zip(*shapes, strict=True)
    return AnchorGrid(
        [x.tensor for x in anchors],
        torch.cat(
            [F.pad(x, (0, max(y.shape[2] for y in columns) - x.shape[2])) for x in columns], 1
        ),
        torch.cat([F.pad(x, (0, max(y.shape[2] for y in rows) - x.shape[2])) for x in rows], 1),
        *(torch.cat(parts) for parts in rest),
    )


def _layout(anchors: Tensor, first: int) -> tuple[Tensor, ...] | None:
    """The fields of an `AnchorGrid` that has one level, but the first field."""
    if len(anchors) == 0:
        return None
    # The first anchor recurs one column to the right, and one row below.
    same, after = anchors[:MAX_ROW] == anchors[0], anchors[:MAX_ROW] > anchors[0]
    right = after[:, 0] & after[:, 2] & same[:, 1] & same[:, 3]
    below = after[:, 1] & after[:, 3] & same[:, 0] & same[:, 2]
    row_stride = int(below.int().argmax()) or len(anchors)
    column_stride = int(right.int().argmax()) or row_stride
    if len(anchors) % row_stride or row_stride % column_stride:
        return None
    # A coordinate at a time, and over the longest inner loop: several times as fast as (R, 4).
    for i in range(4):
        x = anchors[:, i].view(-1, row_stride)
        recurs = x == x[0] if i in (0, 2) else x[:, column_stride:] == x[:, :-column_stride]
        if not recurs.all():
            return None
    cells = anchors.view(-1, row_stride // column_stride, column_stride, 4)
    columns = cells[0, :, :, 0::2].permute(2, 1, 0)  # (2, A, W)
    rows = cells[:, 0, :, 1::2].permute(2, 1, 0)  # (2, A, H)
    x, y = _axis(*columns.double()), _axis(*rows.double())
    if x is None or y is None:
        return None
    step, smallest, largest = (torch.stack(pair, 1) for pair in zip(x, y, strict=True))
    size = torch.tensor([columns.shape[2], rows.shape[2]]).expand(column_stride, 2)
    stride = torch.tensor([column_stride, row_stride]).expand(column_stride, 2)
    number = torch.arange(first, first + column_stride)
    return columns, rows, size, step, smallest, largest, number, stride


def _axis(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
    """Step, least and greatest extent, (A,) each, of A rising rows; None where they are uneven.

    Args:
        low, high: (A, L) where the anchors begin and end.
    """
    length = low.shape[1]
    extent = high - low
    step = (low[:, -1:] - low[:, :1]) / max(1, length - 1)
    if length == 1:
        step = torch.ones_like(step)
    place = torch.arange(length) * step
    uneven = torch.maximum((low - low[:, :1] - place).abs(), (high - high[:, :1] - place).abs())
    if (step <= 0).any() or (uneven > GRID_TOLERANCE / 2 * step).any() or (extent < 0).any():
        return None
    return step.squeeze(1), extent.amin(1), extent.amax(1)
