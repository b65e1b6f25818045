"""The benchmark's models do equal work on the same inputs."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import small_cfg
from detectron2.modeling import build_model
from detectron2.structures import Boxes
from detectron2.utils.events import EventStorage
from test_head import outputs_of

from retina_focal.tools.benchmark import cases, inputs, models
from retina_focal.tools.benchmark.instruments import Stopwatch
from retina_focal.tools.benchmark.models import MODELS, Setting
from retina_focal.tools.common import load_cfg

SMALL = ["MODEL.RESNETS.DEPTH", "18", "MODEL.RESNETS.RES2_OUT_CHANNELS", "64"]
CONFIG = "COCO-Detection/retinanet_R_50_FPN_1x.yaml"


def setting_of(size: tuple[int, int] = (96, 128), batch: int = 1, boxes: int = 20) -> Setting:
    return Setting(load_cfg(CONFIG, [*SMALL, "MODEL.DEVICE", "cpu"]), size, batch, boxes)


@pytest.fixture(scope="module")
def setting() -> Setting:
    return setting_of()


def run_once(case, setting: Setting, names=MODELS) -> dict:
    """What each model's run returns."""
    runs = case(setting, names)
    return {name: run(Stopwatch("cpu")) for name, run in runs.items()}


def test_pictures_have_the_boxes_that_the_help_promises():
    setting = setting_of(size=(90, 130), batch=2, boxes=2000)
    batch = inputs.pictures(setting)
    assert len(batch) == 2
    for record in batch:
        assert record["image"].shape == (3, 90, 130) and record["image"].dtype == torch.uint8
        boxes = record["instances"].gt_boxes.tensor
        side = boxes[:, 2:] - boxes[:, :2]
        assert len(boxes) == 2000
        # 1e-3 px: corner + side, rounded, may end past the edge.
        assert (boxes >= 0).all() and (boxes <= torch.tensor([130, 90] * 2) + 1e-3).all()
        assert (side > 8 - 1e-3).all() and (side < torch.tensor([65, 45]) + 1e-3).all()
        # Log-uniform: the median is the geometric mean; 2,000 draws know it to a few percent.
        expected = torch.tensor([(8 * 65) ** 0.5, (8 * 45) ** 0.5])
        torch.testing.assert_close(side.median(0).values, expected, rtol=0.1, atol=0)
    assert not torch.equal(batch[0]["image"], batch[1]["image"])


def test_shapes_equal_those_of_the_network():
    setting = setting_of(size=(100, 150), batch=2)
    model = models.build("ours", setting).eval()
    images = model.preprocess_image(inputs.pictures(setting)).tensor
    features = [model.backbone(images)[name] for name in model.head_in_features]
    logits, deltas = outputs_of(model.head, features)
    expected = model.anchor_generator(features)
    anchors, sizes = inputs.anchors_per_level(setting)
    assert all(torch.equal(a.tensor, b.tensor) for a, b in zip(anchors, expected, strict=True))
    outputs = inputs.random_outputs(setting, std=1.0)
    assert [x.shape for x in outputs[0]] == [x.shape for x in logits]
    assert [x.shape for x in outputs[1]] == [x.shape for x in deltas]
    assert all(len(a) == s[1] * s[2] * s[3] for a, s in zip(anchors, sizes, strict=True))


@pytest.mark.parametrize("batch", [1, 2])
def test_loss_and_gradient_are_the_same_for_all(batch):
    results = run_once(cases.classification_loss, setting_of(batch=batch))
    value, gradients = results["ours"]
    # torchvision divides by each image's own positives: the same for one image.
    for name in MODELS if batch == 1 else ("stock", "ours"):
        # 1e-5: fp32 sums in another order.
        torch.testing.assert_close(results[name][0], value, rtol=1e-5, atol=0)
        for found, expected in zip(results[name][1], gradients, strict=True):
            assert (found - expected).norm() <= 1e-5 * expected.norm()


def test_stock_loss_is_that_of_detectron2(setting):
    """Its own `losses`, to the last bit."""
    logits, deltas = inputs.random_outputs(setting, std=1.0)
    stock = models.build("stock", setting)
    anchors, _ = inputs.anchors_per_level(setting)
    gt_instances = [record["instances"] for record in inputs.pictures(setting)]
    labels, gt_boxes = stock.label_anchors(anchors, gt_instances)
    predictions = stock._transpose_dense_predictions([logits, deltas], [setting.classes, 4])
    with EventStorage() as storage:
        losses = stock.losses(anchors, predictions[0], labels, predictions[1], gt_boxes)
        num_positives = storage.latest()["num_pos_anchors"][0]
    expected = losses["loss_cls"] * stock.loss_normalizer / num_positives
    (value, _) = run_once(cases.classification_loss, setting, ["stock"])["stock"]
    # 1e-6: the quotient is taken another way round.
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=0)


def test_matches_are_the_same_for_all():
    setting = setting_of(batch=2, boxes=60)
    results = run_once(cases.matching, setting)
    labels, matched_idxs = results["ours"]
    assert torch.equal(labels, torch.stack(results["stock"][0]))
    for i, theirs in enumerate(results["torchvision"]):
        positive = (labels[i] >= 0) & (labels[i] < setting.classes)
        assert positive.any() and (labels[i] == -1).any()
        assert torch.equal(theirs >= 0, positive)
        assert torch.equal(theirs == -2, labels[i] == -1)
        assert torch.equal(theirs[positive], matched_idxs[i][positive])


def test_the_first_training_step_of_stock_and_ours_is_the_same(setting):
    results = run_once(cases.training_step, setting)
    assert results["stock"].keys() == results["ours"].keys()
    for name, loss in results["ours"].items():
        # 1e-5: R-18 and head in fp32, sums in another order.
        torch.testing.assert_close(loss, results["stock"][name], rtol=1e-5, atol=0)
    assert all(loss.isfinite() for loss in results["torchvision"].values())


@pytest.mark.parametrize("size", [(96, 128), (800, 1216), (375, 501)])
def test_torchvision_sees_the_image_in_its_size(size):
    setting = setting_of(size)
    model = models.build("torchvision", setting)
    images, targets = inputs.arguments("torchvision", inputs.pictures(setting), "cpu")
    transformed, _ = model.transform(images, targets)
    assert transformed.image_sizes == [size]
    ours = models.build("ours", setting).preprocess_image(inputs.pictures(setting))
    assert transformed.tensors.shape == ours.tensor.shape


def test_realistic_logits_saturate_the_candidates_of_p3_to_p5():
    setting = setting_of((800, 1216), batch=2)
    node = setting.cfg.MODEL.RETINANET
    logits = inputs.realistic_logits(setting)
    for i, level in enumerate(logits):
        passing = (level.sigmoid() > node.SCORE_THRESH_TEST).flatten(1).double()
        if i < 3:
            assert (passing.sum(1) >= node.TOPK_CANDIDATES_TEST).all()
            # 1% of 684,000 pairs or more is known to 1.2% (one sigma).
            np.testing.assert_allclose(passing.mean(1), 0.01, rtol=0.05)
        else:
            assert not passing.any()


@pytest.mark.parametrize(
    ("case", "count"), [(cases.inference, 0), (cases.inference_realistic, 100)]
)
def test_detections_of_stock_and_ours_are_the_same(setting, case, count):
    """None on an initialised model, whose scores are 0.01, and as many as allowed otherwise."""
    results = run_once(case, setting)
    stock, ours = (results[name][0]["instances"] for name in ("stock", "ours"))
    assert len(stock) == len(ours) == len(results["torchvision"][0]["boxes"]) == count
    torch.testing.assert_close(ours.scores, stock.scores, rtol=0, atol=1e-6)
    torch.testing.assert_close(
        ours.pred_boxes.tensor.sum(0), stock.pred_boxes.tensor.sum(0), rtol=1e-4, atol=0
    )


def test_realistic_logits_stay_for_the_next_run(setting):
    """Stock takes the sigmoid in place, and on a level of one cell permuting makes no copy."""
    cfg = setting.cfg.clone()
    cfg.defrost()
    cfg.TEST.DETECTIONS_PER_IMAGE = 5000  # P7's background would come last
    all_of_them = replace(setting, cfg=cfg)
    assert inputs.anchors_per_level(all_of_them)[1][-1][2:] == (1, 1)
    run = cases.inference_realistic(all_of_them, ["stock"])["stock"]
    first, second = (run(Stopwatch("cpu"))[0]["instances"] for _ in range(2))
    assert torch.equal(first.scores, second.scores)


def test_stock_is_built_from_detectron2s_parts(setting):
    cfg = models.stock_cfg(setting.cfg)
    assert cfg.MODEL.META_ARCHITECTURE == "RetinaNet"
    assert cfg.MODEL.BACKBONE.NAME == "build_retinanet_resnet_fpn_backbone"
    assert cfg.MODEL.ANCHOR_GENERATOR.NAME == "DefaultAnchorGenerator"
    model = build_model(cfg)
    assert not [m for m in model.modules() if type(m).__module__.startswith("retina_focal")]
    features = [torch.zeros(1, 1, 12 // 2**i + 1, 16 // 2**i + 1) for i in range(5)]
    ours = models.build("ours", setting).anchor_generator(features)
    stock = model.anchor_generator(features)
    torch.testing.assert_close(Boxes.cat(ours).tensor, Boxes.cat(stock).tensor)


def test_stock_runs_timm_as_timm_made_it():
    cfg = load_cfg("quick_start/bccd.yaml", ["DATASETS.COCO_JSON", "[]", "MODEL.WEIGHTS", "''"])
    small = Setting(cfg, image_size=(64, 96), batch=1, boxes=2)
    stock, ours = (models.build(name, small) for name in ("stock", "ours"))
    inside = [type(m).__module__ for m in stock.modules()]
    assert not [m for m in inside if m.startswith("retina_focal") and m != models.__name__]
    state = stock.state_dict()
    assert all(
        torch.equal(state[name], x) for name, x in ours.state_dict().items() if name in state
    )
    trained = [{n for n, p in m.named_parameters() if p.requires_grad} for m in (stock, ours)]
    assert trained[0] == trained[1]
    image = torch.randn(1, 3, 64, 96)
    for name, feature in ours.backbone(image).items():
        torch.testing.assert_close(stock.backbone(image)[name], feature, rtol=1e-4, atol=1e-4)


def test_torchvision_is_left_out_where_it_has_no_such_network(setting):
    assert models.torchvision_has(setting.cfg)
    assert not models.torchvision_has(small_cfg())  # 64 channels
    timm = load_cfg("quick_start/bccd.yaml", ["DATASETS.COCO_JSON", "[]"])
    assert not models.torchvision_has(timm)
