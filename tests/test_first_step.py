"""The first training step has a closed form: every anchor scores pi, so the loss is known.

loss_cls x normaliser / P = [(RK - P) L_neg(pi) + P L_pos(pi)] / P over the anchors that are not
ignored (Sec. 3.3); a wrong prior, class count or normalisation shows here before it costs a run.
"""

import math

import pytest
import torch
from conftest import pictures, small_cfg
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import build_model

from retina_focal import get_cfg
from retina_focal.config import config_path
from retina_focal.head import prior_bias

ALPHA = 0.25


@pytest.fixture(params=["resnet_50", "lite0"])
def model(request):
    """R-50 with random weights, and the pretrained Lite0 of the quick starts."""
    torch.manual_seed(0)
    if request.param == "resnet_50":
        return build_model(small_cfg(depth=50, **{"MODEL.META_ARCHITECTURE": "FocalRetinaNet"}))
    cfg = get_cfg()
    cfg.merge_from_file(config_path("quick_start/bccd.yaml"))
    # The paper's head: group norm and fewer convolutions give the first scores a spread.
    cfg.merge_from_list(["MODEL.RETINANET.NORM", "", "MODEL.RETINANET.NUM_CONVS", 4])
    cfg.MODEL.DEVICE = "cpu"
    model = build_model(cfg)
    DetectionCheckpointer(model).load(str(request.getfixturevalue("lite0_weights")))
    return model


def closed_form(pi: float, gamma: float, num_negatives: int, num_positives: int) -> float:
    """[(RK - P) L_neg(pi) + P L_pos(pi)] / P of the alpha-balanced focal loss."""
    negative = (1 - ALPHA) * pi**gamma * -math.log(1 - pi)
    positive = ALPHA * (1 - pi) ** gamma * -math.log(pi)
    return (num_negatives * negative + num_positives * positive) / num_positives


@torch.no_grad()
def test_first_loss_and_mean_score_are_those_of_the_prior(model):
    model.train()
    batch = pictures([(608, 800)], num_boxes=[12])
    features = model.backbone(model.preprocess_image(batch).tensor)
    features = [features[name] for name in model.head_in_features]
    anchors = model.anchor_generator(features)
    gt_instances = [x["instances"] for x in batch]
    labels, matched_idxs = model.assigner(anchors, gt_instances)
    num_positives = int(((labels >= 0) & (labels < 3)).sum())
    num_negatives = 3 * int((labels >= 0).sum()) - num_positives
    assert num_positives > 20
    for pi in (0.01, 0.5):
        model.head.cls_score.bias.fill_(prior_bias(pi))
        logits, deltas = model.head(features)
        scores = torch.cat([x.sigmoid().flatten() for x in logits])
        assert scores.mean().item() == pytest.approx(pi, rel=0.02)
        for gamma in (0.0, 2.0):
            cfg = small_cfg(**{"MODEL.RETINANET.FOCAL_LOSS_GAMMA": gamma})
            criterion = type(model.criterion)(cfg)
            losses, _ = criterion(anchors, logits, deltas, labels, matched_idxs, gt_instances)
            found = losses["loss_cls"] * criterion.loss_normalizer / num_positives
            expected = closed_form(pi, gamma, num_negatives, num_positives)
            assert found.item() == pytest.approx(expected, rel=0.02), (pi, gamma)
