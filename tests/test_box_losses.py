"""Laws of the box losses: fvcore and torchvision agree, and a perfect box costs nothing."""

import pytest
import torch
import torchvision.ops as ops
from detectron2.modeling.box_regression import Box2BoxTransform
from fvcore.nn import smooth_l1_loss

from retina_focal.box_losses import BOX_LOSSES, IOU_LOSSES, box_regression_loss

TRANSFORM = Box2BoxTransform(weights=(1.0, 1.0, 1.0, 1.0))


def random_boxes(count, seed):
    generator = torch.Generator().manual_seed(seed)
    corner = 100 * torch.rand(count, 2, generator=generator)
    return torch.cat([corner, corner + 5 + 60 * torch.rand(count, 2, generator=generator)], 1)


@pytest.fixture
def case():
    anchors, gt_boxes = random_boxes(50, 0), random_boxes(50, 1)
    deltas = 0.3 * torch.randn(50, 4, generator=torch.Generator().manual_seed(2))
    return deltas.requires_grad_(), anchors, gt_boxes


def assert_same_value_and_gradient(ours, theirs, deltas):
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    (ours_grad,) = torch.autograd.grad(ours.sum(), deltas, retain_graph=True)
    (theirs_grad,) = torch.autograd.grad(theirs.sum(), deltas)
    torch.testing.assert_close(ours_grad, theirs_grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("beta", [0.0, 0.11, 1.0])
def test_smooth_l1_equals_fvcore_and_its_definition(case, beta):
    deltas, anchors, gt_boxes = case
    ours = box_regression_loss(deltas, anchors, gt_boxes, TRANSFORM, "smooth_l1", beta)
    gt_deltas = TRANSFORM.get_deltas(anchors, gt_boxes)
    assert_same_value_and_gradient(ours, smooth_l1_loss(deltas, gt_deltas, beta).sum(1), deltas)
    error = (deltas - gt_deltas).abs()
    definition = torch.where(error < beta, 0.5 * error**2 / max(beta, 1e-9), error - 0.5 * beta)
    torch.testing.assert_close(ours, definition.sum(1), rtol=1e-5, atol=1e-6)


def test_smooth_l1_is_fp64_where_the_deltas_are(case):
    deltas, anchors, gt_boxes = (x.double() for x in case)
    gt_deltas = TRANSFORM.get_deltas(anchors, gt_boxes)
    expected = smooth_l1_loss(deltas, gt_deltas, beta=0.0).sum(1)
    ours = box_regression_loss(deltas, anchors.float(), gt_boxes.float(), TRANSFORM)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    "name, theirs",
    [
        ("giou", ops.generalized_box_iou_loss),
        ("diou", ops.distance_box_iou_loss),
        ("ciou", ops.complete_box_iou_loss),
    ],
)
def test_iou_losses_equal_torchvision(case, name, theirs):
    deltas, anchors, gt_boxes = case
    ours = box_regression_loss(deltas, anchors, gt_boxes, TRANSFORM, name)
    expected = theirs(TRANSFORM.apply_deltas(deltas, anchors), gt_boxes)
    assert_same_value_and_gradient(ours, expected, deltas)


@pytest.mark.parametrize("name", BOX_LOSSES)
def test_a_perfect_prediction_costs_nothing(name):
    anchors, gt_boxes = random_boxes(20, 0), random_boxes(20, 1)
    deltas = TRANSFORM.get_deltas(anchors, gt_boxes)
    loss = box_regression_loss(deltas, anchors, gt_boxes, TRANSFORM, name)
    torch.testing.assert_close(loss, torch.zeros(20), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", BOX_LOSSES)
def test_no_positives_give_an_empty_loss_with_a_gradient(name):
    deltas = torch.zeros(0, 4, requires_grad=True)
    loss = box_regression_loss(deltas, torch.zeros(0, 4), torch.zeros(0, 4), TRANSFORM, name)
    assert loss.shape == (0,)
    loss.sum().backward()
    assert deltas.grad.shape == (0, 4)


@pytest.mark.parametrize("name", BOX_LOSSES)
def test_half_precision_deltas_cost_what_their_fp32_values_cost(case, name):
    deltas, anchors, gt_boxes = case
    half = deltas.detach().bfloat16()
    arguments = (anchors, gt_boxes, TRANSFORM, name)
    assert torch.equal(
        box_regression_loss(half, *arguments), box_regression_loss(half.float(), *arguments)
    )


@pytest.mark.parametrize("name", IOU_LOSSES)
def test_iou_losses_do_not_depend_on_scale(case, name):
    deltas, anchors, gt_boxes = case
    small = box_regression_loss(deltas, anchors, gt_boxes, TRANSFORM, name)
    large = box_regression_loss(deltas, 4 * anchors, 4 * gt_boxes, TRANSFORM, name)
    torch.testing.assert_close(small, large, rtol=1e-4, atol=1e-5)


def test_deltas_are_detectron2s_to_the_last_bit():
    generator = torch.Generator().manual_seed(0)
    corners = 500 * torch.rand(2, 1000, 2, generator=generator)
    sizes = 1 + 300 * torch.rand(2, 1000, 2, generator=generator)
    anchors, gt_boxes = torch.cat([corners, corners + sizes], dim=2)
    transform = Box2BoxTransform(weights=(10.0, 10.0, 5.0, 5.0))
    pred = transform.get_deltas(anchors, gt_boxes)
    loss = box_regression_loss(pred, anchors, gt_boxes, transform, smooth_l1_beta=0.0)
    assert (loss == 0).all()
