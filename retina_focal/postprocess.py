"""Dense predictions to detections (Sec. 4.1, "Inference")."""

from typing import NamedTuple

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import batched_nms, nms
from detectron2.modeling import detector_postprocess
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.structures import Boxes, Instances
from torch import Tensor

from retina_focal.box_tower import PendingDeltas, deltas_at
from retina_focal.candidates import passing_candidates, top_candidates
from retina_focal.config import retina_focal_node
from retina_focal.transfer import to_device


class Postprocessor:
    """Score threshold, top candidates of each level, decoding, NMS of each class or of all."""

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
        class_agnostic_nms: bool = False,
        clip_before_nms: bool = False,
        keep_empty_boxes: bool = False,
    ):
        """
        Args:
            num_classes: K.
            box2box_transform: decodes deltas.
            score_thresh: a candidate's score must be above it, [0, 1).
            topk_candidates: (anchor, class) pairs kept per level.
            nms_thresh: boxes of one class with a higher IoU are the same object.
            max_detections_per_image: kept after NMS.
            class_agnostic_nms: whether boxes of two classes can be the same object.
            clip_before_nms: whether NMS sees boxes that are clipped to the image already.
            keep_empty_boxes: whether boxes that clipping leaves without area are detections.
        """
        self.num_classes = num_classes
        self.box2box_transform = box2box_transform
        self.score_thresh = score_thresh
        self.topk_candidates = topk_candidates
        self.nms_thresh = nms_thresh
        self.max_detections_per_image = max_detections_per_image
        self.class_agnostic_nms = class_agnostic_nms
        self.clip_before_nms = clip_before_nms
        self.keep_empty_boxes = keep_empty_boxes

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        node, test = cfg.MODEL.RETINANET, retina_focal_node(cfg).TEST
        return {
            "num_classes": node.NUM_CLASSES,
            "box2box_transform": Box2BoxTransform(weights=node.BBOX_REG_WEIGHTS),
            "score_thresh": node.SCORE_THRESH_TEST,
            "topk_candidates": node.TOPK_CANDIDATES_TEST,
            "nms_thresh": node.NMS_THRESH_TEST,
            "max_detections_per_image": cfg.TEST.DETECTIONS_PER_IMAGE,
            "class_agnostic_nms": test.CLASS_AGNOSTIC_NMS,
            "clip_before_nms": test.CLIP_BEFORE_NMS,
            "keep_empty_boxes": test.KEEP_EMPTY_BOXES,
        }

    @torch.no_grad()
    def __call__(
        self,
        anchors: list[Boxes],
        logits: list[Tensor],
        deltas: list[Tensor] | PendingDeltas,
        image_sizes: list[tuple[int, int]],
        output_sizes: list[tuple[int, int]] | None = None,
    ) -> list[Instances]:
        """
        Args:
            anchors: (Hi x Wi x A) boxes per level.
            logits: (N, A x K, Hi, Wi) per level.
            deltas: (N, A x 4, Hi, Wi) per level, read at the candidates.
            image_sizes: (height, width) of each image before padding, pixels.
            output_sizes: those to return boxes in, clipped, and without boxes that have no area
                then, unless those are kept; default: as they are, in `image_sizes`.
        Returns:
            N Instances with `pred_boxes`, `scores` (falling), `pred_classes`.
        """
        sizes, resizing = image_sizes, None
        if output_sizes is not None and not _may_read(logits[0]):
            sizes, resizing = output_sizes, _resizing(image_sizes, output_sizes, logits[0].device)
        bounds = _bounds(image_sizes, logits[0].device) if self.clip_before_nms else None
        found = self.detect([level.tensor for level in anchors], logits, deltas, resizing, bounds)
        results = [
            Instances(size, pred_boxes=Boxes(boxes), scores=scores, pred_classes=classes)
            for size, (_, boxes, scores, classes) in zip(sizes, found, strict=True)
        ]
        if output_sizes is None or resizing is not None:
            return results
        resize = _resized if self.keep_empty_boxes else detector_postprocess
        return [resize(x, *y) for x, y in zip(results, output_sizes, strict=True)]

    def detect(
        self,
        anchors: list[Tensor],
        logits: list[Tensor],
        deltas: list[Tensor] | PendingDeltas,
        resizing: "Resizing | None" = None,
        bounds: Tensor | None = None,
    ) -> list["Detections"]:
        """The same in tensors alone.

        On a CPU the elements that pass the threshold are looked for; elsewhere, where the host
        would wait for their number, the top candidates come first, in fixed shapes.

        Args:
            anchors: (Hi x Wi x A, 4) per level.
            logits, deltas: as of `__call__`.
            resizing: of the boxes; only for a device.
            bounds: (N, 4) of each image, to clip its boxes to before NMS.
        """
        may_read, topk = _may_read(logits[0]), self.topk_candidates
        if may_read:
            candidates = passing_candidates(logits, self.num_classes, self.score_thresh, topk)
        else:
            candidates = top_candidates(logits, self.num_classes, topk)
        places, number, scores, classes = candidates
        boxes = decoded(
            self.box2box_transform, deltas_at(deltas, places), torch.cat(anchors)[number]
        )
        image = torch.cat([place.image for place in places])
        found = Detections(image, boxes, scores, classes)
        if bounds is not None:
            found = found._replace(boxes=_clipped(boxes, bounds[image]))
            if not self.keep_empty_boxes:
                found = found.at(_has_area(found.boxes).nonzero().squeeze(1))
        if may_read:
            return self._suppress_each(found, len(logits[0]))
        return self._suppress_all(found, len(logits[0]), resizing)

    def _suppress_each(self, found: "Detections", num_images: int) -> list["Detections"]:
        """What non-maximum suppression leaves of each image, by falling score."""
        kept = []
        for i in range(num_images):
            own = found.at((found.image == i).nonzero().squeeze(1))
            rows = suppress(*own[1:], self.nms_thresh, self.class_agnostic_nms)
            kept.append(own.at(rows[: self.max_detections_per_image]))
        return kept

    def _suppress_all(
        self, found: "Detections", num_images: int, resizing: "Resizing | None"
    ) -> list["Detections"]:
        """The same with three waits for all images: what passes, what NMS leaves, what is kept."""
        found = found.at((found.scores > self.score_thresh).nonzero().squeeze(1))
        # Boxes of two images or classes are moved so far apart that none overlap. In fp64, which
        # moves them without rounding that matters.
        boxes = found.boxes.double()
        extent = boxes.amax() - boxes.amin() + 1 if len(boxes) else 1
        classes = 0 if self.class_agnostic_nms else found.classes
        group = found.image * self.num_classes + classes
        rows = nms(boxes + (group * extent)[:, None], found.scores.double(), self.nms_thresh)
        found = found.at(rows[found.image[rows].argsort(stable=True)])

        images = torch.arange(num_images, device=rows.device)
        rank = torch.arange(len(rows), device=rows.device)
        rank -= torch.searchsorted(found.image, images)[found.image]  # within the image
        is_kept = rank < self.max_detections_per_image
        if resizing is not None:
            boxes = found.boxes * resizing.scale[found.image]
            boxes = _clipped(boxes, resizing.size[found.image])
            if not self.keep_empty_boxes:
                is_kept &= _has_area(boxes)
            found = found._replace(boxes=boxes)
        counts = (is_kept[:, None] & (found.image[:, None] == images)).sum(0).tolist()
        found = found.at(is_kept.nonzero_static(size=sum(counts)).squeeze(1))
        return [Detections(*x) for x in zip(*(y.split(counts) for y in found), strict=True)]


class Detections(NamedTuple):
    """M boxes of a batch; every tensor has M rows."""

    image: Tensor
    boxes: Tensor  # (M, 4) XYXY in pixels of the network's input
    scores: Tensor
    classes: Tensor

    def at(self, rows: Tensor) -> "Detections":
        return Detections(*(field[rows] for field in self))


class Resizing(NamedTuple):
    """How boxes of N images become those of other sizes."""

    scale: Tensor  # (N, 4) factors of XYXY
    size: Tensor  # (N, 4) width, height, width, height to clip to, pixels


def decoded(transform: Box2BoxTransform, deltas: Tensor, anchors: Tensor) -> Tensor:
    """(M, 4) boxes of (M, 4) deltas and anchors, in fp32 at least.

    detectron2's `apply_deltas` cuts fp64 to fp32, which moves the sides of a box that leaves the
    image far by more than 1e-3 px.
    """
    if deltas.dtype != torch.float64:
        return transform.apply_deltas(deltas, anchors)
    size = anchors[:, 2:] - anchors[:, :2]
    shift, scale = (deltas / deltas.new_tensor(transform.weights)).split(2, 1)
    centre = anchors[:, :2] + size / 2 + shift * size
    half = scale.clamp(max=transform.scale_clamp).exp() * size / 2
    return torch.cat([centre - half, centre + half], 1)


def suppress(
    boxes: Tensor, scores: Tensor, classes: Tensor, nms_thresh: float, class_agnostic: bool
) -> Tensor:
    """Rows of M boxes that non-maximum suppression leaves, by falling score.

    Args:
        boxes, scores, classes: (M, 4), (M,), (M,).
        nms_thresh: boxes with a higher IoU are the same object.
        class_agnostic: whether boxes of two classes can be.
    """
    if class_agnostic:
        return nms(boxes, scores, nms_thresh)
    return batched_nms(boxes, scores, classes, nms_thresh)


def _clipped(boxes: Tensor, bounds: Tensor) -> Tensor:
    """(M, 4) boxes inside of images whose width, height, width and height `bounds` has."""
    return torch.minimum(boxes.clamp(min=0), bounds)


def _has_area(boxes: Tensor) -> Tensor:
    return (boxes[:, 2:] > boxes[:, :2]).all(1)


def _bounds(image_sizes: list[tuple[int, int]], device: torch.device) -> Tensor:
    """(N, 4) width, height, width and height of each image."""
    # Stacked, as torch.jit.trace has tensors for sizes.
    sizes = [torch.stack([torch.as_tensor(w), torch.as_tensor(h)]) for h, w in image_sizes]
    return to_device([torch.stack(sizes).repeat(1, 2).float()], device)[0]


def _resized(result: Instances, height: int, width: int) -> Instances:
    """As detectron2's `detector_postprocess`, which drops boxes without area."""
    boxes = result.pred_boxes.clone()
    boxes.scale(width / result.image_size[1], height / result.image_size[0])
    boxes.clip((height, width))
    return Instances((height, width), **{**result.get_fields(), "pred_boxes": boxes})


def _resizing(
    image_sizes: list[tuple[int, int]], output_sizes: list[tuple[int, int]], device: torch.device
) -> Resizing:
    old, new = (torch.tensor(x, dtype=torch.float64).flip(1) for x in (image_sizes, output_sizes))
    tables = [x.repeat(1, 2).float() for x in (new / old, new)]
    return Resizing(*to_device(tables, device))


def _may_read(x: Tensor) -> bool:
    """Whether sizes may depend on values: the host of a device waits for these.

    A trace would keep what the host has read, such as the number of detections of an image.
    """
    return x.device.type == "cpu" or torch.jit.is_tracing()
