"""ATSS: anchors to labels by statistics of each box's IoUs (arXiv:1912.02424, Algorithm 1).

Published gain on RetinaNet: AP 37.0 to 39.3 (their Table 3: COCO minival, R-50, 90k iterations, one
anchor per cell, both with FCOS's other parts: GIoU loss, group norm, a scale per level and more).
"""

import math

import torch
from detectron2.config import CfgNode
from detectron2.structures import Boxes, Instances
from torch import Tensor

from retina_focal.assigner import ASSIGNER_REGISTRY
from retina_focal.matching import iou_of_pairs

TOP_K = 9  # cells per level, the paper's k
MIN_DISTANCE = 0.01  # pixels of a positive anchor's centre from its box's sides
# How far, in pixels, centres of one cell's anchors may lie apart, and of a row from a line.
TOLERANCE = 0.01
MAX_BOXES = 256  # that are looked at together: bounds the memory


class ATSSAssigner:
    """Of the anchors nearest to a box, those with a high IoU among them are positive.

    Candidates of a box are, on every level, the k x A anchors whose centres are nearest to its own
    (A per cell; ties by the lower index). A candidate is positive where its IoU reaches the mean
    plus the sample standard deviation of their IoUs and its centre is inside the box. An anchor
    that two boxes want goes to the one that it overlaps more, of equals to the first. Nothing is
    ignored.
    """

    def __init__(self, num_classes: int, top_k: int = TOP_K):
        """
        Args:
            num_classes: K.
            top_k: k, cells per level.
        """
        self.num_classes = num_classes
        self.top_k = top_k

    @torch.no_grad()
    def __call__(
        self, anchors: list[Boxes], gt_instances: list[Instances]
    ) -> tuple[Tensor, Tensor]:
        """As `Assigner.__call__`."""
        levels = [level.tensor for level in anchors]
        flat = torch.cat(levels)
        labels = flat.new_full((len(gt_instances), len(flat)), self.num_classes, dtype=torch.int64)
        matched_idxs = torch.zeros_like(labels)
        cells = [_Cells(level) for level in levels]
        for label, matched_idx, instances in zip(labels, matched_idxs, gt_instances, strict=True):
            gt_boxes = instances.gt_boxes.tensor.to(flat.device)
            # An IoU is not negative, so its bits order as it does: one maximum finds the highest
            # IoU and, of equals, the first box.
            best = torch.full_like(label, -1)
            for first in range(0, len(gt_boxes), MAX_BOXES):
                box, anchor, iou = self._positives(
                    levels, flat, cells, gt_boxes[first : first + MAX_BOXES]
                )
                rank = (iou.view(torch.int32).long() << 32) + (2**31 - 1 - first - box)
                best.scatter_reduce_(0, anchor, rank, "amax")
            is_positive = best >= 0
            box = 2**31 - 1 - (best[is_positive] & (2**31 - 1))
            matched_idx[is_positive] = box
            label[is_positive] = instances.gt_classes.to(flat.device)[box]
        return labels, matched_idxs

    def _positives(
        self, levels: list[Tensor], flat: Tensor, cells: list["_Cells"], boxes: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Box, anchor and IoU of every pair that is positive for its box."""
        centres = boxes.double().view(-1, 2, 2).mean(1)  # (M, 2)
        candidates, begin = [], 0
        for level, grid in zip(levels, cells, strict=True):
            nearest = grid.nearest(centres, self.top_k)
            candidates.append(begin + nearest)
            begin += len(level)
        anchor = torch.cat(candidates, 1)  # (M, C)
        sides, box_sides = flat[anchor], boxes[:, None]  # (M, C, 4), (M, 1, 4)
        iou = iou_of_pairs(
            sides[..., 0::2].movedim(-1, 0),
            sides[..., 1::2].movedim(-1, 0),
            box_sides.movedim(-1, 0),
        )
        exact = iou.double()
        spread = exact.std(1) if anchor.shape[1] > 1 else torch.zeros_like(exact[:, 0])
        threshold = (exact.mean(1) + spread)[:, None]
        middle = sides.double().unflatten(2, (2, 2)).mean(2)
        low, high = box_sides.double().split(2, 2)
        inside = torch.minimum(middle - low, high - middle).amin(2) > MIN_DISTANCE
        box, candidate = ((exact >= threshold) & inside).nonzero(as_tuple=True)
        return box, anchor[box, candidate], iou[box, candidate]


@ASSIGNER_REGISTRY.register()
def atss(cfg: CfgNode) -> ATSSAssigner:
    """ATSS; ``MODEL.RETINANET.IOU_THRESHOLDS`` and ``IOU_LABELS`` are not used."""
    return ATSSAssigner(cfg.MODEL.RETINANET.NUM_CLASSES)


class _Cells:
    """Which anchors of a level are near to a point: those of a window of its grid of cells.

    Where the cells stand on no grid, the window is the whole level.
    """

    def __init__(self, anchors: Tensor):
        """
        Args:
            anchors: (Hi x Wi x A, 4), rows of cells, a cell's anchors next to each other.
        """
        # In fp64 the mean of two fp32 numbers is exact.
        self.centres = anchors.double().view(-1, 2, 2).mean(1)
        apart = (self.centres - self.centres[:1]).abs() > TOLERANCE
        self.num_anchors = _first(apart.any(1))
        cells = self.centres[:: self.num_anchors]
        columns = _first((cells[:, 1] - cells[:1, 1]).abs() > TOLERANCE)
        self.shape = len(cells) // columns, columns
        self.axes = [cells[::columns, 1].contiguous(), cells[:columns, 0].contiguous()]
        self.is_grid = len(anchors) == math.prod(self.shape) * self.num_anchors and all(
            (x.diff() > 0).all() and (x.diff().diff().abs() < TOLERANCE).all() for x in self.axes
        )
        if self.is_grid:
            y, x = torch.meshgrid(*self.axes, indexing="ij")
            grid = torch.stack((x, y), 2).flatten(0, 1).repeat_interleave(self.num_anchors, 0)
            self.is_grid = bool(((grid - self.centres).abs() < TOLERANCE).all())

    def nearest(self, points: Tensor, top_k: int) -> Tensor:
        """(M, top_k x A) indices of the anchors whose centres are nearest, ties by lower index."""
        window = self._window(points, top_k) if self.is_grid else None
        if window is None:
            window = torch.arange(len(self.centres), device=points.device).expand(len(points), -1)
        distance = (self.centres[window] - points[:, None]).square().sum(2)
        # Stable: the window is in the order of the anchors.
        order = distance.argsort(dim=1, stable=True)[:, : top_k * self.num_anchors]
        return window.gather(1, order)

    def _window(self, points: Tensor, top_k: int) -> Tensor:
        """(M, anchors of a window) indices, rising.

        Of a row of cells the k nearest are k next to each other, so a cell outside of a window of
        k x k has k cells before it. Three more on each axis leave room for rounding.
        """
        index = []
        for x, point in zip(self.axes, points.flip(1).t(), strict=True):
            span = min(top_k + 3, len(x))
            start = torch.searchsorted(x, point.contiguous()) - span // 2
            start = start.clamp(0, len(x) - span)
            index.append(start[:, None] + torch.arange(span, device=x.device))
        row, column = index
        cell = (row[:, :, None] * self.shape[1] + column[:, None]).flatten(1)
        anchor = torch.arange(self.num_anchors, device=cell.device)
        return (cell[..., None] * self.num_anchors + anchor).flatten(1)


def _first(mask: Tensor) -> int:
    """Index of the first True; the length where there is none."""
    return int(mask.int().argmax()) if mask.any() else len(mask)
