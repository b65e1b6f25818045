"""Octave anchors from plain numbers (Sec. 4, "Anchors")."""

from collections.abc import Sequence

import torch
from detectron2.config import CfgNode, configurable
from detectron2.config import get_cfg as detectron2_get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling.anchor_generator import ANCHOR_GENERATOR_REGISTRY, DefaultAnchorGenerator
from detectron2.structures import Boxes
from torch import Tensor

from retina_focal.config import retina_focal_node
from retina_focal.errors import UserError


@ANCHOR_GENERATOR_REGISTRY.register()
class OctaveAnchorGenerator(DefaultAnchorGenerator):
    """A anchors per cell: each aspect ratio at base * 2^(i / S), i < S, with one base per level.

    The grid and the arithmetic are detectron2's, so that its checkpoints and its code that looks
    for a `DefaultAnchorGenerator` go on working; only the sizes are computed here. With one
    feature map, all base sizes stand on it.
    """

    @configurable
    def __init__(
        self,
        *,
        base_sizes: Sequence[float],
        scales_per_octave: int,
        aspect_ratios: Sequence[Sequence[float]] | Sequence[float],
        strides: Sequence[int],
        offset: float = 0.0,
    ):
        """
        Args:
            base_sizes: sqrt of the anchor area at scale 0, in pixels, P3 first.
            scales_per_octave: S >= 1, sizes between one base size and its double.
            aspect_ratios: height / width, per level or for all levels.
            strides: pixels between neighbouring cells, per level.
            offset: of the first anchor's centre from the image corner, in strides, [0, 1).
        Raises:
            UserError: the number of base sizes fits neither the levels nor a single level.
        """
        super().__init__(
            sizes=octave_sizes(base_sizes, scales_per_octave, num_levels=len(strides)),
            aspect_ratios=aspect_ratios,
            strides=strides,
            offset=offset,
        )
        # Of the last feature sizes. No buffer: DDP would send it to all processes at every step.
        self._last: tuple[tuple, list[Tensor]] | None = None

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: list[ShapeSpec]) -> dict:
        node = retina_focal_node(cfg).ANCHORS
        sizes = octave_sizes(node.BASE_SIZES, node.SCALES_PER_OCTAVE, num_levels=len(input_shape))
        _check_sizes_key(cfg.MODEL.ANCHOR_GENERATOR.SIZES, sizes)
        return {
            "base_sizes": node.BASE_SIZES,
            "scales_per_octave": node.SCALES_PER_OCTAVE,
            "aspect_ratios": cfg.MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS,
            "strides": [shape.stride for shape in input_shape],
            "offset": cfg.MODEL.ANCHOR_GENERATOR.OFFSET,
        }

    def forward(self, features: list[Tensor]) -> list[Boxes]:
        """
        Args:
            features: (..., Hi, Wi) per level, for their sizes.
        Returns:
            (Hi x Wi x A) boxes per level, XYXY in pixels; the same tensors as long as the sizes
            are, not to be changed in place.
        """
        if torch.jit.is_tracing() or torch.compiler.is_compiling():
            return super().forward(features)  # these sizes can differ in the graph's next call
        sizes = [tuple(feature.shape[-2:]) for feature in features]
        cells = list(self.cell_anchors.buffers())
        key = (cells[0].device, *sizes)
        if self._last is None or self._last[0] != key:
            with torch.inference_mode(False):  # training may come after inference
                self._last = key, list(map(self._level, sizes, self.steps(sizes), cells))
        return [Boxes(anchors) for anchors in self._last[1]]

    def steps(self, sizes: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """Pixels from row to row and from column to column, per level of these feature sizes."""
        return [(stride, stride) for stride in self.strides]

    def _level(self, size: tuple[int, int], steps: tuple[int, int], cell: Tensor) -> Tensor:
        """(Hi x Wi x A, 4): detectron2's numbers, but made on the device."""
        y, x = (
            torch.arange(
                self.offset * stride,
                length * stride,
                step=stride,
                dtype=torch.float32,
                device=cell.device,
            )
            for length, stride in zip(size, steps, strict=True)
        )
        y, x = torch.meshgrid(y, x, indexing="ij")
        shifts = torch.stack((x, y, x, y), 2)
        return (shifts[:, :, None] + cell).flatten(0, 2)


def octave_sizes(
    base_sizes: Sequence[float], scales_per_octave: int, num_levels: int
) -> list[list[float]]:
    """Anchor sizes in pixels, a list per level; where there is one level, it has them all."""
    if scales_per_octave < 1:
        raise UserError(
            f"MODEL.RETINA_FOCAL.ANCHORS.SCALES_PER_OCTAVE is {scales_per_octave}; "
            "expected at least 1 (the paper's value is 3)"
        )
    octaves = [
        [base * 2 ** (i / scales_per_octave) for i in range(scales_per_octave)]
        for base in base_sizes
    ]
    if num_levels == 1:
        return [[size for octave in octaves for size in octave]]
    if len(octaves) != num_levels:
        raise UserError(
            f"MODEL.RETINA_FOCAL.ANCHORS.BASE_SIZES has {len(octaves)} sizes {list(base_sizes)} "
            f"for {num_levels} feature levels; give one size per level, highest resolution first"
        )
    return octaves


def _check_sizes_key(sizes_key: Sequence, sizes: list[list[float]]) -> None:
    """Refuse a config whose ANCHOR_GENERATOR.SIZES asks for anchors that would not be made."""
    default = detectron2_get_cfg().MODEL.ANCHOR_GENERATOR.SIZES
    key = [list(level) if isinstance(level, Sequence) else level for level in sizes_key]
    if key not in (default, sizes):
        raise UserError(
            f"MODEL.ANCHOR_GENERATOR.SIZES is {key}, but OctaveAnchorGenerator makes {sizes} from "
            "MODEL.RETINA_FOCAL.ANCHORS; set ANCHORS.BASE_SIZES and ANCHORS.SCALES_PER_OCTAVE and "
            "leave SIZES out, or use MODEL.ANCHOR_GENERATOR.NAME DefaultAnchorGenerator"
        )
