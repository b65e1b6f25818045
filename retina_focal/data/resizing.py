"""How the pictures of a test are resized: as detectron2 does, or as the project whose weights run.

The projects differ in the rounding of sides, and in what a pixel is made of where a picture gets
smaller: Pillow averages all pixels that it covers, the others look at the four nearest.
"""

import math
from collections.abc import Callable

import cv2
import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper
from detectron2.data.transforms import (
    Augmentation,
    CropTransform,
    ResizeShortestEdge,
    ResizeTransform,
)
from torch.nn import functional as F

from retina_focal.config import retina_focal_node

# Rounds a side, and makes (H, W, 3) of a size out of uint8 pixels and the factor of both sides.
Rounding = Callable[[float], int]
Pixels = Callable[[np.ndarray, tuple[int, int], float], np.ndarray]


class ResizeAs(Augmentation):
    """The shorter side to a length, unless the longer one would get too long; by another project.

    Args:
        kind: a key of `KINDS`.
        shortest: pixels of the shorter side.
        longest: pixels that the longer side has at most.
    """

    def __init__(self, kind: str, shortest: int, longest: int):
        super().__init__()
        self._init(locals())

    def get_transform(self, image: np.ndarray) -> ResizeTransform:
        rounding, pixels = KINDS[self.kind]
        height, width = image.shape[:2]
        scale = min(self.shortest / min(height, width), self.longest / max(height, width))
        size = tuple(max(rounding(length * scale), 1) for length in (height, width))
        return _Resizing(height, width, *size, lambda image: pixels(image, size, scale))


class _Resizing(ResizeTransform):
    """detectron2's transform of boxes, with pixels of another project."""

    def __init__(
        self,
        h: int,
        w: int,
        new_h: int,
        new_w: int,
        pixels: Callable[[np.ndarray], np.ndarray],
    ):
        super().__init__(h, w, new_h, new_w)
        self.pixels = pixels

    def apply_image(self, img: np.ndarray, interp: int | None = None) -> np.ndarray:
        return self.pixels(img)


def _torchvision_pixels(image: np.ndarray, size: tuple[int, int], _: float) -> np.ndarray:
    # In fp64, as torchvision for a network of fp64: fp32 here would move boxes by up to 1e-3 px.
    tensor = torch.from_numpy(image.astype(np.float64)).permute(2, 0, 1)[None]
    resized = F.interpolate(tensor, size, mode="bilinear", align_corners=False)
    return resized[0].permute(1, 2, 0).numpy()


def _mmdetection_pixels(image: np.ndarray, size: tuple[int, int], _: float) -> np.ndarray:
    return cv2.resize(np.ascontiguousarray(image), size[::-1])


def _detectron_pixels(image: np.ndarray, size: tuple[int, int], scale: float) -> np.ndarray:
    return cv2.resize(image.astype(np.float32), None, fx=scale, fy=scale)


# float64 pixels of torchvision, float32 of Detectron, uint8 of mmdetection.
KINDS: dict[str, tuple[Rounding, Pixels]] = {
    "torchvision": (math.floor, _torchvision_pixels),
    "mmdetection": (lambda length: int(length + 0.5), _mmdetection_pixels),
    "detectron": (round, _detectron_pixels),
}


def resizing_of_test(cfg: CfgNode, shortest: int | None = None, longest: int | None = None) -> list:
    """The augmentations of a test: one that resizes, or none where the shorter side is 0.

    Args:
        cfg: its ``MODEL.RETINA_FOCAL.TEST.RESIZE`` counts.
        shortest, longest: pixels; default: ``INPUT.MIN_SIZE_TEST`` and ``INPUT.MAX_SIZE_TEST``.
    """
    shortest = cfg.INPUT.MIN_SIZE_TEST if shortest is None else shortest
    longest = cfg.INPUT.MAX_SIZE_TEST if longest is None else longest
    kind = retina_focal_node(cfg).TEST.RESIZE
    if not shortest:
        return []
    if kind == "detectron2":
        return [ResizeShortestEdge(shortest, longest)]
    return [ResizeAs(kind, shortest, longest)]


def mapper_of_test(cfg: CfgNode) -> DatasetMapper:
    """detectron2's mapper of a test set, with the resizing of the config."""
    return DatasetMapper(cfg, is_train=False, augmentations=resizing_of_test(cfg))


def middle_tile(height: int, width: int, side: int) -> tuple[int, int, int, int]:
    """Left, top, width and height of the tile in the middle of a picture, pixels.

    Args:
        side: of a tile, ``MODEL.RETINA_FOCAL.TEST.TILE``; 0: the whole picture.
    """
    w, h = (min(x, side or x) for x in (width, height))
    return (width - w) // 2, (height - h) // 2, w, h


class MiddleTile(Augmentation):
    """Of a picture that is larger than a tile the one in the middle; see `middle_tile`."""

    def __init__(self, side: int):
        super().__init__()
        self.side = side

    def get_transform(self, image: np.ndarray) -> CropTransform:
        return CropTransform(*middle_tile(*image.shape[:2], self.side))


def mapper_with_boxes(cfg: CfgNode) -> DatasetMapper:
    """What the network sees in a test, with the boxes: of a picture that ``TEST.TILE`` cuts the
    middle tile alone."""
    tile = MiddleTile(retina_focal_node(cfg).TEST.TILE)
    views = [tile, *resizing_of_test(cfg)]
    # DatasetMapper drops the boxes unless it is "training".
    return DatasetMapper(is_train=True, augmentations=views, image_format=cfg.INPUT.FORMAT)
