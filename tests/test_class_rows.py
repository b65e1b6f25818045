"""Laws of fine-tuning from weights with other classes."""

import logging

import pytest
import torch
from detectron2.layers import ShapeSpec
from test_resume import Trainer, small
from test_resume import toy as toy
from torch import nn

from retina_focal.head import FocalRetinaNetHead, prior_bias
from retina_focal.weights.class_rows import SCORES, match_class_rows

A = 2
OLD, NEW = ["cat", "dog", "bird"], ["fish", "bird", "cat", "cow"]


def net(num_classes: int, channels: int = 4, num_anchors: int = A) -> nn.Module:
    model = nn.Module()
    model.head = FocalRetinaNetHead(
        input_shape=[ShapeSpec(channels=channels)],
        num_classes=num_classes,
        num_anchors=num_anchors,
        conv_dims=[channels],
    )
    nn.init.normal_(model.head.cls_score.bias)
    return model


def test_every_class_of_the_same_name_keeps_its_scores_and_the_rest_the_prior(caplog):
    old, new = net(3), net(4)
    nn.init.constant_(new.head.cls_score.bias, prior_bias(0.01))
    first = {k: x.clone() for k, x in new.state_dict().items()}
    checkpoint = {"model": old.state_dict(), "classes": OLD}
    with caplog.at_level(logging.INFO):
        match_class_rows(new, checkpoint, NEW, "old.pth")
    new.load_state_dict(checkpoint["model"])  # strictly
    for name in SCORES:
        was, now = old.state_dict()[name], new.state_dict()[name]
        for i, j in [(1, 2), (2, 0)]:  # bird and cat
            assert torch.equal(now[i::4], was[j::3])
        for i in (0, 3):
            assert torch.equal(now[i::4], first[name][i::4])
    # What any image is scored with, for the classes that stay.
    features = [torch.randn(1, 4, 5, 5)]
    before, after = old.head(features)[0][0], new.head(features)[0][0]
    torch.testing.assert_close(after[:, [1, 2, 5, 6]], before[:, [2, 0, 5, 3]])
    assert caplog.messages == [
        "fine-tuning: 2 of 4 classes keep what 'old.pth' has of them (bird, cat); 2 start from the "
        "prior (fish, cow); 1 of the file are dropped (dog)"
    ]


@pytest.mark.parametrize(
    "classes, model",
    [
        (None, net(3)),  # a file of others
        (NEW, net(4)),  # the same classes
        (OLD, net(4, channels=6)),
        (OLD, net(4, num_anchors=3)),
        ("abc", net(4)),
        ([], net(4)),
        (["x"] * 5, net(4)),  # does not fit the rows
    ],
)
def test_what_does_not_fit_is_left_as_it_is(classes, model, caplog):
    weights = net(4 if classes is NEW else 3).state_dict()
    checkpoint = {"model": dict(weights), **({} if classes is None else {"classes": classes})}
    with caplog.at_level(logging.INFO):
        match_class_rows(model, checkpoint, NEW)
    assert checkpoint["model"].keys() == weights.keys() and not caplog.messages
    assert all(torch.equal(x, weights[k]) for k, x in checkpoint["model"].items())


def test_a_training_starts_from_the_rows_of_its_classes(toy, tmp_path, caplog):
    model = Trainer.build_model(small(tmp_path))
    nn.init.normal_(model.head.cls_score.bias)
    path = str(tmp_path / "other.pth")
    torch.save({"model": model.state_dict(), "classes": ["x", "blue"]}, path)
    with caplog.at_level(logging.INFO):
        trainer = Trainer(small(tmp_path, **{"MODEL.WEIGHTS": path}))
        trainer.resume_or_load(False)
    assert f"1 of 2 classes keep what '{path}' has of them" in caplog.text
    bias = trainer.model.head.cls_score.bias
    assert torch.equal(bias[1::2], model.head.cls_score.bias[1::2])
    torch.testing.assert_close(bias[0::2], torch.full_like(bias[0::2], prior_bias(0.01)))
