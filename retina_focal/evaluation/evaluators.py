"""Evaluators by the type of a dataset."""

from detectron2.data import MetadataCatalog
from detectron2.evaluation import (
    COCOEvaluator,
    DatasetEvaluator,
    LVISEvaluator,
    PascalVOCDetectionEvaluator,
)

from retina_focal.errors import UserError


def build_evaluator(dataset_name: str, output_dir: str) -> DatasetEvaluator:
    """The evaluator of a registered dataset's `evaluator_type`, which writes to a folder.

    Raises:
        UserError: a type that has no evaluator.
    """
    evaluator_type = MetadataCatalog.get(dataset_name).get("evaluator_type")
    if evaluator_type == "coco":
        return COCOEvaluator(dataset_name, output_dir=output_dir)
    if evaluator_type == "lvis":
        return LVISEvaluator(dataset_name, output_dir=output_dir)
    if evaluator_type == "pascal_voc":
        return PascalVOCDetectionEvaluator(dataset_name)
    raise UserError(
        f"dataset '{dataset_name}' has evaluator_type {evaluator_type!r}; expected coco, lvis or "
        "pascal_voc: set it by MetadataCatalog.get(name).evaluator_type, or register the dataset "
        "with --dataset NAME JSON IMAGES"
    )
