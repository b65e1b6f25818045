"""Laws of the class losses that came after the paper: value and gradient, against autograd."""

import pytest
import torch
from detectron2.structures import Boxes, pairwise_iou
from hypothesis import given, settings
from hypothesis import strategies as st
from test_criterion import TRANSFORM, K, case, criterion, flat
from test_losses import loss_cfg

from retina_focal import (
    AsymmetricLoss,
    Criterion,
    Poly1FocalLoss,
    QualityFocalLoss,
    VarifocalLoss,
)
from retina_focal.errors import UserError
from retina_focal.losses import build_classification_loss

LOGITS = st.lists(st.floats(-30, 30), min_size=1, max_size=30)
UNIT = st.floats(0, 1)
GAMMA = st.sampled_from([0.0, 0.5, 1.0, 2.0, 4.0])


def binary_cross_entropy(x, q):
    zero = torch.zeros(())
    return q * torch.logaddexp(zero, -x) + (1 - q) * torch.logaddexp(zero, x)


def power(base, exponent):
    """Without the NaN that autograd makes of the derivative of 0^0 and 0^0.5."""
    return base.clamp(min=1e-300) ** exponent


def quality_focal(x, q, beta):
    return power((q - x.sigmoid()).abs(), beta) * binary_cross_entropy(x, q)


def varifocal(x, q, alpha, gamma):
    of_background = (
        (1 - alpha if alpha >= 0 else 1) * power(x.sigmoid(), gamma) * binary_cross_entropy(x, 0)
    )
    return torch.where(q > 0, q * binary_cross_entropy(x, q), of_background)


def poly1(x, t, epsilon, alpha, gamma):
    wrong = (x * (1 - 2 * t)).sigmoid()
    alpha_t = alpha * t + (1 - alpha) * (1 - t) if alpha >= 0 else 1
    cross_entropy = binary_cross_entropy(x, t)
    return alpha_t * (power(wrong, gamma) * cross_entropy + epsilon * wrong ** (gamma + 1))


def asymmetric(x, t, gamma_pos, gamma_neg, margin):
    p_m = (x.sigmoid() - margin).clamp(min=0)
    # 1 - p is sigmoid(-x): that does not cancel.
    rest = torch.where(p_m > 0, (-x).sigmoid() + margin, 1.0)
    of_class = power((-x).sigmoid(), gamma_pos) * binary_cross_entropy(x, 1)
    return torch.where(t == 1, of_class, -power(p_m, gamma_neg) * (p_m > 0) * rest.log())


def assert_closed_form(loss, definition, x, *others):
    """`loss` of both kinds of logits has the value of `definition` and the derivative of autograd.

    Args:
        definition: of logits and targets q, 0 for background.
        others: the q of the object's class, where it is not 1.
    """
    x = torch.tensor(x, dtype=torch.float64)
    for foreground in (False, True):
        q = others[0] if others and foreground else torch.full_like(x, foreground)
        soft = (q,) if others and foreground else ()
        leaf = x.clone().requires_grad_()
        expected = definition(leaf, q)
        (derivative,) = torch.autograd.grad(expected.sum(), leaf)
        found, slope = loss(x, foreground, *soft)
        torch.testing.assert_close(found, expected.detach(), rtol=1e-9, atol=1e-13)
        torch.testing.assert_close(slope, derivative, rtol=1e-9, atol=1e-13)


@settings(max_examples=60)
@given(x=LOGITS, q=UNIT, beta=st.sampled_from([0.0, 1.0, 1.5, 2.0, 4.0]))
def test_quality_focal_loss_is_its_equation(x, q, beta):
    quality = torch.full((len(x),), q, dtype=torch.float64)
    # At p = q the derivative of |q - p| is a matter of taste.
    distance = torch.tensor(x, dtype=torch.float64).sigmoid() - quality
    quality = torch.where(distance.abs() < 1e-6, (quality + 0.5) % 1, quality)
    assert_closed_form(QualityFocalLoss(beta), lambda a, b: quality_focal(a, b, beta), x, quality)


@settings(max_examples=60)
@given(x=LOGITS, q=UNIT, alpha=st.sampled_from([-1.0, 0.0, 0.25, 1.0]), gamma=GAMMA)
def test_varifocal_loss_is_its_equation(x, q, alpha, gamma):
    quality = torch.full((len(x),), q, dtype=torch.float64)
    quality[::3] = 0.0  # a positive anchor whose box has moved away counts as background
    loss = VarifocalLoss(alpha, gamma)
    assert_closed_form(loss, lambda a, b: varifocal(a, b, alpha, gamma), x, quality)


@settings(max_examples=60)
@given(x=LOGITS, epsilon=st.floats(-2, 4), alpha=st.sampled_from([-1.0, 0.25, 0.9]), gamma=GAMMA)
def test_poly1_focal_loss_is_its_equation(x, epsilon, alpha, gamma):
    loss = Poly1FocalLoss(epsilon, alpha, gamma)
    assert_closed_form(loss, lambda a, b: poly1(a, b, epsilon, alpha, gamma), x)


@settings(max_examples=60)
@given(x=LOGITS, gamma_pos=GAMMA, gamma_neg=GAMMA, margin=st.sampled_from([0.0, 0.05, 0.3]))
def test_asymmetric_loss_is_its_equation(x, gamma_pos, gamma_neg, margin):
    kink = torch.tensor(margin, dtype=torch.float64).logit().item() if margin else 100.0
    x = [a if abs(a - kink) > 1e-6 else 0.0 for a in x]
    loss = AsymmetricLoss(gamma_pos, gamma_neg, margin)
    assert_closed_form(loss, lambda a, b: asymmetric(a, b, gamma_pos, gamma_neg, margin), x)


def test_the_losses_where_the_values_are_known_by_heart():
    """At logit 0, p is 1/2 and CE log 2, whatever q is."""
    x, log2 = torch.zeros(1, dtype=torch.float64), 0.69314718056
    q = torch.tensor([0.8], dtype=torch.float64)
    assert QualityFocalLoss(2)(x, True, q)[0].item() == pytest.approx(0.3**2 * log2)
    assert QualityFocalLoss(2)(x, False)[0].item() == pytest.approx(0.5**2 * log2)
    assert VarifocalLoss()(x, True, q)[0].item() == pytest.approx(0.8 * log2)
    assert VarifocalLoss()(x, False)[0].item() == pytest.approx(0.75 * 0.5**2 * log2)
    assert Poly1FocalLoss(2)(x, True)[0].item() == pytest.approx(0.25 * (log2 / 4 + 2 / 8))
    assert AsymmetricLoss()(x, True)[0].item() == pytest.approx(log2)
    assert AsymmetricLoss()(x, False)[0].item() == pytest.approx(0.45**4 * 0.59783700076)


def test_poly1_without_epsilon_and_asymmetric_without_asymmetry_are_the_focal_loss():
    x = torch.linspace(-20, 20, 81, dtype=torch.float64)
    for foreground in (False, True):
        focal = build_classification_loss(loss_cfg("focal", {}))(x, foreground)
        torch.testing.assert_close(Poly1FocalLoss(0)(x, foreground), focal)
        unbalanced = loss_cfg("focal", {"MODEL.RETINANET.FOCAL_LOSS_ALPHA": -1.0})
        focal = build_classification_loss(unbalanced)(x, foreground)
        torch.testing.assert_close(AsymmetricLoss(2, 2, 0)(x, foreground), focal)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["quality_focal", "varifocal", "poly1", "asymmetric"])
def test_each_is_finite_and_leaves_the_logits_alone(name, dtype):
    loss = build_classification_loss(loss_cfg(name, {}))
    x = torch.tensor([-1000.0, -100.0, -20.0, 0.0, 20.0, 100.0, 1000.0], dtype=dtype)
    kept, soft = x.clone(), getattr(loss, "soft_targets", False)
    for q in (0.0, 0.5, 1.0):
        for foreground in (False, True):
            more = (torch.full((7,), q),) if soft and foreground else ()
            for part in loss(x, foreground, *more):
                assert part.dtype == dtype and part.isfinite().all()
    assert torch.equal(x, kept)


@pytest.mark.parametrize("definition, loss", [
    (lambda x, q: quality_focal(x, q, 2.0), QualityFocalLoss()),
    (lambda x, q: varifocal(x, q, 0.25, 2.0), VarifocalLoss()),
])  # fmt: skip
def test_the_target_is_the_iou_of_the_decoded_box_and_gets_no_gradient(definition, loss):
    anchors, logits, deltas, labels, matched_idxs, instances = case()
    module = criterion(classification_loss=loss, normalizer="batch")
    losses, _ = module(anchors, logits, deltas, labels, matched_idxs, instances)
    plain, _ = criterion(normalizer="batch")(
        anchors, logits, deltas, labels, matched_idxs, instances
    )
    assert torch.equal(losses["loss_box_reg"], plain["loss_box_reg"])  # not weighted
    boxes, total = Boxes.cat(anchors).tensor, 0
    positive = (labels >= 0) & (labels < K)
    for i, target in enumerate(instances):
        q = torch.zeros(len(boxes), K)
        for anchor in positive[i].nonzero().flatten().tolist():
            decoded = TRANSFORM.apply_deltas(
                flat(deltas, 4)[i, anchor : anchor + 1], boxes[[anchor]]
            )
            iou = pairwise_iou(Boxes(decoded), target.gt_boxes)[0, matched_idxs[i, anchor]]
            q[anchor, labels[i, anchor]] = iou.detach()
        total = total + definition(flat(logits, K)[i], q)[labels[i] >= 0].sum()
    expected = total / positive.sum()
    torch.testing.assert_close(losses["loss_cls"], expected, rtol=1e-5, atol=0)
    ours = torch.autograd.grad(losses["loss_cls"], logits, retain_graph=True)
    theirs = torch.autograd.grad(expected, logits)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-7)
    assert torch.autograd.grad(losses["loss_cls"], deltas, allow_unused=True) == (None, None)


@pytest.mark.parametrize("name", ["quality_focal", "varifocal"])
@pytest.mark.parametrize("key", ["OHEM.ENABLED", "ALPHA_FROM_DATA"])
def test_soft_targets_refuse_what_cannot_weigh_them(name, key):
    cfg = loss_cfg(name, {f"MODEL.RETINA_FOCAL.{key}": True})
    message = "has soft targets, which neither" if key.startswith("OHEM") else "weigh by alpha"
    with pytest.raises(UserError, match=message):
        Criterion(cfg)


@pytest.mark.parametrize(
    "name, keys, message",
    [
        ("quality_focal", {"MODEL.RETINANET.FOCAL_LOSS_GAMMA": 0.5}, "expects 0 or at least 1"),
        ("varifocal", {"MODEL.RETINANET.FOCAL_LOSS_GAMMA": -1.0}, "GAMMA is -1.0"),
        ("poly1", {"MODEL.RETINANET.FOCAL_LOSS_GAMMA": -1.0}, "GAMMA is -1.0"),
        ("asymmetric", {"MODEL.RETINA_FOCAL.ASYMMETRIC.MARGIN": 1.0}, "MARGIN 1.0; expected"),
        ("asymmetric", {"MODEL.RETINA_FOCAL.ASYMMETRIC.GAMMA_NEG": -1.0}, "GAMMA_NEG -1.0"),
    ],
)
def test_a_parameter_out_of_range_is_refused_in_words(name, keys, message):
    with pytest.raises(UserError, match=message):
        build_classification_loss(loss_cfg(name, keys))


def test_the_config_names_each_loss_and_its_parameters():
    keys = {"MODEL.RETINANET.FOCAL_LOSS_GAMMA": 3.0, "MODEL.RETINA_FOCAL.POLY1.EPSILON": -0.5}
    of = {name: build_classification_loss(loss_cfg(name, keys)) for name in
          ("quality_focal", "varifocal", "poly1", "asymmetric")}  # fmt: skip
    assert list(of.values()) == [
        QualityFocalLoss(3.0),
        VarifocalLoss(0.25, 3.0),
        Poly1FocalLoss(-0.5, 0.25, 3.0),
        AsymmetricLoss(0.0, 4.0, 0.05),
    ]
    # The kernels have a term for each, of poly-1 where gamma is 2.
    states = {name: "background_term" in vars(type(loss)) for name, loss in of.items()}
    assert states == {**dict.fromkeys(of, True), "poly1": False}
    assert "background_term" in vars(type(build_classification_loss(loss_cfg("poly1", {}))))
