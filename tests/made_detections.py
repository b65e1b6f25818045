"""Made ground truth and detections in COCO format, with crowds, small boxes and tied scores."""

import contextlib
import io

import numpy as np
from detectron2.evaluation.coco_evaluation import COCOevalMaxDets
from pycocotools.coco import COCO

CLASSES = ("ant", "bee", "cat")


def made(
    seed: int, num_images: int = 12, max_detections: int = 40, digits: int = 9
) -> tuple[dict, list[dict]]:
    """A dataset and results: most detections are a box that was moved, one in ten misnamed.

    Args:
        max_detections: per image, an upper limit.
        digits: of a score; few give ties.
    """
    draw = np.random.default_rng(seed)
    images, annotations, results = [], [], []
    for image in range(3, 3 + num_images):
        size = {"width": 300, "height": 300}
        images.append({"id": image, "file_name": f"{image}.png", **size})
        mine = []
        for _ in range(draw.integers(0, 9)):
            w, h = draw.uniform(2, 160 if draw.random() < 0.7 else 20, 2)
            mine.append(
                {
                    "id": len(annotations) + len(mine) + 1,
                    "image_id": image,
                    "category_id": int(draw.integers(1, 4)) * 10,
                    "bbox": [*draw.uniform(0, 200, 2).tolist(), float(w), float(h)],
                    "area": float(w * h * draw.uniform(0.5, 1)),
                    "iscrowd": int(draw.random() < 0.15),
                }
            )
        annotations += mine
        for _ in range(draw.integers(0, max_detections)):
            category = int(draw.integers(1, 4)) * 10
            box = [*draw.uniform(0, 200, 2), *draw.uniform(2, 100, 2)]
            if mine and draw.random() < 0.7:
                near = mine[draw.integers(len(mine))]
                box = np.array(near["bbox"]) * draw.uniform(0.85, 1.15, 4)
                category = near["category_id"] if draw.random() < 0.9 else category
            score = float(np.round(draw.random(), digits))
            result = {"image_id": image, "category_id": category, "score": score}
            results.append({**result, "bbox": [float(x) for x in box]})
    categories = [{"id": 10 * i, "name": name} for i, name in enumerate(CLASSES, start=1)]
    dataset = {"images": images, "annotations": annotations, "categories": categories}
    return {"info": {}, **dataset}, results


def of_pycocotools(dataset: dict, results: list[dict], limits: list[int]) -> COCOevalMaxDets:
    """What pycocotools measures; the last of three limits counts for the AP."""
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = dataset
        truth.createIndex()
        measured = COCOevalMaxDets(truth, truth.loadRes([dict(x) for x in results]), "bbox")
        measured.params.maxDets = limits
        measured.evaluate()
        measured.accumulate()
        measured.summarize()
    return measured
