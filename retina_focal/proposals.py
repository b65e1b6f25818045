"""Focal-loss proposals for two-stage models: every anchor counts, none is sampled."""

import logging

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling.proposal_generator.build import PROPOSAL_GENERATOR_REGISTRY
from detectron2.modeling.proposal_generator.rpn import RPN, RPN_HEAD_REGISTRY, StandardRPNHead
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import get_event_storage, has_event_storage
from torch import Tensor, nn

from retina_focal.criterion import Criterion
from retina_focal.head import prior_bias

logger = logging.getLogger(__name__)


@RPN_HEAD_REGISTRY.register()
class FocalRPNHead(StandardRPNHead):
    """detectron2's RPN head, whose objectness starts at a score of pi (Sec. 3.3)."""

    @configurable
    def __init__(self, *, prior_prob: float = 0.01, **kwargs):
        """
        Args:
            prior_prob: pi in (0, 1).
            kwargs: of `StandardRPNHead`.
        """
        super().__init__(**kwargs)
        nn.init.constant_(self.objectness_logits.bias, prior_bias(prior_prob))

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: list[ShapeSpec]) -> dict:
        arguments = super().from_config(cfg, input_shape)
        return {**arguments, "prior_prob": cfg.MODEL.RETINANET.PRIOR_PROB}


@PROPOSAL_GENERATOR_REGISTRY.register()
class FocalRPN(RPN):
    """detectron2's RPN with the focal loss over all anchors in place of sampling.

    A subclass: decoding and NMS of proposals are detectron2's, and its two-stage models call them.
    ``RPN.BATCH_SIZE_PER_IMAGE`` and ``RPN.POSITIVE_FRACTION`` have no effect; the loss keys of
    ``MODEL.RETINA_FOCAL``, OHEM included, have the one that they have on `FocalRetinaNet`.
    """

    @configurable
    def __init__(self, *, criterion: Criterion, **kwargs):
        """
        Args:
            criterion: one class, the object; owns the loss parameters and the normaliser.
            kwargs: of `RPN`.
        """
        super().__init__(**kwargs)
        self.criterion = criterion
        logger.info(
            "FocalRPN uses every anchor: MODEL.RPN.BATCH_SIZE_PER_IMAGE "
            f"({self.batch_size_per_image}) and POSITIVE_FRACTION ({self.positive_fraction}) "
            "are unused"
        )

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict:
        arguments = super().from_config(cfg, input_shape)
        of_rpn = {
            "num_classes": 1,
            "box2box_transform": arguments["box2box_transform"],
            "smooth_l1_beta": cfg.MODEL.RPN.SMOOTH_L1_BETA,
            "box_reg_loss_type": cfg.MODEL.RPN.BBOX_REG_LOSS_TYPE,
        }
        criterion = Criterion(**{**Criterion.from_config(cfg), **of_rpn})
        return {**arguments, "criterion": criterion}

    def _subsample_labels(self, label: Tensor) -> Tensor:
        """All anchors stay: the focal loss takes the place of sampling (Sec. 3.2)."""
        return label

    def losses(
        self,
        anchors: list[Boxes],
        pred_objectness_logits: list[Tensor],
        gt_labels: list[Tensor],
        pred_anchor_deltas: list[Tensor],
        gt_boxes: list[Tensor],
    ) -> dict[str, Tensor]:
        """
        Args:
            anchors: (Hi x Wi x A) boxes per level; R over all levels.
            pred_objectness_logits: (N, Hi x Wi x A) per level.
            gt_labels: N of (R,) in {-1, 0, 1}: ignored, background, object.
            pred_anchor_deltas: (N, Hi x Wi x A, 4) per level.
            gt_boxes: N of (R, 4) matched boxes.
        Returns:
            Scalars `loss_rpn_cls` and `loss_rpn_loc`.
        """
        labels = torch.stack(gt_labels).long()  # (N, R)
        # Every level is one cell to the criterion, every anchor of an image has a box of its own.
        losses, statistics = self.criterion(
            anchors,
            [x[..., None, None] for x in pred_objectness_logits],
            [x.flatten(1)[..., None, None] for x in pred_anchor_deltas],
            torch.where(labels < 0, labels, 1 - labels),  # class 0 is the object, 1 background
            torch.arange(labels.shape[1], device=labels.device).expand_as(labels),
            [Instances((0, 0), gt_boxes=Boxes(boxes)) for boxes in gt_boxes],
        )
        if has_event_storage():
            get_event_storage().put_scalar("rpn/num_pos_anchors", statistics["num_pos_anchors"])
        losses = {"loss_rpn_cls": losses["loss_cls"], "loss_rpn_loc": losses["loss_box_reg"]}
        return {name: loss * self.loss_weight.get(name, 1.0) for name, loss in losses.items()}
