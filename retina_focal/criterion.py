"""Labels and predictions to the two losses (Sec. 3.2 and Sec. 4.1, "Focal Loss")."""

from collections.abc import Callable

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.structures import Boxes, Instances
from detectron2.structures.boxes import matched_pairwise_iou
from torch import Tensor, nn

from retina_focal.box_losses import BOX_LOSSES, box_regression_loss
from retina_focal.box_tower import PendingDeltas, deltas_at
from retina_focal.config import check_choice, registered, retina_focal_node
from retina_focal.dense_sum import LevelTargets, dense_loss_sum
from retina_focal.errors import UserError
from retina_focal.losses import (
    NO_ALPHA,
    DenseLoss,
    SigmoidFocalLoss,
    build_classification_loss,
    inverse_frequency_alpha,
)
from retina_focal.normalizers import NORMALIZER_REGISTRY
from retina_focal.sampling import HardExampleSampler
from retina_focal.targets import Positives, Targets, find_targets, level_targets

FOCAL_LOSS = SigmoidFocalLoss()


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
        normalizer: str | Callable[[Tensor, Tensor | None], Tensor] = "ema",
    ):
        """
        Args:
            num_classes: K.
            box2box_transform: encodes boxes as deltas.
            classification_loss: of each class of an anchor, see `DenseLoss`.
            alpha_from_data: use `inverse_frequency_alpha` of each batch in place of the loss's.
            sampler: chooses the anchors whose class loss counts; their number in the batch of this
                process, at least 1, then divides it. None: all that are not ignored.
            smooth_l1_beta: where smooth L1 turns from quadratic to linear, in deltas; 0 is L1.
            box_reg_loss_type: one of `box_losses.BOX_LOSSES`.
            normalizer: a name in `NORMALIZER_REGISTRY`, or a function as it describes.
        Raises:
            UserError: an unknown name, or `alpha_from_data` for a loss without alpha.
        """
        super().__init__()
        if isinstance(normalizer, str):
            key = "MODEL.RETINA_FOCAL.NORMALIZER"
            normalizer = registered(NORMALIZER_REGISTRY, key, normalizer)
        check_choice("MODEL.RETINANET.BBOX_REG_LOSS_TYPE", box_reg_loss_type, BOX_LOSSES)
        _check_loss(classification_loss, alpha_from_data, sampler)
        self.num_classes = num_classes
        self.box2box_transform = box2box_transform
        self.classification_loss = classification_loss
        self.alpha_from_data = alpha_from_data
        self.sampler = sampler
        self.smooth_l1_beta = smooth_l1_beta
        self.box_reg_loss_type = box_reg_loss_type
        self.normalizer = normalizer
        if hasattr(normalizer, "start"):
            self.register_buffer("loss_normalizer", torch.tensor(normalizer.start))

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
        deltas: list[Tensor] | PendingDeltas,
        labels: Tensor,
        matched_idxs: Tensor,
        gt_instances: list[Instances],
        normalizers: Tensor | None = None,
        targets: Targets | None = None,
    ) -> tuple[dict[str, Tensor], dict[str, float]]:
        """
        Args:
            anchors: (Hi x Wi x A) boxes per level.
            logits: (N, A x K, Hi, Wi) per level.
            deltas: (N, A x 4, Hi, Wi) per level, read at the positive anchors.
            labels, matched_idxs: (N, R) each, from `Assigner`.
            gt_instances: N images with `gt_boxes`, on any device.
            normalizers: (N,) of `normalizers`, where these images are a part of a step; default:
                they are the whole of it.
            targets: of these labels, where they are known already.
        Returns:
            losses: scalars `loss_cls` and `loss_box_reg`.
            statistics: what is worth logging, numbers on the host.
        """
        if targets is None:
            arguments = anchors, labels, matched_idxs, gt_instances, logits
            targets = find_targets(*arguments, self.num_classes)
        levels, positives, num_positives = targets
        pred_deltas = deltas_at(deltas, [level.positive for level in levels])
        if normalizers is None:
            normalizers = self.normalizers(num_positives)
        # fp32, but fp64 where the logits are.
        normalizers = normalizers.to(torch.promote_types(logits[0].dtype, torch.float32))
        loss_box_reg = box_regression_loss(
            pred_deltas,
            positives.anchors,
            positives.gt_boxes,
            self.box2box_transform,
            self.box_reg_loss_type,
            self.smooth_l1_beta,
        )
        loss_box_reg = (loss_box_reg / normalizers[positives.image]).sum()
        if self.sampler is not None:
            labels = self.sampler(anchors, logits, labels, self.num_classes)
            levels = level_targets(labels, logits, self.num_classes)
            normalizers = (labels >= 0).sum().clamp(min=1).to(normalizers).expand_as(normalizers)
        if getattr(self.classification_loss, "soft_targets", False):
            levels = self._with_quality(levels, positives, pred_deltas.detach())
        loss = self.classification_loss
        if self.alpha_from_data:
            loss = self.class_loss_of(labels)
        loss_cls = dense_loss_sum(loss, logits, levels, self.num_classes, normalizers.reciprocal())
        losses = {"loss_cls": loss_cls, "loss_box_reg": loss_box_reg}
        return losses, {"num_pos_anchors": len(positives.image) / len(labels)}

    def normalizers(self, num_positives: Tensor) -> Tensor:
        """What to divide each image's loss sums by.

        Args:
            num_positives: (N,) positive anchors of each image of this process's step.
        Returns:
            (N,) floats above 0.
        """
        return self.normalizer(num_positives, getattr(self, "loss_normalizer", None))

    def class_loss_of(self, labels: Tensor) -> DenseLoss:
        """The class loss, with the alpha of these labels where it comes from the data."""
        if not self.alpha_from_data:
            return self.classification_loss
        alpha = inverse_frequency_alpha(labels, self.num_classes)
        return self.classification_loss.with_alpha(alpha)

    def _with_quality(
        self, levels: list[LevelTargets], positives: Positives, pred_deltas: Tensor
    ) -> list[LevelTargets]:
        """With the IoU of each positive anchor's decoded box with its ground truth."""
        boxes = self.box2box_transform.apply_deltas(pred_deltas.float(), positives.anchors)
        quality = matched_pairwise_iou(Boxes(boxes), Boxes(positives.gt_boxes)).clamp(0, 1)
        per_level = quality.split([len(level.classes) for level in levels])
        return [level._replace(quality=own) for level, own in zip(levels, per_level, strict=True)]

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, *rest
    ):
        """Weights trained elsewhere have no normaliser; its start value is right for them."""
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, *rest
        )
        if f"{prefix}loss_normalizer" in missing_keys:
            missing_keys.remove(f"{prefix}loss_normalizer")


def _check_loss(loss: DenseLoss, alpha_from_data: bool, sampler: HardExampleSampler | None) -> None:
    """Refuse what a loss can't be combined with."""
    if alpha_from_data:
        if not hasattr(loss, "with_alpha"):
            raise UserError(NO_ALPHA.format(loss))
        loss.with_alpha(0.5)
    if getattr(loss, "soft_targets", False) and (alpha_from_data or sampler):
        raise UserError(
            f"{loss} has soft targets, which neither MODEL.RETINA_FOCAL.OHEM.ENABLED nor "
            "ALPHA_FROM_DATA takes into account; set both to False, or CLS_LOSS focal"
        )
