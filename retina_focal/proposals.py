"""Focal-loss proposals for two-stage models: every anchor counts, none is sampled."""

import logging

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling.proposal_generator.build import PROPOSAL_GENERATOR_REGISTRY
from detectron2.modeling.proposal_generator.rpn import RPN, RPN_HEAD_REGISTRY, StandardRPNHead
from detectron2.structures import Boxes
from detectron2.utils.events import get_event_storage, has_event_storage
from torch import Tensor, nn

from retina_focal.box_losses import box_regression_loss
from retina_focal.config import retina_focal_node
from retina_focal.criterion import Criterion
from retina_focal.head import prior_bias
from retina_focal.losses import sigmoid_focal_loss

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
        return {
            **super().from_config(cfg, input_shape),
            "prior_prob": cfg.MODEL.RETINANET.PRIOR_PROB,
        }


@PROPOSAL_GENERATOR_REGISTRY.register()
class FocalRPN(RPN):
    """detectron2's RPN with the focal loss over all anchors in place of sampling.

    A subclass: decoding and NMS of proposals are detectron2's, and its two-stage models call them.
    ``RPN.BATCH_SIZE_PER_IMAGE`` and ``RPN.POSITIVE_FRACTION`` have no effect.
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
        criterion = Criterion(
            num_classes=1,
            box2box_transform=arguments["box2box_transform"],
            focal_loss_alpha=cfg.MODEL.RETINANET.FOCAL_LOSS_ALPHA,
            focal_loss_gamma=cfg.MODEL.RETINANET.FOCAL_LOSS_GAMMA,
            smooth_l1_beta=cfg.MODEL.RPN.SMOOTH_L1_BETA,
            box_reg_loss_type=cfg.MODEL.RPN.BBOX_REG_LOSS_TYPE,
            normalizer=retina_focal_node(cfg).NORMALIZER,
        )
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
            anchors: (Hi x Wi x A) boxes a level; R over all levels.
            pred_objectness_logits: (N, Hi x Wi x A) a level.
            gt_labels: N of (R,) in {-1, 0, 1}: ignored, background, object.
            pred_anchor_deltas: (N, Hi x Wi x A, 4) a level.
            gt_boxes: N of (R, 4) matched boxes.
        Returns:
            Scalars `loss_rpn_cls` and `loss_rpn_loc`.
        """
        labels = torch.stack(gt_labels)  # (N, R)
        logits = torch.cat(pred_objectness_logits, dim=1).float()
        normalizers = self.criterion.normalizers((labels == 1).sum(1))
        loss = self.criterion.classification_loss
        per_anchor = sigmoid_focal_loss(logits, (labels == 1).float(), loss.alpha, loss.gamma)
        image, index = (labels == 1).nonzero(as_tuple=True)
        per_positive = box_regression_loss(
            torch.cat(pred_anchor_deltas, dim=1)[image, index],
            Boxes.cat(anchors).tensor[index],
            torch.stack(gt_boxes)[image, index],
            self.box2box_transform,
            self.criterion.box_reg_loss_type,
            self.criterion.smooth_l1_beta,
        )
        if has_event_storage():
            get_event_storage().put_scalar("rpn/num_pos_anchors", len(image) / len(labels))
        losses = {
            "loss_rpn_cls": (per_anchor * (labels >= 0) / normalizers[:, None]).sum(),
            "loss_rpn_loc": (per_positive / normalizers[image]).sum(),
        }
        return {name: loss * self.loss_weight.get(name, 1.0) for name, loss in losses.items()}
