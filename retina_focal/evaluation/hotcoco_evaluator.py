"""COCO's AP by hotcoco, which computes in Rust what pycocotools computes."""

import contextlib
import importlib
import io
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import numpy as np
from detectron2.evaluation import COCOEvaluator
from detectron2.evaluation.coco_evaluation import COCOevalMaxDets

from retina_focal.errors import UserError
from retina_focal.files import write_whole

VERSION = "1.3.0"  # the one whose numbers were compared with pycocotools'


def hotcoco() -> ModuleType:
    """The module, which is an extra of the package.

    Raises:
        UserError: it is not installed.
    """
    try:
        return importlib.import_module("hotcoco")
    except ImportError as error:
        raise UserError(
            f"hotcoco is not installed; type: pip install hotcoco=={VERSION}, or leave "
            "MODEL.RETINA_FOCAL.TEST.EVALUATOR at pycocotools"
        ) from error


class HotcocoEvaluator(COCOEvaluator):
    """`COCOEvaluator` whose boxes are measured by hotcoco; masks and keypoints are left to it."""

    def __init__(self, *args, **options: object):
        hotcoco()  # before anything is detected
        super().__init__(*args, **options)

    def _eval_predictions(self, predictions: list[dict], img_ids: Sequence[int] | None = None):
        results = list(itertools.chain(*[x["instances"] for x in predictions]))
        tasks = self._tasks or self._tasks_from_predictions(results)
        if set(tasks) != {"bbox"} or not self._do_evaluation:
            return super()._eval_predictions(predictions, img_ids)
        ids = self._metadata.get("thing_dataset_id_to_contiguous_id")
        if ids is not None:
            by_class = {index: category for category, index in ids.items()}
            for result in results:
                result["category_id"] = by_class[result["category_id"]]
        if self._output_dir:
            path = Path(self._output_dir, "coco_instances_results.json")
            write_whole(path, json.dumps(results))
        measured = None
        if results:
            dataset, limits = self._coco_api.dataset, self._max_dets_per_image
            measured = box_ap(dataset, results_array(results), limits, img_ids)
        classes = self._metadata.get("thing_classes")
        self._results["bbox"] = self._derive_coco_results(measured, "bbox", classes)


def results_array(results: Sequence[dict]) -> np.ndarray:
    """(D, 7) of results in COCO format: image id, box as XYWH in pixels, score, category id."""
    rows = [(x["image_id"], *x["bbox"], x["score"], x["category_id"]) for x in results]
    return np.array(rows, dtype=np.float64).reshape(-1, 7)


def box_ap(
    dataset: dict,
    results: np.ndarray,
    max_detections: Sequence[int] = (1, 10, 100),
    image_ids: Sequence[int] | None = None,
) -> COCOevalMaxDets:
    """pycocotools' summary of boxes: `stats`, and `eval` with "precision" and "recall".

    Args:
        dataset: ground truth in COCO format.
        results: (D, 7) of `results_array`, D at least 1.
        max_detections: per image and class, three numbers; the last one counts for the AP.
        image_ids: of those that are measured; default: all.
    """
    module = hotcoco()
    with contextlib.redirect_stdout(io.StringIO()):
        truth = module.COCO(dataset)
        measured = module.COCOeval(truth, truth.load_res(results), "bbox")
        measured.params.max_dets = list(max_detections)
        if image_ids is not None:
            measured.params.img_ids = list(image_ids)
        measured.evaluate()
        measured.accumulate()
    # Not hotcoco's own summary, which knows no other limit than 100.
    summary = COCOevalMaxDets(iouType="bbox")
    summary.params.maxDets = list(max_detections)
    summary.eval = {name: np.asarray(measured.eval[name]) for name in ("precision", "recall")}
    summary.summarize()
    return summary
