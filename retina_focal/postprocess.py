"""Dense predictions to detections (Sec. 4.1, "Inference")."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import batched_nms
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.structures import Boxes, Instances
from torch import Tensor

from retina_focal.head import deltas_at

# Half precision rounds a threshold by less, between scores of 1e-6 and 1 - 1e-6.
MARGIN = 0.1


class Postprocessor:
    """Score threshold, top candidates of each level, decoding, NMS of each class.

    Logits are compared with about the threshold's; only what passes gets a sigmoid, the exact
    comparison and a box.
    """

    @configurable
    def __init__(
        self,
        *,
        num_classes: int,
        box2box_transform: Box2BoxTransform,
        score_thresh: float = 0.05,
        topk_candidates: int = 1000,
        nms_thresh: float = 0.5,
        max_detections_per_image: int = 100,
    ):
        """
        Args:
            num_classes: K.
            box2box_transform: decodes deltas.
            score_thresh: a candidate's score must be above it, [0, 1).
            topk_candidates: (anchor, class) pairs kept a level.
            nms_thresh: boxes of one class with a higher IoU are the same object.
            max_detections_per_image: kept after NMS.
        """
        self.num_classes = num_classes
        self.box2box_transform = box2box_transform
        self.score_thresh = score_thresh
        self.topk_candidates = topk_candidates
        self.nms_thresh = nms_thresh
        self.max_detections_per_image = max_detections_per_image

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        node = cfg.MODEL.RETINANET
        return {
            "num_classes": node.NUM_CLASSES,
            "box2box_transform": Box2BoxTransform(weights=node.BBOX_REG_WEIGHTS),
            "score_thresh": node.SCORE_THRESH_TEST,
            "topk_candidates": node.TOPK_CANDIDATES_TEST,
            "nms_thresh": node.NMS_THRESH_TEST,
            "max_detections_per_image": cfg.TEST.DETECTIONS_PER_IMAGE,
        }

    @torch.no_grad()
    def __call__(
        self,
        anchors: list[Boxes],
        logits: list[Tensor],
        deltas: Sequence[Tensor],
        image_sizes: list[tuple[int, int]],
    ) -> list[Instances]:
        """
        Args:
            anchors: (Hi x Wi x A) boxes a level.
            logits: (N, A x K, Hi, Wi) a level.
            deltas: (N, A x 4, Hi, Wi) a level, used at the candidates.
            image_sizes: (height, width) of each image before padding, pixels.
        Returns:
            N Instances with `pred_boxes`, `scores` (falling), `pred_classes`.
        """
        levels = []
        for level in logits:
            parts = [self._candidates(i, level[i]) for i in range(len(image_sizes))]
            levels.append(_Candidates(*(torch.cat(fields) for fields in zip(*parts, strict=True))))
        places = [(x.image, x.row, x.column, x.anchor) for x in levels]
        chosen_anchors = [
            level.tensor.view(*x.shape[-2:], -1, 4)[row, column, anchor]
            for level, x, (_, row, column, anchor) in zip(anchors, logits, places, strict=True)
        ]
        boxes = self.box2box_transform.apply_deltas(
            deltas_at(deltas, places), torch.cat(chosen_anchors)
        )
        image, scores, classes = (
            torch.cat(parts) for parts in zip(*(x[:3] for x in levels), strict=True)
        )
        results = []
        for i, image_size in enumerate(image_sizes):
            own = (image == i).nonzero().squeeze(1)
            keep = batched_nms(boxes[own], scores[own], classes[own], self.nms_thresh)
            keep = own[keep[: self.max_detections_per_image]]
            results.append(
                Instances(
                    image_size,
                    pred_boxes=Boxes(boxes[keep]),
                    scores=scores[keep],
                    pred_classes=classes[keep],
                )
            )
        return results

    def _candidates(self, image: int, logits: Tensor) -> "_Candidates":
        """Of one level of one image, the highest score first.

        Args:
            image: index of the image.
            logits: (A x K, H, W).
        """
        height, width = logits.shape[-2:]
        logits = logits.flatten()
        passed = (logits > logit(self.score_thresh) - MARGIN).nonzero().squeeze(1)
        scores = logits[passed].float().sigmoid()
        exactly = (scores > self.score_thresh).nonzero().squeeze(1)
        passed = passed[exactly]
        scores, order = _top(scores[exactly], self.topk_candidates)
        channel, cell = _divmod(passed[order], height * width)
        anchor, classes = _divmod(channel, self.num_classes)
        row, column = _divmod(cell, width)
        return _Candidates(torch.full_like(row, image), scores, classes, row, column, anchor)


class _Candidates(NamedTuple):
    """(Anchor, class) pairs of a level that may become detections; every tensor has M elements."""

    image: Tensor
    scores: Tensor
    classes: Tensor
    row: Tensor
    column: Tensor
    anchor: Tensor


def logit(score: float) -> float:
    """The logit whose sigmoid is `score` in [0, 1]."""
    if score <= 0:
        return -math.inf
    return math.log(score / (1 - score)) if score < 1 else math.inf


def _top(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k highest scores, falling, and their indices; all of them where there are fewer."""
    count = scores.shape[0]
    # torch.jit.trace turns the count into a tensor, and keeps the dependence on the image.
    return scores.topk(count.clamp(max=k) if isinstance(count, Tensor) else min(count, k))


def _divmod(dividend: Tensor, divisor: int) -> tuple[Tensor, Tensor]:
    quotient = dividend.div(divisor, rounding_mode="floor")
    return quotient, dividend - quotient * divisor
