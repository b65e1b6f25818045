"""The first training step has a closed form: every anchor scores pi, so the loss is known.

loss_cls x normaliser / P = [(RK - P) L_neg(pi) + P L_pos(pi)] / P over the anchors that are not
ignored (Sec. 3.3); a wrong prior, class count or normalisation shows here before it costs a run.
"""

import functools
import itertools
import logging
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import PLUGIN, pictures, small_cfg
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.engine import SimpleTrainer
from detectron2.modeling import build_backbone, build_model
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from retina_focal import (
    Criterion,
    FocalStarLoss,
    HardExampleSampler,
    HingeLoss,
    SigmoidFocalLoss,
    focal_star_loss,
    get_cfg,
    hinge_loss,
    sigmoid_focal_loss,
)
from retina_focal.config import config_path
from retina_focal.head import prior_bias
from retina_focal.training import first_step
from retina_focal.training.first_step import FirstStepCheck

CONFIGS = Path(config_path("Base-RetinaFocal.yaml")).parent
ALPHA = 0.25
# What each of the known causes is called by, and what is to be typed.
PRIOR = "MODEL.RETINANET.PRIOR_PROB"
CLASSES = "MODEL.RETINANET.NUM_CLASSES"
FROZEN = "frozen norms are without statistics"
PIXELS = "MODEL.PIXEL_STD"
CAUSES = (PRIOR, CLASSES, FROZEN, PIXELS)


@pytest.fixture(params=["resnet_50", "lite0"])
def model(request):
    """R-50 with random weights, and the pretrained Lite0 of the quick starts."""
    torch.manual_seed(0)
    if request.param == "resnet_50":
        return build_model(small_cfg(depth=50, **{"MODEL.META_ARCHITECTURE": "FocalRetinaNet"}))
    # The paper's head: group norm and fewer convolutions give the first scores a spread.
    return lite0(request, **{"MODEL.RETINANET.NORM": "", "MODEL.RETINANET.NUM_CONVS": 4})


def lite0(request, **keys: object) -> nn.Module:
    cfg = get_cfg()
    cfg.merge_from_file(config_path("quick_start/bccd.yaml"))
    cfg.merge_from_list([x for pair in keys.items() for x in pair])
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


# Each loss beside its definition.
LOSSES = {
    "focal": (SigmoidFocalLoss(0.25, 2.0), sigmoid_focal_loss),
    "focal without alpha": (
        SigmoidFocalLoss(-1, 0.5),
        functools.partial(sigmoid_focal_loss, alpha=-1, gamma=0.5),
    ),
    "cross_entropy": (
        SigmoidFocalLoss(-1, 0.0),
        functools.partial(F.binary_cross_entropy_with_logits, reduction="none"),
    ),
    "focal_star": (FocalStarLoss(2.0, 1.0), focal_star_loss),
    "hinge": (HingeLoss(0.5), hinge_loss),
}


def labelled(num_positives: int) -> Tensor:
    """Labels of one 5x4 level of two images, 3 anchors per cell and K = 4 classes, a fifth of
    them ignored."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.where(torch.rand(2, 60, generator=generator) < 0.2, -1, 4)
    labels.view(-1)[:num_positives] = torch.arange(num_positives) % 4
    return labels


@pytest.mark.parametrize("num_positives", [0, 1, 17])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        *itertools.product(LOSSES, ["ema", "image", "batch", "global", "OHEM"]),
        ("focal", "ALPHA_FROM_DATA"),  # the others have no alpha
    ],
)
def test_the_closed_form_is_every_loss_at_the_prior_whatever_divides_it(
    name, options, num_positives
):
    loss, definition = LOSSES[name]
    from_data = options == "ALPHA_FROM_DATA"
    criterion = Criterion(
        num_classes=4,
        box2box_transform=Box2BoxTransform((1.0, 1.0, 1.0, 1.0)),
        classification_loss=loss,
        alpha_from_data=from_data,
        sampler=HardExampleSampler(batch_size=8) if options == "OHEM" else None,
        normalizer="ema" if from_data or options == "OHEM" else options,
    )
    labels = labelled(num_positives)
    kept = labels.flatten()[labels.flatten() >= 0]
    targets = F.one_hot(kept, 5)[:, :4].float()
    if from_data:
        alpha = 1 - max(num_positives, 1) / targets.numel()
        definition = functools.partial(definition, alpha=alpha)
    for pi in (0.01, 0.5):
        logits = [torch.full((2, 12, 5, 4), prior_bias(pi))]
        summed = definition(torch.full_like(targets, prior_bias(pi)), targets).double().sum()
        expected = summed.item() / max(num_positives, 1)
        # fp32 arithmetic of the losses; the hinge at pi 0.5 is zero.
        close = pytest.approx(expected, rel=1e-5, abs=1e-6)
        assert first_step.loss_per_positive(criterion, logits, labels) == close
        assert first_step.closed_form(criterion, labels, pi, 4) == close
        assert first_step.mean_score(logits) == pytest.approx(pi, rel=1e-5)


@torch.no_grad()
def check(model: nn.Module, caplog, batch: list[dict], *datasets: str) -> tuple[str, dict]:
    """What the check says about a first step, and the scalars that it leaves."""
    hook = FirstStepCheck(datasets)
    hook.trainer = SimpleNamespace(model=model.train(), start_iter=0)
    hook.before_train()
    caplog.clear()
    with EventStorage() as storage, caplog.at_level(logging.INFO, logger="retina_focal"):
        model(batch)
    records = [x for x in caplog.records if x.name == "retina_focal.training.first_step"]
    assert len(records) == 1
    assert not (model.backbone._forward_pre_hooks or model.criterion._forward_hooks)
    numbers = {k.split("/")[-1]: x for k, (x, _) in storage.latest().items() if "first_step" in k}
    return f"{records[0].levelname}: {records[0].getMessage()}", numbers


def named(said: str) -> list[str]:
    return [cause for cause in CAUSES if cause in said]


def small_model(**keys: object) -> nn.Module:
    torch.manual_seed(0)
    return build_model(small_cfg(**{**PLUGIN, "MODEL.FPN.OUT_CHANNELS": 32, **keys}))


BATCH = [(128, 160), (96, 128)], [6, 0]


def test_a_healthy_first_step_is_one_line(caplog):
    said, numbers = check(small_model(), caplog, pictures(*BATCH))
    expected = "INFO: first step: loss_cls per positive anchor {per_positive:.4g}, closed form "
    expected += "{per_positive_closed_form:.4g}; mean score {mean_score:.4g}, prior 0.01"
    assert said == expected.format(**numbers)
    assert numbers["mean_score"] == pytest.approx(0.01, rel=0.02)


@pytest.mark.parametrize("pi", [0.01, 0.5])
def test_cross_entropy_on_pretrained_weights_starts_within_2_percent(request, caplog, pi):
    keys = {"NORM": "", "NUM_CONVS": 4, "PRIOR_PROB": pi}
    keys = {f"MODEL.RETINANET.{key}": value for key, value in keys.items()}
    torch.manual_seed(0)
    model = lite0(request, **keys, **{"MODEL.RETINA_FOCAL.CLS_LOSS": "cross_entropy"})
    said, numbers = check(model, caplog, pictures(*BATCH))
    assert said.startswith("INFO")
    expected = pytest.approx(numbers["per_positive_closed_form"], rel=0.02)
    assert numbers["per_positive"] == expected


@pytest.mark.parametrize("pi", [0.0101, 0.02, 0.5])
def test_a_wrong_prior_is_named(caplog, pi):
    """A head of another prior, as an earlier run left it, or of none."""
    model = small_model()
    other = small_model(**{"MODEL.RETINANET.PRIOR_PROB": pi})
    model.head.load_state_dict(other.head.state_dict())
    said, _ = check(model, caplog, pictures(*BATCH))
    if pi == 0.0101:  # within rounding of the half-precision formats
        assert said.startswith("INFO")
    else:
        assert named(said) == [PRIOR]
        assert f"type {PRIOR} {pi} " in said


@pytest.fixture
def three_classes():
    MetadataCatalog.get("three").set(thing_classes=["a", "b", "c"])
    yield "three"
    MetadataCatalog.remove("three")


@pytest.mark.parametrize("loss", ["focal", "cross_entropy"])
def test_a_wrong_class_count_is_named(caplog, three_classes, loss):
    cfg = get_cfg()
    cfg.merge_from_other_cfg(small_cfg(**PLUGIN))
    cfg.merge_from_list([CLASSES, 80, "MODEL.RETINA_FOCAL.CLS_LOSS", loss])
    torch.manual_seed(0)
    said, numbers = check(build_model(cfg), caplog, pictures(*BATCH), three_classes)
    assert named(said) == [CLASSES]
    assert f"type {CLASSES} 3 " in said
    if loss == "cross_entropy":  # most of which is background, unlike of the focal loss
        assert numbers["per_positive"] > 2 * numbers["per_positive_closed_form"]


@pytest.mark.parametrize("norm", ["", "GN"])
def test_frozen_norms_with_random_weights_are_named(caplog, norm):
    keys = {"MODEL.RETINANET.NORM": norm, "MODEL.FPN.OUT_CHANNELS": 256}
    said, numbers = check(small_model(depth=50, norm="FrozenBN", **keys), caplog, pictures(*BATCH))
    assert named(said) == [FROZEN]
    assert "type MODEL.RESNETS.NORM BN" in said
    # Without group norm, which hides it from the loss, it shows there.
    assert norm or numbers["per_positive"] > 10 * numbers["per_positive_closed_form"]


def with_statistics(cfg: CfgNode, merged: bool) -> nn.Module:
    """The backbone of a config, its weights random, its frozen norms those of normalised pictures.

    Args:
        merged: as in the files of detectron2's zoo, into scale and shift.
    """
    trained = cfg.clone()
    trained.merge_from_list(["MODEL.RESNETS.NORM", "BN", "MODEL.BACKBONE.FREEZE_AT", 0])
    torch.manual_seed(0)
    source = build_backbone(trained)
    for module in source.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the average over batches, of which there is one
    images = torch.stack([x["image"] for x in pictures([(128, 160)] * 2, [6, 0])]).float()
    mean, std = (
        torch.tensor(x).view(-1, 1, 1) for x in (cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD)
    )
    with torch.no_grad():
        source((images - mean) / std)
    state = source.state_dict()
    for norm in [x.removesuffix(".running_var") for x in state if x.endswith(".running_var")]:
        del state[f"{norm}.num_batches_tracked"]
        if merged:
            scale = state[f"{norm}.weight"] * (state[f"{norm}.running_var"] + 1e-5).rsqrt()
            state[f"{norm}.bias"] -= state[f"{norm}.running_mean"] * scale
            state[f"{norm}.weight"] = scale
            state[f"{norm}.running_mean"].zero_()
            state[f"{norm}.running_var"].fill_(1)
    backbone = build_backbone(cfg)
    backbone.load_state_dict(state)
    return backbone


@pytest.mark.parametrize("norm", ["", "GN"])
@pytest.mark.parametrize("trained_with, used", [(57.0, 1.0), (1.0, 57.0), (57.0, 57.0)])
def test_pixels_that_are_not_those_of_the_weights_are_named(caplog, norm, trained_with, used):
    keys = {"MODEL.RETINANET.NORM": norm, "MODEL.PIXEL_STD": [trained_with] * 3}
    cfg = small_cfg(norm="FrozenBN", **PLUGIN, **keys)
    backbone = with_statistics(cfg, merged=False)
    cfg.MODEL.PIXEL_STD = [used] * 3
    model = build_model(cfg)
    model.backbone.load_state_dict(backbone.state_dict())
    said, _ = check(model, caplog, pictures(*BATCH))
    if trained_with == used:
        assert said.startswith("INFO")
    else:
        assert named(said) == [PIXELS]
        assert "type those of the weights" in said and f"[{used}, {used}, {used}]" in said


def test_undivided_pixels_are_named_on_pretrained_weights(request, caplog):
    model = lite0(request, **{"MODEL.PIXEL_STD": [1.0, 1.0, 1.0]})
    said, _ = check(model, caplog, pictures(*BATCH))
    assert named(said) == [PIXELS]


def test_what_no_known_cause_explains_is_said_to_be_that(caplog):
    model = small_model()
    with torch.no_grad():
        model.head.cls_score.weight.mul_(1e6)
    said, _ = check(model, caplog, pictures(*BATCH))
    assert said.startswith("WARNING") and "none of the known causes" in said
    assert not named(said)


SHIPPED = sorted(
    str(path.relative_to(CONFIGS))
    for folder in ("COCO-Detection", "ablations", "quick_start")
    for path in (CONFIGS / folder).glob("*.yaml")
    if path.stem not in ("lite0", "faster_rcnn_focal_rpn")
)


@pytest.fixture(scope="module")
def backbones():
    """One for all configs that have the same, since most ablations differ in the loss."""
    built = {}

    def get(cfg: CfgNode) -> nn.Module:
        key = f"{cfg.MODEL.BACKBONE.NAME} {cfg.MODEL.RESNETS} {cfg.MODEL.PIXEL_STD}"
        if key not in built:
            built[key] = with_statistics(cfg, merged=True)
        return built[key]

    return get


@pytest.mark.parametrize("path", SHIPPED)
def test_no_shipped_config_raises_an_alarm(request, caplog, monkeypatch, backbones, path):
    """With pretrained weights where there are any, else with norms that have their statistics."""
    cfg = get_cfg()
    cfg.merge_from_file(config_path(path))
    cfg.MODEL.DEVICE = "cpu"
    if cfg.MODEL.BACKBONE.NAME != "build_retina_focal_timm_fpn_backbone":
        monkeypatch.setattr("retina_focal.retinanet.build_backbone", backbones)
    torch.manual_seed(0)
    model = build_model(cfg)
    if not cfg.MODEL.WEIGHTS.startswith("detectron2://"):
        DetectionCheckpointer(model).load(str(request.getfixturevalue("lite0_weights")))
    datasets = [x for x in cfg.DATASETS.TRAIN if x.startswith("coco")]
    batch = pictures([(128, 160)], [6], model.num_classes)
    said, _ = check(model, caplog, batch, *datasets)
    assert said.startswith("INFO"), said
    assert "closed form" in said


def test_a_trained_head_has_no_closed_form(caplog):
    model = small_model()
    with torch.no_grad():
        # cls_score itself may be new, of another number of classes than the checkpoint's.
        model.head.cls_subnet[0].bias[3] = 0.5
    said, numbers = check(model, caplog, pictures(*BATCH))
    assert said.startswith("INFO") and "no closed form" in said
    assert numbers.keys() == {"per_positive", "mean_score"}


def trained_from(iteration: int, model: nn.Module, *batches: list[dict]) -> None:
    batches = batches or (pictures(*BATCH),) * 2
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    trainer = SimpleTrainer(model, batches, optimizer)
    trainer.register_hooks([FirstStepCheck()])
    trainer.train(iteration, iteration + len(batches))


def said_by(caplog) -> list[str]:
    return [x.getMessage() for x in caplog.records if x.name == "retina_focal.training.first_step"]


def test_only_the_first_step_of_a_run_in_the_main_process_is_checked(caplog, monkeypatch):
    with caplog.at_level(logging.INFO):
        trained_from(100, small_model())
        assert not said_by(caplog)
        trained_from(0, small_model())
        assert len(said_by(caplog)) == 1
        monkeypatch.setattr(comm, "is_main_process", lambda: False)
        caplog.clear()
        hook = FirstStepCheck()
        model = small_model()
        hook.trainer = SimpleNamespace(model=model, start_iter=0)
        hook.before_train()
        assert not model.criterion._forward_pre_hooks


def of_tiny_boxes() -> list[dict]:
    batch = pictures(*BATCH)
    for sample in batch:
        boxes = sample["instances"].gt_boxes.tensor
        boxes[:, 2:] = boxes[:, :2] + 4
    return batch


PAPER = {"ASSIGNMENT": "paper"}


def plugin_model(**keys: str) -> nn.Module:
    cfg = get_cfg()
    cfg.merge_from_other_cfg(small_cfg(**{**PLUGIN, "MODEL.FPN.OUT_CHANNELS": 32}))
    cfg.MODEL.RETINA_FOCAL.update(keys)
    torch.manual_seed(0)
    return build_model(cfg)


def test_boxes_that_reach_no_anchor_are_named_with_their_sizes(caplog):
    said, _ = check(plugin_model(**PAPER), caplog, of_tiny_boxes())
    assert said.startswith("WARNING: first step: loss_cls without a positive anchor")
    assert "None of the 6 boxes of the batch has an anchor" in said
    assert "They are 4 to 4 px once resized" in said and "the anchors 32 to 813" in said
    # Where each box has its best anchor, there is nothing to say.
    assert "None of" not in check(plugin_model(), caplog, of_tiny_boxes())[0]


def test_batches_without_boxes_are_followed_until_one_has_some(caplog, monkeypatch):
    empty = pictures([(96, 128)], [0])
    with caplog.at_level(logging.INFO):
        trained_from(0, plugin_model(**PAPER), empty, empty, of_tiny_boxes(), of_tiny_boxes())
        first, second = said_by(caplog)
        assert "WARNING" not in first and "None of" not in first
        assert second.startswith("batch 3 is the first with boxes. None of the 6 boxes")
        caplog.clear()
        trained_from(0, plugin_model(**PAPER), empty, pictures(*BATCH), of_tiny_boxes())
        assert len(said_by(caplog)) == 1
        caplog.clear()
        monkeypatch.setattr(first_step, "BATCHES_WITHOUT_BOXES", 3)
        trained_from(0, plugin_model(**PAPER), *[empty] * 5)
        assert said_by(caplog)[1:] == ["none of the first 3 batches has a box"]


@pytest.mark.parametrize(
    ("value", "words"), [(255, "white"), (0, "black"), (77, "of one value, 77"), (None, None)]
)
def test_blank_pictures_are_named(caplog, value, words):
    batch = [{**x, "file_name": f"{i}.png"} for i, x in enumerate(pictures(*BATCH))]
    if value is not None:
        batch[1]["image"][:] = value
    said, _ = check(small_model(), caplog, batch)
    assert ("pictures are" in said) == (words is not None)
    if words:
        assert f"1 of 2 pictures are {words} (1.png)" in said and said.startswith("WARNING")


class OtherCriterion(nn.Module):
    """A user's own, with arguments and losses of its own kind."""

    num_classes = 3

    def forward(self, *arguments):
        return {"loss": arguments[1][0].mean()}, {}


def test_a_criterion_that_is_not_ours_is_not_checked_and_stops_no_run(caplog):
    model = small_model()
    model.criterion = OtherCriterion()
    with caplog.at_level(logging.INFO, logger="retina_focal"):
        trained_from(0, model)
    assert said_by(caplog) == ["first step: not checked, as the criterion is a OtherCriterion"]
    assert not model.criterion._forward_pre_hooks


def test_the_mean_score_weighs_every_anchor_alike():
    levels = [torch.zeros(1, 1, 1, 3), torch.full((1, 1, 1, 1), 100.0)]
    assert first_step.mean_score(levels) == pytest.approx((3 * 0.5 + 1) / 4)
