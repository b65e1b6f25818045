"""Ground truth and detections of a dataset as arrays, in the order that COCO's AP counts them."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from retina_focal.errors import UserError
from retina_focal.files import open_regular

KEYS = ("image_id", "category_id", "bbox", "score")  # of a result in COCO format


@dataclass(frozen=True)
class Truth:
    """G boxes of the ground truth, in the order of the annotation file."""

    image: np.ndarray  # (G,) int, an index of `Evaluated.images`
    label: np.ndarray  # (G,) int, an index of `Evaluated.classes`
    boxes: np.ndarray  # (G, 4) float64, XYWH in pixels
    crowd: np.ndarray  # (G,) bool: detections on it count neither for nor against
    id: np.ndarray  # (G,) int, of the annotation


@dataclass(frozen=True)
class Found:
    """D detections, by falling score; among equals by image and then as they were given."""

    image: np.ndarray  # (D,) int, an index of `Evaluated.images`
    label: np.ndarray  # (D,) int, an index of `Evaluated.classes`
    boxes: np.ndarray  # (D, 4) float64, XYWH in pixels
    score: np.ndarray  # (D,) float64

    def __getitem__(self, kept: np.ndarray) -> "Found":
        """Those of a mask (D,), or of rising indices."""
        return Found(self.image[kept], self.label[kept], self.boxes[kept], self.score[kept])


@dataclass(frozen=True)
class Evaluated:
    """What is compared: N images by rising id, K classes by rising category id."""

    images: tuple[dict, ...]  # of the annotation file: id, file_name, width, height
    classes: tuple[str, ...]
    truth: Truth
    found: Found

    @property
    def num_boxes(self) -> np.ndarray:
        """(K,) boxes of each class, without crowds."""
        return np.bincount(self.truth.label[~self.truth.crowd], minlength=len(self.classes))


def collect(dataset: dict, results: Sequence[dict], limit: int = 100) -> Evaluated:
    """Ground truth and results in COCO format, of which COCO counts `limit` per image and class."""
    images = sorted(dataset["images"], key=lambda x: x["id"])
    categories = sorted(dataset["categories"], key=lambda x: x["id"])
    index = {x["id"]: i for i, x in enumerate(images)}
    label = {x["id"]: i for i, x in enumerate(categories)}

    def columns(records: Sequence[dict]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        rows = [(index[x["image_id"]], label[x["category_id"]]) for x in records]
        pairs = np.array(rows, dtype=np.int64).reshape(-1, 2)
        boxes = np.array([x["bbox"] for x in records], dtype=np.float64).reshape(-1, 4)
        return pairs[:, 0], pairs[:, 1], boxes

    truth = dataset["annotations"]
    crowd = np.array([bool(x.get("iscrowd", 0)) for x in truth], dtype=bool)
    ids = np.array([x["id"] for x in truth], dtype=np.int64)
    image, labels, boxes = columns(results)
    score = np.array([x["score"] for x in results], dtype=np.float64)
    order = np.lexsort((image, -score))  # stable
    found = Found(image, labels, boxes, score)[order]
    found = found[rank_among_equals(found.image * len(categories) + found.label) < limit]
    names = tuple(x["name"] for x in categories)
    return Evaluated(tuple(images), names, Truth(*columns(truth), crowd, ids), found)


def read_results(path: str | Path, dataset: dict) -> list[dict]:
    """A file of results in COCO format, checked against the dataset that they are of.

    Raises:
        UserError: it is not there or no such file, or a record names an image or a category that
            the dataset lacks, or has no finite box or score; file and record are named.
    """
    with open_regular(path) as file:
        content = file.read()
    try:
        results = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UserError(f"'{path}' is not JSON: {error}") from error
    if not isinstance(results, list):
        raise UserError(
            f"'{path}' holds a {type(results).__name__}; expected a list of results in COCO "
            f"format, each with {', '.join(KEYS)}"
        )
    images = {x["id"] for x in dataset["images"]}
    categories = {x["id"] for x in dataset["categories"]}
    for number, result in enumerate(results):
        if wrong := _fault(result, images, categories):
            raise UserError(f"'{path}', record [{number}]: {wrong}")
    return results


def _fault(result: object, images: set, categories: set) -> str:
    if not isinstance(result, dict) or not all(key in result for key in KEYS):
        return f"expected an object with {', '.join(KEYS)}"
    for key, known in (("image_id", images), ("category_id", categories)):
        value = result[key]
        if type(value) is not int or value not in known:
            return f"{key} is {value!r}, which the dataset lacks"
    box = result["bbox"]
    if not isinstance(box, list) or len(box) != 4 or not all(map(_is_finite, box)):
        return f"bbox is {box!r}; expected [x, y, width, height] in pixels"
    if min(box[2:]) < 0:
        return f"bbox is {box!r}; expected a width and a height of at least 0"
    score = result["score"]
    is_score = _is_finite(score) and 0 <= score <= 1
    return "" if is_score else f"score is {score!r}; expected a number from 0 to 1"


def _is_finite(value: object) -> bool:
    return type(value) in (int, float) and abs(value) < 1e18  # False for NaN


def rank_among_equals(key: np.ndarray) -> np.ndarray:
    """How many earlier elements have the same key."""
    order = np.argsort(key, kind="stable")
    ordered = key[order]
    first = np.searchsorted(ordered, ordered)
    rank = np.empty(len(key), dtype=np.int64)
    rank[order] = np.arange(len(key)) - first
    return rank
