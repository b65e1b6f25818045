"""Backbones with pyramid levels P3 to P7 (Sec. 4, "Feature Pyramid Network Backbone").

No P2; P6 is a 3x3 stride-2 convolution on C5 or P5, P7 a ReLU and the same on P6. Besides the
ResNet pyramid there are the same pyramid on any timm model, and both without a pyramid.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from detectron2.config import CfgNode
from detectron2.layers import Conv2d, ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, FPN, Backbone, build_resnet_backbone
from detectron2.modeling.backbone.fpn import LastLevelP6P7
from fvcore.nn import weight_init
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from retina_focal.config import check_choice, retina_focal_node
from retina_focal.consistency import MAX_BYTES
from retina_focal.errors import UserError
from retina_focal.folding_timm import fold_timm_norms, is_depthwise

TOP_BLOCK_IN_FEATURES = ("res5", "p5")
TIMM_NORMS = ("FrozenBN", "BN", "SyncBN")
# Name and stride of the bottom-up features that P3, P4 and P5 are built on.
PYRAMID_INPUTS = {"res3": 8, "res4": 16, "res5": 32}


@BACKBONE_REGISTRY.register()
def build_retina_focal_resnet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """ResNet or ResNeXt (``MODEL.RESNETS``) with an FPN (``MODEL.FPN``), outputs p3 to p7."""
    return _pyramid(cfg, build_resnet_backbone(cfg, input_shape))


@BACKBONE_REGISTRY.register()
def build_retina_focal_timm_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """The timm model ``RETINA_FOCAL.TIMM.NAME`` with an FPN (``MODEL.FPN``), outputs p3 to p7.

    Its weights come through ``MODEL.WEIGHTS`` only; ``MODEL.BACKBONE.FREEZE_AT`` n freezes all that
    leads to the feature of stride 2^n.
    """
    return _pyramid(cfg, _build_timm_backbone(cfg, input_shape))


@BACKBONE_REGISTRY.register()
def build_retina_focal_resnet_single_backbone(
    cfg: CfgNode, input_shape: ShapeSpec
) -> "SingleLevelBackbone":
    """ResNet without a pyramid: res5, a 1x1 convolution to ``FPN.OUT_CHANNELS``, output p5."""
    bottom_up = build_resnet_backbone(cfg, input_shape)
    _check_features(bottom_up, ["res5"], "MODEL.RESNETS.OUT_FEATURES [res5]")
    return SingleLevelBackbone(bottom_up, cfg.MODEL.FPN.OUT_CHANNELS)


@BACKBONE_REGISTRY.register()
def build_retina_focal_timm_single_backbone(
    cfg: CfgNode, input_shape: ShapeSpec
) -> "SingleLevelBackbone":
    """The same without a pyramid on the timm model ``RETINA_FOCAL.TIMM.NAME``."""
    return SingleLevelBackbone(_build_timm_backbone(cfg, input_shape), cfg.MODEL.FPN.OUT_CHANNELS)


class SingleLevelBackbone(Backbone):
    """One feature map, "p5" of stride 32: what the paper's pyramid is compared with."""

    def __init__(self, bottom_up: Backbone, out_channels: int):
        super().__init__()
        self.bottom_up = bottom_up
        self.lateral5 = Conv2d(bottom_up.output_shape()["res5"].channels, out_channels, 1)
        weight_init.c2_xavier_fill(self.lateral5)
        self._out_features = ["p5"]
        self._out_feature_strides = {"p5": PYRAMID_INPUTS["res5"]}
        self._out_feature_channels = {"p5": out_channels}

    @property
    def size_divisibility(self) -> int:
        return self._out_feature_strides["p5"]

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """(N, C, H, W) images to {"p5": (N, out_channels, H / 32, W / 32)}."""
        return {"p5": self.lateral5(self.bottom_up(images)["res5"])}


class ImageByImage(nn.Sequential):
    """A stage without gradients, on a CPU run one image after another.

    Its inner maps are the largest of the network. A batch of them fits neither the cache nor what
    the C library keeps of freed memory, and the system's fresh pages cost more than the arithmetic.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, C', H', W'), the same as at once where no norm sees the batch."""
        in_graph = torch.jit.is_tracing() or torch.compiler.is_compiling()
        if x.device.type != "cpu" or in_graph:
            return super().forward(x)
        return torch.cat([super(ImageByImage, self).forward(image) for image in x.split(1)])


class LastLevelP6P7WithoutReLU(LastLevelP6P7):
    """P7 as a convolution on P6 itself, as in mmdetection."""

    def forward(self, x: Tensor) -> list[Tensor]:
        """(N, C, H, W) to P6 and P7, of half and a quarter of the size."""
        p6 = self.p6(x)
        return [p6, self.p7(p6)]


class TimmBackbone(Backbone):
    """A timm model as bottom-up network: its features of stride 8, 16, 32 as res3, res4, res5.

    Parameters keep timm's names, so that a timm state dict loads through detectron2's
    ``MODEL.WEIGHTS file.pth?matching_heuristics=True``.
    """

    def __init__(self, name: str, norm: str = "FrozenBN", freeze_at: int = 0, in_channels: int = 3):
        """
        Args:
            name: of the model in timm; built without weights.
            norm: one of `TIMM_NORMS`.
            freeze_at: freeze all that leads to the feature of stride 2^freeze_at; 0: nothing.
            in_channels: of the image.
        Raises:
            UserError: timm is not installed, an unknown name or norm, or no feature of stride 8,
                16 or 32.
        """
        super().__init__()
        check_choice("MODEL.RETINA_FOCAL.TIMM.NORM", norm, TIMM_NORMS)
        self.body = _create_timm_model(name, in_channels)
        info = self.body.feature_info
        strides = info.reduction()
        missing = [stride for stride in PYRAMID_INPUTS.values() if stride not in strides]
        if missing:
            raise UserError(
                f"timm's {name} has features of stride {strides}, none of stride {missing}; P3, P4 "
                f"and P5 need strides {list(PYRAMID_INPUTS.values())}: choose a convolutional model"
            )
        self._outputs = {f: strides.index(stride) for f, stride in PYRAMID_INPUTS.items()}
        self._out_features = list(PYRAMID_INPUTS)
        self._out_feature_strides = dict(PYRAMID_INPUTS)
        self._out_feature_channels = {f: info.channels()[i] for f, i in self._outputs.items()}
        convolutions = [m for m in self.body.modules() if isinstance(m, nn.Conv2d)]
        self._has_depthwise = any(map(is_depthwise, convolutions))
        self._freeze(info.module_name(), strides, freeze_at)
        self._set_norm(norm)

    @property
    def size_divisibility(self) -> int:
        return PYRAMID_INPUTS["res5"]

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """(N, C, H, W) images to {"res3": (N, C3, H / 8, W / 8), "res4": ..., "res5": ...}."""
        if torch.compiler.is_compiling():
            # A graph for any size can't ask how its images lie in memory.
            features = self.body(images)
            return {name: features[index] for name, index in self._outputs.items()}
        channels_last = images.is_contiguous(memory_format=torch.channels_last)
        outside = torch.channels_last if channels_last else torch.contiguous_format
        # Depthwise convolutions train twice as fast in it on a CPU; the pyramid's dense ones don't.
        on_cpu = self._has_depthwise and images.device.type == "cpu"
        features = self.body(images.to(memory_format=torch.channels_last if on_cpu else outside))
        return {
            name: features[index].to(memory_format=outside) for name, index in self._outputs.items()
        }

    def _freeze(self, modules: list[str], strides: list[int], freeze_at: int) -> None:
        """No gradients for all that is registered up to the last feature of stride 2^freeze_at."""
        frozen = [m for m, stride in zip(modules, strides, strict=True) if stride <= 2**freeze_at]
        if freeze_at == 0 or not frozen:
            return
        # Modules, not parameters: the last may be an activation, which has none.
        names, layers = zip(*self.body.model.named_modules(), strict=True)
        inside = [i for i, name in enumerate(names) if f"{name}.".startswith(f"{frozen[-1]}.")]
        for layer in layers[: inside[-1] + 1]:
            for parameter in layer.parameters(recurse=False):
                parameter.requires_grad = False

    def _set_norm(self, norm: str) -> None:
        if norm == "FrozenBN":
            # timm's, not detectron2's: timm's layers hold norm and activation in one module.
            from timm.layers import freeze_batch_norm_2d

            self.body = freeze_batch_norm_2d(self.body)
            fold_timm_norms(self.body.model)
            _run_frozen_stages_image_by_image(self.body.model)
        elif norm == "SyncBN":
            from timm.layers import convert_sync_batchnorm

            self.body = convert_sync_batchnorm(self.body)


def _build_timm_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> TimmBackbone:
    node = retina_focal_node(cfg).TIMM
    return TimmBackbone(node.NAME, node.NORM, cfg.MODEL.BACKBONE.FREEZE_AT, input_shape.channels)


def _create_timm_model(name: str, in_channels: int) -> nn.Module:
    try:
        import timm
    except ImportError as error:
        raise UserError(
            "the timm backbone needs timm, which is not installed; type: pip install timm"
        ) from error
    if not timm.is_model(name):
        near = ", ".join(timm.list_models(f"*{name}*")[:5]) if name else ""
        raise UserError(
            f"MODEL.RETINA_FOCAL.TIMM.NAME is '{name}', which timm {timm.__version__} doesn't have"
            + (f"; it has {near}" if near else "; for example: tf_efficientnet_lite0")
        )
    with _capped(name):
        # "getter" keeps the model's own names; timm's default renames "stages.0" to "stages_0".
        return timm.create_model(
            name, pretrained=False, features_only=True, feature_cls="getter", in_chans=in_channels
        )


@contextmanager
def _capped(name: str) -> Iterator[None]:
    """Refuse (UserError) to build what has more parameters than any detector, while it is built.

    How many a timm model has, it tells only when it is there.
    """
    num_bytes = 0

    def count(module: nn.Module, key: str, parameter: nn.Parameter | None) -> None:
        nonlocal num_bytes
        num_bytes += 0 if parameter is None else parameter.numel() * parameter.element_size()
        if num_bytes > MAX_BYTES:
            raise UserError(
                f"timm's {name} has more than {MAX_BYTES / 1e9:.1f} GB of parameters, which no "
                "detector needs; choose a smaller one: MODEL.RETINA_FOCAL.TIMM.NAME"
            )

    handle = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        handle.remove()


def _run_frozen_stages_image_by_image(module: nn.Module) -> None:
    """Replace, in place, the outermost stages that have parameters but none to train."""
    for name, child in module.named_children():
        parameters = list(child.parameters())
        frozen = parameters and not any(parameter.requires_grad for parameter in parameters)
        if type(child) is nn.Sequential and frozen:
            setattr(module, name, ImageByImage(*child))
        else:
            _run_frozen_stages_image_by_image(child)


def _pyramid(cfg: CfgNode, bottom_up: Backbone) -> FPN:
    """P3 to P7 on the features res3, res4, res5 of `bottom_up`."""
    node = retina_focal_node(cfg)
    in_feature = node.TOP_BLOCK_IN_FEATURE
    check_choice("MODEL.RETINA_FOCAL.TOP_BLOCK_IN_FEATURE", in_feature, TOP_BLOCK_IN_FEATURES)
    _check_features(bottom_up, cfg.MODEL.FPN.IN_FEATURES, "MODEL.FPN.IN_FEATURES")
    if list(cfg.MODEL.FPN.IN_FEATURES) != list(PYRAMID_INPUTS):
        raise UserError(
            f"MODEL.FPN.IN_FEATURES is {cfg.MODEL.FPN.IN_FEATURES}; P3 to P7 without P2 need "
            f"{list(PYRAMID_INPUTS)}"
        )
    out_channels = cfg.MODEL.FPN.OUT_CHANNELS
    top_block = LastLevelP6P7 if node.TOP_BLOCK_RELU else LastLevelP6P7WithoutReLU
    p6_channels = out_channels if in_feature == "p5" else bottom_up.output_shape()["res5"].channels
    return FPN(
        bottom_up=bottom_up,
        in_features=cfg.MODEL.FPN.IN_FEATURES,
        out_channels=out_channels,
        norm=cfg.MODEL.FPN.NORM,
        top_block=top_block(p6_channels, out_channels, in_feature),
        fuse_type=cfg.MODEL.FPN.FUSE_TYPE,
    )


def _check_features(bottom_up: Backbone, features: list[str], key: str) -> None:
    """Refuse features that the bottom-up network doesn't have, or has at another stride."""
    shapes = bottom_up.output_shape()
    absent = [feature for feature in features if feature not in shapes]
    if absent:
        raise UserError(
            f"{key} needs {absent}, but the backbone outputs {sorted(shapes)}; "
            f"set MODEL.RESNETS.OUT_FEATURES {list(PYRAMID_INPUTS)}"
        )
    for feature in set(features) & set(PYRAMID_INPUTS):
        if shapes[feature].stride != PYRAMID_INPUTS[feature]:
            raise UserError(
                f"the backbone's {feature} has stride {shapes[feature].stride}; "
                f"expected {PYRAMID_INPUTS[feature]} (MODEL.RESNETS.RES5_DILATION must be 1)"
            )
