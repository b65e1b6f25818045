"""R-50-FPN with detectron2's choices; `model.num_classes` reaches every part by interpolation."""

from detectron2 import model_zoo
from detectron2.config import LazyCall as L
from detectron2.layers import ShapeSpec
from detectron2.modeling.box_regression import Box2BoxTransform

from retina_focal import (
    Assigner,
    Criterion,
    FocalRetinaNet,
    FocalRetinaNetHead,
    OctaveAnchorGenerator,
    Postprocessor,
    SigmoidFocalLoss,
)

_stock = model_zoo.get_config("COCO-Detection/retinanet_R_50_FPN_1x.py").model

model = L(FocalRetinaNet)(
    backbone=_stock.backbone,
    head=L(FocalRetinaNetHead)(
        input_shape=[ShapeSpec(channels=256)] * 5,
        num_classes="${..num_classes}",
        num_anchors=9,
        conv_dims=[256] * 4,
    ),
    head_in_features=["p3", "p4", "p5", "p6", "p7"],
    anchor_generator=L(OctaveAnchorGenerator)(
        base_sizes=[32, 64, 128, 256, 512],
        scales_per_octave=3,
        aspect_ratios=[0.5, 1.0, 2.0],
        strides=[8, 16, 32, 64, 128],
    ),
    assigner=L(Assigner)(num_classes="${..num_classes}"),
    criterion=L(Criterion)(
        num_classes="${..num_classes}",
        box2box_transform=L(Box2BoxTransform)(weights=[1.0, 1.0, 1.0, 1.0]),
        classification_loss=L(SigmoidFocalLoss)(alpha=0.25, gamma=2.0),
    ),
    postprocessor=L(Postprocessor)(
        num_classes="${..num_classes}", box2box_transform="${..criterion.box2box_transform}"
    ),
    pixel_mean=_stock.pixel_mean,
    pixel_std=_stock.pixel_std,
    num_classes=80,
)
