"""Anchors as other projects place them, for weights that were trained on those.

In detectron2's order all the same: size by size, and the ratios of each.
"""

import math
from collections.abc import Sequence

import torch
from detectron2.modeling.anchor_generator import ANCHOR_GENERATOR_REGISTRY, BufferList
from detectron2.structures import Boxes
from torch import Tensor

from retina_focal.anchors import OctaveAnchorGenerator


@ANCHOR_GENERATOR_REGISTRY.register()
class TorchvisionAnchorGenerator(OctaveAnchorGenerator):
    """torchvision's: sizes cut to whole pixels, corners rounded to them, a grid that fills the
    padded image.

    From cell to cell it goes the padded length divided by the number of cells, without the rest:
    of an image of 800 x 1216 px, P7 has 7 x 10 cells, and steps of 114 and 121 px instead of 128.
    """

    def generate_cell_anchors(
        self, sizes: Sequence[float], aspect_ratios: Sequence[float]
    ) -> Tensor:
        """(A, 4) XYXY around (0, 0)."""
        lengths = torch.tensor([float(int(size)) for size in sizes])[:, None]
        # In torchvision's order of operations: what is rounded then often ends in a half.
        height_ratios = torch.tensor(aspect_ratios, dtype=torch.float32).sqrt()
        width, height = (1 / height_ratios) * lengths, height_ratios * lengths
        return (torch.stack([-width, -height, width, height], 2).flatten(0, 1) / 2).round()

    def forward(self, features: list[Tensor]) -> list[Boxes]:
        """See `OctaveAnchorGenerator.forward`; the first level's stride must divide the image."""
        if torch.jit.is_tracing() or torch.compiler.is_compiling():
            sizes = [feature.shape[-2:] for feature in features]
            levels = map(self._level, sizes, self.steps(sizes), self.cell_anchors.buffers())
            return [Boxes(anchors) for anchors in levels]
        return super().forward(features)

    def steps(self, sizes: list[tuple[int, int]]) -> list[tuple[int, int]]:
        height, width = (length * self.strides[0] for length in sizes[0])
        return [(height // rows, width // columns) for rows, columns in sizes]


@ANCHOR_GENERATOR_REGISTRY.register()
class DetectronAnchorGenerator(OctaveAnchorGenerator):
    """Detectron's: all sizes of a ratio are multiples of one box, of whole pixels and about as
    large as a cell. Its anchors stand in the middle of the cells: ``ANCHOR_GENERATOR.OFFSET 0.5``.
    """

    def _calculate_anchors(
        self, sizes: Sequence[Sequence[float]], aspect_ratios: Sequence[Sequence[float]]
    ) -> BufferList:
        levels = zip(self.strides, sizes, aspect_ratios, strict=True)
        return BufferList([_multiples(*level) for level in levels])


def _multiples(stride: int, sizes: Sequence[float], aspect_ratios: Sequence[float]) -> Tensor:
    """(A, 4) XYXY around (0, 0)."""
    anchors = []
    for size in sizes:
        for ratio in aspect_ratios:
            width = round(math.sqrt(stride**2 / ratio))  # a half to the even number
            x, y = (length * size / stride / 2 for length in (width, round(width * ratio)))
            anchors.append([-x, -y, x, y])
    return torch.tensor(anchors)
