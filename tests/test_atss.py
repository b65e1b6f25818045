"""ATSS beside a brute-force computation, one box, one level and one anchor after the other."""

import math
import statistics

import pytest
import torch
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.structures import Boxes, Instances
from hypothesis import given, settings
from hypothesis import strategies as st

from retina_focal import ATSSAssigner, get_cfg
from retina_focal import atss as atss_module
from retina_focal.assigner import build_assigner

K = 4
Box = list[float]


def iou(a: Box, b: Box) -> float:
    """In fp32, by detectron2's operations in their order."""
    f = torch.tensor
    width = (torch.minimum(f(b[2]), f(a[2])) - torch.maximum(f(b[0]), f(a[0]))).clamp(min=0)
    height = (torch.minimum(f(b[3]), f(a[3])) - torch.maximum(f(b[1]), f(a[1]))).clamp(min=0)
    area = [(f(x[2]) - f(x[0])) * (f(x[3]) - f(x[1])) for x in (b, a)]
    intersection = width * height
    if intersection <= 0:
        return 0.0
    return (intersection / (area[0] + area[1] - intersection)).item()


def centre(box: Box) -> tuple[float, float]:
    return (box[0] + box[2]) / 2, (box[1] + box[3]) / 2


def by_brute_force(
    levels: list[list[Box]], num_anchors: int, boxes: list[Box], classes: list[int], top_k: int
) -> tuple[list[int], list[int]]:
    """Labels and matched indices of one image."""
    anchors = [anchor for level in levels for anchor in level]
    best: dict[int, tuple[float, int]] = {}  # of an anchor: IoU, and the negative of the box
    for number, box in enumerate(boxes):
        x, y = centre(box)
        candidates, first = [], 0
        for level in levels:
            squares = []
            for i, anchor in enumerate(level):
                cx, cy = centre(anchor)
                squares.append(((cx - x) ** 2 + (cy - y) ** 2, first + i))
            candidates += [i for _, i in sorted(squares)[: top_k * num_anchors]]
            first += len(level)
        ious = [iou(anchors[i], box) for i in candidates]
        spread = statistics.stdev(ious) if len(ious) > 1 else 0.0
        threshold = statistics.fmean(ious) + spread
        for i, value in zip(candidates, ious, strict=True):
            cx, cy = centre(anchors[i])
            inside = min(cx - box[0], box[2] - cx, cy - box[1], box[3] - cy) > 0.01
            # The two sums of a mean differ in the last bit; no IoU here is nearer than that.
            if inside and (value >= threshold or math.isclose(value, threshold, rel_tol=1e-12)):
                best[i] = max(best.get(i, (-1.0, 0)), (value, -number))
    labels = [classes[-best[i][1]] if i in best else K for i in range(len(anchors))]
    return labels, [-best[i][1] if i in best else 0 for i in range(len(anchors))]


def instances(boxes: list[Box], classes: list[int]) -> Instances:
    return Instances(
        (64, 64),
        gt_boxes=Boxes(torch.tensor(boxes, dtype=torch.float32).view(-1, 4)),
        gt_classes=torch.tensor(classes, dtype=torch.int64),
    )


def generated(shapes: list[tuple[int, int]], num_ratios: int) -> list[Boxes]:
    generator = DefaultAnchorGenerator(
        sizes=[[12.0 * 2**i] for i in range(len(shapes))],
        aspect_ratios=[[0.5, 1.0, 2.0][:num_ratios]],
        strides=[8 * 2**i for i in range(len(shapes))],
        offset=0.5,
    )
    return generator([torch.zeros(1, 1, *shape) for shape in shapes])


def check(anchors: list[Boxes], num_anchors: int, boxes: list[Box], top_k: int) -> int:
    """Compare an image with these boxes and one without; returns the number of positives."""
    boxes = torch.tensor(boxes, dtype=torch.float32).view(-1, 4).tolist()
    classes = [i % K for i in range(len(boxes))]
    targets = [instances(boxes, classes), instances([], [])]
    labels, matched_idxs = ATSSAssigner(K, top_k)(anchors, targets)
    levels = [level.tensor.tolist() for level in anchors]
    expected = by_brute_force(levels, num_anchors, boxes, classes, top_k)
    assert (labels[0].tolist(), matched_idxs[0].tolist()) == expected
    assert (labels[1] == K).all()
    return int((labels[0] < K).sum())


coordinates = st.floats(0, 60, width=32)


@settings(max_examples=25)
@given(
    shapes=st.lists(st.tuples(st.integers(1, 14), st.integers(1, 14)), min_size=1, max_size=3),
    num_ratios=st.integers(1, 3),
    boxes=st.lists(
        st.tuples(coordinates, coordinates, st.floats(0, 50, width=32), st.floats(0, 50, width=32)),
        max_size=3,
    ),
    top_k=st.integers(1, 9),
)
def test_labels_equal_brute_force(shapes, num_ratios, boxes, top_k):
    corners = [[x, y, x + width, y + height] for x, y, width, height in boxes]
    check(generated(shapes, num_ratios), num_ratios, corners, top_k)


def test_boxes_at_the_border_and_outside_on_a_large_level():
    anchors = generated([(30, 40), (15, 20)], 3)
    boxes = [[0, 0, 9, 9], [290, 200, 320, 240], [150, 100, 190, 130], [-90, 40, -40, 80]]
    assert check(anchors, 3, [*boxes, [120.0, 80.0, 200.0, 160.0]], 9) > 10


def test_anchors_that_stand_on_no_grid_are_searched_through():
    generator = torch.Generator().manual_seed(0)
    corner = 50 * torch.rand(40, 2, generator=generator)
    anchors = [Boxes(torch.cat([corner, corner + 12], 1))]
    near = [[x - 1, y - 2, x + 13, y + 12] for x, y in corner[:3].tolist()]
    assert check(anchors, 1, near, 9) >= 3


@pytest.mark.parametrize("max_boxes", [1, 2])
def test_blocks_of_boxes_change_nothing(monkeypatch, max_boxes):
    anchors = generated([(8, 8), (4, 4)], 3)
    boxes = [[5, 5, 30, 30], [6, 6, 31, 31], [5, 5, 30, 30], [20, 10, 50, 45], [0, 0, 60, 60]]
    monkeypatch.setattr(atss_module, "MAX_BOXES", max_boxes)
    assert check(anchors, 3, boxes, 9) > 0


def test_the_config_names_it():
    cfg = get_cfg()
    cfg.MODEL.RETINA_FOCAL.ASSIGNMENT = "atss"
    assigner = build_assigner(cfg)
    assert isinstance(assigner, ATSSAssigner) and (assigner.num_classes, assigner.top_k) == (80, 9)
    cfg.MODEL.RETINA_FOCAL.ASSIGNMENT = "simota"
    with pytest.raises(ValueError, match=r"ASSIGNMENT is 'simota'; expected one of detectron2, .*"):
        build_assigner(cfg)
