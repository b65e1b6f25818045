"""Laws of online hard example mining, against a reimplementation without tensors."""

import math
from itertools import pairwise

import pytest
import torch
from detectron2.structures import Boxes
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from retina_focal import HardExampleSampler, get_cfg, sampling
from retina_focal.sampling import cross_entropy_per_anchor


def case(seed, num_images, num_anchors, num_classes, sizes, scale=3.0):
    """Boxes that overlap a lot, logits and labels: a fifth positive, a fifth ignored."""
    generator = torch.Generator().manual_seed(seed)
    anchors, logits = [], []
    for height, width in sizes:
        corners = 20 * torch.rand(height * width * num_anchors, 2, generator=generator)
        spans = 5 + 20 * torch.rand(corners.shape, generator=generator)
        anchors.append(Boxes(torch.cat((corners, corners + spans), 1)))
        shape = (num_images, num_anchors * num_classes, height, width)
        logits.append(scale * torch.randn(shape, generator=generator))
    shape = (num_images, sum(map(len, anchors)))
    drawn = torch.rand(shape, generator=generator)
    classes = torch.randint(num_classes, shape, generator=generator)
    labels = torch.where(drawn < 0.2, classes, num_classes)
    return anchors, logits, torch.where(drawn > 0.8, -1, labels)


def scores_by_definition(logits, labels, num_classes):
    """N lists of R cross entropies, summed class by class; an anchor is found by its place."""
    scores = []
    for image, label in enumerate(labels.tolist()):
        found = []
        for x in logits:
            x = x[image].double()
            for row in range(x.shape[1]):
                for column in range(x.shape[2]):
                    for anchor in range(x.shape[0] // num_classes):
                        own = label[len(found)]
                        total = 0.0
                        for k in range(num_classes):
                            logit = x[anchor * num_classes + k, row, column].item()
                            total += math.log1p(math.exp(-logit if k == own else logit))
                        found.append(total)
        scores.append(found)
    return scores


def iou(a, b):
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    shared = max(width, 0) * max(height, 0)
    areas = [(x[2] - x[0]) * (x[3] - x[1]) for x in (a, b)]
    return shared / (sum(areas) - shared)


def kept_by_definition(boxes, scores, labels, num_classes, batch_size, nms_thresh, neg_per_pos):
    """Indices kept of one image; NMS of everything, then the choice."""
    left = []
    for i in sorted((i for i, x in enumerate(labels) if x >= 0), key=lambda i: -scores[i]):
        if all(iou(boxes[i], boxes[j]) <= nms_thresh for j in left):
            left.append(i)
    if not neg_per_pos:
        return set(left[:batch_size])
    positives = [i for i in left if labels[i] < num_classes][: batch_size // (neg_per_pos + 1)]
    negatives = [i for i in left if labels[i] == num_classes][: neg_per_pos * len(positives)]
    return {*positives, *negatives}


def close(values, tolerance):
    values = sorted(values)
    return any(b - a < tolerance for a, b in pairwise(values))


@settings(max_examples=80)
@given(
    seed=st.integers(0, 2**31),
    num_images=st.integers(1, 2),
    num_anchors=st.integers(1, 3),
    num_classes=st.integers(1, 3),
    sizes=st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), min_size=1, max_size=2),
    neg_per_pos=st.sampled_from([0, 1, 3]),
    room=st.integers(0, 12),
    nms_thresh=st.sampled_from([0.0, 0.2, 0.5, 0.7, 1.0]),
    first_candidates=st.sampled_from([1, 16]),
)
def test_what_is_kept_is_what_the_definition_keeps(
    seed,
    num_images,
    num_anchors,
    num_classes,
    sizes,
    neg_per_pos,
    room,
    nms_thresh,
    first_candidates,
):
    anchors, logits, labels = case(seed, num_images, num_anchors, num_classes, sizes)
    scores = scores_by_definition(logits, labels, num_classes)
    boxes = Boxes.cat(anchors).tensor.tolist()
    # fp32 may order two scores otherwise than float64, or put an IoU on the other side.
    assume(not any(close(image, 1e-4) for image in scores))
    overlaps = [iou(a, b) for i, a in enumerate(boxes) for b in boxes[:i]]
    assume(not any(x > 0 and abs(x - nms_thresh) < 1e-5 for x in overlaps))
    parameters = {
        "batch_size": 1 + neg_per_pos + room,
        "nms_thresh": nms_thresh,
        "neg_per_pos": neg_per_pos,
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling, "FIRST_CANDIDATES", first_candidates)
        found = HardExampleSampler(**parameters)(anchors, logits, labels, num_classes)
    for i, label in enumerate(labels.tolist()):
        kept = kept_by_definition(boxes, scores[i], label, num_classes, **parameters)
        assert found[i].tolist() == [x if j in kept else -1 for j, x in enumerate(label)]


def test_the_score_is_the_cross_entropy_of_all_classes():
    _, logits, labels = case(0, 2, 3, 4, [(3, 5), (2, 1)])
    expected = torch.tensor(scores_by_definition(logits, labels, 4))
    found = cross_entropy_per_anchor([x.bfloat16().float() for x in logits], labels, 4)
    exact = cross_entropy_per_anchor(logits, labels, 4)
    # 1e-5: fp32; a positive's score is a difference.
    torch.testing.assert_close(exact, expected, rtol=1e-5, atol=1e-5)
    half = cross_entropy_per_anchor([x.bfloat16() for x in logits], labels, 4)
    assert torch.equal(half, found) and half.dtype == torch.float32


def test_of_identical_anchors_with_equal_scores_one_is_kept():
    corners = torch.tensor([[0.0, 0], [100, 0], [200, 0]]).repeat_interleave(2, 0)
    anchors = [Boxes(torch.cat((corners, corners + 30), 1))]
    labels = torch.full((1, 6), 2)
    kept = HardExampleSampler(batch_size=6)(anchors, [torch.zeros(1, 2, 1, 6)], labels, 2)
    assert (kept >= 0).view(3, 2).sum(1).tolist() == [1, 1, 1]


@pytest.mark.parametrize("neg_per_pos", [0, 3])
def test_an_image_of_which_all_is_ignored_keeps_nothing(neg_per_pos):
    anchors, logits, labels = case(0, 2, 3, 4, [(3, 5)])
    labels[0] = -1
    kept = HardExampleSampler(neg_per_pos=neg_per_pos)(anchors, logits, labels, 4)
    assert (kept[0] == -1).all() and (kept[1] >= 0).any()


def test_the_ratio_keeps_at_most_its_share_of_positives_and_three_negatives_for_each():
    anchors, logits, labels = case(0, 3, 9, 4, [(10, 12)])
    labels[2] = torch.where(labels[2] < 4, 4, labels[2])  # no positive: nothing to set against it
    kept = HardExampleSampler(batch_size=16, nms_thresh=0.9, neg_per_pos=3)(
        anchors, logits, labels, 4
    )
    assert ((kept >= 0) & (kept < 4)).sum(1).tolist() == [4, 4, 0]
    assert (kept == 4).sum(1).tolist() == [12, 12, 0]


def test_the_defaults_are_those_of_the_config():
    assert vars(HardExampleSampler(get_cfg())) == vars(HardExampleSampler())


@pytest.mark.parametrize(
    "arguments",
    [
        {"batch_size": 0},
        {"batch_size": 3, "neg_per_pos": 3},
        {"neg_per_pos": -1},
        {"nms_thresh": 1.5},
    ],
)
def test_values_out_of_range_are_refused_in_words(arguments):
    (name, value), *_ = arguments.items()
    with pytest.raises(ValueError, match=f"{name.upper()} {value}.*expected NMS_THRESH from 0"):
        HardExampleSampler(**arguments)
