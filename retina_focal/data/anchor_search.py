"""Anchors that reach more boxes: a small search over base sizes, scales and ratios."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from retina_focal.anchors import OctaveAnchorGenerator
from retina_focal.data.coverage import AnchorLayout, BoxTable, best_ious, resize

# Base size over stride: the paper's is 4. Half of it and its double keep an object on a level
# whose cells are neither much smaller nor much larger than the object.
BASE_OVER_STRIDE = [2 ** (i / 4) for i in range(4, 13)]
SCALES_PER_OCTAVE = (1, 2, 3, 4)
RATIOS = ((1.0,), (0.67, 1.0, 1.5), (0.5, 1.0, 2.0), (0.33, 1.0, 3.0), (0.33, 0.5, 1.0, 2.0, 3.0))
QUANTILES = ((0.5,), (0.25, 0.75), (0.1, 0.5, 0.9), (0.05, 0.25, 0.5, 0.75, 0.95))
MAX_BOXES = 5_000  # that the search looks at, evenly spread; the gain is computed on all
ROUNDS = 2


@dataclass(frozen=True)
class Octaves:
    """What `OctaveAnchorGenerator` is made from."""

    base_sizes: tuple[float, ...]  # px per level
    scales_per_octave: int
    ratios: tuple[float, ...]  # height / width

    def layout(self, like: AnchorLayout) -> AnchorLayout:
        """These anchors on the grid of another layout."""
        generator = OctaveAnchorGenerator(
            base_sizes=self.base_sizes,
            scales_per_octave=self.scales_per_octave,
            aspect_ratios=[list(self.ratios)],
            strides=like.strides,
            offset=like.offset,
        )
        cells = tuple(x.double().numpy() for x in generator.cell_anchors)
        return replace(like, cells=cells)

    @property
    def num_per_cell(self) -> int:
        return self.scales_per_octave * len(self.ratios)

    def settings(self) -> dict[str, object]:
        """The keys of a config that ask for them."""
        return {
            "MODEL.ANCHOR_GENERATOR.NAME": "OctaveAnchorGenerator",
            "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS": [list(self.ratios)],
            "MODEL.RETINA_FOCAL.ANCHORS.BASE_SIZES": list(self.base_sizes),
            "MODEL.RETINA_FOCAL.ANCHORS.SCALES_PER_OCTAVE": self.scales_per_octave,
        }


def search(
    table: BoxTable,
    layout: AnchorLayout,
    shorter: Sequence[int],
    longer: int,
    upper: float,
    max_per_cell: int,
) -> Octaves:
    """The anchors among a few hundred that reach most boxes; of equals those closest to the boxes.

    One setting is varied at a time, all of them twice. Nothing is random: the same boxes give the
    same anchors.

    Args:
        layout: its grid is kept, one base size per level.
        shorter, longer: see `resize`.
        upper: IoU from which a box counts as reached.
        max_per_cell: anchors per cell, at least 1.
    """
    step = -(-len(table) * len(shorter) // MAX_BOXES) or 1
    sample = [
        (boxes[::step], sizes[table.pictures[kept[::step]]])
        for boxes, kept, sizes in (resize(table, side, longer) for side in shorter)
    ]
    boxes, sizes = (np.concatenate(x) for x in zip(*sample, strict=True))

    def quality(octaves: Octaves) -> tuple[float, float, int]:
        ious = best_ious(octaves.layout(layout), boxes, sizes)
        # A tenth of a percent more boxes is not worth a looser fit of all.
        return round(float((ious >= upper).mean()), 3), float(ious.mean()), -octaves.num_per_cell

    best = Octaves(_bases(layout, 4.0), 3 if max_per_cell >= 3 else 1, (1.0,))
    for _ in range(ROUNDS if len(boxes) else 0):
        for variants in (
            (replace(best, base_sizes=_bases(layout, x)) for x in BASE_OVER_STRIDE),
            _shapes(best, boxes, max_per_cell),
        ):
            best = max((best, *variants), key=quality)
    return best


def _bases(layout: AnchorLayout, over_stride: float) -> tuple[float, ...]:
    return tuple(float(f"{stride * over_stride:.3g}") for stride in layout.strides)


def _shapes(octaves: Octaves, boxes: np.ndarray, max_per_cell: int) -> Iterator[Octaves]:
    """Other scales and ratios, common ones and the boxes' own."""
    width, height = (boxes[:, 2:] - boxes[:, :2]).T
    own = (tuple(np.quantile(height / width, x).round(2).tolist()) for x in QUANTILES)
    for ratios in dict.fromkeys((*RATIOS, *own)):
        for scales in SCALES_PER_OCTAVE:
            if min(ratios) > 0 and scales * len(ratios) <= max_per_cell:
                yield replace(octaves, scales_per_octave=scales, ratios=ratios)
