"""Labels and predictions to the two losses (Sec. 3.2 and Sec. 4.1, "Focal Loss")."""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.structures import Boxes, Instances
from detectron2.utils import comm
from torch import Tensor, distributed, nn

from retina_focal.box_losses import BOX_LOSSES, box_regression_loss
from retina_focal.config import check_choice, retina_focal_node
from retina_focal.errors import UserError
from retina_focal.head import Places, deltas_at
from retina_focal.losses import (
    DenseLoss,
    LevelTargets,
    SigmoidFocalLoss,
    build_classification_loss,
    dense_loss_sum,
    inverse_frequency_alpha,
)
from retina_focal.sampling import HardExampleSampler

FOCAL_LOSS = SigmoidFocalLoss()
NORMALIZERS = ("ema", "image", "batch", "global")
# detectron2's moving average: N <- 0.9 N + 0.1 max(P, 1), from N = 100.
EMA_MOMENTUM = 0.9
EMA_START = 100.0


class Positives(NamedTuple):
    """The P positive anchors of a batch, level by level; every tensor has P rows."""

    image: Tensor  # index of the image
    anchors: Tensor  # (P, 4) XYXY in pixels
    gt_boxes: Tensor  # (P, 4) XYXY in pixels


class Criterion(nn.Module):
    """Class loss over all anchors that are not ignored, box loss over the positive ones.

    Only the normaliser "ema" has state: the buffer `loss_normalizer`, which a checkpoint may lack.
    """

    @configurable
    def __init__(
        self,
        *,
        num_classes: int,
        box2box_transform: Box2BoxTransform,
        classification_loss: DenseLoss = FOCAL_LOSS,
        alpha_from_data: bool = False,
        sampler: HardExampleSampler | None = None,
        smooth_l1_beta: float = 0.0,
        box_reg_loss_type: str = "smooth_l1",
        normalizer: str = "ema",
    ):
        """
        Args:
            num_classes: K.
            box2box_transform: encodes boxes as deltas.
            classification_loss: of each class of an anchor, see `losses`.
            alpha_from_data: use `inverse_frequency_alpha` of each batch in place of the loss's.
            sampler: chooses the anchors whose class loss counts; their number in the batch of this
                process, at least 1, then divides it. None: all that are not ignored.
            smooth_l1_beta: where smooth L1 turns from quadratic to linear, in deltas; 0 is L1.
            box_reg_loss_type: one of `box_losses.BOX_LOSSES`.
            normalizer: one of `NORMALIZERS`; with P positives and W processes, "image" divides each
                image's sum by max(its P, 1) and averages over images, "batch" divides by
                max(P of this process, 1), "ema" by their moving average, "global" by
                max(P of all processes, 1) / W.
        Raises:
            UserError: an unknown name, or `alpha_from_data` for a loss without alpha.
        """
        super().__init__()
        check_choice("MODEL.RETINA_FOCAL.NORMALIZER", normalizer, NORMALIZERS)
        check_choice("MODEL.RETINANET.BBOX_REG_LOSS_TYPE", box_reg_loss_type, BOX_LOSSES)
        if alpha_from_data and getattr(classification_loss, "alpha", -1) < 0:
            raise UserError(
                f"MODEL.RETINA_FOCAL.ALPHA_FROM_DATA is True, but {classification_loss} does not "
                "weigh by alpha; set MODEL.RETINA_FOCAL.CLS_LOSS focal, with "
                "MODEL.RETINANET.FOCAL_LOSS_ALPHA at least 0 (and FOCAL_LOSS_GAMMA 0 for "
                "alpha-balanced cross entropy), or ALPHA_FROM_DATA False"
            )
        self.num_classes = num_classes
        self.box2box_transform = box2box_transform
        self.classification_loss = classification_loss
        self.alpha_from_data = alpha_from_data
        self.sampler = sampler
        self.smooth_l1_beta = smooth_l1_beta
        self.box_reg_loss_type = box_reg_loss_type
        self.normalizer = normalizer
        if normalizer == "ema":
            self.register_buffer("loss_normalizer", torch.tensor(EMA_START))

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        node, ours = cfg.MODEL.RETINANET, retina_focal_node(cfg)
        return {
            "num_classes": node.NUM_CLASSES,
            "box2box_transform": Box2BoxTransform(weights=node.BBOX_REG_WEIGHTS),
            "classification_loss": build_classification_loss(cfg),
            "alpha_from_data": ours.ALPHA_FROM_DATA,
            "sampler": HardExampleSampler(cfg) if ours.OHEM.ENABLED else None,
            "smooth_l1_beta": node.SMOOTH_L1_LOSS_BETA,
            "box_reg_loss_type": node.BBOX_REG_LOSS_TYPE,
            "normalizer": ours.NORMALIZER,
        }

    def forward(
        self,
        anchors: list[Boxes],
        logits: list[Tensor],
        deltas: Sequence[Tensor],
        labels: Tensor,
        matched_idxs: Tensor,
        gt_instances: list[Instances],
        normalizers: Tensor | None = None,
    ) -> tuple[dict[str, Tensor], dict[str, float]]:
        """
        Args:
            anchors: (Hi x Wi x A) boxes a level.
            logits: (N, A x K, Hi, Wi) a level.
            deltas: (N, A x 4, Hi, Wi) a level, used at the positive anchors.
            labels, matched_idxs: (N, R) each, from `Assigner`.
            gt_instances: N images with `gt_boxes`, on any device.
            normalizers: (N,) of `normalizers`, where these images are a part of a step; default:
                they are the whole of it.
        Returns:
            losses: scalars `loss_cls` and `loss_box_reg`.
            statistics: what is worth logging, numbers on the host.
        """
        targets, positives, places = self._gather(
            anchors, logits, labels, matched_idxs, gt_instances
        )
        if normalizers is None:
            normalizers = self.normalizers(torch.bincount(positives.image, minlength=len(labels)))
        loss, cls_normalizers = self.classification_loss, normalizers
        if self.sampler is not None:
            labels = self.sampler(anchors, logits, labels, self.num_classes)
            targets, *_ = self._gather(anchors, logits, labels, matched_idxs, gt_instances)
            cls_normalizers = (labels >= 0).sum().clamp(min=1).float().expand_as(normalizers)
        if self.alpha_from_data:
            loss = replace(loss, alpha=inverse_frequency_alpha(labels, self.num_classes))
        loss_cls = dense_loss_sum(
            loss, logits, targets, self.num_classes, cls_normalizers.reciprocal()
        )
        loss_box_reg = box_regression_loss(
            deltas_at(deltas, places),
            positives.anchors,
            positives.gt_boxes,
            self.box2box_transform,
            self.box_reg_loss_type,
            self.smooth_l1_beta,
        )
        losses = {
            "loss_cls": loss_cls,
            "loss_box_reg": (loss_box_reg / normalizers[positives.image]).sum(),
        }
        return losses, {"num_pos_anchors": len(positives.image) / len(labels)}

    def normalizers(self, num_positives: Tensor) -> Tensor:
        """What to divide each image's loss sums by.

        Args:
            num_positives: (N,) positive anchors of each image of this process's step.
        Returns:
            (N,) fp32.
        """
        if self.normalizer == "image":
            return num_positives.clamp(min=1).float() * len(num_positives)
        total = num_positives.sum().float()
        if self.normalizer == "global":
            if comm.get_world_size() > 1:
                distributed.all_reduce(total)
            total = total.clamp(min=1) / comm.get_world_size()
        else:
            total = total.clamp(min=1)
        if self.normalizer == "ema":
            # PreciseBN runs forwards in training mode without gradients: those are no steps.
            if torch.is_grad_enabled():
                self.loss_normalizer.mul_(EMA_MOMENTUM).add_((1 - EMA_MOMENTUM) * total)
            total = self.loss_normalizer.clone()
        return total.expand(len(num_positives))

    def _gather(
        self,
        anchors: list[Boxes],
        logits: list[Tensor],
        labels: Tensor,
        matched_idxs: Tensor,
        gt_instances: list[Instances],
    ) -> tuple[list[LevelTargets], Positives, list[Places]]:
        """What is not background, by level, and the positive anchors' boxes and places."""
        boxes_per_image = [x.gt_boxes.tensor for x in gt_instances]
        gt_boxes = torch.cat(boxes_per_image).to(labels.device, non_blocking=True)
        counts = [0] + [len(x) for x in boxes_per_image[:-1]]
        first_box = torch.tensor(counts).cumsum(0)  # row of each image's first box in gt_boxes
        first_box = first_box.to(labels.device, non_blocking=True)
        sizes = [len(x.tensor) for x in anchors]
        # A level's anchors are numbered by row, column and anchor of the cell.
        cells = [(-1, *x.shape[-2:], x.shape[1] // self.num_classes) for x in logits]
        labels, matched_idxs = (
            [level.unflatten(1, shape[1:]) for level, shape in zip(levels, cells, strict=True)]
            for levels in (labels.split(sizes, 1), matched_idxs.split(sizes, 1))
        )
        is_positive = [(label >= 0) & (label < self.num_classes) for label in labels]
        places = _places(is_positive + [label < 0 for label in labels])
        targets, positives = [], []
        for i, (level_anchors, shape) in enumerate(zip(anchors, cells, strict=True)):
            image, row, column, anchor = place = places[i]
            ignored_image, ignored_row, ignored_column, ignored_anchor = places[len(anchors) + i]
            targets.append(
                LevelTargets(
                    foreground=(image, anchor, labels[i][place], row, column),
                    ignored=(ignored_image, ignored_anchor, ignored_row, ignored_column),
                )
            )
            positives.append(
                Positives(
                    image=image,
                    anchors=level_anchors.tensor.unflatten(0, shape[1:])[row, column, anchor],
                    gt_boxes=gt_boxes[first_box[image] + matched_idxs[i][place]],
                )
            )
        positives = Positives(*(torch.cat(parts) for parts in zip(*positives, strict=True)))
        return targets, positives, places[: len(anchors)]

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, *rest
    ):
        """Weights trained elsewhere have no normaliser; its start value is right for them."""
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, *rest
        )
        if f"{prefix}loss_normalizer" in missing_keys:
            missing_keys.remove(f"{prefix}loss_normalizer")


def _places(masks: list[Tensor]) -> list[Places]:
    """`nonzero(as_tuple=True)` of every mask.

    A GPU's host has to wait for every number that decides a size: here once for all masks.
    """
    counts = torch.stack([mask.sum() for mask in masks]).tolist()
    found = []
    for mask, count in zip(masks, counts, strict=True):
        # Each True writes its index where it comes in the order, the others past the end.
        is_true = mask.flatten()
        rank = (is_true.cumsum(0) - 1).where(is_true, count)
        index = torch.arange(len(rank), device=rank.device)
        index = rank.new_empty(count + 1).scatter_(0, rank, index)[:count]
        place = []
        for size in reversed(mask.shape[1:]):
            place.append(index % size)
            index = index.div(size, rounding_mode="floor")
        found.append((index, *reversed(place)))
    return found
