"""What the paper, the authors' code and detectron2's model zoo set, and what follows from it.

Values of the paper (arXiv:1708.02002) and of Detectron (facebookresearch/Detectron) are written
down here with their source; detectron2's are read from its own configs. A setting on which a
reference is silent has no value for it.
"""

from collections.abc import Callable
from functools import reduce
from pathlib import Path
from typing import NamedTuple

from detectron2.config import CfgNode

from retina_focal.anchors import octave_sizes

RESNET_BUILDERS = (
    "build_retina_focal_resnet_fpn_backbone",
    "build_retina_focal_resnet_single_backbone",
    "build_retinanet_resnet_fpn_backbone",
)
TIMM_BUILDERS = (
    "build_retina_focal_timm_fpn_backbone",
    "build_retina_focal_timm_single_backbone",
)


class Choice(NamedTuple):
    """What a reference does in one setting."""

    values: tuple  # each agrees with it; none: the reference does what no key here can say
    source: str
    text: str = ""  # printed in place of the values


class Setting(NamedTuple):
    """A line of the comparison."""

    name: str  # as printed and as headers declare it, without a comma
    keys: tuple[str, ...]  # what `value` depends on
    consequence: str
    paper: Choice | None = None
    detectron: Choice | None = None
    # Comparable value in a config, None where the setting has no effect there; by default that of
    # the keys.
    value: Callable[[CfgNode], object] | None = None
    detectron2_source: str = ""  # where not a key of its own holds the value

    def read(self, cfg: CfgNode) -> object:
        if self.value is not None:
            return self.value(cfg)
        values = tuple(frozen(_get(cfg, key)) for key in self.keys)
        return values[0] if len(values) == 1 else values


def frozen(value: object) -> object:
    """Lists as tuples, at every depth: a YAML writes one or the other."""
    return tuple(map(frozen, value)) if isinstance(value, list | tuple) else value


def _get(cfg: CfgNode, key: str) -> object:
    return reduce(getattr, key.split("."), cfg)


def _has_timm(cfg: CfgNode) -> bool:
    return cfg.MODEL.BACKBONE.NAME in TIMM_BUILDERS


def _has_resnet(cfg: CfgNode) -> bool:
    return cfg.MODEL.BACKBONE.NAME in RESNET_BUILDERS


def _backbone(cfg: CfgNode) -> str:
    resnets = cfg.MODEL.RESNETS
    if _has_timm(cfg):
        return cfg.MODEL.RETINA_FOCAL.TIMM.NAME
    if not _has_resnet(cfg):
        return cfg.MODEL.BACKBONE.NAME
    if resnets.NUM_GROUPS > 1 or resnets.WIDTH_PER_GROUP != 64:
        return f"X-{resnets.DEPTH}-{resnets.NUM_GROUPS}x{resnets.WIDTH_PER_GROUP}d"
    return f"R-{resnets.DEPTH}"


def _bottleneck_stride(cfg: CfgNode) -> str | None:
    if not _has_resnet(cfg):
        return None
    convolution = "1x1" if cfg.MODEL.RESNETS.STRIDE_IN_1X1 else "3x3"
    return convolution + (" (ResNeXt)" if cfg.MODEL.RESNETS.NUM_GROUPS > 1 else "")


def _backbone_norm(cfg: CfgNode) -> str | None:
    if _has_timm(cfg):
        return cfg.MODEL.RETINA_FOCAL.TIMM.NORM
    return cfg.MODEL.RESNETS.NORM if _has_resnet(cfg) else None


def _initial_weights(cfg: CfgNode) -> str:
    """The last folder and the name: the same name exists from several sources."""
    path = Path(cfg.MODEL.WEIGHTS.partition("?")[0])
    return "/".join(path.parts[-2:]) or "none"


def _p6_source(cfg: CfgNode) -> str | None:
    has_p6 = "p6" in cfg.MODEL.RETINANET.IN_FEATURES
    return cfg.MODEL.RETINA_FOCAL.TOP_BLOCK_IN_FEATURE if has_p6 else None


def _class_loss(cfg: CfgNode) -> str:
    node = cfg.MODEL.RETINA_FOCAL
    if node.CLS_LOSS == "focal_star":
        return f"focal_star, beta {node.FOCAL_STAR.BETA:g}"
    if node.CLS_LOSS == "hinge":
        return f"hinge, margin {node.HINGE.MARGIN:g}"
    return node.CLS_LOSS


def _gamma(cfg: CfgNode) -> float | None:
    has_gamma = cfg.MODEL.RETINA_FOCAL.CLS_LOSS in ("focal", "focal_star")
    return cfg.MODEL.RETINANET.FOCAL_LOSS_GAMMA if has_gamma else None


def _alpha(cfg: CfgNode) -> float | str | None:
    if cfg.MODEL.RETINA_FOCAL.CLS_LOSS != "focal":
        return None
    if cfg.MODEL.RETINA_FOCAL.ALPHA_FROM_DATA:
        return "inverse class frequency"
    return cfg.MODEL.RETINANET.FOCAL_LOSS_ALPHA


def _ohem(cfg: CfgNode) -> str:
    node = cfg.MODEL.RETINA_FOCAL.OHEM
    if not node.ENABLED:
        return "off"
    ratio = f", 1:{node.NEG_PER_POS}" if node.NEG_PER_POS else ""
    return f"{node.BATCH_SIZE} anchors, NMS {node.NMS_THRESH:g}{ratio}"


def _box_loss(cfg: CfgNode) -> str:
    node = cfg.MODEL.RETINANET
    if node.BBOX_REG_LOSS_TYPE != "smooth_l1":
        return node.BBOX_REG_LOSS_TYPE
    return f"smooth L1, beta {node.SMOOTH_L1_LOSS_BETA:g}"


def _levels(numbers: list) -> list[list[float]]:
    """detectron2 takes one list for all levels too."""
    return numbers if isinstance(numbers[0], list | tuple) else [numbers]


def _anchor_levels(cfg: CfgNode) -> list[list[float]]:
    if cfg.MODEL.ANCHOR_GENERATOR.NAME == "OctaveAnchorGenerator":
        node = cfg.MODEL.RETINA_FOCAL.ANCHORS
        return octave_sizes(node.BASE_SIZES, node.SCALES_PER_OCTAVE, len(node.BASE_SIZES))
    return _levels(cfg.MODEL.ANCHOR_GENERATOR.SIZES)


def _anchor_sizes(cfg: CfgNode) -> tuple[float, ...]:
    return tuple(sizes[0] for sizes in _anchor_levels(cfg))


def _anchor_scales(cfg: CfgNode) -> tuple[float, ...]:
    sizes = _anchor_levels(cfg)[0]
    return tuple(size / sizes[0] for size in sizes)


def _aspect_ratios(cfg: CfgNode) -> tuple[float, ...]:
    levels = _levels(cfg.MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS)
    return tuple(sorted({ratio for level in levels for ratio in level}))


def _schedule(cfg: CfgNode) -> str:
    solver = cfg.SOLVER
    if solver.LR_SCHEDULER_NAME != "WarmupMultiStepLR":
        return f"{solver.MAX_ITER} it, {solver.LR_SCHEDULER_NAME}"
    return f"{solver.MAX_ITER} it, x {solver.GAMMA:g} at {', '.join(map(str, solver.STEPS))}"


def _warm_up(cfg: CfgNode) -> str:
    solver = cfg.SOLVER
    if not solver.WARMUP_ITERS:
        return "none"
    return f"{solver.WARMUP_METHOD}, {solver.WARMUP_ITERS} it from x {solver.WARMUP_FACTOR:.3g}"


def _bias_updates(cfg: CfgNode) -> str:
    decay = cfg.SOLVER.WEIGHT_DECAY_BIAS
    decay = "as weights" if decay is None else f"{decay:g}"
    return f"lr x {cfg.SOLVER.BIAS_LR_FACTOR:g}, decay {decay}"


def _gradient_clipping(cfg: CfgNode) -> str:
    node = cfg.SOLVER.CLIP_GRADIENTS
    return f"by {node.CLIP_TYPE} at {node.CLIP_VALUE:g}" if node.ENABLED else "off"


def _precision(cfg: CfgNode) -> str:
    return "autocast" if cfg.SOLVER.AMP.ENABLED else cfg.MODEL.RETINA_FOCAL.PRECISION


def _training_scales(cfg: CfgNode) -> tuple[int, ...] | str:
    sizes, sampling = frozen(cfg.INPUT.MIN_SIZE_TRAIN), cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING
    return sizes if sampling == "choice" else f"{sampling} of {sizes}"


PAPER_SCALES = (400, 500, 600, 700, 800)
OCTAVES = tuple(2 ** (i / 3) for i in range(3))
RETINANET, FOCAL = "MODEL.RETINANET.", "MODEL.RETINA_FOCAL."
YAML = "Detectron retinanet_R-50-FPN_1x.yaml"
CONFIG = "Detectron config.py"
HEADS = "Detectron retinanet_heads.py"
LABELS = "Detectron roi_data/retinanet.py"
DETECTIONS = "Detectron test_retinanet.py"

SETTINGS = (
    # The network.
    Setting(
        "backbone",
        (
            "MODEL.BACKBONE.NAME",
            "MODEL.RESNETS.DEPTH",
            "MODEL.RESNETS.NUM_GROUPS",
            "MODEL.RESNETS.WIDTH_PER_GROUP",
            f"{FOCAL}TIMM.NAME",
        ),
        "AP on test-dev at 800 px: R-50 35.7, R-101 37.8 (Table 1e); R-101 39.1, X-101 40.8 (Table "
        "2)",
        Choice(("R-50", "R-101", "X-101-32x8d"), "paper Sec. 4.1, Table 2"),
        Choice(
            ("R-50", "R-101", "X-101-32x8d", "X-101-64x4d"), "Detectron configs/12_2017_baselines"
        ),
        _backbone,
    ),
    Setting(
        "initial weights",
        ("MODEL.WEIGHTS",),
        "where features start; from random ones with frozen norms the prior is void",
        Choice(
            ("MSRA/R-50.pkl", "MSRA/R-101.pkl", "FAIR/X-101-32x8d.pkl"),
            "paper Sec. 4.1",
            "ImageNet; R-50 and R-101 of He et al.",
        ),
        Choice(
            ("MSRA/R-50.pkl", "MSRA/R-101.pkl", "20171220/X-101-32x8d.pkl"),
            "Detectron configs/12_2017_baselines",
        ),
        _initial_weights,
    ),
    Setting(
        "bottleneck stride",
        ("MODEL.RESNETS.STRIDE_IN_1X1",),
        "must be that of the initial weights",
        detectron=Choice(("1x1", "3x3 (ResNeXt)"), YAML.replace("R-50", "X-101-32x8d")),
        value=_bottleneck_stride,
    ),
    Setting(
        "backbone norm",
        ("MODEL.RESNETS.NORM", f"{FOCAL}TIMM.NORM"),
        "trained statistics of few images a process are noisy",
        detectron=Choice(("FrozenBN",), "Detectron ResNet.py", "FrozenBN (AffineChannel)"),
        value=_backbone_norm,
    ),
    Setting(
        "frozen stages",
        ("MODEL.BACKBONE.FREEZE_AT",),
        "frozen stages keep their ImageNet features and cost no gradient",
        detectron=Choice((2,), CONFIG),
    ),
    Setting(
        "pixel mean",
        ("MODEL.PIXEL_MEAN",),
        "must be that of the initial weights; detectron2's and Detectron's differ by 1 at most",
        detectron=Choice(((102.9801, 115.9465, 122.7717),), CONFIG),
    ),
    Setting(
        "pixel std",
        ("MODEL.PIXEL_STD",),
        "must be that of the initial weights",
        detectron=Choice(((1.0, 1.0, 1.0),), "Detectron blob.py", "not divided"),
    ),
    Setting(
        "channel order",
        ("INPUT.FORMAT",),
        "must be that of the initial weights",
        detectron=Choice(("BGR",), CONFIG),
    ),
    Setting(
        "pyramid",
        (f"{RETINANET}IN_FEATURES", "MODEL.RESNETS.OUT_FEATURES", "MODEL.FPN.IN_FEATURES"),
        "without the pyramid AP is low; the paper gives no number (Sec. 4)",
        Choice((("p3", "p4", "p5", "p6", "p7"),), "paper Sec. 4"),
        Choice((("p3", "p4", "p5", "p6", "p7"),), YAML),
        lambda cfg: frozen(cfg.MODEL.RETINANET.IN_FEATURES),
    ),
    Setting(
        "P6 source",
        (f"{FOCAL}TOP_BLOCK_IN_FEATURE",),
        "weights of one do not fit the other; no number",
        Choice(("res5",), "paper Sec. 4, footnote 2"),
        Choice(("res5",), "Detectron FPN.py"),
        _p6_source,
        "detectron2 backbone/fpn.py",
    ),
    Setting(
        "pyramid channels",
        ("MODEL.FPN.OUT_CHANNELS",),
        "width of pyramid and head: time against AP",
        Choice((256,), "paper Sec. 4"),
        Choice((256,), CONFIG),
    ),
    Setting(
        "pyramid norm",
        ("MODEL.FPN.NORM",),
        "weights of one do not fit the other",
        detectron=Choice(("",), CONFIG),
    ),
    Setting(
        "head",
        (f"{FOCAL}HEAD",),
        "two towers that share no weights, box tower without classes",
        Choice(("FocalRetinaNetHead",), "paper Sec. 4", "two unshared towers"),
        Choice(("FocalRetinaNetHead",), CONFIG, "two unshared towers"),
        detectron2_source="detectron2 meta_arch/retinanet.py",
    ),
    Setting(
        "head convolutions",
        (f"{RETINANET}NUM_CONVS",),
        "depth of both towers: time against AP",
        Choice((4,), "paper Sec. 4"),
        Choice((4,), CONFIG),
    ),
    Setting(
        "head norm",
        (f"{RETINANET}NORM",),
        "weights of one do not fit the other",
        Choice(("",), "paper Sec. 4", "none"),
        Choice(("",), HEADS, "none"),
    ),
    Setting(
        "prior",
        (f"{RETINANET}PRIOR_PROB",),
        "cross entropy diverges without it and has AP 30.2 with it; its exact value hardly matters "
        "(Sec. 5.1)",
        Choice((0.01,), "paper Sec. 4.1"),
        Choice((0.01,), CONFIG),
    ),
    # Anchors and their labels.
    Setting(
        "anchor sizes",
        (
            "MODEL.ANCHOR_GENERATOR.NAME",
            "MODEL.ANCHOR_GENERATOR.SIZES",
            f"{FOCAL}ANCHORS.BASE_SIZES",
        ),
        "a square under 0.71 times the smallest has no anchor at IoU 0.5",
        Choice(((32, 64, 128, 256, 512),), "paper Sec. 4"),
        Choice(((32, 64, 128, 256, 512),), CONFIG, "4 strides: 32, 64, 128, 256, 512"),
        _anchor_sizes,
    ),
    Setting(
        "anchor scales",
        (
            "MODEL.ANCHOR_GENERATOR.NAME",
            "MODEL.ANCHOR_GENERATOR.SIZES",
            f"{FOCAL}ANCHORS.SCALES_PER_OCTAVE",
        ),
        "AP with 3 ratios: 1 scale 32.4, 2 34.2, 3 34.0, 4 33.8; with 1: 30.3, 31.9, 31.8 (Table "
        "1c)",
        Choice((OCTAVES,), "paper Sec. 4"),
        Choice((OCTAVES,), CONFIG),
        _anchor_scales,
    ),
    Setting(
        "aspect ratios",
        ("MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS",),
        "AP with 3 scales: 1 ratio 31.8, 3 ratios 34.0 (Table 1c)",
        Choice(((0.5, 1.0, 2.0),), "paper Sec. 4"),
        Choice(((0.5, 1.0, 2.0),), CONFIG),
        _aspect_ratios,
    ),
    Setting(
        "anchor offset",
        ("MODEL.ANCHOR_GENERATOR.OFFSET",),
        "boxes of weights trained with one are off by up to half a stride with the other",
        detectron=Choice((), "Detectron generate_anchors.py", "(stride - 1) / 2 px"),
    ),
    Setting(
        "box geometry",
        (),
        "about a pixel in anchors and IoU; no key changes it",
        detectron=Choice(
            (),
            "Detectron generate_anchors.py",
            "width x1 - x0 + 1; anchors rounded at the size of the stride",
        ),
        value=lambda cfg: "width x1 - x0; anchors not rounded",
        detectron2_source="detectron2 anchor_generator.py",
    ),
    Setting(
        "IoU thresholds",
        (f"{RETINANET}IOU_THRESHOLDS", f"{RETINANET}IOU_LABELS"),
        "which anchors are background, ignored and positive; no number",
        Choice((((0.4, 0.5), (0, -1, 1)),), "paper Sec. 4", "< 0.4, ignored, >= 0.5"),
        Choice((((0.4, 0.5), (0, -1, 1)),), CONFIG, "< 0.4, ignored, >= 0.5"),
    ),
    Setting(
        "low-quality matches",
        (f"{FOCAL}ASSIGNMENT",),
        "detectron2: every box has an anchor, at any IoU; detectron: from IoU 0.4; paper: small "
        "boxes may have none",
        Choice(("paper",), "paper Sec. 4"),
        Choice(("detectron",), LABELS),
        detectron2_source="detectron2 meta_arch/retinanet.py",
    ),
    # The losses.
    Setting(
        "class loss",
        (f"{FOCAL}CLS_LOSS", f"{FOCAL}FOCAL_STAR.BETA", f"{FOCAL}HINGE.MARGIN"),
        "AP: alpha-balanced CE 31.1, focal 34.0, focal_star 33.8 and 33.9 (Table 3); CE 30.2 "
        "(Table 1a); hinge unstable (Sec. 5.1)",
        Choice(("focal",), "paper Sec. 3.2"),
        Choice(("focal",), HEADS),
        _class_loss,
        "detectron2 meta_arch/retinanet.py",
    ),
    Setting(
        "gamma",
        (f"{RETINANET}FOCAL_LOSS_GAMMA",),
        "AP with the best alpha: 0 31.1, 0.1 31.4, 0.2 31.9, 0.5 32.9, 1 33.7, 2 34.0, 5 32.2 "
        "(Table 1b)",
        Choice((2.0,), "paper Sec. 5.1"),
        Choice((2.0,), CONFIG),
        _gamma,
    ),
    Setting(
        "alpha",
        (f"{RETINANET}FOCAL_LOSS_ALPHA", f"{FOCAL}ALPHA_FROM_DATA"),
        "AP at gamma 0: 0.1 0.0, 0.25 10.8, 0.5 30.2, 0.75 31.1, 0.9 30.8, 0.99 28.7, 0.999 "
        "25.1 (Table 1a); at gamma 2, 0.5 costs 0.4",
        Choice((0.25,), "paper Sec. 5.1"),
        Choice((0.25,), CONFIG),
        _alpha,
    ),
    Setting(
        "OHEM",
        tuple(
            f"{FOCAL}OHEM.{key}" for key in ("ENABLED", "BATCH_SIZE", "NMS_THRESH", "NEG_PER_POS")
        ),
        "AP with R-101: at best 32.8 (128, NMS 0.5), focal loss 36.0 (Table 1d)",
        Choice(("off",), "paper Sec. 4.1", "off: all anchors"),
        Choice(("off",), LABELS, "off: all anchors"),
        _ohem,
        "detectron2 meta_arch/retinanet.py",
    ),
    Setting(
        "normaliser",
        (f"{FOCAL}NORMALIZER",),
        "what a loss is divided by: weight of images with few objects; no number",
        Choice(("image",), "paper Sec. 4.1"),
        Choice((), LABELS, "positives + 1 of each image, summed over a GPU's images"),
        detectron2_source="detectron2 meta_arch/retinanet.py",
    ),
    Setting(
        "box loss",
        (f"{RETINANET}BBOX_REG_LOSS_TYPE", f"{RETINANET}SMOOTH_L1_LOSS_BETA"),
        "weight of small errors, and of boxes against classes; no number",
        Choice(("smooth L1, beta 1",), "paper Sec. 4.1: the standard smooth L1"),
        Choice(("smooth L1, beta 0.11",), CONFIG),
        _box_loss,
    ),
    Setting(
        "box coding weights",
        (f"{RETINANET}BBOX_REG_WEIGHTS",),
        "scale of the box loss; weights of one give wrong boxes with the other",
        detectron=Choice(((1.0, 1.0, 1.0, 1.0),), "Detectron data_utils.py"),
    ),
    # Training.
    Setting(
        "datasets",
        ("DATASETS.TRAIN", "DATASETS.TEST"),
        "AP of R-50 at 600 px: 34.0 on minival, 34.3 on test-dev (Tables 1b, 1e)",
        Choice(
            ((("coco_2017_train",), ("coco_2017_val",)),),
            "paper Sec. 5",
            "trainval35k; minival, test-dev (coco_2017_train and _val: the same images, not "
            "verified)",
        ),
        Choice(
            ((("coco_2017_train",), ("coco_2017_val",)),),
            YAML,
            "coco_2014_train + valminusminival; minival (2017 names: the same images, not "
            "verified)",
        ),
    ),
    Setting(
        "classes",
        (f"{RETINANET}NUM_CLASSES",),
        "follows from the data",
        Choice((80,), "paper Sec. 5"),
        Choice((80,), YAML),
    ),
    Setting(
        "images without boxes",
        ("DATALOADER.FILTER_EMPTY_ANNOTATIONS",),
        "filtered ones teach no background",
        detectron=Choice(("filtered",), LABELS, "refused"),
        value=lambda cfg: "filtered" if cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS else "used",
    ),
    Setting(
        "training scales",
        ("INPUT.MIN_SIZE_TRAIN", "INPUT.MIN_SIZE_TRAIN_SAMPLING"),
        "AP of R-50 at 400, 500, 600, 700, 800 px: 30.5, 32.5, 34.3, 35.1, 35.7 (Table 1e); jitter "
        "and 1.5 times the schedule: +1.3 (Table 2)",
        Choice(tuple((s,) for s in PAPER_SCALES), "paper Tables 1b and 1e", "one of 400 to 800"),
        Choice(((800,),), YAML),
        _training_scales,
    ),
    Setting(
        "test scale",
        ("INPUT.MIN_SIZE_TEST",),
        "as of training scales; time an image on an M40, R-50: 64 ms at 400 px, 153 at 800 "
        "(Table 1e)",
        Choice(PAPER_SCALES, "paper Tables 1b and 1e", "one of 400 to 800"),
        Choice((800,), YAML),
    ),
    Setting(
        "longer side",
        ("INPUT.MAX_SIZE_TRAIN", "INPUT.MAX_SIZE_TEST"),
        "elongated images are smaller where it binds",
        detectron=Choice(((1333, 1333),), YAML),
    ),
    Setting(
        "padding",
        (),
        "zeros beside the image; no key changes it",
        detectron=Choice((), YAML, "to a multiple of 128"),
        value=lambda cfg: "to a multiple of 32",
        detectron2_source="detectron2 backbone/fpn.py",
    ),
    Setting(
        "flip",
        ("INPUT.RANDOM_FLIP",),
        "the only augmentation of Tables 1a to 1e",
        Choice(("horizontal",), "paper Sec. 4.1"),
        Choice(("horizontal",), CONFIG),
    ),
    Setting(
        "images a step",
        ("SOLVER.IMS_PER_BATCH",),
        "the learning rate and the schedule belong to it",
        Choice((16,), "paper Sec. 4.1"),
        Choice((16,), CONFIG),
    ),
    Setting(
        "learning rate",
        ("SOLVER.BASE_LR",),
        "belongs to the images a step",
        Choice((0.01,), "paper Sec. 4.1"),
        Choice((0.01,), YAML),
    ),
    Setting(
        "schedule",
        ("SOLVER.MAX_ITER", "SOLVER.STEPS", "SOLVER.GAMMA", "SOLVER.LR_SCHEDULER_NAME"),
        "1.5 times as long, with jitter: +1.3 AP (Table 2)",
        Choice(("90000 it, x 0.1 at 60000, 80000",), "paper Sec. 4.1"),
        Choice(
            ("90000 it, x 0.1 at 60000, 80000", "180000 it, x 0.1 at 120000, 160000"),
            "Detectron retinanet_R-50-FPN_1x, _2x",
        ),
        _schedule,
    ),
    Setting(
        "warm-up",
        ("SOLVER.WARMUP_ITERS", "SOLVER.WARMUP_FACTOR", "SOLVER.WARMUP_METHOD"),
        "lower learning rate at the start; no number",
        Choice(("none",), "paper Sec. 4.1 has none"),
        Choice(("linear, 500 it from x 0.333",), CONFIG),
        _warm_up,
    ),
    Setting(
        "momentum",
        ("SOLVER.MOMENTUM",),
        "belongs to the learning rate",
        Choice((0.9,), "paper Sec. 4.1"),
        Choice((0.9,), CONFIG),
    ),
    Setting(
        "weight decay",
        ("SOLVER.WEIGHT_DECAY",),
        "belongs to the length of the schedule",
        Choice((1e-4,), "paper Sec. 4.1"),
        Choice((1e-4,), YAML),
    ),
    Setting(
        "norm decay",
        ("SOLVER.WEIGHT_DECAY_NORM",),
        "matters for norms that are trained",
        detectron=Choice((0.0,), CONFIG),
    ),
    Setting(
        "bias updates",
        ("SOLVER.BIAS_LR_FACTOR", "SOLVER.WEIGHT_DECAY_BIAS"),
        "how fast the prior is forgotten; no number",
        detectron=Choice(("lr x 2, decay 0",), "Detectron optimizer.py"),
        value=_bias_updates,
    ),
    Setting(
        "gradient clipping",
        tuple(f"SOLVER.CLIP_GRADIENTS.{key}" for key in ("ENABLED", "CLIP_TYPE", "CLIP_VALUE")),
        "bounds the step of a batch with an outlying loss",
        detectron=Choice(("off",), "Detectron optimizer.py"),
        value=_gradient_clipping,
    ),
    Setting(
        "precision",
        (f"{FOCAL}PRECISION", "SOLVER.AMP.ENABLED"),
        "speed and memory against rounding, in backbone and head",
        value=_precision,
    ),
    # Inference.
    Setting(
        "score threshold",
        (f"{RETINANET}SCORE_THRESH_TEST",),
        "candidates that reach NMS; with 0.0 on P7 an image never has none",
        Choice((0.05,), "paper Sec. 4.1"),
        Choice((), DETECTIONS, "0.05; 0.0 on P7"),
    ),
    Setting(
        "candidates a level",
        (f"{RETINANET}TOPK_CANDIDATES_TEST",),
        "time of NMS against recall",
        Choice((1000,), "paper Sec. 4.1"),
        Choice((1000,), CONFIG),
    ),
    Setting(
        "NMS threshold",
        (f"{RETINANET}NMS_THRESH_TEST",),
        "lower: fewer duplicates, and fewer objects that overlap",
        Choice((0.5,), "paper Sec. 4.1"),
        Choice((0.5,), YAML),
    ),
    Setting(
        "detections an image",
        ("TEST.DETECTIONS_PER_IMAGE",),
        "COCO's AP counts 100",
        detectron=Choice((100,), CONFIG),
    ),
    Setting(
        "clipping to the image",
        (),
        "IoU of boxes that leave the image, in NMS; no key changes it",
        detectron=Choice((), DETECTIONS, "before NMS"),
        value=lambda cfg: "after NMS",
        detectron2_source="detectron2 modeling/postprocessing.py",
    ),
)
