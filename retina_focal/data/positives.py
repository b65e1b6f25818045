"""Positive anchors of each box, as each assignment rule counts them."""

from collections.abc import Callable, Mapping

import numpy as np
import torch
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.structures import Boxes, Instances

from retina_focal.data.coverage import AnchorLayout, BoxTable, resize


def count_positives(
    table: BoxTable,
    generator: DefaultAnchorGenerator,
    layout: AnchorLayout,
    assigners: Mapping[str, Callable],
    shorter: int,
    longer: int,
) -> dict[str, np.ndarray]:
    """Label the anchors of every picture, as a training step of that picture alone does.

    Args:
        generator: of the anchors that `layout` describes.
        assigners: by name, see `Assigner`.
        shorter, longer: see `resize`.
    Returns:
        By name (P, L) int64: the anchors of each level that are positive for each box.
    """
    boxes, kept, sizes = resize(table, shorter, longer)
    pictures, grids = table.pictures[kept], layout.grids(sizes)
    begins = np.searchsorted(pictures, np.arange(len(sizes) + 1))
    counts = {name: np.zeros((len(boxes), len(grids)), np.int64) for name in assigners}
    # Pictures of one size one after another: assigners keep the grid of the last one.
    for picture in np.lexsort(sizes.T):
        mine = slice(*begins[picture : picture + 2])
        if mine.start == mine.stop:
            continue
        features = [torch.empty(1, 0, *grid[picture].tolist()) for grid in grids]
        anchors = generator(features)
        levels = torch.arange(len(anchors)).repeat_interleave(torch.tensor(list(map(len, anchors))))
        own = torch.from_numpy(boxes[mine]).float()
        instances = Instances(
            tuple(sizes[picture].tolist()),
            gt_boxes=Boxes(own),
            gt_classes=torch.zeros(len(own), dtype=torch.int64),  # no rule looks at them
        )
        for name, assigner in assigners.items():
            labels, matched = (x[0] for x in assigner(anchors, [instances]))
            positive = labels == 0
            place = matched[positive] * len(anchors) + levels[positive]
            count = torch.bincount(place, minlength=len(own) * len(anchors))
            counts[name][mine] = count.view(len(own), -1).numpy()
    return counts
