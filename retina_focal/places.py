"""Where some anchors stand: one coordinate for head, losses, criterion and postprocessing."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor


class Places(NamedTuple):
    """P anchors of one pyramid level, as equally long index vectors."""

    image: Tensor
    anchor: Tensor  # of the cell, 0 to A - 1
    row: Tensor
    column: Tensor

    def of_map(self, level: Tensor, num_channels: int) -> Tensor:
        """(P, num_channels): what a map (N, A x num_channels, Hi, Wi) holds for these anchors."""
        level = level.unflatten(1, (-1, num_channels))
        return level[self.image, self.anchor, :, self.row, self.column]

    def numbers(self, num_anchors: int, size: Sequence[int]) -> Tensor:
        """(P,): which of the level's Hi x Wi x A anchors they are.

        Args:
            num_anchors: A.
            size: (Hi, Wi).
        """
        return (self.row * size[1] + self.column) * num_anchors + self.anchor


def places_of_elements(
    index: Tensor, num_channels: int, num_cells: int | Tensor, width: int | Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Anchor, channel, row and column of elements of one image's flattened map.

    Args:
        index: into the (A x num_channels x Hi x Wi) elements.
        num_channels: of an anchor.
        num_cells: Hi x Wi of the map; a tensor where the elements come from several maps.
        width: Wi of the map, likewise.
    """
    index, cell = _divmod(index, num_cells)
    anchor, channel = _divmod(index, num_channels)
    row, column = _divmod(cell, width)
    return anchor, channel, row, column


def _divmod(dividend: Tensor, divisor: int | Tensor) -> tuple[Tensor, Tensor]:
    quotient = dividend.div(divisor, rounding_mode="floor")
    return quotient, dividend - quotient * divisor
