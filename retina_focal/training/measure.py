"""What an evaluation is made of, for both kinds of config: pictures, evaluator, trained weights."""

import logging
import os
from collections.abc import Iterable

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode, instantiate
from detectron2.data import build_detection_test_loader
from detectron2.evaluation import (
    COCOEvaluator,
    DatasetEvaluator,
    inference_on_dataset,
    print_csv_format,
)
from detectron2.utils.registry import locate
from omegaconf import DictConfig, OmegaConf
from torch import nn

from retina_focal.config import retina_focal_node
from retina_focal.data.classes import match_checkpoint
from retina_focal.data.images import naming
from retina_focal.errors import UserError
from retina_focal.evaluation.evaluators import (
    ALL,
    COCO_LIMIT,
    build_evaluator,
    coco_evaluator,
)
from retina_focal.evaluation.tested import build_test_mapper
from retina_focal.training.signals import StoppableLoader
from retina_focal.weights.trained import expect_trained, missing_parameters

logger = logging.getLogger(__name__)


def yaml_test_loader(cfg: CfgNode, dataset_name: str) -> Iterable[list[dict]]:
    """detectron2's, which names the picture that it can't use."""
    mapper = naming(build_test_mapper(cfg), retina_focal_node(cfg).DATA.MAX_PIXELS)
    return build_detection_test_loader(cfg, dataset_name, mapper=mapper)


def measure_lazy(
    cfg: DictConfig, model: nn.Module, evaluator: DatasetEvaluator | None, node: CfgNode
) -> dict:
    """Results of a LazyConfig's evaluation; nothing where it has no evaluator.

    Args:
        evaluator: default: `dataloader.evaluator`.
        node: ``MODEL.RETINA_FOCAL``.
    """
    if "evaluator" not in cfg.dataloader:
        return {}
    if node.TEST.TILE:
        logger.warning(
            "TEST.TILE %d: the evaluation of a LazyConfig sees pictures whole; in tiles: "
            "retina-focal evaluate RUN --config-file FILE.py",
            node.TEST.TILE,
        )
    loader = StoppableLoader(_lazy_test_loader(cfg, node.DATA.MAX_PIXELS), node.TRAIN.TIMEOUT)
    evaluator = evaluator or _lazy_evaluator(cfg, node.TEST.EVALUATOR)
    results = inference_on_dataset(model, loader, evaluator) or {}
    print_csv_format(results)
    return results


def _lazy_test_loader(cfg: DictConfig, max_pixels: int) -> Iterable[list[dict]]:
    """`dataloader.test`, with a mapper that names the picture it can't use."""
    loader = cfg.dataloader.test
    if "mapper" not in loader:
        return instantiate(loader)
    parts = {key: instantiate(x) for key, x in loader.items()}
    return instantiate({**parts, "mapper": naming(parts["mapper"], max_pixels)})


def yaml_evaluator(cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
    """See `build_evaluator`; writes to ``OUTPUT_DIR/inference``."""
    folder, test = os.path.join(cfg.OUTPUT_DIR, "inference"), retina_focal_node(cfg).TEST
    limit = ALL if test.TILE else cfg.TEST.DETECTIONS_PER_IMAGE  # which holds in each tile
    return build_evaluator(dataset_name, folder, limit, test.EVALUATOR)


def _lazy_evaluator(cfg: DictConfig, library: str = "pycocotools") -> DatasetEvaluator:
    """`dataloader.evaluator`, which counts all detections that the model makes."""
    evaluator, key = cfg.dataloader.evaluator, "model.postprocessor.max_detections_per_image"
    made = OmegaConf.select(cfg, key, default=COCO_LIMIT)
    target = evaluator["_target_"]
    target = locate(target) if isinstance(target, str) else target
    if target is COCOEvaluator:
        options = {"max_dets_per_image": made} if made > COCO_LIMIT else {}
        evaluator = {**options, **evaluator, "_target_": coco_evaluator(library)}
    return instantiate(evaluator)


def load_trained(
    checkpointer: DetectionCheckpointer, path: str, resume: bool, datasets: Iterable[str]
) -> None:
    """Load what is measured, and number the classes of the test sets as it does.

    Args:
        path: of ``MODEL.WEIGHTS``.
        resume: the last checkpoint of the folder is taken, where there is one.
        datasets: names of the test sets, whose records are not read yet.
    Raises:
        UserError: there are no weights, some are missing, or they are of other classes.
    """
    with missing_parameters(checkpointer.model) as missing:
        checkpoint = checkpointer.resume_or_load(path, resume=resume)
    path = (checkpointer.get_checkpoint_file() if resume else "") or path
    if not path:
        raise UserError(
            "no weights are given; add: MODEL.WEIGHTS output/model_final.pth (in a LazyConfig: "
            "train.init_checkpoint=output/model_final.pth)"
        )
    expect_trained(checkpointer.model, missing, path)
    match_checkpoint(datasets, checkpoint, path)
