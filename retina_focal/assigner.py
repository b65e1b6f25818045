"""Anchors to labels and matched boxes (Sec. 4, "Anchors")."""

from collections.abc import Callable, Sequence

import torch
from detectron2.config import CfgNode, configurable
from detectron2.structures import Boxes, Instances
from fvcore.common.registry import Registry
from torch import Tensor

from retina_focal.config import check_choice, registered, retina_focal_node
from retina_focal.errors import UserError
from retina_focal.matching import AnchorGrid, find_grid, match_dense, match_on_grid

ASSIGNMENTS = ("detectron2", "detectron", "paper")

ASSIGNER_REGISTRY = Registry("ASSIGNER")
ASSIGNER_REGISTRY.__doc__ = """
Assigners by ``MODEL.RETINA_FOCAL.ASSIGNMENT``. Called with `(cfg)`; returns an object with
`num_classes` that is called as `Assigner` is.
"""


def build_assigner(cfg: CfgNode) -> Callable[..., tuple[Tensor, Tensor]]:
    """The assigner that ``MODEL.RETINA_FOCAL.ASSIGNMENT`` names.

    Raises:
        UserError: an unknown name, or thresholds and labels that don't fit.
    """
    name = retina_focal_node(cfg).ASSIGNMENT
    return registered(ASSIGNER_REGISTRY, "MODEL.RETINA_FOCAL.ASSIGNMENT", name)(cfg)


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
        thresholds = torch.tensor(self.iou_thresholds).to(device, non_blocking=True)
        label_of_interval = torch.tensor(self.iou_labels).to(device, non_blocking=True)
        unmatched = self.num_classes if self.iou_labels[0] == 0 else -1
        size = (len(gt_instances), sum(len(x) for x in levels))
        labels = torch.full(size, unmatched, device=device)
        matched_idxs = torch.zeros_like(labels)
        for i, instances in enumerate(gt_instances):
            gt_boxes = instances.gt_boxes.tensor.to(device, non_blocking=True)
            gt_classes = instances.gt_classes.to(device, non_blocking=True)
            if len(gt_boxes) == 0:
                continue
            if self.grid is None:
                matches = match_dense(torch.cat(levels), gt_boxes)
            else:
                matches = match_on_grid(self.grid, gt_boxes, self.iou_thresholds[0])
            quality = label_of_interval[torch.bucketize(matches.ious, thresholds, right=True)]
            if self.rule == "detectron2":
                quality.masked_fill_(matches.is_best, 1)
            elif self.rule == "detectron":
                quality.masked_fill_(matches.is_best & (matches.ious >= thresholds[0]), 1)
            matched_labels = gt_classes[matches.box_idxs]
            matched_labels.masked_fill_(quality == 0, self.num_classes)
            matched_labels.masked_fill_(quality == -1, -1)
            labels[i, matches.anchor_idxs] = matched_labels
            matched_idxs[i, matches.anchor_idxs] = matches.box_idxs
        return labels, matched_idxs


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
