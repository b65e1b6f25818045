"""A model as it is tested: with the augmentations of ``TEST.AUG``, in tiles of ``TEST.TILE``."""

from collections.abc import Iterable, Iterator
from itertools import groupby

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper
from detectron2.structures import Instances
from PIL import Image
from torch import nn

from retina_focal.config import retina_focal_node
from retina_focal.data.resizing import mapper_of_test
from retina_focal.errors import UserError
from retina_focal.evaluation.tiles import merge_tiles
from retina_focal.evaluation.tta import with_tta
from retina_focal.evaluation.views import NoView, Views

TILES_AT_ONCE = 8  # on a GPU; a CPU is as fast with one, in less memory


class TiledModel(nn.Module):
    """A model that sees large pictures in tiles, as `retina-focal predict` shows them to it."""

    def __init__(self, cfg: CfgNode, model: nn.Module):
        """
        Args:
            cfg: see `Views`.
            model: takes a picture or a tile; of `with_tta`.
        Raises:
            UserError: see `Views`.
        """
        super().__init__()
        self.model, self.views = model, Views(cfg)
        self.training = model.training  # which a user of it in evaluation sets back
        self.nms_thresh = cfg.MODEL.RETINANET.NMS_THRESH_TEST
        self.class_agnostic = retina_focal_node(cfg).TEST.CLASS_AGNOSTIC_NMS
        self.batch_size = 1 if cfg.MODEL.DEVICE == "cpu" else TILES_AT_ONCE

    @torch.no_grad()
    def forward(self, batched_inputs: list[dict]) -> list[dict]:
        """As `FocalRetinaNet.forward` in evaluation.

        Args:
            batched_inputs: `image` (3, H, W) uint8 as decoded, see `build_test_mapper`.
        Raises:
            UserError: a picture of which the resizing leaves no pixel.
        """
        return [{"instances": self._detect(x)} for x in batched_inputs]

    def _detect(self, record: dict) -> Instances:
        image = Image.fromarray(record["image"].permute(1, 2, 0).contiguous().numpy())
        tiles, found = self.views.tiles(*image.size), []
        for same_shape in groupby(self._seen(image, tiles, record), lambda x: x["image"].shape):
            for batch in _batches(same_shape[1], self.batch_size):
                found += [output["instances"].to("cpu") for output in self.model(batch)]
        return merge_tiles(tiles, found, self.views.side, self.nms_thresh, self.class_agnostic)

    def _seen(self, image: Image.Image, tiles: list, record: dict) -> Iterator[dict]:
        for tile in tiles:
            try:
                array = self.views.pixels(image, tile)
            except NoView as error:
                raise UserError(
                    f"'{record.get('file_name')}' can't be used: {error}; leave it out, or raise "
                    "INPUT.MAX_SIZE_TEST"
                ) from error
            width, height = tile.size
            pixels = torch.from_numpy(array.transpose(2, 0, 1).copy())
            yield {"image": pixels, "width": width, "height": height}


def _batches(items: Iterable[dict], size: int) -> Iterator[list[dict]]:
    batch = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def as_tested(cfg: CfgNode, model: nn.Module) -> nn.Module:
    """The model as a config tests it; takes what `build_test_mapper` makes.

    Raises:
        UserError: see `RetinaNetWithTTA` and `Views`.
    """
    model = with_tta(cfg, model)
    return TiledModel(cfg, model) if retina_focal_node(cfg).TEST.TILE else model


def build_test_mapper(cfg: CfgNode) -> DatasetMapper:
    """The mapper of a test set; where `as_tested` resizes, pictures stay as they were decoded, so
    that none is resized twice."""
    if not (cfg.TEST.AUG.ENABLED or retina_focal_node(cfg).TEST.TILE):
        return mapper_of_test(cfg)
    return DatasetMapper(is_train=False, augmentations=[], image_format=cfg.INPUT.FORMAT)
