"""The focal loss in detectron2's two-stage models: all anchors, none sampled."""

import logging

import pytest
import torch
from conftest import pictures
from detectron2 import model_zoo
from detectron2.config import CfgNode
from detectron2.config import get_cfg as detectron2_get_cfg
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

from retina_focal import add_retina_focal_config, sigmoid_focal_loss
from retina_focal.config import config_path

ON_P2_P6 = model_zoo.get_config_file("COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml")
ON_P3_P7 = config_path("ablations/faster_rcnn_focal_rpn.yaml")


def faster_rcnn_cfg(path: str = ON_P2_P6) -> CfgNode:
    """A Faster R-CNN of 32 channels, with the proposal generator of this package by its names."""
    cfg = detectron2_get_cfg()
    cfg.merge_from_file(path)
    small = {
        "MODEL.DEVICE": "cpu",
        "MODEL.WEIGHTS": "",
        "MODEL.BACKBONE.FREEZE_AT": 0,
        "MODEL.RESNETS.DEPTH": 18,
        "MODEL.RESNETS.RES2_OUT_CHANNELS": 64,
        "MODEL.RESNETS.NORM": "BN",
        "MODEL.FPN.OUT_CHANNELS": 32,
        "MODEL.ROI_HEADS.NUM_CLASSES": 3,
        "MODEL.PROPOSAL_GENERATOR.NAME": "FocalRPN",
        "MODEL.RPN.HEAD_NAME": "FocalRPNHead",
    }
    cfg.merge_from_list([x for pair in small.items() for x in pair])
    return cfg


@pytest.mark.parametrize("path", [ON_P2_P6, ON_P3_P7], ids=["P2-P6", "P3-P7"])
def test_faster_rcnn_takes_a_training_step_and_detects(path):
    torch.manual_seed(0)
    model = build_model(faster_rcnn_cfg(path)).train()
    batch = pictures([(128, 160), (96, 128)], num_boxes=[4, 0])
    with EventStorage() as storage:
        losses = model(batch)
        assert storage.latest()["rpn/num_pos_anchors"][0] > 0
    assert set(losses) == {"loss_rpn_cls", "loss_rpn_loc", "loss_cls", "loss_box_reg"}
    sum(losses.values()).backward()
    for name, parameter in model.proposal_generator.named_parameters():
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name
    with torch.no_grad():
        results = model.eval()([{"image": batch[0]["image"]}])
    assert results[0]["instances"].has("pred_boxes")


def test_every_anchor_that_is_not_ignored_counts():
    torch.manual_seed(0)
    generator = build_model(faster_rcnn_cfg()).proposal_generator
    anchors = generator.anchor_generator([torch.zeros(1, 32, s, s) for s in (32, 16, 8, 4, 2)])
    counts = [len(x) for x in anchors]
    gt = pictures([(128, 128)], num_boxes=[5])[0]["instances"]
    labels, boxes = generator.label_and_sample_anchors(anchors, [gt])
    logits = [torch.randn(1, count) for count in counts]
    deltas = [torch.zeros(1, count, 4) for count in counts]
    kept = labels[0] >= 0
    assert kept.sum() > generator.batch_size_per_image  # which sampling would have left
    with EventStorage():
        found = generator.losses(anchors, logits, labels, deltas, boxes)["loss_rpn_cls"]
    expected = sigmoid_focal_loss(torch.cat(logits, 1)[0][kept], (labels[0][kept] == 1).float())
    normalizer = 0.9 * 100 + 0.1 * (labels[0] == 1).sum()  # the first step of detectron2's average
    torch.testing.assert_close(found, expected.sum() / normalizer, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    "key, value",
    [
        ("CLS_LOSS", "cross_entropy"),
        ("CLS_LOSS", "focal_star"),
        ("CLS_LOSS", "hinge"),
        ("ALPHA_FROM_DATA", True),
        ("OHEM.ENABLED", True),
    ],
)
def test_every_choice_of_the_class_loss_trains_the_proposals(key, value):
    torch.manual_seed(0)
    cfg = faster_rcnn_cfg()
    add_retina_focal_config(cfg)
    cfg.merge_from_list([f"MODEL.RETINA_FOCAL.{key}", value])
    model = build_model(cfg).train()
    with EventStorage():
        losses = model(pictures([(64, 96)], num_boxes=[4]))
    losses["loss_rpn_cls"].backward()
    gradient = model.proposal_generator.rpn_head.objectness_logits.weight.grad
    assert gradient.isfinite().all() and gradient.abs().max() > 0


def test_objectness_starts_at_the_prior():
    torch.manual_seed(0)
    head = build_model(faster_rcnn_cfg()).proposal_generator.rpn_head
    logits, _ = head([torch.randn(1, 32, 16, 16)])
    assert logits[0].sigmoid().mean().item() == pytest.approx(0.01, rel=0.02)


def test_what_sampling_would_need_is_said_to_be_unused(caplog):
    with caplog.at_level(logging.INFO, logger="retina_focal"):
        build_model(faster_rcnn_cfg())
    assert "BATCH_SIZE_PER_IMAGE (256) and POSITIVE_FRACTION (0.5) are unused" in caplog.text
