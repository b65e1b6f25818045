"""Anchors to labels and matched boxes (Sec. 4, "Anchors")."""

from collections.abc import Callable, Sequence

import torch
from detectron2.config import CfgNode, configurable
from detectron2.structures import Boxes, Instances, pairwise_ioa
from fvcore.common.registry import Registry
from torch import Tensor

from retina_focal.config import check_choice, registered, retina_focal_node
from retina_focal.errors import UserError
from retina_focal.matching import (
    AnchorGrid,
    BatchMatches,
    Matches,
    find_grid,
    match_batch,
    match_on_grid,
)
from retina_focal.transfer import to_device

# An anchor is ignored where at least this part of its area is inside a region.
MIN_INSIDE = 0.5
REGIONS_AT_ONCE = 16  # bounds the memory

ASSIGNMENTS = ("detectron2", "detectron", "paper")

ASSIGNER_REGISTRY = Registry("ASSIGNER")
ASSIGNER_REGISTRY.__doc__ = """
Assigners by ``MODEL.RETINA_FOCAL.ASSIGNMENT``. Called with `(cfg)`; returns an object with
`num_classes` that is called as `Assigner` is.
"""


def build_assigner(cfg: CfgNode) -> Callable[..., tuple[Tensor, Tensor]]:
    """The assigner that ``MODEL.RETINA_FOCAL.ASSIGNMENT`` names.

    With ``DATA.IGNORE_REGIONS`` it is inside an `IgnoreRegions`.

    Raises:
        UserError: an unknown name, or thresholds and labels that don't fit.
    """
    node = retina_focal_node(cfg)
    name = node.ASSIGNMENT
    assigner = registered(ASSIGNER_REGISTRY, "MODEL.RETINA_FOCAL.ASSIGNMENT", name)(cfg)
    return IgnoreRegions(assigner) if node.DATA.IGNORE_REGIONS else assigner


class IgnoreRegions:
    """Another assigner's labels, with -1 in place of background in the regions to ignore.

    Ignored are the anchors with at least half of their own area inside one region. Positive ones
    stay. Regions are the boxes of class -1, the last of an image (`ground_truth`), which the other
    assigner does not see.
    """

    def __init__(self, assigner: Callable[..., tuple[Tensor, Tensor]]):
        self.assigner, self.num_classes = assigner, assigner.num_classes

    @torch.no_grad()
    def __call__(
        self, anchors: list[Boxes], gt_instances: list[Instances]
    ) -> tuple[Tensor, Tensor]:
        """As `Assigner.__call__`."""
        objects = [x[: int((x.gt_classes >= 0).sum())] for x in gt_instances]
        labels, matched_idxs = self.assigner(anchors, objects)
        flat = Boxes.cat(anchors)
        for label, own, instances in zip(labels, objects, gt_instances, strict=True):
            regions = instances.gt_boxes.tensor[len(own) :].to(flat.device)
            for some in regions.split(REGIONS_AT_ONCE):
                inside = (pairwise_ioa(Boxes(some), flat) >= MIN_INSIDE).any(0)
                label[inside & (label == self.num_classes)] = -1
        return labels, matched_idxs


class Assigner:
    """Labels every anchor by its highest IoU with a ground-truth box.

    Low-quality matches, the anchors whose IoU is a box's highest though below the upper threshold,
    are positive under the rule "detectron2"; under "detectron" only where the anchor's own highest
    IoU reaches the lower threshold; under "paper" never. A box that overlaps no anchor makes no
    anchor positive (detectron2's `Matcher` would make all of them positive).
    """

    @configurable
    def __init__(
        self,
        *,
        num_classes: int,
        iou_thresholds: Sequence[float] = (0.4, 0.5),
        iou_labels: Sequence[int] = (0, -1, 1),
        rule: str = "detectron2",
    ):
        """
        Args:
            num_classes: K.
            iou_thresholds: rising, (lower, ..., upper), above 0.
            iou_labels: one more than thresholds; 0 background, -1 ignored, 1 foreground. An IoU
                equal to a threshold falls into the interval above it. The first is not 1: an
                anchor that overlaps nothing has no box to regress to.
            rule: one of `ASSIGNMENTS`.
        Raises:
            UserError: an unknown rule, or thresholds and labels that don't fit.
        """
        check_choice("MODEL.RETINA_FOCAL.ASSIGNMENT", rule, ASSIGNMENTS)
        rising = [0, *iou_thresholds] == sorted([0, *iou_thresholds]) and iou_thresholds[0] > 0
        if not rising or len(iou_labels) != len(iou_thresholds) + 1 or iou_labels[0] == 1:
            raise UserError(
                f"MODEL.RETINANET.IOU_THRESHOLDS {list(iou_thresholds)} and IOU_LABELS "
                f"{list(iou_labels)}; expected rising thresholds above 0, one label more than "
                "thresholds, and as first label 0 or -1"
            )
        self.num_classes = num_classes
        self.iou_thresholds = tuple(iou_thresholds)
        self.iou_labels = tuple(iou_labels)
        self.rule = rule
        self._unmatched = num_classes if iou_labels[0] == 0 else -1
        # Of the last anchors: finding it takes as long as matching twenty boxes.
        self.grid: AnchorGrid | None = None

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        return {
            "num_classes": cfg.MODEL.RETINANET.NUM_CLASSES,
            "iou_thresholds": cfg.MODEL.RETINANET.IOU_THRESHOLDS,
            "iou_labels": cfg.MODEL.RETINANET.IOU_LABELS,
            "rule": retina_focal_node(cfg).ASSIGNMENT,
        }

    @torch.no_grad()
    def __call__(
        self, anchors: list[Boxes], gt_instances: list[Instances]
    ) -> tuple[Tensor, Tensor]:
        """
        Args:
            anchors: one Boxes per level, P3 first, XYXY in pixels; R anchors over all levels.
            gt_instances: N images with `gt_boxes` and `gt_classes`, on any device.
        Returns:
            labels: (N, R) int64 in {-1, 0, ..., K}; K is background, -1 is ignored.
            matched_idxs: (N, R) int64 index of the matched box; meaningful where 0 <= label < K.
        """
        levels = [x.tensor for x in anchors]
        device = levels[0].device
        # Windows have sizes that the host must know: on another device they would make it wait.
        if device.type != "cpu":
            self.grid = None
        elif (
            self.grid is None
            or len(self.grid.levels) != len(levels)
            or not all(map(torch.equal, self.grid.levels, levels))
        ):
            self.grid = find_grid(levels)
        if self.grid is None and any(map(len, gt_instances)):
            return self._match_batch(torch.cat(levels), gt_instances)
        size = (len(gt_instances), sum(len(x) for x in levels))
        labels = torch.full(size, self._unmatched, device=device)
        matched_idxs = torch.zeros_like(labels)
        for i, instances in enumerate(gt_instances):
            if len(instances) > 0:
                gt_boxes = instances.gt_boxes.tensor.to(device)
                matches = match_on_grid(self.grid, gt_boxes, self.iou_thresholds[0])
                gt_classes = instances.gt_classes.to(device)[matches.box_idxs]
                labels[i, matches.anchor_idxs] = self._label(matches, gt_classes)
                matched_idxs[i, matches.anchor_idxs] = matches.box_idxs
        return labels, matched_idxs

    def _match_batch(self, anchors: Tensor, gt_instances: list[Instances]) -> tuple[Tensor, Tensor]:
        """All images at once, without a wait of the host for the device."""
        num_boxes, gt_boxes, gt_classes = to_device(
            [
                torch.tensor([len(x) for x in gt_instances]),
                torch.cat([x.gt_boxes.tensor for x in gt_instances]),
                torch.cat([x.gt_classes for x in gt_instances]),
            ],
            anchors.device,
        )
        matches = match_batch(anchors, gt_boxes, num_boxes)
        first = (num_boxes.cumsum(0) - num_boxes)[:, None]
        labels = self._label(matches, gt_classes[matches.box_idxs])
        return labels, (matches.box_idxs - first).clamp_(min=0)

    def _label(self, matches: Matches | BatchMatches, gt_classes: Tensor) -> Tensor:
        """Labels of anchors whose best boxes have these classes."""
        labels = torch.full_like(gt_classes, self._unmatched)
        # Numbers, not tensors of them, which would have to be copied to a device.
        for threshold, label in zip(self.iou_thresholds, self.iou_labels[1:], strict=True):
            reached = matches.ious >= threshold
            if label == 1:
                labels = torch.where(reached, gt_classes, labels)
            else:
                labels.masked_fill_(reached, self.num_classes if label == 0 else -1)
        if self.rule == "paper":
            return labels
        is_positive = matches.is_best
        if self.rule == "detectron":
            is_positive = is_positive & (matches.ious >= self.iou_thresholds[0])
        return torch.where(is_positive, gt_classes, labels)


@ASSIGNER_REGISTRY.register()
def detectron2(cfg: CfgNode) -> Assigner:
    """Low-quality matches are always positive, as in detectron2."""
    return Assigner(cfg, rule="detectron2")


@ASSIGNER_REGISTRY.register()
def detectron(cfg: CfgNode) -> Assigner:
    """They are positive only where their IoU reaches the lower threshold: the authors' code."""
    return Assigner(cfg, rule="detectron")


@ASSIGNER_REGISTRY.register()
def paper(cfg: CfgNode) -> Assigner:
    """They are never positive (Sec. 4, "Anchors")."""
    return Assigner(cfg, rule="paper")
