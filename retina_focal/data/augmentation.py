"""Augmentations beyond ``INPUT``, by ``MODEL.RETINA_FOCAL.TRAIN.AUGMENT``; see `config`.

All random numbers come from the generators that the loader seeds by (seed, position).
"""

from collections.abc import Sequence

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper
from detectron2.data import transforms as T
from detectron2.structures import Boxes, Instances

from retina_focal.errors import UserError

SHIFT = 0.2  # of width and height: with scale jitter the picture moves up to half of it either way
GREY = 114  # where a mosaic has no picture
MIN_VISIBLE = 0.25  # share of a box's area; a smaller rest is left out of a mosaic


def add_augmentations(mapper: DatasetMapper, augment: CfgNode) -> None:
    """Add scale jitter before the augmentations of a mapper, the others after them, in place.

    Raises:
        UserError: a value out of its range.
    """
    low, high = augment.SCALE
    upside_down = augment.VERTICAL_FLIP
    probabilities = 0 <= augment.GREY <= 1 and 0 <= upside_down <= 1
    if not (0 < low <= high and 0 <= augment.COLOUR < 1 and probabilities):
        raise UserError(
            f"TRAIN.AUGMENT has SCALE {list(augment.SCALE)}, COLOUR {augment.COLOUR}, GREY "
            f"{augment.GREY}, VERTICAL_FLIP {upside_down}; expected SCALE [low, high] above 0, "
            "COLOUR from 0 to below 1, GREY and VERTICAL_FLIP from 0 to 1"
        )
    augmentations = list(mapper.augmentations.augs)
    if (low, high) != (1, 1):
        augmentations.insert(0, T.RandomExtent((1 / high, 1 / low), (SHIFT, SHIFT)))
    if upside_down:
        augmentations.append(T.RandomFlip(upside_down, horizontal=False, vertical=True))
    if augment.COLOUR:
        around = 1 - augment.COLOUR, 1 + augment.COLOUR
        kinds = T.RandomBrightness, T.RandomContrast, T.RandomSaturation
        augmentations += [kind(*around) for kind in kinds]
    if augment.GREY:
        augmentations.append(T.RandomApply(T.RandomSaturation(0, 0), augment.GREY))
    mapper.augmentations = T.AugmentationList(augmentations)


def refuse_for_lazy(augment: CfgNode) -> None:
    """Refuse (UserError) the keys of augmentations that a LazyConfig has in its mapper."""
    if list(augment.SCALE) != [1, 1] or augment.COLOUR or augment.GREY or augment.VERTICAL_FLIP:
        raise UserError(
            "train.retina_focal.train.augment has scale, colour, grey or vertical_flip; in a "
            "LazyConfig all but mosaic are in dataloader.train.mapper.augmentations"
        )


class Mosaic:
    """Four pictures in one of the size of the first, around a random point."""

    def __init__(self, probability: float, end: int):
        """
        Args:
            probability: of a sample to be a mosaic.
            end: position in the order of all samples; from there on there is no mosaic.
        """
        self.probability, self.end = probability, end

    def is_due(self, position: int) -> bool:
        """Draws a random number."""
        return position < self.end and torch.rand(()).item() < self.probability

    def __call__(self, samples: Sequence[dict]) -> dict:
        """
        Args:
            samples: four, of a mapper: `image` (C, H, W), `instances`, maybe `ignore_regions`.
        Returns:
            The first with another image and the boxes of all, of which at least `MIN_VISIBLE` of
            the area is seen; of their fields `gt_boxes` and `gt_classes`.
        """
        image = torch.full_like(samples[0]["image"], GREY)
        height, width = image.shape[-2:]
        y, x = (int(side * torch.empty(()).uniform_(0.25, 0.75)) for side in (height, width))
        corners = (0, 0, y, x), (0, x, y, width), (y, 0, height, x), (y, x, height, width)
        boxes, classes, regions = [], [], []
        for (top, left, bottom, right), sample in zip(corners, samples, strict=True):
            window = bottom - top, right - left
            spare = [max(a - b, 0) for a, b in zip(sample["image"].shape[-2:], window, strict=True)]
            down, along = (int(torch.randint(most + 1, ())) for most in spare)
            part = sample["image"][:, down : down + window[0], along : along + window[1]]
            image[:, top : top + part.shape[1], left : left + part.shape[2]] = part
            shift, edges = (left - along, top - down), (left, top, right, bottom)
            own, keep = _visible(sample["instances"].gt_boxes.tensor, shift, edges)
            boxes.append(own[keep])
            classes.append(sample["instances"].gt_classes[keep])
            if "ignore_regions" in sample:
                own, keep = _visible(sample["ignore_regions"].tensor, shift, edges, 0.0)
                regions.append(own[keep])
        instances = Instances((height, width))
        instances.gt_boxes, instances.gt_classes = Boxes(torch.cat(boxes)), torch.cat(classes)
        result = {**samples[0], "image": image, "instances": instances}
        return {**result, "ignore_regions": Boxes(torch.cat(regions))} if regions else result


def _visible(
    boxes: torch.Tensor,
    shift: tuple[int, int],
    edges: tuple[int, int, int, int],
    least: float = MIN_VISIBLE,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Boxes moved by (x, y) and cut at (left, top, right, bottom), and which of them are kept."""
    moved = boxes + boxes.new_tensor(shift * 2)
    left, top, right, bottom = edges
    cut = torch.stack(
        [moved[:, 0::2].clamp(left, right), moved[:, 1::2].clamp(top, bottom)], 2
    ).flatten(1)
    area = Boxes(cut).area()
    return cut, (area > 0) & (area >= least * Boxes(boxes).area())


def mosaic(augment: CfgNode, num_samples: int) -> Mosaic | None:
    """What ``MOSAIC`` and ``MOSAIC_OFF`` ask for.

    Args:
        num_samples: of the whole training.
    Raises:
        UserError: a value outside [0, 1].
    """
    if not (0 <= augment.MOSAIC <= 1 and 0 <= augment.MOSAIC_OFF <= 1):
        raise UserError(
            f"TRAIN.AUGMENT has MOSAIC {augment.MOSAIC} and MOSAIC_OFF {augment.MOSAIC_OFF}; "
            "expected a probability, and a share of the training, from 0 to 1"
        )
    end = round((1 - augment.MOSAIC_OFF) * num_samples)
    return Mosaic(augment.MOSAIC, end) if augment.MOSAIC else None
