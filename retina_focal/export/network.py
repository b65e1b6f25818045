"""The network that is exported: an image tensor in; boxes, scores and classes out.

Its detections are those of `FocalRetinaNet` in eval mode, in fixed shapes: the best candidates of
each level come first, and the score threshold after.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from torch import Tensor, nn

from retina_focal.anchors import OctaveAnchorGenerator
from retina_focal.box_tower import PendingDeltas
from retina_focal.errors import UserError
from retina_focal.export import operators
from retina_focal.export.calibrated import CalibratedScores
from retina_focal.export.folded import folded_copy
from retina_focal.export.metadata import Metadata
from retina_focal.export.sparse_boxes import Pairs, SparseBoxTower
from retina_focal.places import places_of_elements
from retina_focal.retinanet import FocalRetinaNet


class Candidates(NamedTuple):
    """The M best (anchor, class) pairs of N images, level by level."""

    boxes: Tensor  # (N, M, 4) XYXY in pixels
    scores: Tensor  # (N, M); 0 where a level has fewer
    classes: Tensor  # (N, M)

    def first(self, kept: Tensor, count: int) -> tuple["Candidates", Tensor]:
        """The `count` of each image with the highest scores among those kept, by falling score.

        Args:
            kept: (N, M) bool.
        Returns:
            `count` of each image, and (N, count) whether it is one of those kept.
        """
        ranked = torch.where(kept, self.scores, -1.0)
        scores, rows = F.pad(ranked, (0, count), value=-1.0).topk(count)
        rows = rows.clamp(max=ranked.shape[1] - 1)
        boxes = self.boxes.gather(1, rows[..., None].expand(-1, -1, 4))
        return Candidates(boxes, scores, self.classes.gather(1, rows)), scores >= 0

    def used(self, kept: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Boxes, scores and classes; box 0, score 0 and class -1 where they are not kept."""
        boxes = torch.where(kept[..., None], self.boxes, 0)
        return boxes, torch.where(kept, self.scores, 0), torch.where(kept, self.classes, -1)


def example(dtype: str) -> Tensor:
    """An image batch of the kind that the network takes, for a trace."""
    # No length that the network has: torch.export would take the two for one.
    if dtype == "uint8":
        return torch.zeros(2, 224, 288, 3, dtype=torch.uint8)
    return torch.zeros(2, 3, 224, 288)


class ExportedNetwork(nn.Module):
    """(N, 3, H, W) pixels to (N, D, 4) boxes, (N, D) scores, (N, D) classes."""

    def __init__(
        self,
        model: FocalRetinaNet,
        metadata: Metadata,
        own_operators: bool = True,
        sparse_boxes: bool = False,
    ):
        """
        Args:
            model: trained; it is copied, and its norms folded.
            metadata: says the dtype of images, whether NMS is inside, and whether scores are
                calibrated.
            own_operators: padding and NMS as `export.operators`, which ONNX translates; otherwise
                in torch's and torchvision's.
            sparse_boxes: run the box tower where boxes are read, if those cells are few enough;
                with `own_operators` alone.
        Raises:
            UserError: an anchor generator whose anchors can't be computed from their places, a
                backbone that pads to a square, or see `SparseBoxTower`.
        """
        super().__init__()
        model = folded_copy(model)
        self.backbone, self.head = model.backbone, model.head
        self.box_tower = SparseBoxTower(self.head) if sparse_boxes else None
        self.in_features = model.head_in_features
        self.stride = _stride(model.padding)
        self.postprocessor = model.postprocessor
        self.uint8, self.nms = metadata.dtype == "uint8", metadata.nms == "inside"
        self.own_operators = own_operators
        self.calibrated = None
        if metadata.scores == "calibrated":
            self.calibrated = CalibratedScores(metadata.calibration, metadata.classes)
        _expect_grid(model.anchor_generator)
        self.anchor_generator = model.anchor_generator
        self.register_buffer("cells", torch.cat(list(model.anchor_generator.cell_anchors)))
        self.register_buffer("pixel_mean", model.pixel_mean.clone())
        self.register_buffer("pixel_std", model.pixel_std.clone())
        self.eval()

    def forward(self, image: Tensor, sizes: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """
        Args:
            image: (N, 3, H, W) float32 or (N, H, W, 3) uint8, 0 to 255, channels as the config's
                ``INPUT.FORMAT``.
            sizes: (N, 2) height and width of each image; `image` is padded to the stride then.
                Default: all of `image`, of any size.
        Returns:
            boxes: (N, D, 4) XYXY in pixels of `image`, clipped to it.
            scores: (N, D), falling.
            classes: (N, D) int64. A row that is not used has box 0, score 0 and class -1.
        """
        images = image.permute(0, 3, 1, 2).float().contiguous() if self.uint8 else image
        logits, deltas = self._maps(self._padded(images, sizes))
        found, limits = self._candidates(logits, deltas), _limits(images, sizes)
        passing = found.scores > self.postprocessor.score_thresh
        if self.postprocessor.clip_before_nms:
            found, has_area = self._clipped(found, limits)
            passing = passing & has_area
        if not self.nms:
            return found.used(passing)
        kept = self._suppress(found, passing)
        found, kept = found.first(kept, self.postprocessor.max_detections_per_image)
        if self.calibrated:
            found = found._replace(scores=self.calibrated(found.scores, found.classes))
        found, has_area = self._clipped(found, limits)
        found, kept = found.first(kept & has_area, kept.shape[1])
        return found.used(kept)

    def _padded(self, images: Tensor, sizes: Tensor | None) -> Tensor:
        """Normalised, with zeros around each image."""
        images = (images - self.pixel_mean) / self.pixel_std
        if sizes is not None:
            return images * _inside(images, sizes)
        if self.own_operators:
            return operators.pad_to_stride(images, self.stride)
        height, width = images.shape[-2:]
        return F.pad(images, (0, -width % self.stride, 0, -height % self.stride))

    def _maps(self, images: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """(N, A x K, Hi, Wi) logits and (N, A x 4, Hi, Wi) deltas per level; or, with a
        `SparseBoxTower`, (N, C, Hi, Wi) that it makes deltas of.
        """
        features = self.backbone(images)
        logits, deltas = self.head([features[name] for name in self.in_features])
        return logits, deltas.maps() if isinstance(deltas, PendingDeltas) else deltas

    def _candidates(self, logits: list[Tensor], deltas: list[Tensor]) -> Candidates:
        """The k best pairs of each level, of all levels."""
        pairs = [self._best_pairs(x) for x in logits]
        if self.box_tower:
            threshold = self.postprocessor.score_thresh
            deltas = self.box_tower(deltas, pairs, [x.values.sigmoid() > threshold for x in pairs])
        else:
            deltas = torch.cat([x.deltas(y) for x, y in zip(pairs, deltas, strict=True)], 1)
        # Anchors are computed where they are needed.
        steps = self._steps([x.shape[-2:] for x in logits])
        centres = torch.cat([self._centres(*x) for x in zip(pairs, steps, strict=True)], 1)
        anchor, _, _, values, classes = (torch.cat(x, 1) for x in zip(*pairs, strict=True))
        k = self.postprocessor.topk_candidates
        level = torch.arange(len(pairs), device=anchor.device).repeat_interleave(k)
        anchors = centres + self.cells[level * (len(self.cells) // len(pairs)) + anchor]
        decode = self.postprocessor.box2box_transform.apply_deltas
        boxes = decode(deltas.flatten(0, 1), anchors.flatten(0, 1)).view(anchors.shape)
        return Candidates(boxes, values.sigmoid(), classes)

    def _steps(self, sizes: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """Pixels from row to row and from column to column, per level."""
        generator = self.anchor_generator
        if isinstance(generator, OctaveAnchorGenerator):
            return generator.steps(sizes)
        return [(stride, stride) for stride in generator.strides]

    def _centres(self, pairs: Pairs, steps: tuple[int, int]) -> Tensor:
        """(N, k, 4) centres of the anchors as XYXY."""
        y, x = (
            (index + self.anchor_generator.offset) * step
            for index, step in zip((pairs.row, pairs.column), steps, strict=True)
        )
        return torch.stack([x, y, x, y], -1)

    def _best_pairs(self, logits: Tensor) -> Pairs:
        """The k best pairs of one level.

        A pair among the k best is of an anchor whose best class is among the k best.
        """
        k, num_classes = self.postprocessor.topk_candidates, self.postprocessor.num_classes
        height, width = logits.shape[-2:]
        num_cells = height * width
        best = logits.unflatten(1, (-1, num_classes)).amax(2).flatten(1)
        # There may be fewer than k.
        best, anchors = F.pad(best, (0, k), value=-torch.inf).topk(k)
        anchors = torch.where(best > -torch.inf, anchors, 0)
        anchor, _, row, column = places_of_elements(anchors, 1, num_cells, width)
        first = anchor * (num_classes * num_cells) + row * width + column
        of_class = torch.arange(num_classes, device=logits.device) * num_cells
        elements = (first[..., None] + of_class).flatten(1)
        values = logits.flatten(1).gather(1, elements).unflatten(1, (k, num_classes))
        values = torch.where(best[..., None] > -torch.inf, values, -torch.inf).flatten(1)
        values, pairs = values.topk(k)
        places = places_of_elements(elements.gather(1, pairs), num_classes, num_cells, width)
        anchor, classes, row, column = places
        return Pairs(anchor, row, column, values, classes)

    def _suppress(self, found: Candidates, passing: Tensor) -> Tensor:
        """(N, M) bool: what non-maximum suppression leaves of those that pass."""
        own = self.postprocessor
        groups = torch.zeros_like(found.classes) if own.class_agnostic_nms else found.classes
        num_groups = 1 if own.class_agnostic_nms else own.num_classes
        ranked = torch.where(passing, found.scores, -1.0)
        suppress = operators.nms if self.own_operators else operators.nms_in_torch
        return suppress(found.boxes, ranked, groups, num_groups, own.nms_thresh)

    def _clipped(self, found: Candidates, limits: Tensor) -> tuple[Candidates, Tensor]:
        """Boxes inside of the image, and (N, M) whether they may be detections then."""
        boxes = found.boxes.clamp(min=0).minimum(limits)
        has_area = (boxes[..., 2:] > boxes[..., :2]).all(-1)
        if self.postprocessor.keep_empty_boxes:
            has_area = torch.ones_like(has_area)
        return found._replace(boxes=boxes), has_area


def _limits(images: Tensor, sizes: Tensor | None) -> Tensor:
    """(N or 1, 1, 4) pixels that boxes are clipped to."""
    if sizes is not None:
        return sizes.flip(1).repeat(1, 2)[:, None].float()
    height, width = images.shape[-2:]
    sides = [images.new_full((1, 1), length) for length in (width, height)]
    return torch.stack(sides * 2, -1)


def _inside(images: Tensor, sizes: Tensor) -> Tensor:
    """(N, 1, H, W) bool: pixels of the image, not of its padding."""
    rows, columns = (torch.arange(n, device=images.device) for n in images.shape[-2:])
    return (rows[:, None] < sizes[:, 0, None, None, None]) & (
        columns < sizes[:, 1, None, None, None]
    )


def _stride(padding: dict) -> int:
    constraints = padding["padding_constraints"] or {}
    if constraints.get("square_size", 0):
        raise UserError(
            f"the backbone pads every image to {constraints['square_size']} pixels a side, which "
            "export doesn't know; expected one that pads to a multiple of its stride"
        )
    return max(1, constraints.get("size_divisibility", padding["size_divisibility"]))


def _expect_grid(generator: nn.Module) -> None:
    if not isinstance(generator, DefaultAnchorGenerator):
        raise UserError(
            f"MODEL.ANCHOR_GENERATOR.NAME is {type(generator).__name__}, whose anchors export "
            "can't compute; expected OctaveAnchorGenerator or DefaultAnchorGenerator"
        )
