"""What the network sees of a picture: the whole of it, or tiles where it is large, resized."""

import numpy as np
from detectron2.config import CfgNode
from detectron2.data.transforms import ResizeShortestEdge
from PIL import Image

from retina_focal.config import check_choice, retina_focal_node
from retina_focal.data.resizing import ResizeAs, resizing_of_test
from retina_focal.evaluation.tiles import Tile, tiles_of


class NoView(ValueError):
    """A picture or a tile that the resizing leaves no pixel of; says which sizes."""


class Views:
    """How a config cuts pictures, and resizes them as its mapper of a test set does.

    Raises:
        UserError: an ``INPUT.FORMAT`` other than BGR and RGB.
    """

    def __init__(self, cfg: CfgNode):
        """
        Args:
            cfg: its ``INPUT.*_TEST``, ``TEST.AUG.ENABLED`` and ``MODEL.RETINA_FOCAL.TEST`` count.
        """
        check_choice("INPUT.FORMAT", cfg.INPUT.FORMAT, ("BGR", "RGB"))
        test = retina_focal_node(cfg).TEST
        self.side, self.overlap = test.TILE, test.TILE_OVERLAP
        # Of a tile; test-time augmentation resizes each view itself.
        aug = cfg.TEST.AUG
        self.resizing = [] if aug.ENABLED else resizing_of_test(cfg)
        # (shortest, longest) of what detectron2 resizes to, which may leave no pixel.
        self.limits = [(x, aug.MAX_SIZE) for x in aug.MIN_SIZES] if aug.ENABLED else []
        if self.resizing:
            self.limits = [(cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST)]
        if test.RESIZE != "detectron2":
            self.limits = []

    def tiles(self, width: int, height: int) -> list[Tile]:
        """See `tiles_of`."""
        return tiles_of(width, height, self.side, self.overlap)

    def pixels(self, image: Image.Image, tile: Tile) -> np.ndarray:
        """(H, W, 3) of a tile of `tiles`, with the image's channels.

        Raises:
            NoView: H or W would be 0.
        """
        size = width, height = tile.size
        others = [x for x in self.resizing if isinstance(x, ResizeAs)]
        for limits in self.limits:
            h, w = ResizeShortestEdge.get_output_shape(height, width, *limits)
            if min(h, w) < 1:
                raise NoView(f"its {width} x {height} pixels are {w} x {h} to the model")
            if self.resizing:  # at once, out of the whole picture
                size = w, h
        if size != image.size or any(tile.inner):
            image = image.resize(size, Image.Resampling.BILINEAR, box=tile.window)
        array = np.asarray(image)
        for resizing in others:
            array = resizing.get_transform(array).apply_image(array)
        return array
