"""A model of a LazyConfig as what predicts and measures: built, and with a YAML config's values."""

from collections.abc import Sequence

from detectron2.config import CfgNode, instantiate
from detectron2.data import DatasetMapper
from detectron2.data.transforms import Augmentation, ResizeShortestEdge
from detectron2.modeling import RetinaNet
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from torch import nn

from retina_focal.config import get_cfg
from retina_focal.errors import UserError
from retina_focal.retinanet import FocalRetinaNet
from retina_focal.training.values import plain_values
from retina_focal.training.words import faults_of_the_config

MAPPER = "dataloader.test.mapper"


@faults_of_the_config()
def build_lazy_model(cfg: DictConfig) -> nn.Module:
    """The model of a LazyConfig, without weights.

    Raises:
        UserError: it can't be built, or is no RetinaNet.
    """
    model = instantiate(cfg.model)
    if not isinstance(model, (FocalRetinaNet, RetinaNet)):
        raise UserError(
            f"the LazyConfig's model is a {type(model).__name__}; expected FocalRetinaNet, or "
            "detectron2's RetinaNet"
        )
    return model.to(cfg.train.device)


def values_of_test(cfg: DictConfig, model: nn.Module) -> CfgNode:
    """What a LazyConfig's model detects with, under the names of a YAML config.

    Keys of its training are the defaults.

    Args:
        model: of `build_lazy_model`.
    Raises:
        UserError: pictures get more than another size on their way to the model, which those that
            are in no dataset would not get.
    """
    plain, found = plain_values(cfg), get_cfg()
    mapper = _mapper(cfg)
    found.OUTPUT_DIR, found.MODEL.WEIGHTS = plain.OUTPUT_DIR, plain.MODEL.WEIGHTS
    found.MODEL.RETINA_FOCAL.merge_from_other_cfg(plain.MODEL.RETINA_FOCAL)
    found.MODEL.META_ARCHITECTURE = type(model).__name__
    found.MODEL.DEVICE = str(cfg.train.device)
    found.MODEL.RETINANET.NUM_CLASSES = model.num_classes
    found.MODEL.RETINANET.SCORE_THRESH_TEST = float(model.test_score_thresh)
    found.MODEL.RETINANET.TOPK_CANDIDATES_TEST = model.test_topk_candidates
    found.MODEL.RETINANET.NMS_THRESH_TEST = float(model.test_nms_thresh)
    found.TEST.DETECTIONS_PER_IMAGE = model.max_detections_per_image
    found.INPUT.FORMAT = mapper.image_format
    found.INPUT.MIN_SIZE_TEST, found.INPUT.MAX_SIZE_TEST = _sides(mapper.augmentations.augs)
    found.DATASETS.merge_from_other_cfg(plain.DATASETS)
    sources = OmegaConf.select(cfg, "train.retina_focal.sources", default=[])
    found.DATASETS.SOURCES = [[*row] for row in sources]
    found.DATALOADER.NUM_WORKERS = OmegaConf.select(cfg, "dataloader.test.num_workers", default=0)
    return found


@faults_of_the_config()
def _mapper(cfg: DictConfig) -> DatasetMapper:
    node = OmegaConf.select(cfg, MAPPER)
    mapper = None if node is None else instantiate(node)
    if type(mapper) is not DatasetMapper:
        raise UserError(
            f"{MAPPER} is {'missing' if node is None else type(mapper).__name__}; expected "
            "detectron2's DatasetMapper, which can be repeated for pictures of no dataset"
        )
    return mapper


def _sides(augmentations: Sequence[Augmentation]) -> tuple[int, int]:
    """Pixels of the shorter side, and of the longer one at most; (0, 0): as the picture has."""
    if not augmentations:
        return 0, 0
    resize = augmentations[0]
    if (
        len(augmentations) > 1
        or not isinstance(resize, ResizeShortestEdge)
        or len(set(resize.short_edge_length)) > 1
        or resize.interp != Image.BILINEAR
    ):
        raise UserError(
            f"{MAPPER}.augmentations is {[*augmentations]}; expected one ResizeShortestEdge to one "
            "length, or nothing"
        )
    return resize.short_edge_length[0], resize.max_size
