"""Dense predictions to detections (Sec. 4.1, "Inference")."""

import math
from typing import NamedTuple

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import batched_nms, nms
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.structures import Boxes, Instances
from torch import Tensor

from retina_focal.box_tower import PendingDeltas, deltas_at
from retina_focal.places import Places, places_of_elements

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
            topk_candidates: (anchor, class) pairs kept per level.
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
        deltas: list[Tensor] | PendingDeltas,
        image_sizes: list[tuple[int, int]],
    ) -> list[Instances]:
        """
        Args:
            anchors: (Hi x Wi x A) boxes per level.
            logits: (N, A x K, Hi, Wi) per level.
            deltas: (N, A x 4, Hi, Wi) per level, read at the candidates.
            image_sizes: (height, width) of each image before padding, pixels.
        Returns:
            N Instances with `pred_boxes`, `scores` (falling), `pred_classes`.
        """
        found = self.detect([level.tensor for level in anchors], logits, deltas)
        return [
            Instances(size, pred_boxes=Boxes(boxes), scores=scores, pred_classes=classes)
            for size, (_, boxes, scores, classes) in zip(image_sizes, found, strict=True)
        ]

    def detect(
        self, anchors: list[Tensor], logits: list[Tensor], deltas: list[Tensor] | PendingDeltas
    ) -> list["Detections"]:
        """The same in tensors alone.

        On a CPU the elements that pass the threshold are looked for; elsewhere, where the host
        would wait for their number, the top candidates come first, in fixed shapes.

        Args:
            anchors: (Hi x Wi x A, 4) per level.
            logits, deltas: as of `__call__`.
        """
        candidates = self._passing if _is_on_cpu(logits[0]) else self._top
        places, scores, classes = zip(*map(candidates, logits), strict=True)
        own_anchors = [
            level[place.numbers(x.shape[1] // self.num_classes, x.shape[-2:])]
            for place, level, x in zip(places, anchors, logits, strict=True)
        ]
        boxes = self.box2box_transform.apply_deltas(
            deltas_at(deltas, places), torch.cat(own_anchors)
        )
        image = torch.cat([place.image for place in places])
        found = Detections(image, boxes, torch.cat(scores), torch.cat(classes))
        if not _is_on_cpu(logits[0]):
            found = found.at((found.scores > self.score_thresh).nonzero().squeeze(1))
        return [
            found.at(rows[: self.max_detections_per_image])
            for rows in self._suppress(found, len(logits[0]))
        ]

    def _passing(self, logits: Tensor) -> tuple[Places, Tensor, Tensor]:
        """The top candidates of one level among those that pass, image by image.

        Args:
            logits: (N, A x K, H, W).
        Returns:
            Places of M candidates, (M,) scores and classes.
        """
        found = []
        for i, elements in enumerate(logits.flatten(1)):
            # Scores only of what can pass; their comparison decides.
            passed = (elements > logit(self.score_thresh) - MARGIN).nonzero().squeeze(1)
            scores = elements[passed].float().sigmoid()
            exactly = (scores > self.score_thresh).nonzero().squeeze(1)
            scores, order = _top(scores[exactly], self.topk_candidates)
            anchor, classes, row, column = places_of_elements(
                passed[exactly][order], self.num_classes, logits.shape[-2:]
            )
            found.append((torch.full_like(row, i), anchor, row, column, scores, classes))
        *places, scores, classes = (torch.cat(parts) for parts in zip(*found, strict=True))
        return Places(*places), scores, classes

    def _top(self, logits: Tensor) -> tuple[Places, Tensor, Tensor]:
        """The same without the threshold: as many in every image."""
        top, element = _top(logits.flatten(1), self.topk_candidates)
        anchor, classes, row, column = places_of_elements(
            element, self.num_classes, logits.shape[-2:]
        )
        image = torch.arange(len(logits), device=logits.device)[:, None].expand_as(element)
        places = Places(*(x.flatten() for x in (image, anchor, row, column)))
        return places, top.float().sigmoid().flatten(), classes.flatten()

    def _suppress(self, found: "Detections", num_images: int) -> list[Tensor]:
        """Rows that non-maximum suppression per class leaves of each image, by falling score."""
        if _is_on_cpu(found.boxes):
            kept = []
            for i in range(num_images):
                own = (found.image == i).nonzero().squeeze(1)
                _, boxes, scores, classes = found.at(own)
                kept.append(own[batched_nms(boxes, scores, classes, self.nms_thresh)])
            return kept
        # All images at once: those of two images or classes are moved so far apart that none
        # overlap. In fp64, which moves them without rounding that matters.
        boxes = found.boxes.double()
        extent = boxes.amax() - boxes.amin() + 1 if len(boxes) else 1
        group = found.image * self.num_classes + found.classes
        kept = nms(boxes + (group * extent)[:, None], found.scores.double(), self.nms_thresh)
        images = torch.arange(num_images, device=kept.device)
        image = found.image[kept]
        counts = (image[:, None] == images).sum(0).tolist()
        return list(kept[image.argsort(stable=True)].split(counts))


class Detections(NamedTuple):
    """M boxes of a batch; every tensor has M rows."""

    image: Tensor
    boxes: Tensor  # (M, 4) XYXY in pixels of the network's input
    scores: Tensor
    classes: Tensor

    def at(self, rows: Tensor) -> "Detections":
        return Detections(*(field[rows] for field in self))


def _is_on_cpu(x: Tensor) -> bool:
    return x.device.type == "cpu"


def logit(score: float) -> float:
    """The logit whose sigmoid is `score` in [0, 1]."""
    if score <= 0:
        return -math.inf
    return math.log(score / (1 - score)) if score < 1 else math.inf


def _top(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k highest of each row, falling, and their indices; all of them where there are fewer."""
    count = values.shape[-1]
    # torch.jit.trace turns the count into a tensor, and keeps the dependence on the image.
    return values.topk(count.clamp(max=k) if isinstance(count, Tensor) else min(count, k))
