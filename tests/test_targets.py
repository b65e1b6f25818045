"""What is not background is found as by a mask, on a CPU and on a device."""

import pytest
import torch
from detectron2.structures import Boxes, Instances
from pretend import DEVICE, Counting, PretendTensor

from retina_focal.targets import find_targets, level_targets

K, A = 3, 2
SIZES = [(4, 5), (1, 1), (2, 3)]
NUM_ANCHORS = [height * width * A for height, width in SIZES]


def case(num_images: int, fractions: tuple[float, float], seed: int = 0):
    """Labels (N, R) with these fractions of positive and of ignored anchors, and all else."""
    generator = torch.Generator().manual_seed(seed)
    size = num_images, sum(NUM_ANCHORS)
    draw = torch.rand(size, generator=generator)
    labels = torch.randint(0, K, size, generator=generator)
    labels[draw > fractions[0]] = K
    labels[draw > 1 - fractions[1]] = -1
    num_boxes = [3, 0, 5][:num_images]
    matched = [torch.randint(0, max(n, 1), size[1:], generator=generator) for n in num_boxes]
    boxes = [100 * torch.rand(n, 4, generator=generator) for n in num_boxes]
    for label, n in zip(labels, num_boxes, strict=True):
        label[(label >= 0) & (n == 0)] = K  # no box, no positive
    instances = [Instances((9, 9), gt_boxes=Boxes(x)) for x in boxes]
    anchors = [Boxes(100 * torch.rand(n, 4, generator=generator)) for n in NUM_ANCHORS]
    return (
        anchors,
        labels,
        torch.stack(matched),
        instances,
        [torch.empty(0, *size) for size in SIZES],
        K,
    )


def by_masks(anchors, labels, matched_idxs, instances, features, num_classes) -> set[tuple]:
    """Level, image, place, class, anchor and box of each positive, and places of the ignored."""
    found, first = set(), 0
    for level, (boxes, size) in enumerate(zip(anchors, SIZES, strict=True)):
        for i, label in enumerate(labels[:, first : first + len(boxes)].tolist()):
            for number, own in enumerate(label):
                cell, anchor = divmod(number, A)
                place = level, i, anchor, *divmod(cell, size[1])
                if own < 0:
                    found.add(place)
                elif own < num_classes:
                    box = instances[i].gt_boxes.tensor[matched_idxs[i, first + number]]
                    values = boxes.tensor[number].tolist(), box.tolist()
                    found.add((*place, own, *map(tuple, values)))
        first += len(boxes)
    return found


def as_set(targets) -> set[tuple]:
    found, first = set(), 0
    for number, level in enumerate(targets.levels):
        rows = slice(first, first + len(level.classes))
        first = rows.stop
        columns = [x.tolist() for x in (*level.positive, level.classes)]
        columns += [[tuple(x) for x in y[rows].tolist()] for y in targets.positives[1:]]
        assert targets.positives.image[rows].tolist() == level.positive.image.tolist()
        found |= {(number, *x) for x in zip(*columns, strict=True)}
        found |= {(number, *x) for x in zip(*(x.tolist() for x in level.ignored), strict=True)}
    return found


@pytest.mark.parametrize("num_images", [1, 3])
@pytest.mark.parametrize("fractions", [(0.0, 0.0), (0.2, 0.1), (1.0, 0.0), (0.0, 1.0)])
def test_targets_are_those_of_the_masks(num_images, fractions):
    arguments = case(num_images, fractions)
    anchors, labels, matched_idxs, instances, *rest = arguments
    positives = ((labels >= 0) & (labels < K)).sum(1)
    found = find_targets(*arguments)
    assert as_set(found) == by_masks(*arguments)
    assert torch.equal(found.num_positives, positives)
    anchors = [Boxes(PretendTensor(x.tensor)) for x in anchors]
    labels, matched_idxs = PretendTensor(labels), PretendTensor(matched_idxs)
    with Counting() as counting:
        on_device = find_targets(anchors, labels, matched_idxs, instances, *rest)
    assert sum(counting.waits.values()) == 1, counting.waits
    assert as_set(on_device) == by_masks(*arguments)
    assert torch.equal(on_device.num_positives.held, positives)


def test_the_levels_alone_wait_once_too():
    labels = PretendTensor(case(2, (0.2, 0.1))[1])
    logits = [torch.empty(2, A * K, *size, device=DEVICE) for size in SIZES]
    with Counting() as counting:
        level_targets(labels, logits, K)
    assert sum(counting.waits.values()) == 1, counting.waits
