"""Exact matching of anchors to boxes in bounded memory, never the whole anchors x boxes matrix.

`match_batch` looks at all pairs, block by block. `match_on_grid`, on a CPU, looks at few of them:
anchors of one shape stand on a grid, so those that reach a given IoU with a box are a window of it.
The window has to reach the lowest threshold or, where that is lower, the best IoU of the box, which
the anchor nearest to the box's centre shows for each shape.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

# Pairs of an anchor and a box that `match_batch` looks at together: what stays in the cache of a
# CPU, and what keeps a device busy.
MAX_PAIRS = 1 << 20
MAX_PAIRS_ON_DEVICE = 1 << 24
# Boxes that `match_on_grid` takes at a time. A box usually has tens of pairs; one that is a line
# across the whole image has tens of thousands.
MAX_BOXES = 64
# How far, in steps, an anchor may stand from where an exact grid has it.
GRID_TOLERANCE = 1e-3
# fp32 rounds an IoU by less than one part in 10^6; windows are computed in float64.
ROUNDING = 1e-5
# Anchors among which the first one of the second row is looked for.
MAX_ROW = 1 << 14
INT32_MAX = 2**31 - 1


class Matches(NamedTuple):
    """All anchors whose IoU with some box reaches a threshold or is that box's best.

    There may be other anchors among them.
    """

    anchor_idxs: Tensor  # (P,) each anchor once
    ious: Tensor  # (P,) its highest IoU with any box; exact for the anchors meant above
    box_idxs: Tensor  # (P,) that box, the first of equals
    is_best: Tensor  # (P,) bool: no anchor overlaps some box better (ties included)


class BatchMatches(NamedTuple):
    """Every anchor of N images, with its best box among all M boxes of the batch."""

    ious: Tensor  # (N, R) the highest IoU with any box of the image
    box_idxs: Tensor  # (N, R) int64 that box, the first of equals; 0 where the IoU is 0
    is_best: Tensor  # (N, R) bool: no anchor overlaps some box of the image better (ties included)


class AnchorGrid(NamedTuple):
    """R anchors as C shapes (those of all levels), each on a grid of its own.

    The anchor of shape c in column x and row y is number first[c] + [x, y] . stride[c], and spans
    columns[:, c, x] by rows[:, c, y].
    """

    levels: list[Tensor]  # (Hi x Wi x A, 4) anchors per level
    columns: Tensor  # (2, C, W) x0 and x1, as the anchors have them; short grids end in zeros
    rows: Tensor  # (2, C, H) y0 and y1
    size: Tensor  # (C, 2) int64 columns, rows
    step: Tensor  # (C, 2) float64 pixels between columns, between rows
    smallest: Tensor  # (C, 2) float64 least width and height; they differ in the last bits
    largest: Tensor  # (C, 2) float64
    first: Tensor  # (C,) int64
    stride: Tensor  # (C, 2) int64 from column to column, from row to row


def match_batch(anchors: Tensor, gt_boxes: Tensor, num_boxes: Tensor) -> BatchMatches:
    """All anchors of all images by their highest IoU, whatever the anchors are.

    Nothing here makes the host wait for a device, and the number of operations grows with the
    blocks, not with the images. A block takes up to 18 bytes per pair: 300 MB on a device.

    Args:
        anchors: (R, 4) XYXY, those of every image.
        gt_boxes: (M, 4) XYXY, of the N images one after another.
        num_boxes: (N,) int64, how many of them each image has; M in all.
    """
    size, device = (len(num_boxes), len(anchors)), anchors.device
    limit = MAX_PAIRS if device.type == "cpu" else MAX_PAIRS_ON_DEVICE
    # An IoU is not negative, so its bits order as it does: one maximum finds the highest IoU and,
    # of equals, the first box.
    packed = torch.full(size, INT32_MAX, device=device)
    is_best = torch.zeros(size, dtype=torch.uint8, device=device)
    box = torch.arange(len(gt_boxes), device=device)
    image = torch.searchsorted(num_boxes.cumsum(0), box, right=True)
    low_bits = INT32_MAX - box
    sides = anchors.t().contiguous()[:, None]
    per_block = max(1, limit // max(1, len(anchors)))
    for block in zip(*(x.split(per_block) for x in (gt_boxes, image, low_bits)), strict=True):
        _match_block(sides, *block, packed, is_best)
    return BatchMatches(*_unpack(packed), is_best.bool())


def _match_block(
    sides: Tensor, boxes: Tensor, image: Tensor, low_bits: Tensor, packed: Tensor, is_best: Tensor
) -> None:
    """Update the (N, R) best matches and flags with some boxes, of these images."""
    ious = iou_of_pairs(sides[0::2], sides[1::2], boxes.t()[:, :, None])  # (boxes, R)
    row = image[:, None].expand_as(ious)
    best_of_box = ious.amax(1, keepdim=True)
    best_of_box.masked_fill_(best_of_box == 0, torch.inf)  # a best anchor overlaps its box
    is_best.scatter_reduce_(0, row, (ious == best_of_box).view(torch.uint8), "amax")
    rank = ious.view(torch.int32).long().bitwise_left_shift_(32).bitwise_or_(low_bits[:, None])
    packed.scatter_reduce_(0, row, rank, "amax")


def match_on_grid(grid: AnchorGrid, gt_boxes: Tensor, min_iou: float) -> Matches:
    """The anchors of one image that overlap some box by `min_iou`, or more than any other does.

    Args:
        grid: of R anchors, on a CPU: windows have sizes that the host must know.
        gt_boxes: (M, 4) XYXY.
        min_iou: above 0.
    """
    num_anchors = sum(len(level) for level in grid.levels)
    packed = torch.zeros(num_anchors, dtype=torch.int64)  # as in `match_batch`
    is_best = torch.zeros(num_anchors, dtype=torch.bool)
    first = 0
    for boxes in gt_boxes.split(MAX_BOXES):
        box, anchor, iou = _overlapping_pairs(grid, boxes, min_iou)
        rank = (iou.view(torch.int32).long() << 32) + (INT32_MAX - first - box)
        packed.scatter_reduce_(0, anchor, rank, "amax")
        best_of_box = iou.new_zeros(len(boxes)).scatter_reduce_(0, box, iou, "amax")
        is_best[anchor[iou == best_of_box[box]]] = True
        first += len(boxes)
    anchor_idxs = packed.nonzero().squeeze(1)
    packed, is_best = packed[anchor_idxs], is_best[anchor_idxs]
    ious, box_idxs = _unpack(packed)
    # A low-quality match may overlap another box more, though that box has no use for it.
    low = (is_best & (ious < min_iou)).nonzero().squeeze(1)
    if len(low):
        anchors = torch.cat(grid.levels)[anchor_idxs[low]]
        ious[low], box_idxs[low] = _best_boxes(anchors, gt_boxes)
    return Matches(anchor_idxs, ious, box_idxs, is_best)


def _best_boxes(anchors: Tensor, gt_boxes: Tensor) -> tuple[Tensor, Tensor]:
    """The highest IoU of each of a few anchors, (R, 4), with any box, and the first such box.

    Faster on a CPU than `match_batch`, whose scattered maxima serve many images.
    """
    per_block = max(1, MAX_PAIRS // max(1, len(gt_boxes)))
    boxes = gt_boxes.t()[:, :, None]
    found = []
    for block in anchors.split(per_block):
        sides = block.t().contiguous()[:, None]
        found.append(iou_of_pairs(sides[0::2], sides[1::2], boxes).max(0))
    ious, box_idxs = map(torch.cat, zip(*found, strict=True))
    return ious, box_idxs


def _unpack(packed: Tensor) -> tuple[Tensor, Tensor]:
    """IoUs and indices of boxes, out of (IoU's bits, `INT32_MAX` - index)."""
    return (packed >> 32).int().view(torch.float32), INT32_MAX - (packed & INT32_MAX)


def _overlapping_pairs(
    grid: AnchorGrid, boxes: Tensor, min_iou: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Box, anchor and IoU > 0 of at least all pairs that reach `min_iou` or the box's best."""
    low, high = boxes.double().split(2, dim=1)  # (M, 2) each
    origin = torch.stack([grid.columns[..., 0], grid.rows[..., 0]], 2).double()
    first_low, first_high = origin  # (C, 2) each, the anchors in the first column and row

    # The anchor of each shape that is nearest to the box's centre, (C, M), shows the best IoU.
    place = (low + high - (first_low + first_high)[:, None]) / (2 * grid.step[:, None])
    nearest = torch.minimum(place.round().clamp(min=0), grid.size[:, None] - 1.0).long()
    shape, (column, row) = torch.arange(len(nearest))[:, None], nearest.unbind(2)
    iou = iou_of_pairs(grid.columns[:, shape, column], grid.rows[:, shape, row], boxes.t()[:, None])
    iou = iou.amax(0).double().clamp(max=min_iou) * (1 - ROUNDING)  # (M,)

    # IoU = I / (area + anchor area - I) >= iou needs an intersection I of at least this, (C, M).
    areas = grid.smallest.prod(1)[:, None] + (high - low).prod(1)
    intersection = iou / (1 + iou) * areas
    # I is at most this wide and high, (C, M, 2), so it is at least so high and wide.
    most = torch.minimum(high - low, grid.largest[:, None])
    shape, box = (intersection <= most.prod(2)).nonzero(as_tuple=True)
    least = intersection[shape, box][:, None] / most[shape, box].flip(1)
    least = least.nan_to_num(0.0)  # 0 / 0: a box without an area

    # One window per row: its first column and row, and how many of them, (V, 2) each.
    start = (low[box] + least - first_high[shape]) / grid.step[shape] - GRID_TOLERANCE
    stop = (high[box] - least - first_low[shape]) / grid.step[shape] + GRID_TOLERANCE
    start = start.ceil().clamp(min=0)
    count = (torch.minimum(stop.floor(), grid.size[shape] - 1.0) - start + 1).clamp(min=0).long()

    # One pair per row, (P,).
    num_pairs = count.prod(1)
    window = torch.repeat_interleave(num_pairs)
    cell = torch.arange(len(window)) - (num_pairs.cumsum(0) - num_pairs)[window]
    shape, box, (column, row) = shape[window], box[window], start.long().t()[:, window]
    width = count[:, 0][window]
    below = cell.div(width, rounding_mode="floor")
    column, row = column + cell - below * width, row + below
    iou = iou_of_pairs(grid.columns[:, shape, column], grid.rows[:, shape, row], boxes.t()[:, box])
    column_stride, row_stride = grid.stride.t()[:, shape]
    anchor = grid.first[shape] + column * column_stride + row * row_stride
    overlap = (iou > 0).nonzero().squeeze(1)
    return box[overlap], anchor[overlap], iou[overlap]


def iou_of_pairs(anchor_x: Tensor, anchor_y: Tensor, boxes: Tensor) -> Tensor:
    """IoU by `pairwise_iou`'s operations in their order.

    Args:
        anchor_x, anchor_y: (2, ...) where the anchors begin and end.
        boxes: (4, ...) XYXY; they broadcast.
    """
    (ax0, ax1), (ay0, ay1), (bx0, by0, bx1, by1) = anchor_x, anchor_y, boxes
    width = (torch.minimum(bx1, ax1) - torch.maximum(bx0, ax0)).clamp_(min=0)
    height = (torch.minimum(by1, ay1) - torch.maximum(by0, ay0)).clamp_(min=0)
    intersection = width.mul_(height)
    box_area, anchor_area = (bx1 - bx0) * (by1 - by0), (ax1 - ax0) * (ay1 - ay0)
    iou = intersection / (box_area + anchor_area).sub_(intersection)
    return torch.where(intersection > 0, iou, 0.0)


def find_grid(levels: list[Tensor]) -> AnchorGrid | None:
    """The grid that anchors stand on, read off their coordinates; None where they stand on none.

    Args:
        levels: (Hi x Wi x A, 4) per level, rows of cells, a cell's anchors next to each other.
    """
    columns, rows, sizes, strides, first = [], [], [], [], []  # an element per shape
    num_anchors = 0
    for anchors in levels:
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
        # One coordinate at a time: several times as fast as (R, 4), whose inner loop is short.
        for i in range(4):
            x = anchors[:, i].view(-1, row_stride)
            recurs = x == x[0] if i in (0, 2) else x[:, column_stride:] == x[:, :-column_stride]
            if not recurs.all():
                return None
        cells = anchors.view(-1, row_stride // column_stride, column_stride, 4)  # (H, W, A, 4)
        columns += cells[0, :, :, 0::2].unbind(1)
        rows += cells[:, 0, :, 1::2].unbind(1)
        sizes += [(cells.shape[1], cells.shape[0])] * column_stride
        strides += [(column_stride, row_stride)] * column_stride
        first += range(num_anchors, num_anchors + column_stride)
        num_anchors += len(anchors)

    size, axes = torch.tensor(sizes), []
    for ends, length in zip((columns, rows), size.t(), strict=True):
        table = pad_sequence(ends).permute(2, 1, 0)  # (2, C, longest)
        low, high = table.double()
        index = torch.arange(table.shape[2])
        inside = index < length[:, None]
        last = (length - 1)[:, None]
        step = (low.gather(1, last) - low[:, :1]) / last.clamp(min=1)
        step = torch.where(last == 0, 1.0, step)
        unevenness = (torch.stack([low - low[:, :1], high - high[:, :1]]) - index * step).abs()
        uneven = (unevenness > GRID_TOLERANCE / 2 * step) & inside
        extent = high - low
        if (step <= 0).any() or uneven.any() or (extent < 0).any():
            return None
        axes.append((table, step[:, 0], extent.where(inside, torch.inf).amin(1), extent.amax(1)))
    (columns, *x), (rows, *y) = axes
    step, smallest, largest = (torch.stack(pair, 1) for pair in zip(x, y, strict=True))
    return AnchorGrid(
        levels,
        columns,
        rows,
        size,
        step,
        smallest,
        largest,
        first=torch.tensor(first),
        stride=torch.tensor(strides),
    )
