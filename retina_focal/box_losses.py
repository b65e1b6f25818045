"""Box regression losses at the positive anchors, by ``MODEL.RETINANET.BBOX_REG_LOSS_TYPE``."""

from collections.abc import Callable

import torch
from detectron2.layers import ciou_loss, diou_loss
from detectron2.modeling.box_regression import Box2BoxTransform
from fvcore.nn import giou_loss, smooth_l1_loss
from torch import Tensor

IOU_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "giou": giou_loss,
    "diou": diou_loss,
    "ciou": ciou_loss,
}
BOX_LOSSES = ("smooth_l1", *IOU_LOSSES)


def box_regression_loss(
    pred_deltas: Tensor,
    anchors: Tensor,
    gt_boxes: Tensor,
    box2box_transform: Box2BoxTransform,
    loss_type: str = "smooth_l1",
    smooth_l1_beta: float = 0.0,
) -> Tensor:
    """Loss of each positive anchor's box.

    Args:
        pred_deltas: (P, 4) predicted (dx, dy, dw, dh); the arithmetic is at least fp32.
        anchors: (P, 4) XYXY in pixels.
        gt_boxes: (P, 4) matched ground truth, XYXY in pixels.
        loss_type: "smooth_l1" on deltas (Fast R-CNN, Eq. 3; `smooth_l1_beta` 0 is L1), or on
            decoded boxes "giou" (arXiv:1902.09630), "diou" or "ciou" (arXiv:1911.08287).
    Returns:
        (P,) losses, the four coordinates of smooth L1 summed.
    """
    pred_deltas, anchors, gt_boxes = (
        x.to(torch.promote_types(pred_deltas.dtype, torch.float32))
        for x in (pred_deltas, anchors, gt_boxes)
    )
    if loss_type == "smooth_l1":
        # As get_deltas, without its check of the anchors: a GPU's host would wait for that.
        anchor_size, gt_size = anchors[:, 2:] - anchors[:, :2], gt_boxes[:, 2:] - gt_boxes[:, :2]
        anchor_centre = anchors[:, :2] + 0.5 * anchor_size
        gt_centre = gt_boxes[:, :2] + 0.5 * gt_size
        wx, wy, ww, wh = box2box_transform.weights
        width, height = anchor_size.unbind(1)
        dx, dy = (gt_centre - anchor_centre).unbind(1)
        dw, dh = (gt_size / anchor_size).log().unbind(1)
        gt_deltas = torch.stack((wx * dx / width, wy * dy / height, ww * dw, wh * dh), dim=1)
        return smooth_l1_loss(pred_deltas, gt_deltas, beta=smooth_l1_beta).sum(1)
    pred_boxes = box2box_transform.apply_deltas(pred_deltas, anchors)
    return IOU_LOSSES[loss_type](pred_boxes, gt_boxes)
