"""Every default of the package, in one place.

What detectron2 already has keeps its name and meaning (``MODEL.RETINANET``,
``MODEL.ANCHOR_GENERATOR``, ``MODEL.FPN``, ``SOLVER``, ``INPUT``); the keys below are what it lacks.
The first value named in a comment is the default and means "as stock detectron2".
"""

import difflib
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.config import get_cfg as detectron2_get_cfg
from fvcore.common.registry import Registry

from retina_focal.errors import UserError
from retina_focal.files import check_regular


def add_retina_focal_config(cfg: CfgNode) -> None:
    """Add ``MODEL.RETINA_FOCAL``, ``DATASETS.COCO_JSON`` and ``.SOURCES`` with their defaults."""
    cfg.MODEL.RETINA_FOCAL = _default_node()
    # Datasets by URI to register: rows of [name, uri], such as [mine, "voc:FOLDER?split=train"].
    cfg.DATASETS.SOURCES = []
    # Datasets in COCO format to register: rows of [name, annotation json, image folder].
    cfg.DATASETS.COCO_JSON = []


def get_cfg() -> CfgNode:
    """detectron2's default config with the keys of this package added."""
    cfg = detectron2_get_cfg()
    add_retina_focal_config(cfg)
    return cfg


def retina_focal_node(cfg: CfgNode) -> CfgNode:
    """``cfg.MODEL.RETINA_FOCAL``, or the defaults for a config that never had the node."""
    return cfg.MODEL.RETINA_FOCAL if "RETINA_FOCAL" in cfg.MODEL else _default_node()


def flatten(node: dict, prefix: str = "") -> dict[str, object]:
    """{"A": {"B": 1}} to {"A.B": 1}, tuples to lists."""
    flat = {}
    for key, value in node.items():
        if isinstance(value, dict):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = list(value) if isinstance(value, tuple) else value
    return flat


def check_choice(key: str, value: str, choices: Sequence[str]) -> None:
    """Refuse a value of a key that is none of its choices (UserError)."""
    if value not in choices:
        raise UserError(f"{key} is '{value}'; expected one of {', '.join(choices)}")


def registered(registry: Registry, key: str, name: str) -> Callable:
    """What is registered under the name that a config's key gives.

    Raises:
        UserError: nothing is.
    """
    if name not in registry:
        raise UserError(
            f"{key} is '{name}'; expected one of {', '.join(other for other, _ in registry)}, or a "
            "name that your own file registers"
        )
    return registry.get(name)


def config_path(name: str) -> str:
    """Path of a config: `name` itself where it is a file, else that of the package's config `name`.

    Raises:
        UserError: neither exists, or it is no regular file.
    """
    if os.path.isfile(name):  # False for a name that is too long, too
        return name
    if found := package_config(name):
        return found
    if os.path.lexists(name):
        check_regular(name)  # says what it is
    folder = _configs_folder()
    paths = (path for path in folder.rglob("*") if path.suffix in (".yaml", ".py"))
    names = sorted(path.relative_to(folder).as_posix() for path in paths)
    near = difflib.get_close_matches(name, names, n=5, cutoff=0.4) or names[:5]
    raise UserError(
        f"config '{name}' is neither a file nor a config of the package; near it: {', '.join(near)}"
    )


def package_config(name: str) -> str | None:
    """Path of the package's config of that name, such as ``quick_start/bccd.yaml``, or None."""
    path = _configs_folder() / name
    return str(path) if os.path.isfile(path) else None


def _configs_folder() -> Path:
    # An installed wheel has the configs inside the package, a clone beside it.
    package = Path(__file__).parent
    folders = [package / "configs", package.parent / "configs"]
    return next((folder for folder in folders if folder.is_dir()), folders[0])


def _default_node() -> CfgNode:
    node = CfgNode()

    # Name in DENSE_HEAD_REGISTRY.
    node.HEAD = "FocalRetinaNetHead"

    # Where P6 comes from: "res5" (the paper, Sec. 4 footnote 2) or "p5" (torchvision v1, FCOS).
    node.TOP_BLOCK_IN_FEATURE = "res5"
    # Whether a ReLU stands between P6 and P7, as in the paper; not so in mmdetection.
    node.TOP_BLOCK_RELU = True

    # A name in ASSIGNER_REGISTRY. Three label by thresholds of the IoU and differ in the anchors
    # below the upper threshold that are positive ("low-quality matches"): "detectron2" every best
    # anchor of a box; "detectron" only where its IoU reaches the lower threshold (the authors'
    # code); "paper" none (Sec. 4, "Anchors"). "atss" labels by statistics of the IoUs
    # (arXiv:1912.02424).
    node.ASSIGNMENT = "detectron2"

    # What the losses are divided by: "ema" moving average of the positives of this process;
    # "image" the positives of each image, then the mean over images (Sec. 4.1, "Focal Loss");
    # "batch" the positives of this process; "global" the positives of all processes.
    node.NORMALIZER = "ema"

    # Loss of each class of each anchor: "focal" with MODEL.RETINANET.FOCAL_LOSS_ALPHA and _GAMMA
    # (gamma 0: alpha-balanced cross entropy); "cross_entropy" -log(p_t), without alpha;
    # "focal_star" -log(sigmoid(gamma x_t + beta)) / gamma with FOCAL_LOSS_GAMMA and FOCAL_STAR.BETA
    # (appendix A); "hinge" max(0, HINGE.MARGIN - p_t) (Sec. 5.1). Later ones, see later_losses.py:
    # "quality_focal" and "varifocal", whose target is the IoU; "poly1"; "asymmetric".
    node.CLS_LOSS = "focal"
    node.FOCAL_STAR = CfgNode()
    node.FOCAL_STAR.BETA = 1.0
    node.HINGE = CfgNode()
    node.HINGE.MARGIN = 0.5
    node.POLY1 = CfgNode()
    node.POLY1.EPSILON = 1.0
    node.ASYMMETRIC = CfgNode()
    node.ASYMMETRIC.GAMMA_POS = 0.0
    node.ASYMMETRIC.GAMMA_NEG = 4.0
    node.ASYMMETRIC.MARGIN = 0.05

    # True: the alpha of "focal" is the inverse class frequency of each batch (Sec. 3.1), not
    # FOCAL_LOSS_ALPHA.
    node.ALPHA_FROM_DATA = False

    # Online hard example mining (Table 1d): the class loss counts only the BATCH_SIZE hardest
    # anchors of each image, after NMS at the IoU NMS_THRESH, and is divided by their number.
    # NEG_PER_POS 3 keeps 1:3, the positives and three negatives for each; 0: no fixed ratio.
    node.OHEM = CfgNode()
    node.OHEM.ENABLED = False
    node.OHEM.BATCH_SIZE = 128
    node.OHEM.NMS_THRESH = 0.5
    node.OHEM.NEG_PER_POS = 0

    # What backbone and head compute in: "fp32", in which an outer autocast (SOLVER.AMP.ENABLED)
    # still works; "bf16"; "fp16", for inference only; "auto", which is bf16 where the processor has
    # it. The rest is always fp32.
    node.PRECISION = "fp32"

    # True: in training, backbone and head run as CUDA graphs: fewer launches, for images of one
    # size. On one GPU, without accumulation and without norms that are trained.
    node.CUDA_GRAPHS = False

    # Micro-batches that the package's trainer runs one after another for one step of the optimizer:
    # less memory, the same gradient. SOLVER.IMS_PER_BATCH stays the images of a step.
    node.ACCUMULATE_STEPS = 1

    # How the package's trainer runs: checkpoints, averages, early stops, augmentations.
    node.TRAIN = CfgNode()
    # Seconds that processes wait for one of them, in a collective or at the start, and that a data
    # loader waits for its worker; then all end and say who is missing. It must be longer than what
    # one process does alone: evaluating all detections, and saving.
    node.TRAIN.TIMEOUT = 600
    # The newest checkpoints that stay beside model_final.pth and model_best.pth; 0: all. In a
    # LazyConfig train.checkpointer.max_to_keep.
    node.TRAIN.KEEP_CHECKPOINTS = 0
    # Metric of the evaluations ("bbox/AP") whose best weights on DATA.VAL are kept in
    # model_best.pth; "": none.
    node.TRAIN.BEST = ""
    # Evaluations without a better TRAIN.BEST after which the run ends; 0: it goes to the end.
    node.TRAIN.PATIENCE = 0
    # Decay of a moving average of the weights; 0: none. The average is then what is evaluated, and
    # `model` in a checkpoint; see `training.average`.
    node.TRAIN.EMA = 0.0
    # Names of modules and parameters that stay as they are, such as ["backbone.bottom_up"]; their
    # batch norms keep their statistics.
    node.TRAIN.FREEZE = []
    # Augmentations beyond INPUT. SCALE: the least and the most that objects are scaled by. COLOUR
    # c: brightness, contrast and saturation are multiplied by 1 - c to 1 + c. GREY: the probability
    # of a picture without colours. VERTICAL_FLIP: that of one upside down, beside what
    # INPUT.RANDOM_FLIP does. MOSAIC: that of four pictures in one; there are none in the last part
    # MOSAIC_OFF of the iterations.
    node.TRAIN.AUGMENT = CfgNode({"SCALE": [1.0, 1.0], "COLOUR": 0.0, "GREY": 0.0})
    node.TRAIN.AUGMENT.VERTICAL_FLIP = 0.0
    node.TRAIN.AUGMENT.MOSAIC = 0.0
    node.TRAIN.AUGMENT.MOSAIC_OFF = 0.2
    # True: a training's pictures stay in memory once they are read, in up to half of what is free.
    node.TRAIN.CACHE_IMAGES = False
    # True: each evaluation also computes the losses on DATA.VAL, as val/... in metrics.json.
    node.TRAIN.VAL_LOSS = False
    # Which images and boxes are read, and the dataset that choices are made on.
    node.DATA = CfgNode()
    # How many pictures that can't be used a training may skip before it stops; 0: it stops at the
    # first. Each is counted once and named.
    node.DATA.MAX_BAD_IMAGES = 0
    # True: pictures without a box are trained on (DATALOADER.FILTER_EMPTY_ANNOTATIONS False).
    node.DATA.KEEP_EMPTY = False
    # True: background anchors with at least half of their area in a crowd (iscrowd 1) are ignored.
    node.DATA.IGNORE_REGIONS = False
    # Names of the classes to keep, numbered in this order; others become background. []: all.
    node.DATA.CLASSES = []
    # The largest picture that is decoded, in pixels, as the head of its file tells before.
    node.DATA.MAX_PIXELS = 50_000_000
    # Whether pictures may lie outside of their dataset's image folder, by ".." or an absolute path
    # in the annotations. Of the command line alone: a config file can't set it.
    node.DATA.ALLOW_OUTSIDE = False
    # The dataset that choices are made on (the best checkpoint, calibration, operating points), so
    # that those of DATASETS.TEST serve to measure alone; "": none is chosen.
    node.DATA.VAL = ""
    # How detections are made and measured, beyond MODEL.RETINANET.*_TEST.
    node.TEST = CfgNode()
    # What computes the AP of boxes: "pycocotools", or "hotcoco", which gives the same numbers in a
    # fraction of the time and is an extra to install.
    node.TEST.EVALUATOR = "pycocotools"
    # Whether NMS takes overlapping boxes of two classes for one object, and keeps the higher score.
    node.TEST.CLASS_AGNOSTIC_NMS = False
    # Whose resizing pictures go through, with the sizes of INPUT.*_TEST: "detectron2",
    # "torchvision", "mmdetection" or "detectron"; see `data.resizing`.
    node.TEST.RESIZE = "detectron2"
    # True: boxes are clipped to the picture before NMS and not after it (torchvision, Detectron,
    # mmdetection); and boxes without area, that clipping leaves of those outside, are detections
    # (torchvision, Detectron).
    node.TEST.CLIP_BEFORE_NMS = False
    node.TEST.KEEP_EMPTY_BOXES = False
    # Side in pixels of the tiles into which larger pictures are cut to be predicted and measured;
    # 0: none.
    node.TEST.TILE = 0
    # Overlap of neighbouring tiles, as a part of their side; it should be larger than most objects.
    node.TEST.TILE_OVERLAP = 0.2

    # Octave anchors of OctaveAnchorGenerator (Sec. 4, "Anchors"): one base size per level, in
    # pixels, each repeated at 2^(i / SCALES_PER_OCTAVE) for i < SCALES_PER_OCTAVE.
    node.ANCHORS = CfgNode()
    node.ANCHORS.BASE_SIZES = [32, 64, 128, 256, 512]
    node.ANCHORS.SCALES_PER_OCTAVE = 3

    # build_retina_focal_timm_fpn_backbone: the model's name in timm, and what its batch
    # normalisation does: "FrozenBN" (fixed statistics and affine), "BN" or "SyncBN" (trained).
    node.TIMM = CfgNode()
    node.TIMM.NAME = ""
    node.TIMM.NORM = "FrozenBN"
    return node
