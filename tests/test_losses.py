"""Laws of the classification losses."""

import pytest
import torch
import torch.nn.functional as F
from fvcore.nn import sigmoid_focal_loss as fvcore_focal_loss
from torchvision.ops import sigmoid_focal_loss as torchvision_focal_loss

from retina_focal import get_cfg
from retina_focal.losses import (
    FocalStarLoss,
    HingeLoss,
    SigmoidFocalLoss,
    build_classification_loss,
    focal_star_loss,
    hinge_loss,
    sigmoid_focal_loss,
)

GAMMAS = [0.0, 0.1, 0.5, 1.0, 2.0, 5.0]
ALPHAS = [-1.0, 0.0, 0.25, 0.75, 1.0]


def textbook(logits, targets, alpha, gamma):
    """Equation 5 as the paper prints it."""
    p = logits.sigmoid()
    p_t = torch.where(targets == 1, p, 1 - p)
    alpha_t = torch.where(targets == 1, alpha, 1 - alpha) if alpha >= 0 else 1.0
    return -alpha_t * (1 - p_t) ** gamma * p_t.log()


def logits_and_targets(limit, dtype=torch.float64):
    """A grid of logits, once as negatives and once as positives."""
    x = torch.linspace(-limit, limit, 201, dtype=dtype).repeat(2).requires_grad_()
    return x, (torch.arange(402) >= 201).to(dtype)


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("gamma", GAMMAS)
def test_value_and_gradient_equal_the_textbook_form(alpha, gamma):
    # Up to +-12, where the textbook's 1 - p_t still has ten of float64's sixteen digits.
    x, targets = logits_and_targets(12)
    ours, theirs = sigmoid_focal_loss(x, targets, alpha, gamma), textbook(x, targets, alpha, gamma)
    torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=0)
    (ours_grad,) = torch.autograd.grad(ours.sum(), x)
    (theirs_grad,) = torch.autograd.grad(theirs.sum(), x)
    torch.testing.assert_close(ours_grad, theirs_grad, rtol=1e-8, atol=1e-14)


@pytest.mark.parametrize("peer", [fvcore_focal_loss, torchvision_focal_loss])
@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("gamma", [0.0, 1.0, 2.0, 5.0])
def test_value_and_gradient_equal_fvcore_and_torchvision(alpha, gamma, peer):
    # Both cancel in 1 - p_t, in fp32: hence an absolute tolerance of a few ulp of 1.
    x, targets = logits_and_targets(20, torch.float32)
    ours = sigmoid_focal_loss(x, targets, alpha, gamma)
    theirs = peer(x, targets, alpha, gamma)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    (ours_grad,) = torch.autograd.grad(ours.sum(), x)
    (theirs_grad,) = torch.autograd.grad(theirs.sum(), x)
    torch.testing.assert_close(ours_grad, theirs_grad, rtol=1e-5, atol=1e-6)


def test_gamma_0_without_balancing_is_cross_entropy():
    x, targets = logits_and_targets(100)
    theirs = F.binary_cross_entropy_with_logits(x, targets, reduction="none")
    # torch's form cancels to 0 where the loss is below one ulp of 1.
    torch.testing.assert_close(
        sigmoid_focal_loss(x, targets, -1, 0), theirs, rtol=1e-12, atol=1e-14
    )


def test_alpha_weighs_positives_and_its_complement_negatives():
    x, targets = logits_and_targets(5)
    ratio = sigmoid_focal_loss(x, targets, 0.25) / sigmoid_focal_loss(x, targets, -1)
    torch.testing.assert_close(ratio, torch.where(targets == 1, 0.25, 0.75).double())


@pytest.mark.parametrize("gamma", [*GAMMAS, 1e-3])
def test_saturated_logits_have_finite_values_and_gradients(gamma):
    x = torch.tensor([-100.0, -20.0, 0.0, 20.0, 100.0]).repeat(2).requires_grad_()
    targets = (torch.arange(10) >= 5).float()
    loss = sigmoid_focal_loss(x, targets, 0.25, gamma)
    (grad,) = torch.autograd.grad(loss.sum(), x)
    assert loss.isfinite().all() and grad.isfinite().all()
    dense = SigmoidFocalLoss(0.25, gamma)
    with torch.no_grad():
        for foreground in (False, True):
            assert all(part.isfinite().all() for part in dense(x, foreground))


@pytest.mark.parametrize("alpha", [-1.0, 0.0, 0.25, 1.0])
@pytest.mark.parametrize("gamma", GAMMAS)
def test_closed_form_equals_the_definition_and_its_autograd(alpha, gamma):
    x, targets = logits_and_targets(100)
    definition = sigmoid_focal_loss(x, targets, alpha, gamma)
    (derivative,) = torch.autograd.grad(definition.sum(), x)
    loss, (negative, positive) = SigmoidFocalLoss(alpha, gamma), x.detach().view(2, -1)
    parts = zip(loss(negative, False), loss(positive, True), strict=True)
    value, slope = (torch.cat(part) for part in parts)
    torch.testing.assert_close(value, definition.detach(), rtol=1e-12, atol=1e-40)
    torch.testing.assert_close(slope, derivative, rtol=1e-12, atol=1e-40)


# Each loss by name: the config that makes it, its definition and the form that a textbook prints.
# Of p_t both textbooks take what does not cancel: sigmoid(x_t).
CHOICES = {
    "cross_entropy": (
        {"MODEL.RETINANET.FOCAL_LOSS_ALPHA": 0.75, "MODEL.RETINANET.FOCAL_LOSS_GAMMA": 5.0},
        lambda x, t: sigmoid_focal_loss(x, t, -1, 0),
        lambda x, t: F.binary_cross_entropy_with_logits(x, t, reduction="none"),
    ),
    "focal_star": (
        {"MODEL.RETINA_FOCAL.FOCAL_STAR.BETA": 1.0},
        lambda x, t: focal_star_loss(x, t, 2.0, 1.0),
        lambda x, t: torch.logaddexp(torch.zeros(()), -2 * torch.where(t == 1, x, -x) - 1) / 2,
    ),
    "focal_star, gamma 4": (
        {"MODEL.RETINANET.FOCAL_LOSS_GAMMA": 4.0, "MODEL.RETINA_FOCAL.FOCAL_STAR.BETA": 0.0},
        lambda x, t: focal_star_loss(x, t, 4.0, 0.0),
        lambda x, t: -(4 * torch.where(t == 1, x, -x)).sigmoid().clamp(min=1e-200).log() / 4,
    ),
    "hinge": (
        {},
        lambda x, t: hinge_loss(x, t, 0.5),
        lambda x, t: (0.5 - torch.where(t == 1, x, -x).sigmoid()).clamp(min=0),
    ),
    "hinge, margin 0.8": (
        {"MODEL.RETINA_FOCAL.HINGE.MARGIN": 0.8},
        lambda x, t: hinge_loss(x, t, 0.8),
        lambda x, t: (0.8 - torch.where(t == 1, x, -x).sigmoid()).clamp(min=0),
    ),
}


def loss_cfg(name, keys):
    cfg = get_cfg()
    pairs = {"MODEL.RETINA_FOCAL.CLS_LOSS": name.split(",")[0], **keys}
    cfg.merge_from_list([x for pair in pairs.items() for x in pair])
    return cfg


@pytest.mark.parametrize("name", CHOICES)
def test_each_named_loss_equals_its_definition_and_the_textbook(name):
    keys, definition, textbook_form = CHOICES[name]
    loss = build_classification_loss(loss_cfg(name, keys))
    x, targets = logits_and_targets(100)
    # Logits of 0 are the kink of hinge at m 0.5, where a derivative is a matter of taste.
    apart = x.detach().abs() > 1e-9
    negative, positive = x.detach().view(2, -1)
    parts = zip(loss(negative, False), loss(positive, True), strict=True)
    value, slope = (torch.cat(part) for part in parts)
    for reference in (definition, textbook_form):
        expected = reference(x, targets)
        (derivative,) = torch.autograd.grad(expected.sum(), x)
        # 1e-14: the textbooks round at an ulp of 1, or of the margin, where the loss is less.
        torch.testing.assert_close(value, expected.detach(), rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(slope[apart], derivative[apart], rtol=1e-12, atol=1e-14)


def test_the_losses_where_the_values_are_known_by_heart():
    """At logit 0, p is 1/2: CE log 2; FL* log(1 + e^-beta) / gamma; hinge m - 1/2."""
    x = torch.zeros(1, dtype=torch.float64)
    for foreground in (False, True):
        assert SigmoidFocalLoss(-1, 0)(x, foreground)[0].item() == pytest.approx(0.69314718056)
        assert FocalStarLoss(2, 1)(x, foreground)[0].item() == pytest.approx(0.31326168752 / 2)
        assert FocalStarLoss(4, 0)(x, foreground)[0].item() == pytest.approx(0.69314718056 / 4)
        assert HingeLoss(0.75)(x, foreground)[0].item() == 0.25


def test_gamma_0_with_alpha_is_alpha_balanced_cross_entropy():
    x, targets = logits_and_targets(100)
    weights = torch.where(targets == 1, 0.75, 0.25).double()
    theirs = F.binary_cross_entropy_with_logits(x, targets, weights, reduction="none")
    keys = {"MODEL.RETINANET.FOCAL_LOSS_ALPHA": 0.75, "MODEL.RETINANET.FOCAL_LOSS_GAMMA": 0.0}
    loss, (negative, positive) = build_classification_loss(loss_cfg("focal", keys)), x.view(2, -1)
    ours = torch.cat([loss(negative, False)[0], loss(positive, True)[0]])
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


def test_focal_star_with_gamma_1_and_beta_0_is_cross_entropy():
    x, targets = logits_and_targets(100)
    torch.testing.assert_close(
        focal_star_loss(x, targets, 1, 0), sigmoid_focal_loss(x, targets, -1, 0)
    )


@pytest.mark.parametrize("loss", [SigmoidFocalLoss(), SigmoidFocalLoss(-1, 0), FocalStarLoss()])
@pytest.mark.parametrize("foreground", [True, False])
def test_fp32_has_five_digits_however_sure_or_wrong_the_logit(loss, foreground):
    # 1 + e^x alone keeps one digit of e^x at -14, and none at -17.
    x = torch.linspace(-20, 20, 4001)
    for single, double in zip(loss(x, foreground), loss(x.double(), foreground), strict=True):
        torch.testing.assert_close(single.double(), double, rtol=5e-6, atol=0)
    x = torch.linspace(-20, 20, 4001, dtype=torch.float64)
    p, gamma = x.sigmoid(), 2.0
    by_hand = 0.75 * p**gamma * torch.log1p(x.exp())
    torch.testing.assert_close(SigmoidFocalLoss()(x, False)[0], by_hand, rtol=1e-13, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", CHOICES)
def test_each_named_loss_is_finite_and_leaves_the_logits_alone(name, dtype):
    loss = build_classification_loss(loss_cfg(name, CHOICES[name][0]))
    x = torch.tensor([-100.0, -20.0, 0.0, 20.0, 100.0], dtype=dtype)
    kept = x.clone()
    for foreground in (False, True):
        for part in loss(x, foreground):
            assert part.dtype == dtype and part.isfinite().all()
    assert torch.equal(x, kept)


def test_the_default_loss_is_stocks():
    assert build_classification_loss(get_cfg()) == SigmoidFocalLoss(0.25, 2.0)


@pytest.mark.parametrize(
    "name, keys, message",
    [
        ("softmax", {}, "CLS_LOSS is 'softmax'; expected one of focal, cross_entropy, focal_star"),
        ("focal", {"MODEL.RETINANET.FOCAL_LOSS_GAMMA": -1.0}, "GAMMA is -1.0; expected at least 0"),
        ("focal_star", {"MODEL.RETINANET.FOCAL_LOSS_GAMMA": 0.0}, "GAMMA is 0.0; .*above 0"),
        ("hinge", {"MODEL.RETINA_FOCAL.HINGE.MARGIN": 1.5}, "HINGE.MARGIN is 1.5; expected above"),
    ],
)
def test_a_loss_that_does_not_exist_is_refused_in_words(name, keys, message):
    with pytest.raises(ValueError, match=message):
        build_classification_loss(loss_cfg(name, keys))
