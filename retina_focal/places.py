"""Where some anchors stand: one coordinate for head, losses, criterion and postprocessing."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
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


def places_where(masks: Sequence[Tensor]) -> list[Places]:
    """The anchors at which masks (N, Hi, Wi, A) are True, in the order of the masks.

    The host of a GPU waits for every number that decides a size: here once for all masks.
    """
    counts = torch.stack([mask.sum() for mask in masks]).tolist()
    found = []
    for mask, count in zip(masks, counts, strict=True):
        # As nonzero, which would wait: the n-th True writes its index to the n-th element of the
        # result, each False to one element more, which is cut off.
        is_true = mask.flatten()
        rank = (is_true.cumsum(0) - 1).where(is_true, count)
        index = torch.arange(len(rank), device=rank.device)
        index = rank.new_empty(count + 1).scatter_(0, rank, index)[:count]
        image, row, column, anchor = torch.unravel_index(index, mask.shape)
        found.append(Places(image, anchor, row, column))
    return found


def places_of_elements(
    index: Tensor, num_channels: int, size: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Anchor, channel, row and column of elements of one image's flattened map.

    Args:
        index: into the (A x num_channels x Hi x Wi) elements.
        num_channels: of an anchor.
        size: (Hi, Wi).
    """
    index, cell = _divmod(index, size[0] * size[1])
    anchor, channel = _divmod(index, num_channels)
    row, column = _divmod(cell, size[1])
    return anchor, channel, row, column


def _divmod(dividend: Tensor, divisor: int) -> tuple[Tensor, Tensor]:
    quotient = dividend.div(divisor, rounding_mode="floor")
    return quotient, dividend - quotient * divisor
