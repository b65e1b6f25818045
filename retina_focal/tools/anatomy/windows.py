"""Windows, the (anchor, class) pairs that the class loss sums over, counted in bounded memory.

The focal loss falls with the signed logit x_t (the logit of a positive, minus that of a negative;
p_t = sigmoid(x_t)) whatever gamma is, so one order of the windows serves all gammas, and counts and
loss sums in narrow bins of x_t hold all that a cumulative distribution needs.
"""

import heapq
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import nms

from retina_focal.data.resizing import middle_tile
from retina_focal.errors import UserError
from retina_focal.losses import sigmoid_focal_loss

BINS_PER_UNIT = 64  # of x_t; a power of two, so that scaling is exact
MAX_LOGIT = 32  # windows beyond +-32 share the two outermost bins
HALF = BINS_PER_UNIT * MAX_LOGIT  # bins on each side of x_t = 0
# Windows that are looked at together: bounds the temporaries, for any number of classes.
CHUNK_SIZE = 1 << 20
# The hardest windows of each chunk and image that are thinned to one per place.
NUM_CANDIDATES = 1000
# Windows that are kept for a contact sheet.
SHEET_SIZE = 20
# IoU of anchors of one place: low, as those of neighbouring sizes differ by more than their areas.
SAME_PLACE_IOU = 0.1


class Windows(NamedTuple):
    """n windows of one level, all positive or all negative."""

    is_positive: bool
    x_t: Tensor  # (n,) fp32 signed logits
    anchors: Tensor  # (n,) indices of the level's anchors
    classes: Tensor  # (n,)


def windows(logits: Tensor, labels: Tensor) -> Iterator[Windows]:
    """The windows of one level that are not ignored, in chunks.

    Args:
        logits: (R, K) of the level's anchors.
        labels: (R,) in {-1, 0, ..., K}; K is background, -1 is ignored.
    """
    num_classes = logits.shape[1]
    num_rows = max(1, CHUNK_SIZE // num_classes)
    for begin in range(0, len(logits), num_rows):
        x, label = logits[begin : begin + num_rows].float(), labels[begin : begin + num_rows, None]
        own_class = label == torch.arange(num_classes, device=label.device)
        for is_positive, chosen in ((True, own_class), (False, ~own_class & (label >= 0))):
            anchors, classes = chosen.nonzero(as_tuple=True)
            x_t = x[anchors, classes] if is_positive else -x[anchors, classes]
            yield Windows(is_positive, x_t, anchors + begin, classes)


class Cumulative(NamedTuple):
    """Shares of the windows and of their loss that the hardest make up, from none to all.

    Exact at the points; between them the line is off by at most `error`, a share of the loss.
    """

    windows: np.ndarray
    loss: np.ndarray
    error: float

    def loss_of_hardest(self, share: float) -> float:
        """Share of the loss that the hardest `share` of the windows make."""
        return float(np.interp(share, self.windows, self.loss))

    def hardest_with(self, share: float) -> float:
        """Share of the windows that is needed, hardest first, for `share` of the loss."""
        return float(np.interp(share, self.loss, self.windows))


class LossTally:
    """Counts of windows and exact sums of their focal loss, by level, by class and by x_t.

    Attributes:
        by_level: (2, levels, 1 + G, bins): negatives and positives; the count, then the loss at
            each gamma; bin i holds the x_t in (i - HALF, i + 1 - HALF] / BINS_PER_UNIT.
        by_class: (2, K, 1 + G, 2), whose two bins are p_t <= 0.5 and p_t > 0.5.
    """

    def __init__(self, gammas: Sequence[float], alpha: float, num_levels: int, num_classes: int):
        """
        Args:
            gammas: G values >= 0.
            alpha: weight of the positives in [0, 1], 1 - alpha of the negatives; < 0: no balancing.
        """
        self.gammas = tuple(gammas)
        self.alpha = alpha
        self.by_level = np.zeros((2, num_levels, 1 + len(self.gammas), 2 * HALF))
        self.by_class = np.zeros((2, num_classes, 1 + len(self.gammas), 2))

    def add(self, level: int, found: Windows) -> None:
        """Count these windows of level number `level`; P3 is 0."""
        # ceil, so that x_t = 0 is no well-classified window: p_t > 0.5 is a union of bins.
        bins = (found.x_t * BINS_PER_UNIT).ceil().clamp(1 - HALF, HALF).long() + (HALF - 1)
        class_bins = 2 * found.classes + (found.x_t > 0)
        x_t = found.x_t.double()  # fp32 would lose what well-classified windows have at gamma 5
        logits, target = (x_t, 1.0) if found.is_positive else (-x_t, 0.0)
        target = x_t.new_tensor(target)
        losses = [sigmoid_focal_loss(logits, target, self.alpha, gamma) for gamma in self.gammas]
        side = int(found.is_positive)
        for i, weights in enumerate([None, *losses]):
            per_bin = torch.bincount(bins, weights, minlength=2 * HALF)
            self.by_level[side, level, i] += per_bin.cpu().numpy()
            per_class = torch.bincount(class_bins, weights, minlength=self.by_class[0, :, 0].size)
            self.by_class[side, :, i] += per_class.view(-1, 2).cpu().numpy()

    def num_windows(self, is_positive: bool) -> int:
        return int(self.by_class[int(is_positive), :, 0].sum())

    def cumulative(self, is_positive: bool, gamma: float) -> Cumulative:
        """Distribution of the loss over all positives, or all negatives; there is at least one.

        A window's loss grows by a factor of at most r = exp((gamma + 1) width) across a bin, so
        the line through a bin with a share q of the loss is off by at most
        q (sqrt(r) - 1) / (sqrt(r) + 1) = q tanh((gamma + 1) width / 4); by q in the outermost two.
        """
        count, *losses = self.by_level[int(is_positive)].sum(0)
        loss = losses[self.gammas.index(gamma)]
        share = loss / loss.sum()
        errors = share * math.tanh((gamma + 1) / BINS_PER_UNIT / 4)
        errors[[0, -1]] = share[[0, -1]]
        filled = count > 0
        return Cumulative(
            windows=np.append(0, count[filled].cumsum() / count.sum()),
            loss=np.append(0, share[filled].cumsum()),
            error=float(errors.max()),
        )


class HardWindow(NamedTuple):
    """One window, in pixels of the picture as it lies on the disk."""

    x_t: float
    anchor: np.ndarray  # (4,) XYXY
    label: int  # class of the window
    file_name: str
    gt_boxes: np.ndarray  # (M, 4) XYXY
    gt_classes: np.ndarray  # (M,)


class HardestWindows:
    """The windows of the highest loss, at most one per place of an image.

    An image's candidates are the `NUM_CANDIDATES` hardest of it, which NMS thins.
    """

    def __init__(self, size: int, tile: int = 0):
        """
        Args:
            size: windows that are kept.
            tile: see `middle_tile`, in which the images were seen.
        """
        self.size, self.tile = size, tile
        self.windows: list[HardWindow] = []  # hardest first
        self._candidates: list[tuple[Tensor, Tensor, Tensor]] = []

    def add(self, anchors: Tensor, found: Windows) -> None:
        """Note windows of the present image; `anchors` are the (R, 4) of their level."""
        x_t, index = _hardest(found.x_t)
        self._candidates.append((x_t, anchors[found.anchors[index]], found.classes[index]))

    def end_image(self, record: dict) -> None:
        """Choose among the noted windows.

        Args:
            record: of `DatasetMapper`, with `file_name`, `height`, `width` and `instances`.
        """
        x_t, boxes, classes = (torch.cat(x) for x in zip(*self._candidates, strict=True))
        self._candidates = []
        x_t, index = _hardest(x_t)
        boxes, classes = boxes[index], classes[index]
        kept = nms(boxes, -x_t, SAME_PLACE_IOU)[: self.size]
        instances = record["instances"]
        height, width = instances.image_size
        left, top, *seen = middle_tile(record["height"], record["width"], self.tile)
        scale = np.tile([seen[0] / width, seen[1] / height], 2)
        corner = np.tile([left, top], 2)
        gt_boxes = instances.gt_boxes.tensor.numpy() * scale + corner
        picture = (record["file_name"], gt_boxes, instances.gt_classes.numpy())
        anchors = boxes[kept].cpu().numpy() * scale + corner
        columns = (x_t[kept].tolist(), anchors, classes[kept].tolist())
        new = [HardWindow(*window, *picture) for window in zip(*columns, strict=True)]
        self.windows = heapq.nsmallest(self.size, self.windows + new, key=lambda w: w.x_t)


def _hardest(x_t: Tensor) -> tuple[Tensor, Tensor]:
    """The lowest x_t and their indices."""
    return x_t.topk(min(len(x_t), NUM_CANDIDATES), largest=False)


class Anatomy:
    """What is known of the windows of the images seen so far."""

    def __init__(
        self,
        level_names: Sequence[str],
        class_names: Sequence[str],
        gammas: Sequence[float],
        alpha: float,
        tile: int = 0,
    ):
        """
        Args:
            level_names: P3 first.
            class_names: K.
            gammas, alpha: see `LossTally`.
            tile: see `HardestWindows`.
        """
        self.level_names = list(level_names)
        self.class_names = list(class_names)
        self.tally = LossTally(gammas, alpha, len(level_names), len(class_names))
        self.hardest = tuple(HardestWindows(SHEET_SIZE, tile) for _ in range(2))  # by is_positive
        self.num_images = self.num_anchors = self.num_ignored = 0

    def add_image(
        self, record: dict, anchors: list[Tensor], logits: list[Tensor], labels: list[Tensor]
    ) -> None:
        """Count the windows of an image.

        Args:
            record: of `DatasetMapper`, with `file_name`, `height`, `width` and `instances`.
            anchors: (Ri, 4) per level, XYXY in pixels of the resized image.
            logits: (Ri, K) per level.
            labels: (Ri,) per level, in {-1, 0, ..., K}.
        Raises:
            UserError: logits that are not finite.
        """
        for name, x in zip(self.level_names, logits, strict=True):
            if not x.isfinite().all():
                raise UserError(
                    f"image '{record['file_name']}': logits of {name} are not finite; the weights "
                    "hold NaN or values too large for MODEL.RETINA_FOCAL.PRECISION"
                )
        for level, (boxes, x, label) in enumerate(zip(anchors, logits, labels, strict=True)):
            for found in windows(x, label):
                self.tally.add(level, found)
                self.hardest[found.is_positive].add(boxes, found)
            self.num_anchors += len(label)
            self.num_ignored += int((label < 0).sum())
        for hardest in self.hardest:
            hardest.end_image(record)
        self.num_images += 1
