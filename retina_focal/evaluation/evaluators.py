"""Evaluators by the type of a dataset, and what their numbers do not say."""

import logging
import math
from collections.abc import Mapping

from detectron2.data import MetadataCatalog
from detectron2.evaluation import (
    COCOEvaluator,
    DatasetEvaluator,
    LVISEvaluator,
    PascalVOCDetectionEvaluator,
)

from retina_focal.config import check_choice
from retina_focal.data.classes import listed
from retina_focal.data.coco import coco_file
from retina_focal.errors import UserError
from retina_focal.evaluation.hotcoco_evaluator import HotcocoEvaluator

COCO_LIMIT = 100  # detections per image that COCO's AP counts, and the fewest that are counted
ALL = 10**6  # more than an image has

logger = logging.getLogger(__name__)


def build_evaluator(
    dataset_name: str,
    output_dir: str | None,
    max_detections: int = COCO_LIMIT,
    library: str = "pycocotools",
    **options: object,
) -> DatasetEvaluator:
    """The evaluator of a registered dataset's `evaluator_type`, which writes to a folder.

    Args:
        max_detections: per image that the model makes, or `ALL`; above 100 they all count for the
            AP.
        library: of ``MODEL.RETINA_FOCAL.TEST.EVALUATOR``, for a dataset in COCO format.
        options: of `COCOEvaluator`.
    Raises:
        UserError: a type that has no evaluator, ground truth that can't be measured with, or a
            library that is not installed.
    """
    evaluator_type = MetadataCatalog.get(dataset_name).get("evaluator_type")
    if evaluator_type == "coco":
        if max_detections > COCO_LIMIT:
            counted = "all" if max_detections == ALL else max_detections
            logger.info("AP counts %s detections per image, where COCO counts 100", counted)
            options["max_dets_per_image"] = max_detections
        evaluator = coco_evaluator(library)(dataset_name, output_dir=output_dir, **options)
        file = coco_file(dataset_name)  # which the evaluator may only now have written
        if file is not None:
            file.refuse(dataset_name, trained_on=False)
        return evaluator
    if evaluator_type == "lvis":
        return LVISEvaluator(dataset_name, output_dir=output_dir)
    if evaluator_type == "pascal_voc":
        return PascalVOCDetectionEvaluator(dataset_name)
    raise UserError(
        f"dataset '{dataset_name}' has evaluator_type {evaluator_type!r}; expected coco, lvis or "
        "pascal_voc: set it by MetadataCatalog.get(name).evaluator_type, or register the dataset "
        "with --dataset NAME JSON IMAGES"
    )


def coco_evaluator(library: str) -> type[COCOEvaluator]:
    """What ``MODEL.RETINA_FOCAL.TEST.EVALUATOR`` names; raises UserError for another name."""
    evaluators = {"pycocotools": COCOEvaluator, "hotcoco": HotcocoEvaluator}
    check_choice("MODEL.RETINA_FOCAL.TEST.EVALUATOR", library, list(evaluators))
    return evaluators[library]


def explain_missing(results: Mapping[str, object]) -> None:
    """Say in words why numbers of an evaluation are nan.

    Args:
        results: {"bbox": {"AP": ..., "AP-cat": ...}}, or such a dict for each dataset.
    """
    for name, numbers in results.items():
        if not isinstance(numbers, Mapping):
            continue
        if "AP" not in numbers:
            explain_missing(numbers)
            continue
        missing = [x for x, value in numbers.items() if math.isnan(value)]
        classes = [x.removeprefix("AP-") for x in missing if x.startswith("AP-")]
        sizes = [x for x in missing if x in ("APs", "APm", "APl")]
        if "AP" in missing:
            logger.warning(
                "%s: AP is nan, which is no number: the dataset has no box to measure with, or no "
                "detection scores above MODEL.RETINANET.SCORE_THRESH_TEST (are the weights the "
                "right ones?)",
                name,
            )
        elif classes:
            logger.warning(
                "%s: %d classes have no box in the dataset; their AP is nan, and left out of the "
                "mean: %s",
                *(name, len(classes), listed(classes)),
            )
        elif sizes:
            logger.warning("%s: %s nan: no box of that size", name, ", ".join(sizes))
