"""What data shows before it costs a training: boxes that reach no anchor, and blank pictures."""

import logging
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from detectron2.engine import TrainerBase
from detectron2.structures import Boxes, Instances

from retina_focal.data.coverage import AnchorLayout, box_table, cover, policy_of
from retina_focal.data.findings import RECORD, shortened
from retina_focal.retinanet import FocalRetinaNet

BLANK = 0.99  # share of a picture's values that are all white, or all black
SHOWN = 3  # files that a line names
MAX_UNREACHED = 0.02  # share of the boxes above which a training says so
MAX_PICTURES = 2_000  # evenly spread, whose boxes are looked at: a tenth of a second

logger = logging.getLogger(__name__)


def warn_unreached(model: FocalRetinaNet, trainer: TrainerBase) -> None:
    """Log before the first step that more than `MAX_UNREACHED` of the boxes reach no anchor.

    Nothing is said where it isn't known: of a LazyConfig, whose resizing is a part of its loader,
    of random crops that are resized, and under an assigner that has no thresholds.
    """
    records = getattr(getattr(trainer, "data_loader", None), "dataset", None)
    thresholds = getattr(model.assigner, "iou_thresholds", None)
    cfg = getattr(trainer, "cfg", {})
    if not (records and thresholds and "INPUT" in cfg):
        return
    if cfg.INPUT.CROP.ENABLED and policy_of(cfg)[0] != [0]:
        return
    chosen = np.linspace(0, len(records) - 1, min(len(records), MAX_PICTURES)).round().astype(int)
    table = box_table([records[i] for i in chosen])
    constraints = model.padding["padding_constraints"]
    divisibility = model.padding["size_divisibility"]
    layout = AnchorLayout.of(model.anchor_generator, divisibility, constraints)
    coverage = cover(table, layout, *policy_of(cfg))
    missed = coverage.ious < thresholds[0]
    if len(missed) == 0 or missed.mean() <= MAX_UNREACHED:
        return
    sides = coverage.sides[missed]
    learned = "little" if getattr(model.assigner, "rule", "") == "detectron2" else "nothing"
    logger.warning(
        "%.1f%% of the boxes (%s of %s, in %s pictures at %s) overlap no anchor by %g, so %s is "
        "learned of them; they are %.3g to %.3g px once resized (square root of the area). For "
        "pictures of them and anchors that reach more type: retina-focal anchors %s --config-file "
        "%s/config.yaml",
        *(100 * missed.mean(), f"{missed.sum():,}", f"{len(missed):,}", f"{len(chosen):,}"),
        *("1 size" if len(set(coverage.shorter)) == 1 else f"{len(set(coverage.shorter))} sizes",),
        *(thresholds[0], learned, sides.min(), sides.max()),
        *(cfg.DATASETS.TRAIN[0], cfg.OUTPUT_DIR),
    )


def unreached_boxes(anchors: Sequence[Boxes], gt_instances: Sequence[Instances]) -> str | None:
    """The likely cause where no anchor of a batch is positive; None where there is no box either.

    Args:
        anchors: one Boxes per level.
        gt_instances: N images with `gt_boxes`.
    """
    sides = torch.cat([x.gt_boxes.area().sqrt().cpu() for x in gt_instances])
    if not len(sides):
        return None
    of_anchors = torch.cat([level.area().sqrt() for level in anchors])
    found = f"{sides.min().item():.3g} to {sides.max().item():.3g} px"
    return (
        f"None of the {len(sides)} boxes of the batch has an anchor, so nothing is learned of "
        f"them. They are {found} once resized (square root of the area), the anchors "
        f"{of_anchors.min().item():.3g} to {of_anchors.max().item():.3g}; type "
        "MODEL.RETINA_FOCAL.ANCHORS.BASE_SIZES with sizes like theirs, another "
        "INPUT.MIN_SIZE_TRAIN, or MODEL.RETINA_FOCAL.ASSIGNMENT detectron2, which gives every box "
        "its best anchor; if these are not your objects' sizes, look at the boxes: retina-focal "
        "draw"
    )


def blank_pictures(batch: Sequence[Mapping]) -> str | None:
    """The pictures of a batch that are white, black or of one value, as the model gets them.

    Args:
        batch: with "image", (C, H, W) of 0 to 255.
    """
    found: dict[str, list[str]] = {}
    for sample in batch:
        image, kind = sample["image"], None
        if not image.numel():
            continue
        if (image >= 255).float().mean() >= BLANK:
            kind = "white"
        elif (image <= 0).float().mean() >= BLANK:
            kind = "black"
        elif image.min() == image.max():
            kind = f"of one value, {image.min().item():g}"
        if kind:
            name = shortened(sample.get("file_name", "a picture"), RECORD)
            found.setdefault(kind, []).append(name)
    if not found:
        return None
    kinds = (
        f"{len(names)} of {len(batch)} pictures are {kind} ({', '.join(names[:SHOWN])}"
        f"{', ...' if len(names) > SHOWN else ''})"
        for kind, names in found.items()
    )
    return f"{'; '.join(kinds)}: are they as they should be? Convert them to 8 bits per channel"
