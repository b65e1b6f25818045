"""As COCO-Detection/retinanet_X_101_32x8d_FPN_paper_800_jitter.yaml. Not run."""

from detectron2.config import LazyCall as L
from detectron2.modeling.backbone.resnet import BottleneckBlock, ResNet

from .retinanet_R_101_FPN_paper_800_jitter import (
    dataloader,
    lr_multiplier,
    model,
    optimizer,
    train,
)

# ResNet.make_default_stages has no width per group. Columns: blocks, stride, channels in and out.
model.backbone.bottom_up.stages = [
    L(ResNet.make_stage)(
        block_class=BottleneckBlock,
        num_blocks=num_blocks,
        stride_per_block=[stride] + [1] * (num_blocks - 1),
        in_channels=in_channels,
        bottleneck_channels=out_channels,  # at res2: 32 groups of 8
        out_channels=out_channels,
        num_groups=32,
        stride_in_1x1=False,
        norm="FrozenBN",
    )
    for num_blocks, stride, in_channels, out_channels in [
        (3, 1, 64, 256),
        (4, 2, 256, 512),
        (23, 2, 512, 1024),
        (3, 2, 1024, 2048),
    ]
]
model.pixel_std = [57.375, 57.120, 58.395]
train.init_checkpoint = "detectron2://ImageNetPretrained/FAIR/X-101-32x8d.pkl"
