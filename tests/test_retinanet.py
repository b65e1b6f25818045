"""FocalRetinaNet trains on what real annotations hold, or names what is wrong with them."""

import os
import sys
from collections import Counter
from pathlib import Path

import detectron2
import pytest
import torch
from conftest import PLUGIN, STOCK, pictures, small_cfg
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import nn

import retina_focal

SIZES = [(64, 96), (96, 64)]


def with_boxes(boxes: list[list[float]], classes: list[int]) -> list[dict]:
    """A batch whose first image has these boxes, and whose second has none."""
    batch = pictures(SIZES, [0, 0])
    batch[0]["instances"] = Instances(
        SIZES[0],
        gt_boxes=Boxes(torch.tensor(boxes, dtype=torch.float32).view(-1, 4)),
        gt_classes=torch.tensor(classes, dtype=torch.int64),
    )
    return batch


def train_step(model: nn.Module, batch: list[dict]) -> dict[str, float]:
    """Losses of one forward and backward, without an event storage; all numbers are finite."""
    model.zero_grad()
    losses = model.train()(batch)
    sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values())
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    return {name: loss.item() for name, loss in losses.items()}


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return build_model(small_cfg(**PLUGIN))


def test_a_batch_without_boxes_gives_every_parameter_a_gradient(model):
    """Zero where there is nothing to learn, never None: DDP waits for every parameter."""
    losses = train_step(model, pictures(SIZES, [0, 0]))
    assert losses["loss_box_reg"] == 0
    assert model.head.bbox_pred.weight.grad.abs().max() == 0
    assert model.head.cls_score.weight.grad.abs().max() > 0


def test_batches_of_different_sizes_train(model):
    for sizes, num_boxes in (([(96, 64)], [3]), ([(64, 64), (70, 130), (33, 40)], [2, 0, 1])):
        assert train_step(model, pictures(sizes, num_boxes))["loss_box_reg"] > 0


@pytest.mark.parametrize(
    "box", [[200.0, 200, 240, 240], [-50.0, -50, -10, -10]], ids=["beyond", "before"]
)
def test_a_box_outside_the_image_trains(model, box):
    train_step(model, with_boxes([box, [10, 10, 50, 50]], [0, 1]))


@pytest.mark.parametrize(
    "box", [[20.0, 20, 20, 20], [20.0, 20, 20, 60], [20.0, 20, 60, 20]], ids=["point", "x", "y"]
)
def test_a_box_without_area_makes_no_anchor_positive(model, box):
    with EventStorage() as storage:
        losses = train_step(model, with_boxes([box], [0]))
        assert storage.latest()["num_pos_anchors"][0] == 0
    assert losses["loss_box_reg"] == 0


def test_2000_boxes_in_an_image_train(model):
    assert train_step(model, pictures(SIZES, [2000, 0]))["loss_box_reg"] > 0


@pytest.mark.parametrize("num_classes", [1, 1203])
def test_any_number_of_classes_trains(num_classes):
    names = {"MODEL.RETINANET.NUM_CLASSES": num_classes, "MODEL.RETINANET.NUM_CONVS": 1}
    many = build_model(small_cfg(**PLUGIN, **names))
    batch = pictures(SIZES, [3, 0], num_classes)
    batch[0]["instances"].gt_classes[0] = num_classes - 1
    train_step(many, batch)


@pytest.mark.parametrize(
    ("box", "label", "message"),
    [
        ([0.0, 0, float("nan"), 9], 0, r"image 'cells/7.jpg'.*box 1 is \[0.0, 0.0, nan, 9.0\]"),
        ([9.0, 0, 3, 9], 0, "image 'cells/7.jpg'.*box 1 is .* x0 <= x1"),
        ([0.0, 0, 9, 9], 3, "image 'cells/7.jpg'.*box 1 has class 3.* 3 classes.*NUM_CLASSES"),
        ([0.0, 0, 9, 9], -1, "image 'cells/7.jpg'.*box 1 has class -1"),
    ],
    ids=["nan", "corners swapped", "class K", "class -1"],
)
def test_a_record_that_cannot_train_is_named(model, box, label, message):
    batch = with_boxes([[10.0, 10, 50, 50], box], [1, label])
    batch[0]["file_name"] = "cells/7.jpg"
    with pytest.raises(ValueError, match=message):
        model.train()(batch)


def test_training_without_ground_truth_says_eval(model):
    batch = pictures(SIZES, [1, 1])
    del batch[0]["instances"]
    with pytest.raises(ValueError, match=r"image 0 of the batch.*model.eval\(\)"):
        model.train()(batch)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"MODEL.RESNETS.OUT_FEATURES": ["res4", "res5"]}, "res3.*MODEL.RESNETS.OUT_FEATURES"),
        ({"MODEL.FPN.IN_FEATURES": ["res4", "res5"]}, "P3 to P7.*res3"),
        ({"MODEL.RETINANET.IN_FEATURES": ["p2", "p3"]}, "p2.*IN_FEATURES"),
        ({"MODEL.RESNETS.DEPTH": 50, "MODEL.RESNETS.RES5_DILATION": 2}, "stride 16.*DILATION"),
    ],
    ids=["bottom-up", "pyramid", "head", "dilation"],
)
def test_features_that_cannot_make_p3_to_p7_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        build_model(small_cfg(**PLUGIN, **changes))


def entered(model: nn.Module, batch: list[dict]) -> set[tuple[str, str, int]]:
    """(file, function, line) of the plugin and of detectron2 that a second step enters."""
    roots = tuple(os.path.dirname(p.__file__) + os.sep for p in (retina_focal, detectron2))
    found = set()

    def profile(frame, event, _):
        code = frame.f_code
        ours = code.co_filename.startswith(roots) and not code.co_name.startswith("<")
        if event == "call" and ours:
            found.add((code.co_filename, code.co_name, code.co_firstlineno))

    with EventStorage():
        sum(model(batch).values()).backward()
        sys.setprofile(profile)
        try:
            sum(model(batch).values()).backward()
        finally:
            sys.setprofile(None)
    return found


# The files of ours that a training step enters and how many functions of each: what a reader must
# open to follow it. A file may come where it holds an idea of its own, a function where it has a
# name that could be a heading; neither for plumbing.
OF_A_STEP = {
    "retinanet.py": 6,  # the table of contents, preprocessing, the sizes of images and features
    "network.py": 1,  # backbone and head
    "folding.py": 2,  # the weights of trained convolutions with frozen norms
    "padding.py": 1,  # the size that all images of the step share
    "transfer.py": 1,  # to a device, where there is one
    "anchors.py": 1,
    "ground_truth.py": 1,  # checks
    "assigner.py": 2,
    "matching.py": 4,  # windows, pairs, their IoU, the best of each anchor
    "targets.py": 2,  # what is not background
    "precision.py": 2,  # the autocast, the layout
    "head.py": 1,
    "box_tower.py": 4,  # split at the last norm, find the cells, run there
    "criterion.py": 2,
    "normalizers.py": 1,
    "losses.py": 1,
    "dense_sum.py": 8,  # forward, backward, background in chunks, two corrections
    "box_losses.py": 1,
}


def test_a_training_step_enters_few_functions(model):
    batch = pictures(SIZES, [3, 0])
    stock = entered(build_model(small_cfg(**STOCK)).train(), batch)
    ours = entered(model.train(), batch)
    own = Counter(Path(file).name for file, _, _ in ours if "retina_focal" in file)
    assert own == OF_A_STEP
    # Stock has neither one size for several processes, nor targets found before the network, nor
    # weights that are folded together.
    assert len(ours) <= 1.2 * len(stock)


def test_a_backbone_that_rounds_otherwise_trains_on_the_anchors_of_its_features(model):
    """Labels come before the network. So they are for the sizes that its features should have."""
    batch, losses = pictures([(96, 96)], [3]), []
    with pytest.MonkeyPatch.context() as patch:
        for strides in (model.strides, dict.fromkeys(model.strides, 32)):
            patch.setattr(model, "strides", strides)
            model.criterion.loss_normalizer.fill_(100)
            losses.append(train_step(model, batch))
    assert losses[0] == losses[1]
