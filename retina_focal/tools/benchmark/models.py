"""The three RetinaNets that `retina-focal benchmark` compares, of one config and one shape."""

from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from torch import Tensor, nn
from torchvision.models.detection import RetinaNet as TorchvisionRetinaNet
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops import FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from retina_focal.anchors import octave_sizes
from retina_focal.backbone import PYRAMID_INPUTS, TimmBackbone
from retina_focal.config import retina_focal_node
from retina_focal.consistency import OCTAVE_ANCHORS

MODELS = ("stock", "torchvision", "ours")
OURS_GRAPHED = "ours, CUDA graphs"
SEED = 0


@dataclass(frozen=True)
class Setting:
    """What two rows of the table may differ in."""

    cfg: CfgNode  # of our model; number of classes, precision and device are in it
    image_size: tuple[int, int]  # height, width in pixels
    batch: int  # images
    boxes: int  # per image
    half: torch.dtype | None = None  # of the head's outputs, where they are not fp32
    amp: bool = False  # every model is called inside an autocast to `half`, as SOLVER.AMP has it

    @property
    def classes(self) -> int:
        return self.cfg.MODEL.RETINANET.NUM_CLASSES

    @property
    def precision(self) -> str:
        """Of our model; the others compute in fp32."""
        return retina_focal_node(self.cfg).PRECISION

    @property
    def device(self) -> str:
        return self.cfg.MODEL.DEVICE

    @property
    def autocast(self) -> AbstractContextManager:
        """Around the forward pass of every model."""
        return torch.autocast(torch.device(self.device).type, self.half, enabled=self.amp)


def build(name: str, setting: Setting) -> nn.Module:
    """One of `MODELS` or `OURS_GRAPHED`; random weights, those of "stock" and "ours" are equal."""
    torch.manual_seed(SEED)
    if name == "torchvision":
        return _torchvision_model(setting)
    if name in ("ours", OURS_GRAPHED):
        cfg = setting.cfg.clone()
        cfg.defrost()
        retina_focal_node(cfg).CUDA_GRAPHS = name == OURS_GRAPHED
        return build_model(cfg)
    model = build_model(stock_cfg(setting.cfg))
    if isinstance(getattr(model.backbone, "bottom_up", None), TimmBackbone):
        model.backbone.bottom_up = PlainTimm(setting.cfg, model.backbone.bottom_up)
    return model


class PlainTimm(nn.Module):
    """A timm model as timm makes it, for stock: norms not folded, in the image's memory format."""

    def __init__(self, cfg: CfgNode, ours: TimmBackbone):
        import timm
        from timm.layers import freeze_batch_norm_2d

        super().__init__()
        node = retina_focal_node(cfg).TIMM
        body = timm.create_model(node.NAME, features_only=True, feature_cls="getter")
        self.body = freeze_batch_norm_2d(body) if node.NORM == "FrozenBN" else body
        self.body.load_state_dict(ours.body.state_dict())
        self.body.to(cfg.MODEL.DEVICE)
        trained = {name for name, p in ours.body.named_parameters() if p.requires_grad}
        for name, parameter in self.body.named_parameters():
            parameter.requires_grad = name in trained
        strides = self.body.feature_info.reduction()
        self._outputs = {f: strides.index(s) for f, s in PYRAMID_INPUTS.items()}

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        features = self.body(images)
        return {name: features[index] for name, index in self._outputs.items()}


def stock_cfg(cfg: CfgNode) -> CfgNode:
    """The config with detectron2's parts in place of ours, as far as detectron2 has them."""
    cfg = cfg.clone()
    cfg.defrost()
    node = retina_focal_node(cfg)
    cfg.MODEL.META_ARCHITECTURE = "RetinaNet"
    is_resnet = cfg.MODEL.BACKBONE.NAME == "build_retina_focal_resnet_fpn_backbone"
    if is_resnet and node.TOP_BLOCK_IN_FEATURE == "res5":
        cfg.MODEL.BACKBONE.NAME = "build_retinanet_resnet_fpn_backbone"
    if cfg.MODEL.ANCHOR_GENERATOR.NAME in OCTAVE_ANCHORS:
        cfg.MODEL.ANCHOR_GENERATOR.NAME = "DefaultAnchorGenerator"
        sizes, count = node.ANCHORS.BASE_SIZES, node.ANCHORS.SCALES_PER_OCTAVE
        cfg.MODEL.ANCHOR_GENERATOR.SIZES = octave_sizes(sizes, count, len(sizes))
    return cfg


def torchvision_has(cfg: CfgNode) -> bool:
    """Whether torchvision can build this network: a plain ResNet, pyramid and head as published."""
    return (
        "resnet_fpn" in cfg.MODEL.BACKBONE.NAME
        and cfg.MODEL.RESNETS.NORM in ("FrozenBN", "BN")
        and cfg.MODEL.RESNETS.NUM_GROUPS == 1
        and cfg.MODEL.FPN.OUT_CHANNELS == 256
        and cfg.MODEL.RETINANET.NUM_CONVS == 4
        and not cfg.MODEL.RETINANET.NORM
    )


def _torchvision_model(setting: Setting) -> nn.Module:
    model = setting.cfg.MODEL
    backbone = resnet_fpn_backbone(
        backbone_name=f"resnet{model.RESNETS.DEPTH}",
        weights=None,
        norm_layer=FrozenBatchNorm2d if model.RESNETS.NORM == "FrozenBN" else nn.BatchNorm2d,
        trainable_layers=5 - model.BACKBONE.FREEZE_AT,
        returned_layers=[2, 3, 4],
        extra_blocks=LastLevelP6P7(8 * model.RESNETS.RES2_OUT_CHANNELS, 256),
    )
    return TorchvisionRetinaNet(
        backbone,
        setting.classes,
        # Its transform scales the sides to these: an image of this size stays as it is.
        min_size=min(setting.image_size),
        max_size=max(setting.image_size),
        score_thresh=model.RETINANET.SCORE_THRESH_TEST,
        nms_thresh=model.RETINANET.NMS_THRESH_TEST,
        topk_candidates=model.RETINANET.TOPK_CANDIDATES_TEST,
        detections_per_img=setting.cfg.TEST.DETECTIONS_PER_IMAGE,
    ).to(setting.device)


@torch.no_grad()
def calibrate(model: nn.Module) -> nn.Module:
    """Give each norm the statistics of noise, as pretrained weights have those of images.

    Without them, activations of a random network grow from block to block, and a model whose
    scores should start at 0.01 has high ones.
    """

    def take_statistics(norm: nn.Module, inputs: tuple[Tensor]) -> None:
        norm.running_mean.copy_(inputs[0].mean((0, 2, 3)))
        norm.running_var.copy_(inputs[0].var((0, 2, 3), correction=0))

    norms = [m for m in model.modules() if getattr(m, "running_var", None) is not None]
    hooks = [norm.register_forward_pre_hook(take_statistics) for norm in norms]
    image = torch.rand(3, 256, 256, device=next(model.parameters()).device)
    model.eval()
    if isinstance(model, TorchvisionRetinaNet):
        model.backbone(model.transform.normalize(image)[None])
    else:
        model.backbone(model.preprocess_image([{"image": 255 * image}]).tensor)
    for hook in hooks:
        hook.remove()
    return model
