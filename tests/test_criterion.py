"""Laws of the criterion: the two losses and what they are divided by."""

import pytest
import torch
import torch.nn.functional as F
from detectron2.config import get_cfg as detectron2_get_cfg
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.structures import Boxes, Instances
from detectron2.utils import comm
from fvcore.nn import sigmoid_focal_loss as fvcore_focal_loss
from pretend import Counting, PretendTensor, to_device

from retina_focal import (
    Assigner,
    Criterion,
    FocalStarLoss,
    HardExampleSampler,
    HingeLoss,
    SigmoidFocalLoss,
    assigner,
    get_cfg,
    normalizers,
    sigmoid_focal_loss,
)
from retina_focal.box_losses import BOX_LOSSES, box_regression_loss

K, A = 4, 3
SHAPES = [(6, 8), (3, 4)]
TRANSFORM = Box2BoxTransform(weights=(1.0, 1.0, 1.0, 1.0))
BOXES = [[[3.0, 4.0, 30.0, 40.0], [20.0, 10.0, 50.0, 45.0]], [], [[0.0, 0.0, 20.0, 20.0]]]


def criterion(**kwargs):
    return Criterion(num_classes=K, box2box_transform=TRANSFORM, **kwargs)


def case(boxes=BOXES, seed=0):
    """(anchors, logits, deltas, labels, matched_idxs, gt_instances) of len(boxes) images."""
    generator = torch.Generator().manual_seed(seed)
    anchors = DefaultAnchorGenerator(
        sizes=[[24.0], [48.0]], aspect_ratios=[[0.5, 1.0, 2.0]], strides=[8, 16], offset=0.0
    )([torch.zeros(1, 1, *shape) for shape in SHAPES])
    num_images = len(boxes)

    def draw(channels):
        return [
            torch.randn(num_images, channels, *shape, generator=generator).requires_grad_()
            for shape in SHAPES
        ]

    instances = [
        Instances(
            (48, 64),
            gt_boxes=Boxes(torch.tensor(x).reshape(-1, 4)),
            gt_classes=torch.arange(len(x)) % K,
        )
        for x in boxes
    ]
    labels, matched_idxs = Assigner(num_classes=K)(anchors, instances)
    return anchors, draw(A * K), draw(A * 4), labels, matched_idxs, instances


def flat(levels, channels):
    """(N, A x C, H, W) a level to (N, R, C), detectron2's order."""
    return torch.cat(
        [x.unflatten(1, (A, channels)).permute(0, 3, 4, 1, 2).flatten(1, 3) for x in levels], 1
    )


def sums_by_definition(anchors, logits, deltas, labels, matched_idxs, instances, **box_loss):
    """(N,) sums of both losses, image by image over flattened anchors, and the (N,) positives."""
    cls_sums, box_sums = [], []
    for i, target in enumerate(instances):
        valid, positive = labels[i] >= 0, (labels[i] >= 0) & (labels[i] < K)
        one_hot = F.one_hot(labels[i][valid], K + 1)[:, :-1].float()
        logit = flat(logits, K)[i][valid]
        cls_sums.append(fvcore_focal_loss(logit, one_hot, 0.25, 2.0, "sum"))
        box_sums.append(
            box_regression_loss(
                flat(deltas, 4)[i][positive],
                Boxes.cat(anchors).tensor[positive],
                target.gt_boxes.tensor[matched_idxs[i][positive]],
                TRANSFORM,
                **box_loss,
            ).sum()
        )
    positives = ((labels >= 0) & (labels < K)).sum(1)
    return torch.stack(cls_sums), torch.stack(box_sums), positives


@pytest.mark.parametrize("loss_type", BOX_LOSSES)
def test_losses_are_the_definitions_summed_and_divided_by_the_positives(loss_type):
    arguments = case()
    cls_sums, box_sums, positives = sums_by_definition(*arguments, loss_type=loss_type)
    assert (positives > 0).tolist() == [True, False, True]
    losses, statistics = criterion(normalizer="batch", box_reg_loss_type=loss_type)(*arguments)
    assert list(losses) == ["loss_cls", "loss_box_reg"]
    # 1e-5: fp32 sums in different orders.
    expected = [cls_sums.sum() / positives.sum(), box_sums.sum() / positives.sum()]
    torch.testing.assert_close(list(losses.values()), expected, rtol=1e-5, atol=0)
    assert statistics["num_pos_anchors"] == pytest.approx(positives.sum().item() / 3)
    logits, deltas = arguments[1], arguments[2]
    ours = torch.autograd.grad(sum(losses.values()), [*logits, *deltas])
    theirs = torch.autograd.grad(sum(expected), [*logits, *deltas])
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-7)


def test_image_divides_every_image_by_its_own_positives_then_averages():
    arguments = case()
    cls_sums, box_sums, positives = sums_by_definition(*arguments)
    losses, _ = criterion(normalizer="image")(*arguments)
    positives = positives.clamp(min=1)
    expected = [(cls_sums / positives).mean(), (box_sums / positives).mean()]
    torch.testing.assert_close(list(losses.values()), expected, rtol=1e-5, atol=0)


def test_ema_is_stocks_moving_average_from_100():
    module = criterion()
    expected = 100.0
    for positives in ([7, 5], [0, 0], [300]):
        expected = 0.9 * expected + 0.1 * max(sum(positives), 1)
        assert module.normalizers(torch.tensor(positives))[0].item() == pytest.approx(expected)
    assert module.loss_normalizer.item() == pytest.approx(expected)


def test_ema_stands_still_without_gradients():
    module = criterion()
    with torch.no_grad():
        assert module.normalizers(torch.tensor([7, 5])).tolist() == [100.0, 100.0]
    assert module.loss_normalizer.item() == 100.0


def test_an_ema_step_does_not_change_the_divisor_of_the_step_before():
    module = criterion()
    first = module.normalizers(torch.tensor([7]))
    before = first.clone()
    module.normalizers(torch.tensor([700]))
    assert torch.equal(first, before)


@pytest.mark.parametrize("others, mine", [(30, 10), (0, 0), (0, 5)])
def test_global_divides_by_all_positives_over_the_processes(monkeypatch, others, mine):
    monkeypatch.setattr(comm, "get_world_size", lambda: 4)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda total: total.add_(others))
    (value,) = criterion(normalizer="global").normalizers(torch.tensor([mine]))
    assert value.item() == max(mine + others, 1) / 4


def test_global_in_one_process_is_batch():
    positives = torch.tensor([3, 0, 9])
    values = [criterion(normalizer=name).normalizers(positives) for name in ("global", "batch")]
    assert torch.equal(*values) and (values[0] == 12).all()


@pytest.mark.parametrize("normalizer", ["ema", "image", "batch", "global"])
def test_a_batch_without_boxes_has_finite_losses_and_gradients(normalizer):
    arguments = case([[], []])
    losses, statistics = criterion(normalizer=normalizer)(*arguments)
    sum(losses.values()).backward()
    assert losses["loss_box_reg"] == 0 and losses["loss_cls"] > 0
    assert statistics["num_pos_anchors"] == 0
    assert all(x.grad.isfinite().all() for x in arguments[1])
    # A gradient, of zeros: DDP waits for every parameter.
    assert all((x.grad == 0).all() for x in arguments[2])


def test_the_normaliser_is_saved_for_ema_alone():
    assert list(criterion().state_dict()) == ["loss_normalizer"]
    assert criterion().loss_normalizer.dtype == torch.float32
    for name in ("image", "batch", "global"):
        assert not criterion(normalizer=name).state_dict()


def test_a_checkpoint_without_the_normaliser_loads_strictly_and_leaves_100():
    module = criterion()
    missing, unexpected = module.load_state_dict({}, strict=True)
    assert not missing and not unexpected and module.loss_normalizer == 100
    module.load_state_dict({"loss_normalizer": torch.tensor(37.0)})
    assert module.loss_normalizer == 37


def test_config_without_our_node_means_stock():
    module = Criterion(detectron2_get_cfg())
    assert module.normalizer is normalizers.ema and module.num_classes == 80
    assert (module.classification_loss.alpha, module.classification_loss.gamma) == (0.25, 2.0)
    assert (module.smooth_l1_beta, module.box_reg_loss_type) == (0.1, "smooth_l1")


def test_the_config_names_the_loss_and_its_parameters():
    cfg = get_cfg()
    cfg.MODEL.RETINANET.FOCAL_LOSS_GAMMA = 4.0
    cfg.MODEL.RETINA_FOCAL.FOCAL_STAR.BETA = 0.0
    cfg.MODEL.RETINA_FOCAL.HINGE.MARGIN = 0.7
    expected = {
        "focal": SigmoidFocalLoss(0.25, 4.0),
        "cross_entropy": SigmoidFocalLoss(-1, 0),
        "focal_star": FocalStarLoss(4.0, 0.0),
        "hinge": HingeLoss(0.7),
    }
    for name, loss in expected.items():
        cfg.MODEL.RETINA_FOCAL.CLS_LOSS = name
        assert Criterion(cfg).classification_loss == loss


def test_ohem_sums_over_the_kept_anchors_and_divides_by_their_number():
    anchors, logits, deltas, labels, matched_idxs, instances = case()
    sampler = HardExampleSampler(batch_size=8, neg_per_pos=3)
    kept = sampler(anchors, logits, labels, K)
    counts = (kept >= 0).sum(1)
    assert counts.tolist() == [8, 0, 8]
    cls_sums, _, _ = sums_by_definition(anchors, logits, deltas, kept, matched_idxs, instances)
    arguments = anchors, logits, deltas, labels, matched_idxs, instances
    with_ohem, _ = criterion(sampler=sampler)(*arguments)
    without, _ = criterion()(*arguments)
    # 1e-4: the background of all anchors is added in fp32 and mostly subtracted again.
    torch.testing.assert_close(
        with_ohem["loss_cls"], cls_sums.sum() / counts.sum(), rtol=1e-4, atol=0
    )
    assert torch.equal(with_ohem["loss_box_reg"], without["loss_box_reg"])
    gradients = torch.autograd.grad(with_ohem["loss_cls"], logits)
    assert torch.equal((flat(gradients, K) != 0).any(2), kept >= 0)


def test_ohem_that_keeps_nothing_has_a_loss_of_zero_and_gradients():
    arguments = case([[], []])
    losses, _ = criterion(sampler=HardExampleSampler(neg_per_pos=3))(*arguments)
    sum(losses.values()).backward()
    assert losses["loss_cls"].item() == pytest.approx(0, abs=1e-4)
    assert all((x.grad == 0).all() for x in arguments[1])


def test_ohem_is_off_unless_the_config_says_so():
    cfg = get_cfg()
    assert Criterion(cfg).sampler is None
    cfg.MODEL.RETINA_FOCAL.OHEM.ENABLED = True
    cfg.MODEL.RETINA_FOCAL.OHEM.BATCH_SIZE = 512
    cfg.MODEL.RETINA_FOCAL.OHEM.NMS_THRESH = 0.7
    cfg.MODEL.RETINA_FOCAL.OHEM.NEG_PER_POS = 3
    found = vars(Criterion(cfg).sampler)
    assert found == {"batch_size": 512, "nms_thresh": 0.7, "neg_per_pos": 3}


@pytest.mark.parametrize("gamma", [0.0, 2.0])
def test_alpha_from_data_gives_the_two_classes_the_same_total_weight(gamma):
    anchors, logits, deltas, labels, matched_idxs, instances = case()
    one_hot = F.one_hot(labels.clamp(min=0), K + 1)[..., :-1].float()
    counts = (labels >= 0)[..., None].expand_as(one_hot)
    loss = sigmoid_focal_loss(flat(logits, K), one_hot, -1, gamma)
    positives, negatives = loss[counts & (one_hot == 1)], loss[counts & (one_hot == 0)]
    # Each mean with the weight n+ n- / (n+ + n-), and the whole over n+.
    share = len(negatives) / (len(negatives) + len(positives))
    module = criterion(
        classification_loss=SigmoidFocalLoss(0.25, gamma), alpha_from_data=True, normalizer="batch"
    )
    losses, _ = module(anchors, logits, deltas, labels, matched_idxs, instances)
    # 1e-4: 1 - alpha is small.
    torch.testing.assert_close(
        losses["loss_cls"], share * (positives.mean() + negatives.mean()), rtol=1e-4, atol=0
    )
    assert module.classification_loss == SigmoidFocalLoss(0.25, gamma)


def test_alpha_from_data_without_positives_or_anchors_is_finite():
    arguments = case([[], []])
    for labels in (arguments[3], torch.full_like(arguments[3], -1)):
        losses, _ = criterion(alpha_from_data=True)(*arguments[:3], labels, *arguments[4:])
        assert losses["loss_cls"].isfinite()


@pytest.mark.parametrize("name", ["cross_entropy", "focal_star", "hinge"])
def test_alpha_from_data_is_refused_for_a_loss_without_alpha(name):
    cfg = get_cfg()
    cfg.MODEL.RETINA_FOCAL.ALPHA_FROM_DATA = True
    assert Criterion(cfg).alpha_from_data
    cfg.MODEL.RETINA_FOCAL.CLS_LOSS = name
    with pytest.raises(ValueError, match=r"ALPHA_FROM_DATA is True.*CLS_LOSS focal"):
        Criterion(cfg)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"normalizer": "sum"}, "NORMALIZER is 'sum'; expected one of ema, image, batch, global"),
        ({"box_reg_loss_type": "l2"}, "BBOX_REG_LOSS_TYPE is 'l2'; expected one of smooth_l1"),
    ],
)
def test_unknown_names_are_refused_in_words(arguments, message):
    with pytest.raises(ValueError, match=message):
        criterion(**arguments)


@pytest.mark.parametrize("rule", assigner.ASSIGNMENTS)
def test_matching_and_losses_wait_for_a_device_once(rule):
    arguments = case()
    expected, _ = criterion()(*arguments)
    module, instances = to_device(criterion()), arguments[5]
    anchors = [Boxes(PretendTensor(level.tensor)) for level in arguments[0]]
    logits, deltas = (
        [PretendTensor(x.detach()).requires_grad_() for x in levels] for levels in arguments[1:3]
    )
    with Counting() as counting:
        matching = Assigner(num_classes=K, rule=rule)(anchors, instances)
        losses, _ = module(anchors, logits, deltas, *matching, instances)
        sum(losses.values()).backward()
    assert sum(counting.waits.values()) == 1, counting.waits
    if rule == "detectron2":  # that of `case`
        for name, loss in losses.items():
            torch.testing.assert_close(loss.held, expected[name], rtol=1e-5, atol=0)
