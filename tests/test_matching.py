"""Laws of matching on a device: the CPU's labels, few operations, no wait, bounded memory."""

import weakref

import pytest
import torch
from detectron2.structures import Boxes
from hypothesis import given, settings
from hypothesis import strategies as st
from pretend import Counting, PretendTensor
from test_assigner import (
    NUM_CLASSES,
    RULES,
    boxes_strategy,
    instances,
    retinanet_anchors,
    stock_rule,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from retina_focal import Assigner, matching
from retina_focal.assigner import ASSIGNMENTS
from retina_focal.matching import match_batch


def on_device(anchors):
    """The same anchors on a device that pretends."""
    moved = [Boxes(level.tensor) for level in anchors]
    for level in moved:
        level.tensor = PretendTensor(level.tensor)
    return moved


def crowd(num_boxes, seed=0):
    """Boxes of 2 to 256 px."""
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(num_boxes, 2, generator=generator) * torch.tensor([300.0, 240.0])
    side = 2 ** (1 + 7 * torch.rand(num_boxes, 2, generator=generator))
    return instances(torch.cat([corner, corner + side], 1))


@settings(max_examples=40)
@given(
    batch=st.lists(boxes_strategy(), min_size=1, max_size=4),
    rule=RULES,
    boxes_per_block=st.sampled_from([1, 3, 100]),
)
def test_a_device_gives_the_labels_of_a_cpu_and_of_detectron2(batch, rule, boxes_per_block):
    anchors, targets = retinanet_anchors(128, 160), [instances(boxes) for boxes in batch]
    assigner = Assigner(num_classes=NUM_CLASSES, rule=rule)
    expected, expected_idxs = assigner(anchors, targets)
    with pytest.MonkeyPatch.context() as patch, Counting():
        pairs = boxes_per_block * sum(len(level) for level in anchors)
        patch.setattr(matching, "MAX_PAIRS_ON_DEVICE", pairs)
        labels, matched_idxs = (x.held for x in assigner(on_device(anchors), targets))
    assert labels.dtype == matched_idxs.dtype == torch.int64
    assert torch.equal(labels, expected)
    assert (matched_idxs >= 0).all()
    positive = (labels >= 0) & (labels < NUM_CLASSES)
    assert torch.equal(matched_idxs[positive], expected_idxs[positive])
    for i, target in enumerate(targets):
        stock_labels, stock_idxs = stock_rule(anchors, target, rule=rule)
        assert torch.equal(labels[i], stock_labels)
        assert torch.equal(matched_idxs[i][positive[i]], stock_idxs[positive[i]])


@pytest.mark.parametrize("rule", ASSIGNMENTS)
def test_operations_grow_with_the_blocks_alone_and_nothing_waits(rule, monkeypatch):
    anchors, operations = on_device(retinanet_anchors()), {}
    num_anchors = sum(len(level) for level in anchors)
    monkeypatch.setattr(matching, "MAX_PAIRS_ON_DEVICE", 80 * num_anchors)
    for num_images, num_boxes in [(1, 5), (2, 20), (16, 5), (16, 20), (2, 0)]:
        batch = [crowd(num_boxes, seed) for seed in range(num_images)]
        with Counting() as counted:
            Assigner(num_classes=NUM_CLASSES, rule=rule)(anchors, batch)
        # Boxes, classes and the number of boxes per image cross together.
        assert len(counted.copies) <= 1 and not counted.waits
        blocks = -(-num_images * num_boxes // 80)
        operations.setdefault(blocks, set()).add(counted.operations.total())
    (none,), (one,), (four,) = (operations[blocks] for blocks in (0, 1, 4))
    assert none < 5 and one < 60 and four - one <= 3 * 30


class PeakMemory(TorchDispatchMode):
    """The most bytes that results of operations take at one time."""

    def __init__(self):
        super().__init__()
        self.now = self.most = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = {
            x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if is_tensor(x)
        }
        result = function(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            storage = x.untyped_storage() if is_tensor(x) else None
            if storage is not None and storage.data_ptr() not in given:
                self.now += storage.nbytes()
                weakref.finalize(x, self.freed, storage.nbytes())
        self.most = max(self.most, self.now)
        return result

    def freed(self, num_bytes):
        self.now -= num_bytes


def is_tensor(x):
    return isinstance(x, torch.Tensor)


@pytest.mark.parametrize("num_boxes", [20, 200])
def test_memory_is_that_of_a_block_and_of_the_result(num_boxes, monkeypatch):
    anchors = Boxes.cat(retinanet_anchors()).tensor
    boxes = Boxes.cat([crowd(num_boxes, seed).gt_boxes for seed in range(4)]).tensor
    monkeypatch.setattr(matching, "MAX_PAIRS", 50 * len(anchors))
    with PeakMemory() as memory:
        match_batch(anchors, boxes, torch.full((4,), num_boxes))
    # While blocks run, an anchor of an image takes 9 bytes, and the sides of an anchor 16.
    result = (4 * 9 + 16 + 3 * 4) * len(anchors)
    assert 17 * matching.MAX_PAIRS < memory.most <= 18 * matching.MAX_PAIRS + result
