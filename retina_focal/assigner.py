"""Anchors to labels and matched boxes (Sec. 4, "Anchors")."""

from collections.abc import Sequence

import torch
from detectron2.config import CfgNode, configurable
from detectron2.structures import Boxes, Instances, pairwise_iou
from torch import Tensor

from retina_focal.config import retina_focal_node

ASSIGNMENTS = ("detectron2", "detectron", "paper")

# Largest boxes x anchors matrix held at a time; pairwise_iou needs about six of them (fp32).
MAX_PAIRS = 1 << 22


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
            ValueError: an unknown rule, or thresholds and labels that don't fit.
        """
        if rule not in ASSIGNMENTS:
            raise ValueError(
                f"MODEL.RETINA_FOCAL.ASSIGNMENT is '{rule}'; "
                f"expected one of {', '.join(ASSIGNMENTS)}"
            )
        rising = [0, *iou_thresholds] == sorted([0, *iou_thresholds]) and iou_thresholds[0] > 0
        if not rising or len(iou_labels) != len(iou_thresholds) + 1 or iou_labels[0] == 1:
            raise ValueError(
                f"MODEL.RETINANET.IOU_THRESHOLDS {list(iou_thresholds)} and IOU_LABELS "
                f"{list(iou_labels)}; expected rising thresholds above 0, one label more than "
                "thresholds, and as first label 0 or -1"
            )
        self.num_classes = num_classes
        self.iou_thresholds = tuple(iou_thresholds)
        self.iou_labels = tuple(iou_labels)
        self.rule = rule

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
            anchors: one Boxes a level, P3 first, XYXY in pixels; R anchors over all levels.
            gt_instances: N images with `gt_boxes` and `gt_classes`.
        Returns:
            labels: (N, R) int64 in {-1, 0, ..., K}; K is background, -1 is ignored.
            matched_idxs: (N, R) int64 index of the matched box; meaningful where 0 <= label < K.
        """
        all_anchors = Boxes.cat(anchors)
        pairs = [self._label_image(all_anchors, instances) for instances in gt_instances]
        labels, matched_idxs = zip(*pairs, strict=True)
        return torch.stack(labels), torch.stack(matched_idxs)

    def _label_image(self, anchors: Boxes, instances: Instances) -> tuple[Tensor, Tensor]:
        """Labels and matched indices, (R,) each, of one image."""
        ious, matched_idxs, is_best = match(anchors, instances.gt_boxes)
        if len(instances) == 0:
            return torch.full_like(matched_idxs, self.num_classes), matched_idxs
        thresholds = ious.new_tensor(self.iou_thresholds)
        interval = torch.bucketize(ious, thresholds, right=True)
        quality = matched_idxs.new_tensor(self.iou_labels)[interval]
        if self.rule == "detectron":
            is_best &= ious >= thresholds[0]
        if self.rule != "paper":
            quality[is_best] = 1
        labels = instances.gt_classes[matched_idxs]
        labels[quality == 0] = self.num_classes
        labels[quality == -1] = -1
        return labels, matched_idxs


def match(anchors: Boxes, gt_boxes: Boxes) -> tuple[Tensor, Tensor, Tensor]:
    """Highest IoU of every anchor, in blocks of boxes so that memory stays bounded.

    Args:
        anchors: R anchors, XYXY in pixels.
        gt_boxes: M boxes, XYXY in pixels.
    Returns:
        ious: (R,) highest IoU with any box, 0 where there is none.
        matched_idxs: (R,) index of that box, the first of equals; 0 where there is none.
        is_best: (R,) bool; no anchor overlaps some box better (ties included), and it does overlap.
    """
    ious = anchors.tensor.new_zeros(len(anchors))
    matched_idxs = torch.zeros_like(ious, dtype=torch.int64)
    is_best = torch.zeros_like(ious, dtype=torch.bool)
    rows = max(1, MAX_PAIRS // max(1, len(anchors)))
    for first in range(0, len(gt_boxes), rows):
        block = pairwise_iou(gt_boxes[first : first + rows], anchors)
        block_ious, block_idxs = block.max(dim=0)
        better = block_ious > ious
        ious = torch.where(better, block_ious, ious)
        matched_idxs = torch.where(better, block_idxs + first, matched_idxs)
        best_of_box = block.amax(dim=1, keepdim=True)
        is_best |= ((block == best_of_box) & (best_of_box > 0)).any(dim=0)
    return ious, matched_idxs, is_best
