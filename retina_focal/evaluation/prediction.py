"""Detections of files: pictures are decoded, cut and resized ahead of the network, in batches."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from detectron2.config import CfgNode
from detectron2.evaluation import inference_context
from detectron2.structures import Instances
from PIL import Image
from torch import Tensor, nn

from retina_focal.config import retina_focal_node
from retina_focal.data.images import BadPicture
from retina_focal.evaluation.ahead import ahead
from retina_focal.evaluation.inputs import Input, bad_picture, read_frames, read_picture
from retina_focal.evaluation.tiles import Tile, merge_tiles
from retina_focal.evaluation.tta import with_tta
from retina_focal.evaluation.views import NoView, Views


@dataclass
class Prediction:
    """A picture, or a frame of a video, and what is found in it."""

    source: Input
    frame: int | None  # its number in a video, from 0
    width: int  # pixels
    height: int
    tiles: list[Tile]
    preview: Image.Image | None  # RGB, no larger than `Predictor.preview`; None: not asked for
    found: list[Instances] = field(default_factory=list)  # of the tiles seen so far
    instances: Instances | None = None  # `pred_boxes` in pixels, on the CPU, by falling scores

    @property
    def name(self) -> str:
        """Of its outputs: a relative path without ending, which no other prediction has."""
        return self.source.name if self.frame is None else f"{self.source.name}/{self.frame:06d}"


@dataclass
class _View:
    """A tile as the network takes it."""

    picture: Prediction
    inputs: dict  # of the model


class Predictor:
    """Predictions of files, as a stream.

    Views are batched only with others of the same size: more padding would change what the network
    sees, and so the boxes of a picture would depend on its neighbours.
    """

    def __init__(
        self,
        cfg: CfgNode,
        model: nn.Module,
        batch_size: int = 1,
        every: int = 1,
        preview: int = 0,
    ):
        """
        Args:
            cfg: its ``INPUT.*_TEST``, ``TEST.AUG`` and ``MODEL.RETINA_FOCAL.TEST`` count.
            model: with trained weights.
            batch_size: views that the network sees at once, at most.
            every: of a video, each frame whose number is divisible by it.
            preview: pixels of the longer side of the small pictures that come with predictions;
                0: none.
        Raises:
            UserError: see `Views`.
        """
        node = retina_focal_node(cfg)
        self.cfg, self.test, self.views = cfg, node.TEST, Views(cfg)
        self.model = with_tta(cfg, model)
        self.batch_size, self.every, self.preview = batch_size, every, preview
        self.max_pixels = node.DATA.MAX_PIXELS

    def __call__(self, inputs: Iterable[Input]) -> Iterator[Prediction | BadPicture]:
        """What is found in each picture, or why it can't be used, in the order of the inputs."""
        batch: list[_View] = []
        with inference_context(self.model), torch.no_grad(), _our_limit_of_pixels():
            for view in ahead(self._views(inputs), 2 * self.batch_size):
                is_bad = isinstance(view, BadPicture)
                if batch and (is_bad or len(batch) == self.batch_size or _differ(batch[0], view)):
                    yield from self._detect(batch)
                    batch = []
                if is_bad:
                    yield view
                else:
                    batch.append(view)
            yield from self._detect(batch)

    def _detect(self, batch: list[_View]) -> Iterator[Prediction]:
        """The pictures that a batch of views completes."""
        if not batch:
            return
        outputs = self.model([view.inputs for view in batch])
        for view, output in zip(batch, outputs, strict=True):
            picture = view.picture
            picture.found.append(output["instances"].to("cpu"))
            if len(picture.found) == len(picture.tiles):
                picture.instances = merge_tiles(
                    picture.tiles,
                    picture.found,
                    self.test.TILE,
                    self.cfg.MODEL.RETINANET.NMS_THRESH_TEST,
                    self.test.CLASS_AGNOSTIC_NMS,
                )
                picture.found.clear()
                yield picture

    def _views(self, inputs: Iterable[Input]) -> Iterator[_View | BadPicture]:
        """Of every picture, one after the other; at most one is held whole."""
        for source in inputs:
            try:
                if source.is_video:
                    for number, image in read_frames(source.path, self.every):
                        yield from self._views_of(source, number, image)
                else:
                    yield from self._views_of(
                        source, None, read_picture(source.path, self.max_pixels)
                    )
            except BadPicture as error:
                yield error

    def _views_of(self, source: Input, frame: int | None, image: Image.Image) -> Iterator[_View]:
        tiles = self.views.tiles(*image.size)
        preview = _shrunk(image, self.preview) if self.preview else None
        picture = Prediction(source, frame, *image.size, tiles, preview)
        for tile in tiles:
            width, height = tile.size
            tensor = self._resized(image, tile, source)
            yield _View(picture, {"image": tensor, "height": height, "width": width})

    def _resized(self, image: Image.Image, tile: Tile, source: Input) -> Tensor:
        """(3, H, W) of a tile, in the channels of ``INPUT.FORMAT``."""
        try:
            array = self.views.pixels(image, tile)
        except NoView as error:
            raise bad_picture(source.path, str(error)) from error
        if self.cfg.INPUT.FORMAT == "BGR":
            array = array[:, :, ::-1]
        return torch.from_numpy(array.transpose(2, 0, 1).copy())


def _differ(one: _View, other: _View) -> bool:
    return one.inputs["image"].shape != other.inputs["image"].shape


def _shrunk(image: Image.Image, side: int) -> Image.Image:
    """The picture itself, or a smaller one whose longer side is `side`."""
    factor = side / max(image.size)
    if factor >= 1:
        return image
    size = [max(round(x * factor), 1) for x in image.size]
    return image.resize(size, Image.Resampling.BILINEAR, reducing_gap=2.0)


@contextmanager
def _our_limit_of_pixels() -> Iterator[None]:
    """Not Pillow's, which warns of pictures that we take; `read_picture` looks at each header."""
    before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = before
