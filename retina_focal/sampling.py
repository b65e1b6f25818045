"""Online hard example mining: a choice of anchors, not a loss (Sec. 5.1 and Table 1d)."""

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.layers import nms
from detectron2.structures import Boxes
from torch import Tensor

from retina_focal.config import retina_focal_node
from retina_focal.errors import UserError

# How many batches of anchors NMS sees first, and how many times more where those don't suffice.
FIRST_CANDIDATES = 16
GROWTH = 4


class HardExampleSampler:
    """OHEM (arXiv:1604.03540): keeps, of each image, the anchors with the highest loss.

    The score of an anchor that is not ignored is its cross entropy summed over the classes. From
    what class-agnostic NMS of the anchor boxes leaves, the `batch_size` anchors with the highest
    scores are kept. With a fixed ratio these are the positives (the hardest, where there are more
    than their share of the batch) and for each of them `neg_per_pos` of the hardest negatives.
    """

    @configurable
    def __init__(self, *, batch_size: int = 128, nms_thresh: float = 0.5, neg_per_pos: int = 0):
        """
        Args:
            batch_size: anchors kept of an image, at most.
            nms_thresh: anchors with a higher IoU are the same example, [0, 1].
            neg_per_pos: negatives for each positive (3 is the 1:3 of SSD); 0: no fixed ratio.
        Raises:
            UserError: a value out of its range, or a batch too small for the ratio.
        """
        if neg_per_pos < 0 or batch_size < 1 + neg_per_pos or not 0 <= nms_thresh <= 1:
            raise UserError(
                f"MODEL.RETINA_FOCAL.OHEM has BATCH_SIZE {batch_size}, NMS_THRESH {nms_thresh}, "
                f"NEG_PER_POS {neg_per_pos}; expected NMS_THRESH from 0 to 1, NEG_PER_POS at least "
                "0, and a BATCH_SIZE of at least 1 + NEG_PER_POS"
            )
        self.batch_size = batch_size
        self.nms_thresh = nms_thresh
        self.neg_per_pos = neg_per_pos

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        node = retina_focal_node(cfg).OHEM
        return {key: node[key.upper()] for key in ("batch_size", "nms_thresh", "neg_per_pos")}

    @torch.no_grad()
    def __call__(
        self, anchors: list[Boxes], logits: list[Tensor], labels: Tensor, num_classes: int
    ) -> Tensor:
        """
        Args:
            anchors: (Hi x Wi x A) boxes per level.
            logits: (N, A x K, Hi, Wi) per level.
            labels: (N, R) in {-1, 0, ..., K}; K is background, -1 is ignored.
            num_classes: K.
        Returns:
            (N, R) labels, -1 also where an anchor is not kept.
        """
        boxes = Boxes.cat(anchors).tensor
        scores = cross_entropy_per_anchor(logits, labels, num_classes)
        kept_labels = torch.full_like(labels, -1)
        for score, label, kept_label in zip(scores, labels, kept_labels, strict=True):
            candidates = (label >= 0).nonzero()[:, 0]
            candidates = candidates[score[candidates].argsort(descending=True, stable=True)]
            is_positive = label[candidates] < num_classes
            kept = candidates[self._choose(boxes[candidates], score[candidates], is_positive)]
            kept_label[kept] = label[kept]
        return kept_labels

    def _choose(self, boxes: Tensor, scores: Tensor, is_positive: Tensor) -> Tensor:
        """Indices of what one image keeps; its anchors come by falling score."""
        max_positives = self.batch_size // (1 + self.neg_per_pos)
        size = FIRST_CANDIDATES * self.batch_size
        while True:
            # NMS of the hardest alone leaves what NMS of all leaves of them.
            left = nms(boxes[:size], scores[:size], self.nms_thresh)
            if self.neg_per_pos:
                positives = left[is_positive[left]][:max_positives]
                negatives = left[~is_positive[left]][: self.neg_per_pos * len(positives)]
                chosen = torch.cat((positives, negatives))
                enough = len(positives) == max_positives or not is_positive[size:].any()
                enough = enough and len(negatives) == self.neg_per_pos * len(positives)
            else:
                chosen = left[: self.batch_size]
                enough = len(chosen) == self.batch_size
            if enough or size >= len(boxes):
                return chosen
            size *= GROWTH


def cross_entropy_per_anchor(logits: list[Tensor], labels: Tensor, num_classes: int) -> Tensor:
    """-log p_t summed over the classes of each anchor; without meaning where it is ignored.

    Args:
        logits: (N, A x K, Hi, Wi) per level; the arithmetic is fp32.
        labels: (N, R) in {-1, 0, ..., K}.
    Returns:
        (N, R) fp32.
    """
    per_class = [x.float().unflatten(1, (-1, num_classes)).permute(0, 3, 4, 1, 2) for x in logits]
    scores, begin = [], 0
    for x in per_class:  # (N, Hi, Wi, A, K)
        score = F.softplus(x).sum(-1)
        label = labels[:, begin : begin + score[0].numel()].reshape(score.shape)
        begin += score[0].numel()
        # log(1 + e^-x) instead of log(1 + e^x) for the object's class.
        own = x.gather(-1, label.clamp(0, num_classes - 1)[..., None])[..., 0]
        is_positive = (label >= 0) & (label < num_classes)
        scores.append(torch.where(is_positive, score - own, score).flatten(1))
    return torch.cat(scores, 1)
