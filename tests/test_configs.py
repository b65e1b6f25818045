"""The shipped configs: the paper's numbers, detectron2's schedules, and YAML = LazyConfig."""

import functools
import math
from pathlib import Path

import pytest
import torch
from detectron2 import model_zoo
from detectron2.config import CfgNode, LazyConfig, instantiate
from detectron2.config import get_cfg as detectron2_get_cfg
from detectron2.data.detection_utils import build_augmentation
from detectron2.modeling import build_model
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.solver import LRMultiplier, build_lr_scheduler, build_optimizer

import retina_focal

CONFIGS = Path(__file__).parents[1] / "configs"
YAMLS = sorted((CONFIGS / "COCO-Detection").glob("*.yaml"))
DETECTRON2_SCHEDULES = [
    "retinanet_R_50_FPN_1x",
    "retinanet_R_50_FPN_3x",
    "retinanet_R_101_FPN_3x",
]
# Tables 1e and 2 of arXiv:1708.02002: stem of the file, depth, shorter side, AP on test-dev.
TABLE_1E = [
    (f"retinanet_R_{depth}_FPN_paper_{size}", depth, size, ap)
    for depth, aps in [
        (50, [30.5, 32.5, 34.3, 35.1, 35.7]),
        (101, [31.9, 34.4, 36.0, 37.1, 37.8]),
    ]
    for size, ap in zip([400, 500, 600, 700, 800], aps, strict=True)
]
TABLE_2 = [
    ("retinanet_R_101_FPN_paper_800_jitter", 101, 39.1),
    ("retinanet_X_101_32x8d_FPN_paper_800_jitter", 101, 40.8),
]
LAZY = sorted(path.stem for path in (CONFIGS / "lazy").glob("retinanet_*.py"))


def load(stem: str, cfg: CfgNode | None = None) -> CfgNode:
    cfg = cfg or retina_focal.get_cfg()
    cfg.merge_from_file(CONFIGS / "COCO-Detection" / f"{stem}.yaml", allow_unsafe=False)
    return cfg


def load_lazy(stem: str):
    return LazyConfig.load(str(CONFIGS / "lazy" / f"{stem}.py"))


@functools.cache
def build(stem: str) -> torch.nn.Module:
    """Built on the meta device: names, shapes and settings without the memory."""
    cfg = load(stem)
    cfg.MODEL.DEVICE = "meta"
    with torch.device("meta"):
        return build_model(cfg)


def build_lazy(config) -> torch.nn.Module:
    with torch.device("meta"):
        return instantiate(config.model)


def flatten(node: CfgNode, prefix: str = "") -> dict[str, object]:
    leaves = {}
    for key, value in node.items():
        if isinstance(value, CfgNode):
            leaves |= flatten(value, f"{prefix}{key}.")
        else:
            leaves[prefix + key] = value
    return leaves


def differing(one: CfgNode, other: CfgNode) -> set[str]:
    one, other = flatten(one), flatten(other)
    return {key for key in one.keys() | other.keys() if one.get(key) != other.get(key)}


def settings(part: object) -> dict[str, object]:
    """Public attributes of a part, box transforms opened, sequences as lists."""
    values = {}
    for key, value in vars(part).items():
        if isinstance(value, Box2BoxTransform):
            value = settings(value)
        if not key.startswith("_"):
            values[key] = list(value) if isinstance(value, tuple | list) else value
    return values


def test_every_published_model_has_its_config():
    expected = DETECTRON2_SCHEDULES + [row[0] for row in TABLE_1E + TABLE_2]
    assert [path.stem for path in YAMLS] == sorted(expected)


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: path.stem)
def test_header_names_the_command_and_says_what_was_not_run(path):
    header = [line for line in path.read_text().splitlines() if line.startswith("#")]
    command = f"train_net.py --config-file configs/COCO-Detection/{path.name} --num-gpus 8"
    assert f"# {command}" in header
    assert "# This file: not run." in header


@pytest.mark.parametrize("stem", DETECTRON2_SCHEDULES)
def test_detectron2_schedules_load_without_our_keys_and_differ_in_names_only(stem):
    ours = load(stem, detectron2_get_cfg())
    stock = model_zoo.get_config(f"COCO-Detection/{stem}.yaml")
    assert differing(ours, stock) == {
        "MODEL.META_ARCHITECTURE",
        "MODEL.BACKBONE.NAME",
        "MODEL.ANCHOR_GENERATOR.NAME",
        "MODEL.ANCHOR_GENERATOR.SIZES",  # OctaveAnchorGenerator has its own
    }


@pytest.mark.parametrize(("stem", "depth", "size", "ap"), TABLE_1E)
def test_configs_hold_the_numbers_of_table_1e(stem, depth, size, ap):
    cfg = load(stem)
    assert depth == cfg.MODEL.RESNETS.DEPTH
    assert f"detectron2://ImageNetPretrained/MSRA/R-{depth}.pkl" == cfg.MODEL.WEIGHTS
    assert (size,) == cfg.INPUT.MIN_SIZE_TRAIN
    assert size == cfg.INPUT.MIN_SIZE_TEST
    assert cfg.INPUT.MAX_SIZE_TRAIN == cfg.INPUT.MAX_SIZE_TEST == round(5 * size / 3)
    assert (cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS) == (90000, (60000, 80000))
    check_common_to_the_paper(cfg, stem, ap)


@pytest.mark.parametrize(("stem", "depth", "ap"), TABLE_2)
def test_configs_hold_the_numbers_of_table_2(stem, depth, ap):
    cfg = load(stem)
    assert depth == cfg.MODEL.RESNETS.DEPTH
    assert cfg.INPUT.MIN_SIZE_TRAIN == (640, 672, 704, 736, 768, 800)
    assert cfg.INPUT.MIN_SIZE_TEST == 800
    assert cfg.INPUT.MAX_SIZE_TRAIN == cfg.INPUT.MAX_SIZE_TEST == 1333
    assert (cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS) == (135000, (90000, 120000))
    check_common_to_the_paper(cfg, stem, ap)


def check_common_to_the_paper(cfg: CfgNode, stem: str, ap: float) -> None:
    retinanet = cfg.MODEL.RETINANET
    assert (retinanet.FOCAL_LOSS_GAMMA, retinanet.FOCAL_LOSS_ALPHA) == (2.0, 0.25)
    assert (retinanet.PRIOR_PROB, retinanet.IOU_THRESHOLDS) == (0.01, [0.4, 0.5])
    assert retinanet.SMOOTH_L1_LOSS_BETA == 0.11
    assert cfg.MODEL.RETINA_FOCAL.ASSIGNMENT == "paper"
    assert cfg.MODEL.RETINA_FOCAL.NORMALIZER == "image"
    solver = cfg.SOLVER
    assert (solver.IMS_PER_BATCH, solver.BASE_LR, solver.GAMMA) == (16, 0.01, 0.1)
    assert (solver.WEIGHT_DECAY, solver.MOMENTUM) == (1e-4, 0.9)
    assert (solver.WARMUP_ITERS, solver.WARMUP_FACTOR) == (500, 1 / 3)
    assert cfg.INPUT.RANDOM_FLIP == "horizontal"
    assert (cfg.DATASETS.TRAIN, cfg.DATASETS.TEST) == (("coco_2017_train",), ("coco_2017_val",))
    header = (CONFIGS / "COCO-Detection" / f"{stem}.yaml").read_text()
    assert f"# Expected AP: {ap} on test-dev" in header


def test_resnext_differs_from_the_r_101_in_its_backbone_only():
    assert differing(*(load(stem) for stem, _, _ in TABLE_2)) == {
        "MODEL.WEIGHTS",
        "MODEL.PIXEL_STD",
        "MODEL.RESNETS.STRIDE_IN_1X1",
        "MODEL.RESNETS.NUM_GROUPS",
        "MODEL.RESNETS.WIDTH_PER_GROUP",
    }
    # detectron2's own configs of the same weights.
    zoo = model_zoo.get_config("COCO-Detection/faster_rcnn_X_101_32x8d_FPN_3x.yaml").MODEL
    ours = load(TABLE_2[1][0]).MODEL
    assert (ours.WEIGHTS, ours.PIXEL_STD) == (zoo.WEIGHTS, zoo.PIXEL_STD)
    for key in ("DEPTH", "STRIDE_IN_1X1", "NUM_GROUPS", "WIDTH_PER_GROUP"):
        assert ours.RESNETS[key] == zoo.RESNETS[key]


@pytest.mark.parametrize("stem", [path.stem for path in YAMLS])
def test_every_config_builds_80_classes_and_9_anchors(stem):
    model = build(stem)
    assert isinstance(model, retina_focal.FocalRetinaNet)
    assert model.head.cls_score.out_channels == 9 * 80


@pytest.mark.parametrize("stem", LAZY)
def test_lazy_config_builds_the_model_of_its_yaml(stem):
    cfg, lazy = load(stem), load_lazy(stem)
    expected, model = build(stem), build_lazy(lazy)
    # The printed modules show kernel, stride and groups of every convolution.
    assert repr(model) == repr(expected)
    assert [(n, p.shape, p.requires_grad) for n, p in model.named_parameters()] == [
        (n, p.shape, p.requires_grad) for n, p in expected.named_parameters()
    ]
    assert {n: x.shape for n, x in model.state_dict().items()} == {
        n: x.shape for n, x in expected.state_dict().items()
    }
    for part in ("assigner", "criterion", "postprocessor", "head", "anchor_generator"):
        assert settings(getattr(model, part)) == settings(getattr(expected, part)), part
    for name in ("head_in_features", "vis_period", "input_format", "num_classes"):
        assert getattr(model, name) == getattr(expected, name)
    # Values of tensors, which the meta device doesn't have.
    assert lazy.model.pixel_mean == cfg.MODEL.PIXEL_MEAN
    assert lazy.model.pixel_std == cfg.MODEL.PIXEL_STD
    assert lazy.train.init_checkpoint == cfg.MODEL.WEIGHTS


@pytest.mark.parametrize("stem", LAZY)
def test_lazy_config_trains_as_its_yaml(stem):
    cfg, lazy = load(stem), load_lazy(stem)
    assert set(lazy) == {"model", "dataloader", "optimizer", "lr_multiplier", "train"}
    assert lazy.train.max_iter == cfg.SOLVER.MAX_ITER
    assert lazy.dataloader.train.total_batch_size == cfg.SOLVER.IMS_PER_BATCH
    check_same_augmentations(cfg, lazy)

    model = torch.nn.Sequential(torch.nn.Conv2d(3, 3, 1), torch.nn.BatchNorm2d(3))
    expected = build_optimizer(cfg, model)
    lazy.optimizer.params.model = model
    optimizer = instantiate(lazy.optimizer)
    for key in ("lr", "momentum", "weight_decay", "nesterov"):
        assert [g[key] for g in optimizer.param_groups] == [g[key] for g in expected.param_groups]

    schedule = LRMultiplier(optimizer, instantiate(lazy.lr_multiplier), lazy.train.max_iter)
    expected_schedule = build_lr_scheduler(cfg, expected)
    edges = [0, cfg.SOLVER.WARMUP_ITERS, *cfg.SOLVER.STEPS, cfg.SOLVER.MAX_ITER]
    for iteration in [i + d for i in edges for d in (-1, 0, 1, 100) if 0 <= i + d < edges[-1]]:
        schedule.last_epoch = expected_schedule.last_epoch = iteration
        # A rounding of the relative warm-up length, 500 / 90000, is all that may differ.
        assert math.isclose(schedule.get_lr()[0], expected_schedule.get_lr()[0], rel_tol=1e-12), (
            iteration
        )


def check_same_augmentations(cfg: CfgNode, lazy) -> None:
    for split, is_train in [("train", True), ("test", False)]:
        ours = instantiate(lazy.dataloader[split].mapper.augmentations)
        expected = build_augmentation(cfg, is_train)
        assert [type(a) for a in ours] == [type(a) for a in expected]
        # One side is written (800,) in a YAML and may be 800, that is (800, 800), in a LazyConfig.
        assert set(ours[0].short_edge_length) == set(expected[0].short_edge_length)
        assert ours[0].max_size == expected[0].max_size
        if is_train:
            assert ours[0].is_range == expected[0].is_range
            assert (ours[1].horizontal, ours[1].prob) == (expected[1].horizontal, expected[1].prob)
        assert lazy.dataloader[split].dataset.names in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST)


@pytest.mark.parametrize(("stem", "depth", "size", "ap"), TABLE_1E)
def test_two_overrides_turn_the_600_px_lazy_config_into_the_other_scales(stem, depth, size, ap):
    lazy = load_lazy(f"retinanet_R_{depth}_FPN_paper_600")
    resize = "dataloader.train.mapper.augmentations.0"
    LazyConfig.apply_overrides(
        lazy,
        [f"{resize}.short_edge_length={size}", f"{resize}.max_size={round(5 * size / 3)}"],
    )
    check_same_augmentations(load(stem), lazy)


def test_the_same_seed_gives_a_lazy_config_and_its_yaml_equal_weights():
    stem = "retinanet_R_50_FPN_paper_600"
    cfg, lazy = load(stem), load_lazy(stem)
    cfg.MODEL.DEVICE = "cpu"
    torch.manual_seed(0)
    expected = build_model(cfg)
    torch.manual_seed(0)
    model = instantiate(lazy.model)
    tensors = dict([*model.named_parameters(), *model.named_buffers()])
    expected = dict([*expected.named_parameters(), *expected.named_buffers()])
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("stem", LAZY)
def test_num_classes_alone_reaches_every_part(stem):
    lazy = load_lazy(stem)
    LazyConfig.apply_overrides(lazy, ["model.num_classes=3"])
    model = build_lazy(lazy)
    parts = (model, model.assigner, model.criterion, model.postprocessor, model.head)
    assert [part.num_classes for part in parts] == [3] * 5
    assert model.head.cls_score.out_channels == 9 * 3


# The one with a lazily built list of stages.
def test_lazy_config_survives_being_saved_and_loaded(tmp_path):
    # detectron2's default_setup saves it, and falls back to a pickle when that fails.
    lazy = load_lazy("retinanet_X_101_32x8d_FPN_paper_800_jitter")
    LazyConfig.save(lazy, str(tmp_path / "config.yaml"))
    saved = LazyConfig.load(str(tmp_path / "config.yaml"))
    assert repr(build_lazy(saved)) == repr(build_lazy(lazy))


# Tables 1a to 1d and 3 of arXiv:1708.02002: stem of the file, own keys, AP, AP50, AP75.
RETINANET, FOCAL = "MODEL.RETINANET.", "MODEL.RETINA_FOCAL."
BASE_50, BASE_101 = "retinanet_R_50_FPN_paper_600", "retinanet_R_101_FPN_paper_600"


def balanced(gamma: float, alpha: float) -> dict[str, float]:
    return {f"{RETINANET}FOCAL_LOSS_GAMMA": float(gamma), f"{RETINANET}FOCAL_LOSS_ALPHA": alpha}


def ohem(batch_size: int, nms_thresh: float, neg_per_pos: int = 0) -> dict[str, object]:
    keys = {"ENABLED": True, "BATCH_SIZE": batch_size, "NMS_THRESH": nms_thresh}
    keys["NEG_PER_POS"] = neg_per_pos
    return {f"{FOCAL}CLS_LOSS": "cross_entropy"} | {f"{FOCAL}OHEM.{k}": v for k, v in keys.items()}


def anchors(scales: int, ratios: int) -> dict[str, object]:
    return {
        f"{FOCAL}ANCHORS.SCALES_PER_OCTAVE": scales,
        "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS": [[1.0]] if ratios == 1 else [[0.5, 1.0, 2.0]],
    }


def focal_star(gamma: float, beta: float) -> dict[str, object]:
    return {
        f"{FOCAL}CLS_LOSS": "focal_star",
        f"{FOCAL}FOCAL_STAR.BETA": float(beta),
        f"{RETINANET}FOCAL_LOSS_GAMMA": float(gamma),
    }


ABLATIONS = [
    ("table_1a_alpha_0.10", balanced(0, 0.10), "0.0, 0.0, 0.0"),
    ("table_1a_alpha_0.25", balanced(0, 0.25), "10.8, 16.0, 11.7"),
    ("table_1a_alpha_0.50", balanced(0, 0.50), "30.2, 46.7, 32.8"),
    ("table_1a_alpha_0.75", balanced(0, 0.75), "31.1, 49.4, 33.0"),
    ("table_1a_alpha_0.90", balanced(0, 0.90), "30.8, 49.7, 32.3"),
    ("table_1a_alpha_0.99", balanced(0, 0.99), "28.7, 47.4, 29.9"),
    ("table_1a_alpha_0.999", balanced(0, 0.999), "25.1, 41.7, 26.1"),
    ("table_1b_gamma_0.0", balanced(0.0, 0.75), "31.1, 49.4, 33.0"),
    ("table_1b_gamma_0.1", balanced(0.1, 0.75), "31.4, 49.9, 33.1"),
    ("table_1b_gamma_0.2", balanced(0.2, 0.75), "31.9, 50.7, 33.4"),
    ("table_1b_gamma_0.5", balanced(0.5, 0.50), "32.9, 51.7, 35.2"),
    ("table_1b_gamma_1.0", balanced(1.0, 0.25), "33.7, 52.0, 36.2"),
    ("table_1b_gamma_2.0", balanced(2.0, 0.25), "34.0, 52.5, 36.5"),
    ("table_1b_gamma_5.0", balanced(5.0, 0.25), "32.2, 49.6, 34.8"),
    ("table_1c_1_scales_1_ratios", anchors(1, 1), "30.3, 49.0, 31.8"),
    ("table_1c_2_scales_1_ratios", anchors(2, 1), "31.9, 50.0, 34.0"),
    ("table_1c_3_scales_1_ratios", anchors(3, 1), "31.8, 49.4, 33.7"),
    ("table_1c_1_scales_3_ratios", anchors(1, 3), "32.4, 52.3, 33.9"),
    ("table_1c_2_scales_3_ratios", anchors(2, 3), "34.2, 53.1, 36.5"),
    ("table_1c_3_scales_3_ratios", anchors(3, 3), "34.0, 52.5, 36.5"),
    ("table_1c_4_scales_3_ratios", anchors(4, 3), "33.8, 52.1, 36.2"),
    ("table_1d_ohem_128_nms_0.7", ohem(128, 0.7), "31.1, 47.2, 33.2"),
    ("table_1d_ohem_256_nms_0.7", ohem(256, 0.7), "31.8, 48.8, 33.9"),
    ("table_1d_ohem_512_nms_0.7", ohem(512, 0.7), "30.6, 47.0, 32.6"),
    ("table_1d_ohem_128_nms_0.5", ohem(128, 0.5), "32.8, 50.3, 35.1"),
    ("table_1d_ohem_256_nms_0.5", ohem(256, 0.5), "31.0, 47.4, 33.0"),
    ("table_1d_ohem_512_nms_0.5", ohem(512, 0.5), "27.6, 42.0, 29.2"),
    ("table_1d_ohem_1_to_3_128_nms_0.5", ohem(128, 0.5, 3), "31.1, 47.2, 33.2"),
    ("table_1d_ohem_1_to_3_256_nms_0.5", ohem(256, 0.5, 3), "28.3, 42.4, 30.3"),
    ("table_1d_ohem_1_to_3_512_nms_0.5", ohem(512, 0.5, 3), "24.0, 35.5, 25.8"),
    ("table_1d_focal_loss", {}, "36.0, 54.9, 38.7"),
    ("table_3_cross_entropy", balanced(0, 0.75), "31.1, 49.4, 33.0"),
    ("table_3_focal", balanced(2, 0.25), "34.0, 52.5, 36.5"),
    ("table_3_focal_star_gamma_2_beta_1", focal_star(2, 1), "33.8, 52.7, 36.3"),
    ("table_3_focal_star_gamma_4_beta_0", focal_star(4, 0), "33.9, 51.8, 36.4"),
    (
        "cross_entropy_without_prior",
        {f"{RETINANET}PRIOR_PROB": 0.5, f"{FOCAL}CLS_LOSS": "cross_entropy"},
        None,
    ),
    ("hinge", {f"{FOCAL}CLS_LOSS": "hinge", f"{FOCAL}HINGE.MARGIN": 0.5}, None),
    (
        "no_pyramid",
        {
            "MODEL.BACKBONE.NAME": "build_retina_focal_resnet_single_backbone",
            "MODEL.RESNETS.OUT_FEATURES": ["res5"],
            f"{RETINANET}IN_FEATURES": ["p5"],
        },
        None,
    ),
]


@pytest.mark.parametrize(("stem", "keys", "ap"), ABLATIONS, ids=lambda x: x if str(x) == x else "")
def test_an_ablation_is_the_papers_setting_with_its_rows_keys_alone(stem, keys, ap):
    path = CONFIGS / "ablations" / f"{stem}.yaml"
    base = BASE_101 if stem.startswith("table_1d") else BASE_50
    expected = load(base)
    expected.merge_from_list([part for pair in keys.items() for part in pair])
    cfg = retina_focal.get_cfg()
    cfg.merge_from_file(path, allow_unsafe=False)
    assert not differing(cfg, expected)
    header = path.read_text().split("_BASE_")[0]
    assert f"# train_net.py --config-file configs/ablations/{path.name} --num-gpus 8" in header
    assert "# This file: not run." in header
    assert (f"# The paper's AP, AP50, AP75: {ap} (" if ap else "gives no number") in header
    cfg.MODEL.DEVICE = "meta"
    with torch.device("meta"):
        model = build_model(cfg)
    if stem == "no_pyramid":
        assert model.head.num_anchors == 45


TWO_STAGE = CONFIGS / "ablations" / "faster_rcnn_focal_rpn.yaml"


def test_every_ablation_config_is_a_row():
    files = {path.stem for path in (CONFIGS / "ablations").glob("*.yaml")}
    assert files == {row[0] for row in ABLATIONS} | {TWO_STAGE.stem}


def test_the_two_stage_ablation_is_detectron2s_with_other_proposals_on_other_levels():
    cfg = detectron2_get_cfg()
    cfg.merge_from_file(TWO_STAGE, allow_unsafe=False)
    stock = model_zoo.get_config("COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml")
    unused = {key for key in differing(cfg, stock) if key.startswith("MODEL.ROI_MASK_HEAD.")}
    assert not stock.MODEL.MASK_ON
    assert differing(cfg, stock) - unused == {
        "MODEL.BACKBONE.NAME",
        "MODEL.RESNETS.OUT_FEATURES",
        "MODEL.FPN.IN_FEATURES",
        "MODEL.PROPOSAL_GENERATOR.NAME",
        "MODEL.RPN.HEAD_NAME",
        "MODEL.RPN.IN_FEATURES",
        "MODEL.ROI_HEADS.IN_FEATURES",
    }
    header = TWO_STAGE.read_text().split("MODEL:")[0]
    assert f"# train_net.py --config-file configs/ablations/{TWO_STAGE.name} --num-gpus 8" in header
    assert "# This file: not run." in header
    assert "gives no number" in header
    assert "RPN.BATCH_SIZE_PER_IMAGE and POSITIVE_FRACTION are unused" in header
