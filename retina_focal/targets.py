"""From the labels of all anchors to the few that are not background.

The host must learn how many these are. On a device it waits for that, here, once for a batch.
"""

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from detectron2.structures import Boxes, Instances
from torch import Tensor

from retina_focal.dense_sum import LevelTargets
from retina_focal.places import Places
from retina_focal.transfer import to_device


class Positives(NamedTuple):
    """The P positive anchors of a batch, level by level; every tensor has P rows."""

    image: Tensor  # index of the image
    anchors: Tensor  # (P, 4) XYXY in pixels
    gt_boxes: Tensor  # (P, 4) XYXY in pixels


class Targets(NamedTuple):
    """What a batch of N images has besides background."""

    levels: list[LevelTargets]
    positives: Positives
    num_positives: Tensor  # (N,) of each image


class _Found(NamedTuple):
    """Some anchors, level by level."""

    image: Tensor
    number: Tensor  # among the R of all levels
    counts: list[int]  # per level


def find_targets(
    anchors: list[Boxes],
    labels: Tensor,
    matched_idxs: Tensor,
    gt_instances: list[Instances],
    sizes: Sequence[Sequence[int]],
    num_classes: int,
) -> Targets:
    """
    Args:
        anchors: (Hi x Wi x A) boxes per level; R over all levels.
        labels, matched_idxs: (N, R) each, from `Assigner`.
        gt_instances: N images with `gt_boxes`, on any device.
        sizes: (Hi, Wi) per level.
        num_classes: K.
    """
    shapes = [
        (*size, len(level) // math.prod(size)) for level, size in zip(anchors, sizes, strict=True)
    ]
    boxes_per_image = [x.gt_boxes.tensor for x in gt_instances]
    first_box = [0, *accumulate(map(len, boxes_per_image))][:-1]
    gt_boxes, first_box, table = to_device(
        [torch.cat(boxes_per_image), torch.tensor(first_box), _table(shapes)], labels.device
    )
    positive, ignored = _find(labels, shapes, num_classes)
    image, number = positive.image, positive.number
    box = first_box[image] + matched_idxs[image, number]
    own_anchors = torch.cat([level.tensor for level in anchors])[number]
    num_positives = torch.zeros_like(first_box).scatter_add_(0, image, torch.ones_like(image))
    return Targets(
        _levels(labels, positive, ignored, table),
        Positives(image, own_anchors, gt_boxes[box]),
        num_positives,
    )


def level_targets(labels: Tensor, logits: list[Tensor], num_classes: int) -> list[LevelTargets]:
    """What is not background, per level.

    Args:
        labels: (N, R) in {-1, 0, ..., K}.
        logits: (N, A x K, Hi, Wi) per level, for their shapes.
        num_classes: K.
    """
    shapes = [(*x.shape[-2:], x.shape[1] // num_classes) for x in logits]
    (table,) = to_device([_table(shapes)], labels.device)
    return _levels(labels, *_find(labels, shapes, num_classes), table)


def _find(labels: Tensor, shapes: Sequence[tuple], num_classes: int) -> tuple[_Found, _Found]:
    """The positive anchors, and the ignored ones."""
    ends = list(accumulate(map(math.prod, shapes)))
    masks = (labels >= 0) & (labels < num_classes), labels < 0
    if labels.device.type == "cpu":
        return tuple(_find_on_cpu(mask, ends) for mask in masks)
    # How many there are up to the end of each level.
    up_to = torch.stack([mask.sum(0) for mask in masks]).cumsum(1)
    up_to = torch.stack([up_to[:, end - 1] for end in ends], 1).tolist()
    found = []
    for mask, own in zip(masks, up_to, strict=True):
        number, image = mask.t().nonzero_static(size=own[-1]).unbind(1)
        counts = [end - begin for begin, end in zip([0, *own], own, strict=False)]
        found.append(_Found(image, number, counts))
    return tuple(found)


def _find_on_cpu(mask: Tensor, ends: list[int]) -> _Found:
    begins = [0, *ends[:-1]]
    levels = [
        mask[:, begin:end].nonzero() + torch.tensor([0, begin])
        for begin, end in zip(begins, ends, strict=True)
    ]
    image, number = torch.cat(levels).unbind(1)
    return _Found(image, number, list(map(len, levels)))


def _table(shapes: Sequence[tuple]) -> Tensor:
    """(4, levels): each level's first anchor, the one after its last, A, and Wi."""
    ends = list(accumulate(map(math.prod, shapes)))
    return torch.tensor(
        [[0, *ends[:-1]], ends, [a for _, _, a in shapes], [w for _, w, _ in shapes]]
    )


def _levels(labels: Tensor, positive: _Found, ignored: _Found, table: Tensor) -> list[LevelTargets]:
    classes = labels[positive.image, positive.number].split(positive.counts)
    places = [_places(found, table) for found in (positive, ignored)]
    return [LevelTargets(*level) for level in zip(places[0], classes, places[1], strict=True)]


def _places(found: _Found, table: Tensor) -> list[Places]:
    level = torch.bucketize(found.number, table[1], right=True)
    first, _, num_anchors, width = table[:, level]
    number = found.number - first
    cell = number.div(num_anchors, rounding_mode="floor")
    row = cell.div(width, rounding_mode="floor")
    anchor, column = number - cell * num_anchors, cell - row * width
    axes = [x.split(found.counts) for x in (found.image, anchor, row, column)]
    return [Places(*place) for place in zip(*axes, strict=True)]
