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

    levels: list[LevelTargets]
    image: Tensor  # (P,) of the positive ones
    number: Tensor  # (P,) among the R anchors of all levels


def find_targets(
    anchors: list[Boxes],
    labels: Tensor,
    matched_idxs: Tensor,
    gt_instances: list[Instances],
    features: Sequence[Tensor],
    num_classes: int,
) -> Targets:
    """
    Args:
        anchors: (Hi x Wi x A) boxes per level; R over all levels.
        labels, matched_idxs: (N, R) each, from `Assigner`.
        gt_instances: N images with `gt_boxes`, on any device.
        features: (..., Hi, Wi) per level, for their sizes.
        num_classes: K.
    """
    flat, shapes = [level.tensor for level in anchors], []
    for level, feature in zip(flat, features, strict=True):
        height, width = feature.shape[-2:]
        shapes.append((height, width, len(level) // (height * width)))
    boxes_per_image = [x.gt_boxes.tensor for x in gt_instances]
    first_box = [0, *accumulate(map(len, boxes_per_image))][:-1]
    gt_boxes, first_box = to_device(
        [torch.cat(boxes_per_image), torch.tensor(first_box)], labels.device
    )
    levels, image, number = _find(labels, shapes, num_classes)
    box = first_box[image] + matched_idxs[image, number]
    num_positives = torch.zeros_like(first_box).scatter_add_(0, image, torch.ones_like(image))
    return Targets(levels, Positives(image, torch.cat(flat)[number], gt_boxes[box]), num_positives)


def level_targets(labels: Tensor, logits: list[Tensor], num_classes: int) -> list[LevelTargets]:
    """What is not background, per level.

    Args:
        labels: (N, R) in {-1, 0, ..., K}.
        logits: (N, A x K, Hi, Wi) per level, for their shapes.
        num_classes: K.
    """
    shapes = [(*x.shape[-2:], x.shape[1] // num_classes) for x in logits]
    return _find(labels, shapes, num_classes).levels


def _find(labels: Tensor, shapes: Sequence[tuple[int, int, int]], num_classes: int) -> _Found:
    """
    Args:
        shapes: (Hi, Wi, A) per level.
    """
    masks = (labels >= 0) & (labels < num_classes), labels < 0
    ends = list(accumulate(map(math.prod, shapes)))
    begins = [0, *ends[:-1]]
    if labels.device.type == "cpu":
        found, counts = [], []
        for mask in masks:
            levels = [mask[:, i:j].nonzero() for i, j in zip(begins, ends, strict=True)]
            image, number = torch.cat(levels).t().contiguous()
            counts.append(list(map(len, levels)))
            number += torch.tensor(begins).repeat_interleave(torch.tensor(counts[-1]))
            found.append((image, number))
    else:
        found, counts = _find_on_device(masks, ends)
    # Each level's first anchor, the one after its last, A, and Wi.
    table = [begins, ends, [a for _, _, a in shapes], [width for _, width, _ in shapes]]
    (table,) = to_device([torch.tensor(table)], labels.device)
    places = []
    for (image, number), own in zip(found, counts, strict=True):
        first, _, num_anchors, width = table[:, torch.bucketize(number, table[1], right=True)]
        cell = (number - first).div(num_anchors, rounding_mode="floor")
        row = cell.div(width, rounding_mode="floor")
        anchor, column = number - first - cell * num_anchors, cell - row * width
        axes = [x.split(own) for x in (image, anchor, row, column)]
        places.append([Places(*place) for place in zip(*axes, strict=True)])
    image, number = found[0]
    classes = labels[image, number].split(counts[0])
    levels = [LevelTargets(*level) for level in zip(places[0], classes, places[1], strict=True)]
    return _Found(levels, image, number)


def _find_on_device(
    masks: Sequence[Tensor], ends: Sequence[int]
) -> tuple[list[tuple[Tensor, Tensor]], list[list[int]]]:
    """Image and number of the anchors at which (N, R) masks are True, and how many per level.

    Args:
        ends: the anchor after the last, per level.
    """
    up_to = torch.stack([mask.sum(0) for mask in masks]).cumsum(1)
    up_to = torch.stack([up_to[:, end - 1] for end in ends], 1).tolist()  # here the host waits
    found = []
    for mask, own in zip(masks, up_to, strict=True):
        number, image = mask.t().nonzero_static(size=own[-1]).t().contiguous()
        found.append((image, number))
    return found, [[j - i for i, j in zip([0, *own], own, strict=False)] for own in up_to]
