"""The end of the box tower, run only at the cells whose boxes are read.

A training step reads the boxes of the positive anchors, inference those of the candidates. Each
depends on a few cells of the maps below: on 11 x 11 where the last five layers are 3x3
convolutions. So the tower waits until it is known which boxes are read.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from retina_focal.places import Places

# A cell on its own costs up to this many times what it costs in a map.
COST_OF_A_CELL = 1.5
# Cells whose neighbours are gathered at once: 38 MB with 256 channels in fp32.
CELLS_AT_ONCE = 4096
# What a module calls with the whole of its inputs, outputs or gradients.
HOOKS = "_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks"


class Conv3x3(nn.Conv2d):
    """A convolution whose output at a cell sees that cell and its eight neighbours."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__(in_channels, out_channels, 3, padding=1)


@dataclass(frozen=True, eq=False)
class PendingDeltas:
    """The deltas of all anchors, not computed yet: whole maps, or those of some anchors."""

    layers: Sequence[nn.Module]  # `Conv3x3` and ReLU: what is left of the tower
    inputs: Sequence[Tensor]  # (N, C, Hi, Wi) per level, which the first of them sees
    autocast: torch.autocast  # as it was when the head ran

    def maps(self) -> list[Tensor]:
        """(N, A x 4, Hi, Wi) per level."""
        with self.autocast:
            return [nn.Sequential(*self.layers)(x) for x in self.inputs]

    def at(self, places: Sequence[Places]) -> Tensor:
        """(P, 4): the deltas of some anchors, see `deltas_at`."""
        cells = _cells_needed(self.inputs, places, sum(isinstance(x, Conv3x3) for x in self.layers))
        if cells is None:
            return deltas_at(self.maps(), places)
        with self.autocast:
            rows = torch.cat(
                [
                    level[image, :, row, column]
                    for level, (image, row, column) in zip(self.inputs, cells.inputs, strict=True)
                ]
            )
            neighbours = iter(cells.neighbours)
            for layer in self.layers:
                if isinstance(layer, nn.ReLU):
                    rows = layer(rows)
                    continue
                rows = F.pad(rows, (0, 0, 0, 1))  # a row of zeros, for what is outside of the map
                weight = layer.weight.permute(0, 2, 3, 1).flatten(1)
                # Nine rows per cell are gathered, and gathered again rather than kept for the
                # gradient.
                products = [
                    checkpoint(
                        lambda rows, near, weight, bias: F.linear(
                            rows[near].flatten(1), weight, bias
                        ),
                        *(rows, near, weight, layer.bias),
                        use_reentrant=False,
                        preserve_rng_state=False,
                    )
                    for near in next(neighbours).split(CELLS_AT_ONCE)
                ]
                rows = torch.cat(products)
        anchor = torch.cat([level.anchor for level in places])
        return rows.unflatten(1, (-1, 4))[cells.outputs, anchor]


def split_tower(layers: Sequence[nn.Module]) -> tuple[list[nn.Module], list[nn.Module]]:
    """The layers that need whole maps, and those after them, which can run at single cells.

    A norm, a hook, a parametrisation or a layer that is not ours needs whole maps, and so does all
    that comes before it.
    """
    whole, at_cells = list(layers), []
    while whole and not any(getattr(whole[-1], hooks) for hooks in HOOKS):
        layer = whole.pop()
        if type(layer) is nn.Sequential:
            whole.extend(layer)
        elif type(layer) in (Conv3x3, nn.ReLU):
            at_cells.insert(0, layer)
        else:
            whole.append(layer)
            break
    return whole, at_cells


def deltas_at(deltas: Sequence[Tensor] | PendingDeltas, places: Sequence[Places]) -> Tensor:
    """The deltas of some anchors: of the positives in training, of the candidates in inference.

    Args:
        deltas: (N, A x 4, Hi, Wi) per level, or still to be computed.
        places: P anchors in all, per level.
    Returns:
        (P, 4), level by level.
    """
    if isinstance(deltas, PendingDeltas):
        return deltas.at(places)
    return torch.cat([place.of_map(x, 4) for x, place in zip(deltas, places, strict=True)])


def first_image(deltas: Sequence[Tensor] | PendingDeltas) -> Sequence[Tensor] | PendingDeltas:
    """Those of the first image alone; what is not computed yet stays so."""
    if isinstance(deltas, PendingDeltas):
        return replace(deltas, inputs=[x[:1] for x in deltas.inputs])
    return [x[:1] for x in deltas]


class _CellsNeeded(NamedTuple):
    """The cells that some outputs of a tower depend on, one convolution after the other."""

    inputs: list[tuple[Tensor, Tensor, Tensor]]  # image, row and column, per level
    neighbours: list[Tensor]  # per convolution, (outputs, 9) rows of its input; the last is zero
    outputs: Tensor  # (P,) rows of the last convolution's output


def _cells_needed(
    maps: Sequence[Tensor], places: Sequence[Places], num_convs: int
) -> _CellsNeeded | None:
    """Walk from the outputs to the inputs; None where whole maps cost less.

    The cells of all levels and images are numbered in one row, with a border of one cell around
    each map: a cell's neighbours are then at fixed distances from it.
    """
    sizes = [(len(x), x.shape[-2] + 2, x.shape[-1] + 2) for x in maps]
    first = [0, *accumulate(n * height * width for n, height, width in sizes)]
    is_inside = torch.zeros(first[-1], dtype=torch.bool)
    width_at = torch.empty(first[-1], dtype=torch.int64)  # distance to the cell below
    wanted = []
    for begin, end, size, place in zip(first, first[1:], sizes, places, strict=False):
        is_inside[begin:end].view(size)[:, 1:-1, 1:-1] = True
        width_at[begin:end] = size[2]
        wanted.append(begin + (place.image * size[1] + place.row + 1) * size[2] + place.column + 1)

    around = torch.tensor([-1, 0, 1])
    read = torch.cat(wanted)[:, None]  # cells that are read, by those that read them
    rows_read = []  # the same, as rows of the cells that are needed
    for _ in range(1 + num_convs):
        is_needed = torch.zeros_like(is_inside)
        is_needed[read] = True
        cells = is_needed.logical_and_(is_inside).nonzero().squeeze(1)
        row_of = torch.full_like(width_at, len(cells))
        row_of[cells] = torch.arange(len(cells))
        rows_read.append(row_of[read])
        read = (cells[:, None] + width_at[cells, None] * around)[..., None] + around
        read = read.flatten(1)
    outputs, *neighbours = rows_read
    num_cells = sum(map(len, neighbours))
    if COST_OF_A_CELL * num_cells > num_convs * int(is_inside.sum()):
        return None
    inputs = []
    for begin, end, (_, height, width) in zip(first, first[1:], sizes, strict=False):
        own = slice(*torch.searchsorted(cells, torch.tensor([begin, end])))
        image, cell = torch.unravel_index(cells[own] - begin, (sizes[0][0], height * width))
        row, column = torch.unravel_index(cell, (height, width))
        inputs.append((image, row - 1, column - 1))
    return _CellsNeeded(inputs, neighbours[::-1], outputs.squeeze(1))
