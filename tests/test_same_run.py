"""A checkpoint of another model or training is refused, with what differs."""

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.solver.build import maybe_add_gradient_clipping
from torch import nn

from retina_focal.training.same_run import (
    AnotherRun,
    expect_same_training,
    expect_same_weights,
    training_of,
)


def net(width: int = 2, norm: type[nn.Module] = nn.BatchNorm1d) -> nn.ModuleDict:
    return nn.ModuleDict({"body": nn.Linear(3, width), "norm": norm(2)})


def test_weights_differ_by_names_and_shapes_and_not_by_what_libraries_add():
    whole = net().state_dict()
    expect_same_weights("x.pth", whole, net())
    expect_same_weights("x.pth", {k: x for k, x in whole.items() if "num_b" not in k}, net())
    more = {"criterion.loss_normalizer": torch.ones(()), "pixel_mean": torch.ones(3)}
    expect_same_weights("x.pth", {**whole, **more}, net())
    others = r"it lacks 2 \(norm.running_mean, norm.running_var\) of the weights"
    with pytest.raises(AnotherRun, match=others):
        expect_same_weights("x.pth", net(norm=lambda n: nn.GroupNorm(1, n)).state_dict(), net())
    shapes = r"2 weights of another shape \('body.bias' is \(5,\), and the config's \(2,\)\)"
    with pytest.raises(AnotherRun, match=rf"{shapes}.*type: MODEL.WEIGHTS x.pth"):
        expect_same_weights("x.pth", net(5).state_dict(), net())
    with pytest.raises(AnotherRun, match=r"it has 1 \(head\) weights that the config's model lac"):
        expect_same_weights("x.pth", {**whole, "head": torch.ones(1)}, net())


def test_a_training_differs_by_its_optimizer_and_by_what_is_frozen():
    model = net()
    sgd = torch.optim.SGD(model.parameters(), 0.1)
    was = training_of(model, sgd)
    assert was["optimizer"] == "SGD" and len(was["trained"]) == 4
    cfg = get_cfg()
    cfg.SOLVER.CLIP_GRADIENTS.ENABLED = True
    clipping = maybe_add_gradient_clipping(cfg, torch.optim.SGD)(model.parameters(), 0.1)
    expect_same_training("x.pth", was, training_of(model, clipping))
    expect_same_training("x.pth", {}, was)  # of an earlier version, or of detectron2
    with pytest.raises(AnotherRun, match="SGD trained it, and the config has AdamW"):
        expect_same_training(
            "x.pth", was, training_of(model, torch.optim.AdamW(model.parameters()))
        )
    model["body"].bias.requires_grad_(False)
    now = training_of(model, sgd)
    with pytest.raises(AnotherRun, match=r"1 \(body.bias\) parameters are trained there and froz"):
        expect_same_training("x.pth", was, now)
    with pytest.raises(AnotherRun, match=r"1 \(body.bias\) parameters are frozen there and train"):
        expect_same_training("x.pth", now, was)
