"""The box tower of an exported network, run only at the cells whose boxes are read.

What `box_tower` does for eager models, in operators that a graph can hold.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from retina_focal.box_tower import COST_OF_A_CELL, Conv3x3, split_tower
from retina_focal.errors import UserError
from retina_focal.export import operators
from retina_focal.head import FocalRetinaNetHead


def expect_no_norm(norm: str) -> None:
    """Refuse (UserError) a head whose convolutions have norms, before it is built.

    Args:
        norm: ``MODEL.RETINANET.NORM``.
    """
    if norm:
        raise UserError(
            f"MODEL.RETINANET.NORM is '{norm}': a norm of the head needs whole maps, so that boxes "
            "can't be computed at single cells; leave out: --sparse-boxes"
        )


class Pairs(NamedTuple):
    """k (anchor, class) pairs of one level, of N images; (N, k) each."""

    anchor: Tensor  # of the cell, 0 to A - 1
    row: Tensor
    column: Tensor
    values: Tensor  # logits
    classes: Tensor

    def deltas(self, level: Tensor) -> Tensor:
        """(N, k, 4): what (N, A x 4, Hi, Wi) deltas hold for these anchors."""
        height, width = level.shape[-2:]
        num_cells = height * width
        first = self.anchor * (4 * num_cells) + self.row * width + self.column
        elements = first[..., None] + torch.arange(4, device=level.device) * num_cells
        return level.flatten(1).gather(1, elements.flatten(1)).unflatten(1, (-1, 4))


class SparseBoxTower(nn.Module):
    """The layers of a head that make deltas, cut off it: the head gives their inputs then."""

    def __init__(self, head: nn.Module):
        """
        Args:
            head: loses its box tower.
        Raises:
            UserError: the tower can't run at single cells, or gains nothing by it.
        """
        super().__init__()
        layers, later = [], []
        if type(head) is FocalRetinaNetHead:
            layers, later = split_tower([head.bbox_subnet, head.bbox_pred])
        while later and isinstance(later[0], nn.ReLU):
            layers.append(later.pop(0))
        self.layers = nn.ModuleList(later)
        self.num_convs = sum(isinstance(x, Conv3x3) for x in later)
        if self.num_convs < 2:
            is_ours = type(head) is FocalRetinaNetHead
            cause = "has a norm or one layer" if is_ours else f"is a {type(head).__name__}"
            raise UserError(
                f"the head {cause}: boxes can't be computed at single cells; leave out: "
                "--sparse-boxes"
            )
        head.bbox_subnet, head.bbox_pred = nn.Sequential(*layers), nn.Identity()

    def forward(
        self, inputs: Sequence[Tensor], pairs: Sequence[Pairs], needed: Sequence[Tensor]
    ) -> Tensor:
        """
        Args:
            inputs: (N, C, Hi, Wi) per level, of the first of the layers.
            pairs: k per level and image, where boxes may be read.
            needed: (N, k) bool per level: where they are.
        Returns:
            (N, M, 4) deltas, level by level; any where they are not needed.
        """
        masks = [_mask(*x) for x in zip(inputs, pairs, needed, strict=True)]
        flat = []  # from the cells that are read to those that the first convolution reads
        for _ in range(self.num_convs + 1):
            flat.append(torch.cat([_bordered(x).flatten() for x in masks]) > 0)
            masks = [F.max_pool2d(x, 3, 1, 1) for x in masks]
        num_cells = sum(x.shape[0] * x.shape[-2] * x.shape[-1] for x in inputs)
        num_needed = torch.stack([x.sum() for x in flat[:-1]]).sum()
        is_sparse = COST_OF_A_CELL * num_needed <= self.num_convs * num_cells
        of_cells, of_maps = self._at_cells(inputs, pairs, flat), self._of_maps(inputs, pairs)
        return operators.either(is_sparse, of_cells, of_maps)

    def _of_maps(self, maps: Sequence[Tensor], pairs: Sequence[Pairs]) -> Tensor:
        for layer in self.layers:
            maps = [layer(x) for x in maps]
        return torch.cat([y.deltas(x) for x, y in zip(maps, pairs, strict=True)], 1)

    def _at_cells(
        self, inputs: Sequence[Tensor], pairs: Sequence[Pairs], flat: Sequence[Tensor]
    ) -> Tensor:
        """The same at the cells that are needed.

        The cells of all levels and images are numbered in one row, with a border of one cell around
        each map: a cell's neighbours are then at fixed distances from it.

        Args:
            flat: which cells are needed, after the last convolution first.
        """
        sizes = [(x.shape[0], x.shape[-2] + 2, x.shape[-1] + 2) for x in inputs]
        width_at = torch.cat(
            [flat[0].new_ones(n * height * width).long() * width for n, height, width in sizes]
        )  # distance to the cell below
        around = torch.tensor([-1, 0, 1])
        rows = torch.cat([_bordered(x).permute(0, 2, 3, 1).flatten(0, 2) for x in inputs])
        row_of = torch.arange(rows.shape[0])
        depth = self.num_convs
        for layer in self.layers:
            if isinstance(layer, nn.ReLU):
                rows = layer(rows)
                continue
            depth -= 1
            cells = flat[depth].nonzero().squeeze(1)
            near = (cells[:, None] + width_at[cells][:, None] * around)[..., None] + around
            products = layer.bias
            # One neighbour after the other: nine gathered at once would take nine times the memory.
            weights = layer.weight.permute(2, 3, 1, 0).flatten(0, 1)
            for row, weight in zip(row_of[near].flatten(1).unbind(1), weights, strict=True):
                products = torch.addmm(products, rows[row], weight)
            rows = F.pad(products, (0, 0, 1, 0))  # row 0 is zero, for what is outside of the map
            row_of = torch.where(flat[depth], flat[depth].long().cumsum(0), 0)
        found, begin = [], 0
        for (n, height, width), own in zip(sizes, pairs, strict=True):
            image = torch.arange(n)[:, None]
            cell = begin + (image * height + own.row + 1) * width + own.column + 1
            found.append(rows.unflatten(1, (-1, 4))[row_of[cell], own.anchor])
            begin = begin + n * height * width
        return torch.cat(found, 1)


def _mask(level: Tensor, pairs: Pairs, needed: Tensor) -> Tensor:
    """(N, 1, Hi, Wi): 1 at the cells of the pairs that are needed, else 0."""
    height, width = level.shape[-2:]
    num_cells = height * width
    cells = torch.where(needed, pairs.row * width + pairs.column, num_cells)
    mask = level.new_zeros(level.shape[0], num_cells + 1).scatter(1, cells, 1.0)
    return mask[:, :-1].unflatten(1, (1, height, width))


def _bordered(maps: Tensor) -> Tensor:
    """With a border of one cell of zeros."""
    return F.pad(maps, (1, 1, 1, 1))
