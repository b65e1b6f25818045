"""What the first batches show of the data: boxes that reach no anchor, and blank pictures."""

from collections.abc import Mapping, Sequence

import torch
from detectron2.structures import Boxes, Instances

BLANK = 0.99  # share of a picture's values that are all white, or all black
SHOWN = 3  # files that a line names


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
            found.setdefault(kind, []).append(str(sample.get("file_name", "a picture")))
    if not found:
        return None
    kinds = (
        f"{len(names)} of {len(batch)} pictures are {kind} ({', '.join(names[:SHOWN])}"
        f"{', ...' if len(names) > SHOWN else ''})"
        for kind, names in found.items()
    )
    return f"{'; '.join(kinds)}: are they as they should be? Convert them to 8 bits per channel"
