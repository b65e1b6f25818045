"""Laws of the assignment: stock's matcher, the authors' rule, the paper's rule."""

import pytest
import torch
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.matcher import Matcher
from detectron2.structures import Boxes, Instances, pairwise_iou
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from retina_focal import Assigner, get_cfg, matching
from retina_focal.matching import find_grid

NUM_CLASSES = 7
OCTAVES = [[x * 2 ** (i / 3) for i in range(3)] for x in (32, 64, 128, 256, 512)]


def instances(boxes, classes=None, size=(1000, 1000)):
    boxes = torch.as_tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    classes = torch.arange(len(boxes)) % NUM_CLASSES if classes is None else torch.tensor(classes)
    return Instances(size, gt_boxes=Boxes(boxes), gt_classes=classes)


def grid(sizes, ratios, strides, shapes, offset=0.0):
    generator = DefaultAnchorGenerator(
        sizes=sizes, aspect_ratios=ratios, strides=strides, offset=offset
    )
    return generator([torch.zeros(1, 1, *shape) for shape in shapes])


def retinanet_anchors(height=256, width=320, offset=0.0):
    strides = [8, 16, 32, 64, 128]
    shapes = [(-(-height // s), -(-width // s)) for s in strides]
    return grid(OCTAVES, [[0.5, 1.0, 2.0]], strides, shapes, offset)


def stock_rule(anchors, target, thresholds=(0.4, 0.5), iou_labels=(0, -1, 1), rule="detectron2"):
    """Labels and matched boxes by detectron2's `Matcher` on the whole IoU matrix."""
    ious = pairwise_iou(target.gt_boxes, Boxes.cat(anchors))
    if rule == "detectron2":
        # The one exception: a box that overlaps no anchor doesn't match all of them.
        overlapping = (ious > 0).any(1)
        matched, _ = Matcher(list(thresholds), list(iou_labels), False)(ious)
        _, quality = Matcher(list(thresholds), list(iou_labels), True)(ious[overlapping])
    else:
        matched, quality = Matcher(list(thresholds), list(iou_labels), False)(ious)
    if rule == "detectron" and len(target):
        best = (ious == ious.amax(1, keepdim=True)) & (ious.amax(1, keepdim=True) > 0)
        quality[best.any(0) & (ious.amax(0) >= thresholds[0])] = 1
    if len(target) == 0:
        return torch.full_like(matched, NUM_CLASSES), matched
    labels = target.gt_classes[matched]
    labels[quality == 0] = NUM_CLASSES
    labels[quality == -1] = -1
    return labels, matched


def assert_equals_stock_rule(anchors, target, rule="detectron2", **kwargs):
    labels, matched = Assigner(
        num_classes=NUM_CLASSES,
        rule=rule,
        **{
            name: kwargs[key]
            for key, name in (("thresholds", "iou_thresholds"), ("iou_labels", "iou_labels"))
            if key in kwargs
        },
    )(anchors, [target])
    expected_labels, expected_matched = stock_rule(anchors, target, rule=rule, **kwargs)
    assert labels.shape == matched.shape == (1, sum(len(x) for x in anchors))
    assert labels.dtype == matched.dtype == torch.int64
    assert torch.equal(labels[0], expected_labels)
    positive = (expected_labels >= 0) & (expected_labels < NUM_CLASSES)
    assert torch.equal(matched[0][positive], expected_matched[positive])


# One anchor and one box at a chosen IoU: a box inside a 10x10 anchor covers that share of it.
TABLE = [
    # IoU, detectron2, detectron, paper: alone, each box is the best of its anchor
    (0.30, 1, 0, 0),
    (0.40, 1, 1, -1),
    (0.45, 1, 1, -1),
    (0.50, 1, 1, 1),
    (0.80, 1, 1, 1),
]


@pytest.mark.parametrize("iou, detectron2, detectron, paper", TABLE)
def test_rules_by_table_for_the_best_anchor_of_a_box(iou, detectron2, detectron, paper):
    anchors = [Boxes(torch.tensor([[0.0, 0.0, 10.0, 10.0], [500.0, 500.0, 510.0, 510.0]]))]
    target = instances([[0, 0, 10, 10 * iou]], classes=[3])
    expected = {"detectron2": detectron2, "detectron": detectron, "paper": paper}
    meaning = {1: 3, 0: NUM_CLASSES, -1: -1}
    for rule, label in expected.items():
        labels, _ = Assigner(num_classes=NUM_CLASSES, rule=rule)(anchors, [target])
        assert labels.tolist() == [[meaning[label], NUM_CLASSES]]


def test_a_second_best_anchor_is_labelled_by_the_thresholds_alone():
    heights = torch.tensor([10.0, 10 / 0.8, 10 / 0.45, 10 / 0.3])
    corners = torch.zeros(4, 2)
    anchors = [Boxes(torch.cat([corners, torch.full((4, 1), 10.0), heights[:, None]], 1))]
    for rule in ("detectron2", "detectron", "paper"):
        labels, _ = Assigner(num_classes=1, rule=rule)(
            anchors, [instances([[0, 0, 10, 10]], classes=[0])]
        )
        assert labels.tolist() == [[0, 0, -1, 1]]


def test_a_low_quality_match_keeps_the_box_that_the_anchor_overlaps_most():
    anchors = [Boxes(torch.tensor([[0.0, 0.0, 10.0, 10.0], [0.0, 0.0, 10.0, 30.0]]))]
    # Box 1 has its best anchor, 0, in common with box 0, which overlaps that anchor more.
    target = instances([[0, 0, 10, 9], [0, 0, 2, 2]])
    labels, matched = Assigner(num_classes=NUM_CLASSES)(anchors, [target])
    assert labels[0].tolist() == [0, NUM_CLASSES] and matched[0, 0] == 0


@pytest.mark.parametrize("rule", ["detectron2", "detectron", "paper"])
@pytest.mark.parametrize(
    "box", [[-1500, -1500, -1400, -1400], [5000, 5000, 5100, 5100], [100, 100, 100, 150]]
)
def test_a_box_that_overlaps_no_anchor_turns_none_positive(rule, box):
    labels, _ = Assigner(num_classes=NUM_CLASSES, rule=rule)(
        retinanet_anchors(64, 64), [instances([box])]
    )
    assert (labels == NUM_CLASSES).all()


def test_stock_turns_every_anchor_positive_for_such_a_box():
    """The reason for the exception: remove it if detectron2 ever changes this."""
    anchors = Boxes.cat(retinanet_anchors(64, 64))
    ious = pairwise_iou(instances([[100, 100, 100, 150]]).gt_boxes, anchors)
    assert (Matcher([0.4, 0.5], [0, -1, 1], True)(ious)[1] == 1).all()


def test_without_boxes_every_anchor_is_background():
    anchors = retinanet_anchors(64, 96)
    labels, matched = Assigner(num_classes=NUM_CLASSES)(anchors, [instances([]), instances([])])
    assert (labels == NUM_CLASSES).all() and labels.shape == matched.shape
    assert len(labels) == 2


def test_images_of_a_batch_do_not_touch_each_other():
    anchors = retinanet_anchors(64, 96)
    targets = [instances([[5, 5, 40, 45]]), instances([]), instances([[20, 0, 90, 60]] * 2)]
    labels, matched = Assigner(num_classes=NUM_CLASSES)(anchors, targets)
    for i, target in enumerate(targets):
        alone, alone_matched = Assigner(num_classes=NUM_CLASSES)(anchors, [target])
        assert torch.equal(labels[i], alone[0]) and torch.equal(matched[i], alone_matched[0])


def test_of_identical_boxes_the_first_is_matched():
    anchors = retinanet_anchors(128, 128)
    target = instances([[30, 30, 80, 70]] * 3)
    labels, matched = Assigner(num_classes=NUM_CLASSES)(anchors, [target])
    positive = (labels >= 0) & (labels < NUM_CLASSES)
    assert positive.any() and (matched[positive] == 0).all()


def test_a_three_pixel_box_matches_its_nineteen_tied_anchors():
    anchors = retinanet_anchors()
    target = instances([[101, 101, 104, 104]])
    assert_equals_stock_rule(anchors, target)
    ious = pairwise_iou(target.gt_boxes, Boxes.cat(anchors))
    labels, _ = Assigner(num_classes=NUM_CLASSES)(anchors, [target])
    assert (labels == 0).sum() == (ious == ious.max()).sum() > 1


def box_strategy(limit=320):
    """Boxes of 0 px to larger than the image, inside, across its border and outside."""
    corner = st.integers(-4 * limit, 8 * limit).map(lambda x: x / 4)
    side = st.one_of(
        st.integers(0, 16).map(lambda x: x / 4),
        st.integers(0, limit),
        st.sampled_from([32.0, 45.254834, 3.0, 2.0 * limit, 8.0, 16.0]),
    )
    box = st.tuples(corner, corner, side, side)
    return box.map(lambda b: [b[0], b[1], b[0] + b[2], b[1] + b[3]])


def boxes_strategy():
    some = st.lists(box_strategy(), max_size=12)
    return some.flatmap(lambda boxes: st.sampled_from([boxes, boxes + boxes[:3]]))


RULES = st.sampled_from(["detectron2", "detectron", "paper"])


@settings(max_examples=120)
@given(boxes=boxes_strategy(), rule=RULES, offset=st.sampled_from([0.0, 0.5]))
def test_equals_stock_on_retinanet_anchors(boxes, rule, offset):
    assert_equals_stock_rule(retinanet_anchors(offset=offset), instances(boxes), rule)


@settings(max_examples=120)
@given(
    boxes=boxes_strategy(),
    rule=RULES,
    levels=st.lists(
        st.tuples(
            st.sampled_from([1, 7, 8, 64]),  # stride
            st.integers(1, 9),  # rows
            st.integers(1, 9),  # columns
            st.lists(st.floats(1, 300), min_size=1, max_size=3),  # sizes
            st.lists(st.sampled_from([0.1, 0.5, 1.0, 2.0]), min_size=1, max_size=3),  # ratios
        ),
        min_size=1,
        max_size=3,
    ),
    thresholds=st.sampled_from([(0.4, 0.5), (0.5, 0.5), (0.3, 0.7), (0.05, 0.9)]),
)
def test_equals_stock_on_odd_grids(boxes, rule, levels, thresholds):
    strides, rows, columns, sizes, ratios = zip(*levels, strict=True)
    shapes = list(zip(rows, columns, strict=True))
    anchors = grid(list(sizes), list(ratios), list(strides), shapes)
    assert_equals_stock_rule(anchors, instances(boxes), rule, thresholds=thresholds)


@settings(max_examples=60)
@given(boxes=boxes_strategy(), rule=RULES, seed=st.integers(0, 1000), count=st.integers(1, 60))
def test_equals_stock_on_anchors_that_are_no_grid(boxes, rule, seed, count):
    generator = torch.Generator().manual_seed(seed)
    corner = 300 * torch.rand(count, 2, generator=generator)
    anchors = torch.cat([corner, corner + 100 * torch.rand(count, 2, generator=generator)], 1)
    split = count // 2
    levels = [Boxes(anchors[:split]), Boxes(anchors[split:])]
    assert_equals_stock_rule(levels, instances(boxes), rule)


@pytest.mark.parametrize("iou_labels", [(0, -1, 1), (-1, 0, 1), (0, 0, 1), (0, 1, 1), (-1, -1, 1)])
@pytest.mark.parametrize("rule", ["detectron2", "detectron", "paper"])
def test_equals_stock_for_other_interval_labels(iou_labels, rule):
    target = instances([[3, 5, 60, 70], [80, 20, 84, 23], [150, 100, 300, 250]])
    assert_equals_stock_rule(retinanet_anchors(), target, rule, iou_labels=iou_labels)


def test_hundreds_of_boxes_equal_stock():
    generator = torch.Generator().manual_seed(0)
    corner = torch.rand(300, 2, generator=generator) * torch.tensor([300.0, 240.0])
    side = 2 ** (1 + 7 * torch.rand(300, 2, generator=generator))
    target = instances(torch.cat([corner, corner + side], 1))
    for rule in ("detectron2", "detectron", "paper"):
        assert_equals_stock_rule(retinanet_anchors(), target, rule)


def test_config_names_thresholds_labels_and_rule():
    cfg = get_cfg()
    cfg.MODEL.RETINANET.IOU_THRESHOLDS = [0.3, 0.6]
    cfg.MODEL.RETINA_FOCAL.ASSIGNMENT = "paper"
    assigner = Assigner(cfg)
    assert (assigner.num_classes, assigner.rule) == (80, "paper")
    assert assigner.iou_thresholds == (0.3, 0.6) and assigner.iou_labels == (0, -1, 1)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"rule": "atss"}, "ASSIGNMENT is 'atss'; expected one of detectron2, detectron, paper"),
        ({"iou_thresholds": [0.5, 0.4]}, "expected rising thresholds above 0"),
        ({"iou_thresholds": [0.5]}, "one label more than thresholds"),
        ({"iou_thresholds": [0.0, 0.5]}, "above 0"),
        ({"iou_labels": [1, -1, 0]}, "as first label 0 or -1"),
    ],
)
def test_what_makes_no_sense_is_refused_in_words(arguments, message):
    with pytest.raises(ValueError, match=message):
        Assigner(num_classes=NUM_CLASSES, **arguments)


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        # A view of expanded dimensions takes no memory of its own.
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor):
                size = x.untyped_storage().nbytes() // x.element_size()
                self.elements = max(self.elements, size)
        return result


@pytest.mark.parametrize("side", [3.0, 40.0, 2000.0])
def test_no_tensor_grows_with_the_number_of_boxes(side):
    anchors = retinanet_anchors(256, 320)
    largest = []
    for count in (600, 1800):
        corner = 200 * torch.rand(count, 2, generator=torch.Generator().manual_seed(0))
        target = instances(torch.cat([corner, corner + side], 1))
        with LargestTensor() as mode:
            Assigner(num_classes=NUM_CLASSES)(anchors, [target])
        largest.append(mode.elements)
    assert max(largest) <= matching.MAX_PAIRS < 600 * sum(len(x) for x in anchors)


@pytest.mark.parametrize("height, width", [(256, 320), (8, 8), (128, 8), (8, 128), (200, 333)])
@pytest.mark.parametrize("ratios", [[[0.5, 1.0, 2.0]], [[1.0]]])
def test_the_grid_of_a_generator_is_recognised(height, width, ratios):
    strides = [8, 16, 32, 64, 128]
    shapes = [(-(-height // s), -(-width // s)) for s in strides]
    anchors = grid(OCTAVES, ratios, strides, shapes)
    found = find_grid([x.tensor for x in anchors])
    assert found.size[:: len(found.size) // 5].tolist() == [[w, h] for h, w in shapes]
    assert torch.equal(torch.cat(found.levels), Boxes.cat(anchors).tensor)
    sizes = [3 * len(ratios[0])] * 5
    for level, shape in zip(anchors, torch.arange(sum(sizes)).split(sizes), strict=True):
        cells = level.tensor.view(-1, len(shape), 4)
        for index in range(len(cells)):
            row, column = divmod(index, int(found.size[shape[0], 0]))
            (x0, x1), (y0, y1) = found.columns[:, shape, column], found.rows[:, shape, row]
            assert torch.equal(torch.stack([x0, y0, x1, y1], 1), cells[index])
            number = found.first[shape] + found.stride[shape] @ torch.tensor([column, row])
            assert torch.equal(torch.cat(found.levels)[number], cells[index])


@pytest.mark.parametrize("change", ["one anchor", "order", "steps", "cut"])
def test_anchors_off_the_grid_are_matched_without_it(change):
    anchors = retinanet_anchors(128, 160)
    level = anchors[0].tensor
    if change == "one anchor":
        level[777, 2] += 0.5
    elif change == "order":
        level[[40, 41]] = level[[41, 40]]
    elif change == "steps":
        level[:, 0::2] *= 1 + level[:, 0:1].clamp(min=0) / 1000
    else:
        anchors[0] = Boxes(level[:-5])
    assert find_grid([x.tensor for x in anchors]) is None
    assert_equals_stock_rule(anchors, instances([[3, 5, 60, 70], [80, 20, 84, 23]]))


@settings(max_examples=30)
@given(boxes=boxes_strategy(), max_boxes=st.sampled_from([1, 2, 5]))
def test_labels_do_not_depend_on_the_size_of_the_pieces(boxes, max_boxes):
    anchors, target = retinanet_anchors(128, 160), instances(boxes)
    whole = Assigner(num_classes=NUM_CLASSES)(anchors, [target])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matching, "MAX_PAIRS", 1)  # for match_dense
        patch.setattr(matching, "MAX_BOXES", max_boxes)
        pieces = Assigner(num_classes=NUM_CLASSES)(anchors, [target])
    assert torch.equal(whole[0], pieces[0]) and torch.equal(whole[1], pieces[1])


def test_other_anchors_of_the_same_sizes_are_not_taken_for_the_last_ones():
    boxes = torch.tensor([[3.0, 5.0, 40.0, 44.0], [20.0, 10.0, 90.0, 60.0]])
    instances = Instances((96, 96), gt_boxes=Boxes(boxes), gt_classes=torch.tensor([0, 1]))
    assigner = Assigner(num_classes=2)
    coarse, fine = (
        DefaultAnchorGenerator(sizes=[[size]], aspect_ratios=[[1.0]], strides=[8], offset=0.0)(
            [torch.zeros(1, 1, 12, 12)]
        )
        for size in (48.0, 32.0)
    )
    for anchors in (coarse, fine, fine, [*fine, *coarse], fine):
        expected = Assigner(num_classes=2)(anchors, [instances])
        assert all(map(torch.equal, assigner(anchors, [instances]), expected))


def test_a_block_of_boxes_keeps_the_low_quality_matches_of_the_blocks_before(monkeypatch):
    """Without the grid, as on a device: `match_dense` sees a box at a time."""
    monkeypatch.setattr("retina_focal.assigner.find_grid", lambda levels: None)
    anchors = [Boxes(torch.tensor([[0.0, 0, 8, 8], [31, 2, 47, 19], [70, 70, 80, 95]]))]
    boxes = [[0.0, 0, 3, 3], [40, 10, 60, 30], [78, 80, 99, 99]]  # each overlaps one, a little
    target = instances(boxes)
    monkeypatch.setattr(matching, "MAX_PAIRS", 1)
    labels, matched_idxs = Assigner(num_classes=NUM_CLASSES)(anchors, [target])
    assert labels[0].tolist() == target.gt_classes.tolist()
    assert matched_idxs[0].tolist() == [0, 1, 2]
