"""Laws of inference (Sec. 4.1): a loop over every pair of anchor and class finds the same."""

import math

import pytest
import torch
import torchvision
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.structures import Boxes

from retina_focal import Postprocessor, get_cfg, postprocess
from retina_focal.candidates import logit

TRANSFORM = Box2BoxTransform(weights=(1.0, 1.0, 1.0, 1.0))
K, A = 3, 2
SHAPES = [(5, 7), (3, 4), (1, 1)]


def postprocessor(**kwargs):
    return Postprocessor(num_classes=K, box2box_transform=TRANSFORM, **kwargs)


def case(num_images=2, seed=0, shift=-2.0):
    generator = torch.Generator().manual_seed(seed)
    anchors, logits, deltas = [], [], []
    for height, width in SHAPES:
        corner = 60 * torch.rand(height * width * A, 2, generator=generator)
        side = 10 + 30 * torch.rand(height * width * A, 2, generator=generator)
        anchors.append(Boxes(torch.cat([corner, corner + side], 1)))
        logits.append(
            2 * torch.randn(num_images, A * K, height, width, generator=generator) + shift
        )
        deltas.append(0.2 * torch.randn(num_images, A * 4, height, width, generator=generator))
    return anchors, logits, deltas, [(70 + 10 * i, 90) for i in range(num_images)]


def by_loops(anchors, logits, deltas, i, thresh, topk, nms_thresh, max_detections):
    """Scores, classes and boxes of image i, one pair of anchor and class after the other."""
    found = []
    for level_anchors, level_logits, level_deltas in zip(anchors, logits, deltas, strict=True):
        height, width = level_logits.shape[-2:]
        level = []
        for y in range(height):
            for x in range(width):
                for a in range(A):
                    anchor = level_anchors.tensor[(y * width + x) * A + a][None]
                    delta = level_deltas[i, 4 * a : 4 * a + 4, y, x][None]
                    box = TRANSFORM.apply_deltas(delta, anchor)[0]
                    for k in range(K):
                        score = level_logits[i, a * K + k, y, x].sigmoid().item()
                        if score > thresh:
                            level.append((score, k, box))
        found += sorted(level, key=lambda d: -d[0])[:topk]
    kept = []
    for k in range(K):
        of_class = [d for d in found if d[1] == k]
        if of_class:
            boxes, scores = torch.stack([d[2] for d in of_class]), [d[0] for d in of_class]
            for j in torchvision.ops.nms(boxes, torch.tensor(scores), nms_thresh):
                kept.append(of_class[j])
    return sorted(kept, key=lambda d: -d[0])[:max_detections]


@pytest.mark.parametrize(
    "thresh, topk, nms_thresh, max_detections",
    [
        (0.05, 1000, 0.5, 100),
        (0.0, 1000, 0.5, 1000),
        (0.3, 5, 0.3, 100),
        (0.05, 20, 1.0, 7),
        (0.999, 1000, 0.5, 100),
    ],
)
@pytest.mark.parametrize("on_cpu", [True, False], ids=["CPU", "as on a device"])
def test_detections_equal_those_of_loops(
    monkeypatch, on_cpu, thresh, topk, nms_thresh, max_detections
):
    monkeypatch.setattr(postprocess, "_may_read", lambda x: on_cpu)
    arguments = case()
    results = postprocessor(
        score_thresh=thresh,
        topk_candidates=topk,
        nms_thresh=nms_thresh,
        max_detections_per_image=max_detections,
    )(*arguments)
    for i, (result, size) in enumerate(zip(results, arguments[3], strict=True)):
        expected = by_loops(*arguments[:3], i, thresh, topk, nms_thresh, max_detections)
        assert result.image_size == size and len(result) == len(expected)
        if expected:
            scores, classes, boxes = zip(*expected, strict=True)
            torch.testing.assert_close(result.scores, torch.tensor(scores), rtol=1e-6, atol=0)
            assert result.pred_classes.tolist() == list(classes)
            # 1e-5: batched_nms and the decoder see the same boxes in other batch shapes.
            torch.testing.assert_close(
                result.pred_boxes.tensor, torch.stack(boxes), rtol=1e-5, atol=1e-4
            )


@pytest.mark.parametrize("shift, expected", [(-100.0, 0), (-2.0, None)])
def test_images_may_have_no_detection(shift, expected):
    results = postprocessor()(*case(shift=shift))
    assert all((len(r) == 0) == (expected == 0) for r in results)
    assert all(r.pred_boxes.tensor.shape == (len(r), 4) for r in results)


def test_a_score_has_to_be_above_the_threshold():
    anchors = [Boxes(torch.tensor([[0.0, 0.0, 10.0, 10.0]]))]
    below, above = logit(0.05) - 1e-4, logit(0.05) + 1e-4
    scores = torch.tensor([below, above, -math.inf]).view(1, 3, 1, 1)
    (result,) = postprocessor()(anchors, [scores], [torch.zeros(1, 4, 1, 1)], [(20, 20)])
    assert result.pred_classes.tolist() == [1]


def test_boxes_of_different_classes_do_not_suppress_each_other():
    anchors = [Boxes(torch.tensor([[0.0, 0.0, 10.0, 10.0]] * 2))]
    logits = torch.tensor([3.0, 2.0, -9.0, 1.0, -9.0, -9.0]).view(1, 6, 1, 1)
    (result,) = postprocessor()(anchors, [logits], [torch.zeros(1, 8, 1, 1)], [(20, 20)])
    assert result.pred_classes.tolist() == [0, 1]


@pytest.mark.parametrize("on_cpu", [True, False], ids=["CPU", "as on a device"])
def test_nms_may_take_boxes_of_all_classes_for_one_object(monkeypatch, on_cpu):
    monkeypatch.setattr(postprocess, "_may_read", lambda x: on_cpu)
    anchors = [Boxes(torch.tensor([[0.0, 0.0, 10.0, 10.0], [0.0, 0.0, 10.0, 9.0]]))]
    logits = torch.tensor([3.0, 2.0, -9.0, -9.0, -9.0, 1.0]).view(1, 6, 1, 1)
    two_images = logits.repeat(2, 1, 1, 1), torch.zeros(2, 8, 1, 1), [(20, 20)] * 2
    results = postprocessor(class_agnostic_nms=True)(
        anchors, *([x] for x in two_images[:2]), two_images[2]
    )
    assert [x.pred_classes.tolist() for x in results] == [[0], [0]]  # images stay apart


def test_memory_format_changes_nothing():
    anchors, logits, deltas, sizes = case()
    to_last = [[x.to(memory_format=torch.channels_last) for x in y] for y in (logits, deltas)]
    plain = postprocessor()(anchors, logits, deltas, sizes)
    last = postprocessor()(anchors, *to_last, sizes)
    for a, b in zip(plain, last, strict=True):
        assert torch.equal(a.pred_boxes.tensor, b.pred_boxes.tensor)
        assert torch.equal(a.scores, b.scores) and torch.equal(a.pred_classes, b.pred_classes)


def test_logit_is_the_inverse_of_the_sigmoid():
    for score in (0.05, 0.5, 0.999):
        assert torch.tensor(logit(score)).double().sigmoid().item() == pytest.approx(score)
    assert (logit(0), logit(-1), logit(1)) == (-math.inf, -math.inf, math.inf)


def test_config_names_the_numbers():
    cfg = get_cfg()
    cfg.MODEL.RETINANET.SCORE_THRESH_TEST = 0.1
    cfg.MODEL.RETINANET.TOPK_CANDIDATES_TEST = 7
    cfg.MODEL.RETINANET.NMS_THRESH_TEST = 0.6
    cfg.TEST.DETECTIONS_PER_IMAGE = 9
    assert not Postprocessor(cfg).class_agnostic_nms
    cfg.MODEL.RETINA_FOCAL.TEST.CLASS_AGNOSTIC_NMS = True
    p = Postprocessor(cfg)
    assert p.class_agnostic_nms
    found = (p.score_thresh, p.topk_candidates, p.nms_thresh, p.max_detections_per_image)
    assert found == (0.1, 7, 0.6, 9) and p.num_classes == 80


@pytest.mark.parametrize("on_cpu", [True, False], ids=["CPU", "as on a device"])
def test_a_score_equal_to_the_threshold_does_not_pass(on_cpu, monkeypatch):
    monkeypatch.setattr(postprocess, "_may_read", lambda x: on_cpu)
    anchors = [Boxes(torch.tensor([[0.0, 0.0, 10.0, 10.0]]))]
    logits = torch.tensor([0.0, 0.5, -1.0]).view(1, 3, 1, 1)  # sigmoid(0) is 0.5 exactly
    (result,) = postprocessor(score_thresh=0.5)(
        anchors, [logits], [torch.zeros(1, 4, 1, 1)], [(20, 20)]
    )
    assert result.pred_classes.tolist() == [1]


def test_half_precision_loses_no_score_above_the_threshold():
    """bf16 rounds the threshold's logit, -2.944, to -2.9375, whose score is 0.0503."""
    anchors = [Boxes(torch.tensor([[0.0, 0.0, 10.0, 10.0]]))]
    logits = torch.tensor([-2.9375, -2.953125, -9.0]).bfloat16().view(1, 3, 1, 1)
    (result,) = postprocessor()(anchors, [logits], [torch.zeros(1, 4, 1, 1)], [(20, 20)])
    assert result.pred_classes.tolist() == [0]


def test_a_network_of_fp64_has_its_boxes_in_fp64():
    """A box of 25,000 px that begins in the image: fp32 has steps of 1/512 px there."""
    transform = Box2BoxTransform(weights=(10.0, 10.0, 5.0, 5.0))
    anchors = torch.tensor([[0.0, 0.0, 400.0, 200.0], [10.0, 20.0, 30.0, 60.0]])
    deltas = torch.tensor([[312.3, 0.1, 20.67, 90.0], [1.0, -2.0, 3.0, -4.0]], dtype=torch.float64)
    found = postprocess.decoded(transform, deltas, anchors)
    expected = transform.apply_deltas(deltas, anchors)
    assert found.dtype == torch.float64 and expected.dtype == torch.float32
    torch.testing.assert_close(found, expected.double(), rtol=1e-6, atol=1e-2)
    width = 400 * math.exp(20.67 / 5)
    assert found[0, 0] == pytest.approx(200 + 400 * 31.23 - width / 2, abs=1e-9)
    assert abs(found[0, 0] - expected[0, 0]) > 1e-4


@pytest.mark.parametrize("on_cpu", [True, False], ids=["CPU", "as on a device"])
def test_boxes_are_clipped_before_nms_and_empty_ones_kept_where_that_is_asked_for(
    monkeypatch, on_cpu
):
    """Two boxes that differ outside of the image alone, and one that lies outside."""
    monkeypatch.setattr(postprocess, "_may_read", lambda x: on_cpu)
    boxes = torch.tensor([[10.0, 10, 30, 20], [10.0, 10, 90, 20], [50.0, 0, 60, 10]])
    logits = torch.full((1, A * K, 1, 3), -9.0)
    logits[0, 0, 0] = torch.tensor([2.0, 1.0, 0.0])
    anchors = [Boxes(boxes.repeat_interleave(A, 0))]
    deltas = [torch.zeros(1, A * 4, 1, 3)]
    found = {}
    for clip in (False, True):
        for keep in (False, True):
            (result,) = postprocessor(clip_before_nms=clip, keep_empty_boxes=keep)(
                anchors, [logits], deltas, [(40, 30)], [(80, 60)]
            )
            found[clip, keep] = result.pred_boxes.tensor.tolist()
            assert result.scores.tolist() == sorted(result.scores.tolist(), reverse=True)
    seen, empty = [20.0, 20.0, 60.0, 40.0], [60.0, 0.0, 60.0, 20.0]
    assert found[False, False] == [seen, seen]  # an IoU of 0.25 where nothing is clipped
    assert found[False, True] == [seen, seen, empty]
    assert found[True, False] == [seen]
    assert found[True, True] == [seen, empty]
