"""The two towers of RetinaNet (Sec. 4, "Classification Subnet" and "Box Regression Subnet")."""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.layers import CycleBatchNormList, ShapeSpec, get_norm
from detectron2.modeling.anchor_generator import build_anchor_generator
from fvcore.common.registry import Registry
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from retina_focal.config import retina_focal_node
from retina_focal.errors import UserError

DENSE_HEAD_REGISTRY = Registry("DENSE_HEAD")
DENSE_HEAD_REGISTRY.__doc__ = """
Heads that turn pyramid features into dense predictions, by ``MODEL.RETINA_FOCAL.HEAD``.
Called with `(cfg, input_shape: list[ShapeSpec])`; see `FocalRetinaNetHead.forward` for the outputs.
"""

# Image, row, column and anchor of the cell: equally long index vectors of some anchors of a level.
Places = tuple[Tensor, Tensor, Tensor, Tensor]
# A cell on its own costs up to this many times what it costs in a map.
COST_OF_A_CELL = 1.5
# Cells whose neighbours are gathered at once: 38 MB with 256 channels in fp32.
CELLS_AT_ONCE = 4096
# What a module calls with the whole of its inputs, outputs or gradients.
HOOKS = "_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks"

logger = logging.getLogger(__name__)


def build_dense_head(cfg: CfgNode, input_shape: list[ShapeSpec]) -> nn.Module:
    """The head that ``MODEL.RETINA_FOCAL.HEAD`` names."""
    return DENSE_HEAD_REGISTRY.get(retina_focal_node(cfg).HEAD)(cfg, input_shape)


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
            input_shape: one a level, all with the same number of channels.
            num_classes: K.
            num_anchors: A, per cell, the same on all levels.
            conv_dims: channels of the tower's convolutions.
            norm: of the tower: "", "GN", or "BN" and "SyncBN" with statistics of their own a level.
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

    def forward(self, features: list[Tensor]) -> tuple[list[Tensor], Sequence[Tensor]]:
        """
        Args:
            features: (N, C, Hi, Wi) a level, P3 first.
        Returns:
            logits: (N, A x K, Hi, Wi) a level, anchor-major; the score of a class is its sigmoid.
            deltas: (N, A x 4, Hi, Wi) a level, (dx, dy, dw, dh) of each anchor; on a CPU the layers
                after the last norm, hook or foreign layer run where `deltas_at` or an index asks.
        """
        logits = [self.cls_score(self.cls_subnet(feature)) for feature in features]
        device = features[0].device.type
        # Elsewhere the host would wait for the number of cells; a graph needs sizes that are fixed.
        lazy = device == "cpu" and not (torch.jit.is_tracing() or torch.compiler.is_compiling())
        whole, at_cells = [self.bbox_subnet, self.bbox_pred], []
        while lazy and whole and not any(getattr(whole[-1], hooks) for hooks in HOOKS):
            layer = whole.pop()
            if type(layer) is nn.Sequential:
                whole.extend(layer)
            elif type(layer) in (Conv3x3, nn.ReLU):
                at_cells.insert(0, layer)
            else:
                whole.append(layer)
                break
        maps = [nn.Sequential(*whole)(feature) for feature in features]
        if not at_cells:
            return logits, maps
        enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
        return logits, LazyDeltas(at_cells, maps, torch.autocast(device, dtype, enabled))

    def _initialize(self, prior_prob: float) -> None:
        # Towers first, outputs last: detectron2's order, so that one seed gives the same weights.
        for part in (self.cls_subnet, self.bbox_subnet, self.cls_score, self.bbox_pred):
            for layer in part.modules():
                if isinstance(layer, nn.Conv2d):
                    nn.init.normal_(layer.weight, std=0.01)
                    nn.init.zeros_(layer.bias)
        nn.init.constant_(self.cls_score.bias, prior_bias(prior_prob))


class Conv3x3(nn.Conv2d):
    """A convolution whose output at a cell sees that cell and its eight neighbours."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__(in_channels, out_channels, 3, padding=1)


@dataclass(frozen=True, eq=False)
class LazyDeltas(Sequence):
    """Deltas of a level, (N, A x 4, Hi, Wi), computed when it is indexed; see `deltas_at`."""

    layers: list[nn.Module]  # `Conv3x3` and ReLU
    maps: list[Tensor]  # what the first of them sees
    autocast: torch.autocast  # as it was when the head ran

    def __len__(self) -> int:
        return len(self.maps)

    def __getitem__(self, level: int) -> Tensor:
        with self.autocast:
            return nn.Sequential(*self.layers)(self.maps[level])


def deltas_at(deltas: Sequence[Tensor], places: Sequence[Places]) -> Tensor:
    """The deltas of some anchors: all that the box loss needs of the positive, and decoding of the
    candidates. Of `LazyDeltas`, the tower runs only on the cells that these see.

    Args:
        deltas: (N, A x 4, Hi, Wi) a level.
        places: of the anchors of each level, P in all.
    Returns:
        (P, 4), level by level.
    """
    seen = None
    if isinstance(deltas, LazyDeltas):
        seen = _receptive_cells(deltas, places)
    if seen is None:
        return torch.cat(
            [
                level.unflatten(1, (-1, 4))[image, anchor, :, row, column]
                for level, (image, row, column, anchor) in zip(deltas, places, strict=True)
            ]
        )
    with deltas.autocast:
        rows = torch.cat(
            [
                level[image, :, row, column]
                for level, (image, row, column) in zip(deltas.maps, seen.inputs, strict=True)
            ]
        )
        neighbours = iter(seen.neighbours)
        for layer in deltas.layers:
            if isinstance(layer, nn.ReLU):
                rows = layer(rows)
                continue
            rows, weight = F.pad(rows, (0, 0, 0, 1)), layer.weight.permute(0, 2, 3, 1).flatten(1)
            # Nine rows a cell are gathered, and gathered again rather than kept for the gradient.
            products = [
                checkpoint(
                    lambda rows, near, weight, bias: F.linear(rows[near].flatten(1), weight, bias),
                    *(rows, near, weight, layer.bias),
                    use_reentrant=False,
                    preserve_rng_state=False,
                )
                for near in next(neighbours).split(CELLS_AT_ONCE)
            ]
            rows = torch.cat(products)
    anchor = torch.cat([anchor for *_, anchor in places])
    return rows.unflatten(1, (-1, 4))[seen.outputs, anchor]


class _ReceptiveCells(NamedTuple):
    """The cells that some outputs of a tower depend on, a convolution at a time."""

    inputs: list[tuple[Tensor, Tensor, Tensor]]  # image, row and column, of each level
    neighbours: list[Tensor]  # of each convolution, (outputs, 9) rows of its input; the last is 0
    outputs: Tensor  # (P,) rows of the last convolution's output


def _receptive_cells(deltas: LazyDeltas, places: Sequence[Places]) -> _ReceptiveCells | None:
    """None where they are so many that the whole maps cost less."""
    # The cells of all levels and images are numbered in one row, a border of one around each map.
    sizes = [(len(x), x.shape[-2] + 2, x.shape[-1] + 2) for x in deltas.maps]
    first = [0, *accumulate(n * height * width for n, height, width in sizes)]
    inside = torch.zeros(first[-1], dtype=torch.bool)
    below = torch.empty(first[-1], dtype=torch.int64)  # from a cell to the one under it
    wanted = []
    for begin, end, size, (image, row, column, _) in zip(
        first, first[1:], sizes, places, strict=False
    ):
        inside[begin:end].view(size)[:, 1:-1, 1:-1] = True
        below[begin:end] = size[2]
        wanted.append(begin + (image * size[1] + row + 1) * size[2] + column + 1)
    wanted = torch.cat(wanted)

    # From the last convolution to the first: `rank` is a cell's row among those that are needed.
    step = torch.tensor([-1, 0, 1])
    near, tables = wanted[:, None], []
    for _ in range(1 + sum(isinstance(layer, Conv3x3) for layer in deltas.layers)):
        needed = torch.zeros_like(inside)
        needed[near] = True
        cells = needed.logical_and_(inside).nonzero().squeeze(1)
        rank = torch.full_like(below, len(cells))
        rank[cells] = torch.arange(len(cells))
        tables.append(rank[near])
        near = (cells[:, None] + below[cells, None] * step)[..., None] + step
        near = near.flatten(1)
    outputs, *neighbours = tables
    num_cells = sum(len(table) for table in neighbours)
    if COST_OF_A_CELL * num_cells > len(neighbours) * int(inside.sum()):
        return None
    inputs = []
    for begin, end, (_, height, width) in zip(first, first[1:], sizes, strict=False):
        cell = cells[slice(*torch.searchsorted(cells, torch.tensor([begin, end])))] - begin
        image, cell = cell.div(height * width, rounding_mode="floor"), cell % (height * width)
        inputs.append((image, cell.div(width, rounding_mode="floor") - 1, cell % width - 1))
    return _ReceptiveCells(inputs, neighbours[::-1], outputs.squeeze(1))


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
    """Batch statistics differ between levels, so BN and SyncBN get one set a level."""
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
            f"the anchor generator makes {num_anchors} anchors a cell on the levels "
            f"{cfg.MODEL.RETINANET.IN_FEATURES}; one head serves all levels, so give every level "
            "as many sizes and aspect ratios (MODEL.ANCHOR_GENERATOR, MODEL.RETINA_FOCAL.ANCHORS)"
        )
    return num_anchors[0]
