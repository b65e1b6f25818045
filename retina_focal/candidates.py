"""The anchors and classes that may be detections, out of dense logits.

Logits are compared with about the threshold's; only what passes gets a sigmoid and the exact
comparison.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from retina_focal.places import Places, places_of_elements
from retina_focal.transfer import to_device

# Half precision rounds a threshold by less, between scores of 1e-6 and 1 - 1e-6.
MARGIN = 0.1


class Candidates(NamedTuple):
    """M pairs of an anchor and a class, of all images, level by level."""

    places: list[Places]  # per level
    number: Tensor  # (M,) of the anchor, among the R of an image
    scores: Tensor
    classes: Tensor


def passing_candidates(
    logits: list[Tensor], num_classes: int, score_thresh: float, topk: int
) -> Candidates:
    """The top candidates of each level of each image, among those that pass the threshold.

    Args:
        logits: (N, A x K, Hi, Wi) per level.
        num_classes: K.
        score_thresh: a score must be above it.
        topk: candidates per level.
    """
    found = [_passing(x, num_classes, score_thresh, topk) for x in logits]
    places, scores, classes = zip(*found, strict=True)
    numbers, begin = [], 0
    for place, x in zip(places, logits, strict=True):
        num_anchors, size = x.shape[1] // num_classes, x.shape[-2:]
        numbers.append(place.numbers(num_anchors, size) + begin)
        begin = begin + num_anchors * size[0] * size[1]
    return Candidates(list(places), torch.cat(numbers), torch.cat(scores), torch.cat(classes))


def _passing(
    logits: Tensor, num_classes: int, score_thresh: float, topk: int
) -> tuple[Places, Tensor, Tensor]:
    """Of one level, image by image: places of M candidates, (M,) scores and classes."""
    found = []
    for i, elements in enumerate(logits.flatten(1)):
        # Scores only of what can pass; their comparison decides.
        passed = (elements > logit(score_thresh) - MARGIN).nonzero().squeeze(1)
        scores = elements[passed].float().sigmoid()
        exactly = (scores > score_thresh).nonzero().squeeze(1)
        scores, order = _top(scores[exactly], topk)
        height, width = logits.shape[-2:]
        anchor, classes, row, column = places_of_elements(
            passed[exactly][order], num_classes, height * width, width
        )
        found.append((torch.full_like(row, i), anchor, row, column, scores, classes))
    *places, scores, classes = (torch.cat(parts) for parts in zip(*found, strict=True))
    return Places(*places), scores, classes


def top_candidates(logits: list[Tensor], num_classes: int, topk: int) -> Candidates:
    """As `passing_candidates`, without the threshold: as many in every image.

    Where they stand is computed for all levels together: the host of a device launches as much
    for one level as for all.
    """
    num_images, device = len(logits[0]), logits[0].device
    tops = [_top(x.flatten(1), topk) for x in logits]
    counts = [values.shape[1] for values, _ in tops]
    # Of each level: Hi x Wi, Wi, A and its first anchor.
    table, begin = [], 0
    for x in logits:
        (height, width), num_anchors = x.shape[-2:], x.shape[1] // num_classes
        table.append((height * width, width, num_anchors, begin))
        begin += height * width * num_anchors
    table, counts_ = to_device([torch.tensor(table), torch.tensor(counts)], device)
    columns = table.repeat_interleave(counts_, 0, output_size=sum(counts)).t()[:, None]
    cells, width, num_anchors, first = columns
    element = torch.cat([element for _, element in tops], 1)
    anchor, classes, row, column = places_of_elements(element, num_classes, cells, width)
    number = first + (row * width + column) * num_anchors + anchor
    image = torch.arange(num_images, device=device)[:, None].expand_as(element)
    scores = torch.cat([values for values, _ in tops], 1).float().sigmoid()
    # Level by level, as the places are.
    fields = torch.stack([image, anchor, row, column, number, classes]).split(counts, 2)
    fields = [level.flatten(1) for level in fields]
    number, classes = torch.cat([level[4:] for level in fields], 1)
    scores = torch.cat([level.flatten() for level in scores.split(counts, 1)])
    return Candidates([Places(*level[:4]) for level in fields], number, scores, classes)


def logit(score: float) -> float:
    """The logit whose sigmoid is `score` in [0, 1]."""
    if score <= 0:
        return -math.inf
    return math.log(score / (1 - score)) if score < 1 else math.inf


def _top(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k highest of each row, falling, and their indices; all of them where there are fewer."""
    count = values.shape[-1]
    # torch.jit.trace turns the count into a tensor, and keeps the dependence on the image.
    return values.topk(count.clamp(max=k) if isinstance(count, Tensor) else min(count, k))
