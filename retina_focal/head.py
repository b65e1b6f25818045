"""The two towers of RetinaNet (Sec. 4, "Classification Subnet" and "Box Regression Subnet")."""

import logging
import math
from collections.abc import Callable

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import CycleBatchNormList, ShapeSpec, get_norm
from detectron2.modeling.anchor_generator import build_anchor_generator
from fvcore.common.registry import Registry
from torch import Tensor, nn

from retina_focal.box_tower import Conv3x3, PendingDeltas, split_tower
from retina_focal.config import registered, retina_focal_node
from retina_focal.errors import UserError

DENSE_HEAD_REGISTRY = Registry("DENSE_HEAD")
DENSE_HEAD_REGISTRY.__doc__ = """
Heads that turn pyramid features into dense predictions, by ``MODEL.RETINA_FOCAL.HEAD``.
Called with `(cfg, input_shape: list[ShapeSpec])`; see `FocalRetinaNetHead.forward` for the outputs.
A head may have `num_classes`, which must then be that of the other parts, and `prior_prob` beside a
convolution `cls_score`: the first training step is then compared with its closed form.
"""

logger = logging.getLogger(__name__)


def build_dense_head(cfg: CfgNode, input_shape: list[ShapeSpec]) -> nn.Module:
    """The head that ``MODEL.RETINA_FOCAL.HEAD`` names."""
    name = retina_focal_node(cfg).HEAD
    return registered(DENSE_HEAD_REGISTRY, "MODEL.RETINA_FOCAL.HEAD", name)(cfg, input_shape)


@DENSE_HEAD_REGISTRY.register()
class FocalRetinaNetHead(nn.Module):
    """Two unshared towers of 3x3 convolutions, applied to every level with the same weights.

    Convolutions start from N(0, 0.01) and bias 0; the last classification convolution from bias
    -log((1 - pi) / pi), so that every anchor starts at a score of pi (Sec. 3.3).
    """

    @configurable
    def __init__(
        self,
        *,
        input_shape: list[ShapeSpec],
        num_classes: int,
        num_anchors: int,
        conv_dims: list[int],
        norm: str | Callable[[int], nn.Module] = "",
        prior_prob: float = 0.01,
    ):
        """
        Args:
            input_shape: one per level, all with the same number of channels.
            num_classes: K.
            num_anchors: A, per cell, the same on all levels.
            conv_dims: channels of the tower's convolutions.
            norm: of the tower: "", "GN", or "BN" and "SyncBN" with own statistics per level.
            prior_prob: pi in (0, 1).
        Raises:
            UserError: pi outside (0, 1).
        """
        super().__init__()
        if not 0 < prior_prob < 1:
            raise UserError(
                f"MODEL.RETINANET.PRIOR_PROB is {prior_prob}; expected 0 < PRIOR_PROB < 1 "
                "(the paper's value is 0.01)"
            )
        self.num_classes = num_classes
        self.num_anchors = num_anchors
        self.prior_prob = prior_prob
        in_channels = input_shape[0].channels
        norm = _norm_per_level(norm, num_levels=len(input_shape))
        self.cls_subnet = _tower(in_channels, conv_dims, norm)
        self.bbox_subnet = _tower(in_channels, conv_dims, norm)
        width = conv_dims[-1] if conv_dims else in_channels
        self.cls_score = Conv3x3(width, num_anchors * num_classes)
        self.bbox_pred = Conv3x3(width, num_anchors * 4)
        self._initialize(prior_prob)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: list[ShapeSpec]) -> dict:
        return {
            "input_shape": input_shape,
            "num_classes": cfg.MODEL.RETINANET.NUM_CLASSES,
            "num_anchors": _anchors_per_cell(cfg, input_shape),
            "conv_dims": [input_shape[0].channels] * cfg.MODEL.RETINANET.NUM_CONVS,
            "norm": cfg.MODEL.RETINANET.NORM,
            "prior_prob": cfg.MODEL.RETINANET.PRIOR_PROB,
        }

    def forward(self, features: list[Tensor]) -> tuple[list[Tensor], list[Tensor] | PendingDeltas]:
        """
        Args:
            features: (N, C, Hi, Wi) per level, P3 first.
        Returns:
            logits: (N, A x K, Hi, Wi) per level, anchor-major; the score of a class is its sigmoid.
            deltas: (N, A x 4, Hi, Wi) per level, (dx, dy, dw, dh) of each anchor; on a CPU they are
                computed where `box_tower.deltas_at` asks for them.
        """
        logits = [self.cls_score(self.cls_subnet(feature)) for feature in features]
        device = features[0].device.type
        layers, later = [self.bbox_subnet, self.bbox_pred], []
        # Elsewhere the host would wait for the number of cells; a graph needs sizes that are fixed.
        if device == "cpu" and not (torch.jit.is_tracing() or torch.compiler.is_compiling()):
            layers, later = split_tower(layers)
        maps = [nn.Sequential(*layers)(feature) for feature in features]
        if not later:
            return logits, maps
        enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
        return logits, PendingDeltas(later, maps, torch.autocast(device, dtype, enabled))

    def _initialize(self, prior_prob: float) -> None:
        # Towers first, outputs last: detectron2's order, so that one seed gives the same weights.
        for part in (self.cls_subnet, self.bbox_subnet, self.cls_score, self.bbox_pred):
            for layer in part.modules():
                if isinstance(layer, nn.Conv2d):
                    nn.init.normal_(layer.weight, std=0.01)
                    nn.init.zeros_(layer.bias)
        nn.init.constant_(self.cls_score.bias, prior_bias(prior_prob))


def prior_bias(prior_prob: float) -> float:
    """-log((1 - pi) / pi): the logit whose sigmoid is pi (Sec. 4.1, "Initialization")."""
    return -math.log((1 - prior_prob) / prior_prob)


def _tower(
    in_channels: int, conv_dims: list[int], norm: str | Callable[[int], nn.Module]
) -> nn.Sequential:
    layers: list[nn.Module] = []
    for out_channels in conv_dims:
        layers.append(Conv3x3(in_channels, out_channels))
        if norm:
            layers.append(get_norm(norm, out_channels))
        layers.append(nn.ReLU())
        in_channels = out_channels
    return nn.Sequential(*layers)


def _norm_per_level(
    norm: str | Callable[[int], nn.Module], num_levels: int
) -> str | Callable[[int], nn.Module]:
    """Batch statistics differ between levels, so BN and SyncBN get one set per level."""
    if norm in ("BN", "SyncBN"):
        bn_class = nn.BatchNorm2d if norm == "BN" else nn.SyncBatchNorm
        return lambda channels: CycleBatchNormList(
            length=num_levels, bn_class=bn_class, num_features=channels
        )
    if isinstance(norm, str) and "BN" in norm:
        logger.warning(
            f"MODEL.RETINANET.NORM {norm} shares its statistics between pyramid levels, which "
            "differ; use GN, BN or SyncBN"
        )
    return norm


def _anchors_per_cell(cfg: CfgNode, input_shape: list[ShapeSpec]) -> int:
    num_anchors = build_anchor_generator(cfg, input_shape).num_anchors
    if len(set(num_anchors)) != 1:
        raise UserError(
            f"the anchor generator makes {num_anchors} anchors per cell on the levels "
            f"{cfg.MODEL.RETINANET.IN_FEATURES}; one head serves all levels, so give every level "
            "as many sizes and aspect ratios (MODEL.ANCHOR_GENERATOR, MODEL.RETINA_FOCAL.ANCHORS)"
        )
    return num_anchors[0]
