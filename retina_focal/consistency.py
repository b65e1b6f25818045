"""What the values of a config must be to fit together, and to fit into memory."""

import math
import re
from collections.abc import Iterator, Sequence

from detectron2.config import CfgNode

from retina_focal.config import flatten, retina_focal_node
from retina_focal.errors import UserError

# Bytes of a detector's parameters, and anchors per cell. Published ones have 0.4 GB and 45.
MAX_BYTES = 2**31
MAX_ANCHORS = 500
LEAST = 8  # px of a side of a picture, below which detectron2's augmentations fail
LEAST_TILE = 32  # px; smaller ones are too many, and show nothing
# Make their sizes of MODEL.RETINA_FOCAL.ANCHORS.
OCTAVE_ANCHORS = (
    "OctaveAnchorGenerator",
    "TorchvisionAnchorGenerator",
    "DetectronAnchorGenerator",
)
# Blocks per stage of detectron2's ResNets, by MODEL.RESNETS.DEPTH.
BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3)}
BLOCKS |= {101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}


def check_together(cfg: CfgNode) -> None:
    """Refuse values that don't fit each other, each of which is in its own range.

    Raises:
        UserError: the first that doesn't, with what is expected.
    """
    for check in (_solver, _pictures, _rows, _backbone, _head):
        for key, expected in check(cfg):
            raise UserError(f"{key} is {flatten(cfg)[key]!r}; expected {expected}")
    if cfg.MODEL.META_ARCHITECTURE == "FocalRetinaNet":
        _check_size(cfg)


# A key, and what is expected of it.
Misfits = Iterator[tuple[str, str]]


def _solver(cfg: CfgNode) -> Misfits:
    node, world = cfg.SOLVER, cfg.SOLVER.REFERENCE_WORLD_SIZE
    if node.LR_SCHEDULER_NAME == "WarmupMultiStepLR":
        steps = [x for x in node.STEPS if x <= node.MAX_ITER]  # detectron2 ignores the others
        if steps != sorted(set(steps)) or node.MAX_ITER in steps:
            yield "SOLVER.STEPS", f"rising iterations before SOLVER.MAX_ITER {node.MAX_ITER}"
    if node.LR_SCHEDULER_NAME == "WarmupCosineLR" and not 0 < node.BASE_LR >= node.BASE_LR_END:
        yield "SOLVER.BASE_LR", f"more than 0, and at least BASE_LR_END {node.BASE_LR_END}"
    if node.NESTEROV and not node.MOMENTUM:
        yield "SOLVER.MOMENTUM", "more than 0 with NESTEROV True"
    if world and node.IMS_PER_BATCH % world:
        yield "SOLVER.IMS_PER_BATCH", f"a multiple of REFERENCE_WORLD_SIZE {world}"


def _pictures(cfg: CfgNode) -> Misfits:
    crop, sizes = cfg.INPUT.CROP, cfg.INPUT.MIN_SIZE_TRAIN
    if cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING == "range" and (len(sizes) != 2 or sizes[0] >= sizes[1]):
        yield "INPUT.MIN_SIZE_TRAIN", "the least and the most, with MIN_SIZE_TRAIN_SAMPLING range"
    if any(0 < x < LEAST for x in sizes):
        yield "INPUT.MIN_SIZE_TRAIN", f"0, which resizes nothing, or at least {LEAST} px"
    is_relative = crop.TYPE.startswith("relative")
    if crop.ENABLED and not all(x <= 1 if is_relative else type(x) is int for x in crop.SIZE):
        expected = "parts of a picture, at most 1" if is_relative else "whole pixels"
        yield "INPUT.CROP.SIZE", f"{expected}, with CROP.TYPE {crop.TYPE}"
    channels = 1 if cfg.INPUT.FORMAT == "L" else 3
    test = retina_focal_node(cfg).TEST
    if 0 < test.TILE < LEAST_TILE:
        yield "MODEL.RETINA_FOCAL.TEST.TILE", f"0, which cuts nothing, or at least {LEAST_TILE} px"
    if test.TILE and cfg.INPUT.FORMAT not in ("BGR", "RGB"):
        yield "INPUT.FORMAT", "BGR or RGB with MODEL.RETINA_FOCAL.TEST.TILE"
    for key in ("PIXEL_MEAN", "PIXEL_STD"):
        if len(cfg.MODEL[key]) != channels:
            yield f"MODEL.{key}", f"{channels} numbers with INPUT.FORMAT {cfg.INPUT.FORMAT}"


def _rows(cfg: CfgNode) -> Misfits:
    number = (int, float)
    for key, kinds, expected in (
        ("DATASETS.COCO_JSON", [str] * 3, "rows of [name, annotation json, image folder]"),
        ("TEST.EXPECTED_RESULTS", [str, str, number, number], "rows of ['bbox', 'AP', 40.1, 0.5]"),
    ):
        for row in flatten(cfg)[key]:
            is_row = isinstance(row, Sequence) and len(row) == len(kinds)
            if not is_row or not all(map(isinstance, row, kinds)):
                yield key, expected


def _backbone(cfg: CfgNode) -> Misfits:
    node = cfg.MODEL.RESNETS
    if "resnet" not in cfg.MODEL.BACKBONE.NAME:
        return
    if node.DEPTH not in BLOCKS:
        yield "MODEL.RESNETS.DEPTH", f"one of {sorted(BLOCKS)}"
    if len(node.DEFORM_ON_PER_STAGE) != 4:
        yield "MODEL.RESNETS.DEFORM_ON_PER_STAGE", "four values, one per stage"
    if node.DEPTH < 50:
        for key, value in {"RES2_OUT_CHANNELS": 64, "NUM_GROUPS": 1, "RES5_DILATION": 1}.items():
            if node[key] != value:
                yield f"MODEL.RESNETS.{key}", f"{value} with MODEL.RESNETS.DEPTH {node.DEPTH}"
        if any(node.DEFORM_ON_PER_STAGE):
            yield "MODEL.RESNETS.DEFORM_ON_PER_STAGE", f"no True with DEPTH {node.DEPTH}"


def _head(cfg: CfgNode) -> Misfits:
    model, channels = cfg.MODEL, cfg.MODEL.FPN.OUT_CHANNELS
    # The pyramid's norms end at res5, the head's at its coarsest level.
    strides = [2 ** int(x[1]) for x in model.RETINANET.IN_FEATURES if re.match("p[3-7]", str(x))]
    for key, stride in {"FPN": 32, "RETINANET": max(strides, default=128)}.items():
        if model[key].NORM != "GN":
            continue
        but = f"another one with FPN.OUT_CHANNELS {channels}"
        if channels % 32:
            yield f"MODEL.{key}.NORM", f"{but}; GN needs 32, 64, 96, ..."
        if channels == 32 and _least_longer_side(cfg.INPUT, cfg.SOLVER.IMS_PER_BATCH) <= stride:
            yield (
                f"MODEL.{key}.NORM",
                f"{but} and pictures of up to {stride} px (INPUT.MIN_SIZE_TEST), whose coarsest "
                "level has one cell, so that GN's groups have one value; or OUT_CHANNELS 64",
            )
    if model.META_ARCHITECTURE == "FocalRetinaNet" and "Rotated" in model.ANCHOR_GENERATOR.NAME:
        yield "MODEL.ANCHOR_GENERATOR.NAME", "boxes of four numbers: OctaveAnchorGenerator"


def _least_longer_side(node: CfgNode, images: int) -> float:
    """px that the longer side of a picture which is alone in its batch has at least."""
    sizes = [(node.MIN_SIZE_TEST, node.MAX_SIZE_TEST)]
    if images == 1:
        sizes += [(x, node.MAX_SIZE_TRAIN) for x in node.MIN_SIZE_TRAIN]
    return min((min(pair) for pair in sizes if pair[0]), default=math.inf)  # 0: not resized


def _check_size(cfg: CfgNode) -> None:
    """Refuse more anchors per cell, or parameters, than any detector has."""
    model, node = cfg.MODEL, retina_focal_node(cfg).ANCHORS
    ratios = max(map(_length, model.ANCHOR_GENERATOR.ASPECT_RATIOS))
    if model.ANCHOR_GENERATOR.NAME in OCTAVE_ANCHORS:
        is_single = len(model.RETINANET.IN_FEATURES) == 1
        sizes = node.SCALES_PER_OCTAVE * (len(node.BASE_SIZES) if is_single else 1)
    else:
        sizes = max(map(_length, model.ANCHOR_GENERATOR.SIZES))
    num_anchors = sizes * ratios
    if num_anchors > MAX_ANCHORS:
        raise UserError(
            f"the config asks for {num_anchors} anchors per cell (MODEL.ANCHOR_GENERATOR, "
            f"MODEL.RETINA_FOCAL.ANCHORS); expected at most {MAX_ANCHORS} (the paper has 9)"
        )
    channels, c5 = model.FPN.OUT_CHANNELS, 2048
    weights = 0
    if "resnet" in model.BACKBONE.NAME:
        c5 = model.RESNETS.RES2_OUT_CHANNELS * 8
        weights += _resnet_weights(model.RESNETS)
    weights += channels * (9 * 5 * channels + 10 * c5)  # the pyramid
    weights += 2 * model.RETINANET.NUM_CONVS * 9 * channels**2
    weights += 9 * channels * num_anchors * (model.RETINANET.NUM_CLASSES + 4)
    if 4 * weights > MAX_BYTES:
        raise UserError(
            f"the config's detector has {4 * weights / 1e9:,.0f} GB of parameters; expected at "
            f"most {MAX_BYTES / 1e9:.1f} GB: lower MODEL.RETINANET.NUM_CLASSES "
            f"({model.RETINANET.NUM_CLASSES}) or NUM_CONVS ({model.RETINANET.NUM_CONVS}), "
            f"MODEL.FPN.OUT_CHANNELS ({channels}), the anchors per cell ({num_anchors}), or the "
            "channels of MODEL.RESNETS"
        )


def _resnet_weights(node: CfgNode) -> int:
    """Of its blocks, shortcuts included, about."""
    weights = 0
    for stage, blocks in enumerate(BLOCKS[node.DEPTH]):
        inside = node.NUM_GROUPS * node.WIDTH_PER_GROUP * 2**stage
        outside = node.RES2_OUT_CHANNELS * 2**stage
        weights += blocks * (2 * inside * outside + 9 * inside**2 // node.NUM_GROUPS)
        weights += outside**2
    return weights


def _length(value: object) -> int:
    return len(value) if isinstance(value, Sequence) else 1
