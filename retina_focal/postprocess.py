"""Dense predictions to detections (Sec. 4.1, "Inference")."""

import math
from typing import NamedTuple

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import batched_nms, nms
from detectron2.modeling import detector_postprocess
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.structures import Boxes, Instances
from torch import Tensor

from retina_focal.box_tower import PendingDeltas, deltas_at
from retina_focal.config import retina_focal_node
from retina_focal.places import Places, places_of_elements
from retina_focal.transfer import to_device

# Half precision rounds a threshold by less, between scores of 1e-6 and 1 - 1e-6.
MARGIN = 0.1


class Postprocessor:
    """Score threshold, top candidates of each level, decoding, NMS of each class or of all.

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
        class_agnostic_nms: bool = False,
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
        """
        self.num_classes = num_classes
        self.box2box_transform = box2box_transform
        self.score_thresh = score_thresh
        self.topk_candidates = topk_candidates
        self.nms_thresh = nms_thresh
        self.max_detections_per_image = max_detections_per_image
        self.class_agnostic_nms = class_agnostic_nms

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
            "class_agnostic_nms": retina_focal_node(cfg).TEST.CLASS_AGNOSTIC_NMS,
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
                then; default: as they are, in `image_sizes`.
        Returns:
            N Instances with `pred_boxes`, `scores` (falling), `pred_classes`.
        """
        sizes, resizing = image_sizes, None
        if output_sizes is not None and not _may_read(logits[0]):
            sizes, resizing = output_sizes, _resizing(image_sizes, output_sizes, logits[0].device)
        found = self.detect([level.tensor for level in anchors], logits, deltas, resizing)
        results = [
            Instances(size, pred_boxes=Boxes(boxes), scores=scores, pred_classes=classes)
            for size, (_, boxes, scores, classes) in zip(sizes, found, strict=True)
        ]
        if output_sizes is None or resizing is not None:
            return results
        return [detector_postprocess(x, *y) for x, y in zip(results, output_sizes, strict=True)]

    def detect(
        self,
        anchors: list[Tensor],
        logits: list[Tensor],
        deltas: list[Tensor] | PendingDeltas,
        resizing: "Resizing | None" = None,
    ) -> list["Detections"]:
        """The same in tensors alone.

        On a CPU the elements that pass the threshold are looked for; elsewhere, where the host
        would wait for their number, the top candidates come first, in fixed shapes.

        Args:
            anchors: (Hi x Wi x A, 4) per level.
            logits, deltas: as of `__call__`.
            resizing: of the boxes; only for a device.
        """
        may_read = _may_read(logits[0])
        find = self._find_passing if may_read else self._find_top
        places, number, scores, classes = find(logits)
        boxes = self.box2box_transform.apply_deltas(
            deltas_at(deltas, places), torch.cat(anchors)[number]
        )
        image = torch.cat([place.image for place in places])
        found = Detections(image, boxes, scores, classes)
        if may_read:
            return self._suppress_each(found, len(logits[0]))
        return self._suppress_all(found, len(logits[0]), resizing)

    def _find_passing(self, logits: list[Tensor]) -> tuple[list[Places], Tensor, Tensor, Tensor]:
        """The candidates of all levels that pass the threshold.

        Args:
            logits: (N, A x K, Hi, Wi) per level.
        Returns:
            Places per level, and of all M candidates the number among the R anchors, scores and
            classes.
        """
        places, scores, classes = zip(*map(self._passing, logits), strict=True)
        numbers, begin = [], 0
        for place, x in zip(places, logits, strict=True):
            num_anchors, size = x.shape[1] // self.num_classes, x.shape[-2:]
            numbers.append(place.numbers(num_anchors, size) + begin)
            begin = begin + num_anchors * size[0] * size[1]
        return list(places), torch.cat(numbers), torch.cat(scores), torch.cat(classes)

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
            height, width = logits.shape[-2:]
            anchor, classes, row, column = places_of_elements(
                passed[exactly][order], self.num_classes, height * width, width
            )
            found.append((torch.full_like(row, i), anchor, row, column, scores, classes))
        *places, scores, classes = (torch.cat(parts) for parts in zip(*found, strict=True))
        return Places(*places), scores, classes

    def _find_top(self, logits: list[Tensor]) -> tuple[list[Places], Tensor, Tensor, Tensor]:
        """As `_find_passing`, without the threshold: as many in every image.

        Where they stand is computed for all levels together: the host of a device launches as much
        for one level as for all.
        """
        num_images, device = len(logits[0]), logits[0].device
        tops = [_top(x.flatten(1), self.topk_candidates) for x in logits]
        counts = [values.shape[1] for values, _ in tops]
        # Of each level: Hi x Wi, Wi, A and its first anchor.
        table, begin = [], 0
        for x in logits:
            (height, width), num_anchors = x.shape[-2:], x.shape[1] // self.num_classes
            table.append((height * width, width, num_anchors, begin))
            begin += height * width * num_anchors
        table, counts_ = to_device([torch.tensor(table), torch.tensor(counts)], device)
        columns = table.repeat_interleave(counts_, 0, output_size=sum(counts)).t()[:, None]
        cells, width, num_anchors, first = columns
        element = torch.cat([element for _, element in tops], 1)
        anchor, classes, row, column = places_of_elements(element, self.num_classes, cells, width)
        number = first + (row * width + column) * num_anchors + anchor
        image = torch.arange(num_images, device=device)[:, None].expand_as(element)
        scores = torch.cat([values for values, _ in tops], 1).float().sigmoid()
        # Level by level, as the places are.
        fields = torch.stack([image, anchor, row, column, number, classes]).split(counts, 2)
        fields = [level.flatten(1) for level in fields]
        number, classes = torch.cat([level[4:] for level in fields], 1)
        scores = torch.cat([level.flatten() for level in scores.split(counts, 1)])
        return [Places(*level[:4]) for level in fields], number, scores, classes

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
            boxes = torch.minimum(boxes.clamp(min=0), resizing.size[found.image])
            is_kept &= (boxes[:, 2:] > boxes[:, :2]).all(1)
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
