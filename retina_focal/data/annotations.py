"""What each annotation of a COCO file has that can't be used; see `check`."""

import itertools

import numpy as np

from retina_focal.data.findings import Check, Section

MAX_PIXEL = 1e6  # a coordinate beyond is that of no picture
BEYOND = 2.0  # px by which a box may leave its picture unnoticed
NUMBERS = {int, float}
EXPECTED_BOX = "[x, y, width, height] in pixels"
# What messages say of annotations that are left out. One is counted under the first that fits.
FATES = {
    "crowds": "are crowds (iscrowd 1), which are not trained on; set iscrowd to 0 for objects",
    "empty": "have a box without area, which is not trained on, and which no detection can match; "
    "mend or delete them",
    "outside": "have a box outside its picture, which is not trained on, and which no detection "
    "can match; expected bbox [x, y, width, height] in pixels of the picture",
}


def check_annotations(
    annotations: Section, places: dict[int, int], sizes: np.ndarray, check: Check
) -> np.ndarray:
    """Add findings and counts, which add up.

    Args:
        places: of each image by its id; empty where ids are wrong.
        sizes: (num_images + 1, 2) widths and heights in px, inf where one is wrong and in the
            last row.
    Returns:
        (n,) place of the image of each annotation that is trained on; else -1.
    """
    _check_ids(annotations)
    _check_category_ids(annotations, check.category_ids)
    place = _places(annotations, places)
    is_crowd = _crowds(annotations)
    ignored = [i for i, x in enumerate(annotations.column("ignore", 0)) if x]
    text = "have 'ignore', which detectron2 does not know; set iscrowd to 1 instead"
    annotations.find("ignore", "error", ignored, text, "ignore")
    _check_segmentations(annotations)
    boxes = _boxes(annotations)
    _check_areas(annotations)
    faulty = np.zeros(len(place), dtype=bool)
    faulty[list(annotations.faulty)] = True
    if not places:
        check.counts = {"faulty": int(faulty.sum()), "not looked at": int((~faulty).sum())}
        return np.full(len(place), -1)
    width, height = sizes[place].T
    x0, y0, x1, y1 = *boxes[:, :2].T, *(boxes[:, :2] + boxes[:, 2:]).T
    is_of = {
        "faulty": faulty,
        "elsewhere": place < 0,
        "crowds": is_crowd,
        "empty": (boxes[:, 2:] == 0).any(axis=1),
        "outside": (x0 >= width) | (y0 >= height) | (x1 <= 0) | (y1 <= 0),
    }
    kept = np.ones(len(place), dtype=bool)
    for kind, of in is_of.items():
        is_of[kind] = of & kept
        kept &= ~of
    check.counts = {"boxes": int(kept.sum()), **{k: int(v.sum()) for k, v in is_of.items()}}
    _report_elsewhere(annotations, is_of["elsewhere"])
    for kind, text in FATES.items():
        is_all = not kept.any() and is_of[kind].any() and not faulty.any()
        severity = "training" if is_all else "note" if kind == "crowds" else "warning"
        annotations.find(kind, severity, np.flatnonzero(is_of[kind]), text, "bbox")
    beyond = kept & ((x1 > width + BEYOND) | (y1 > height + BEYOND))
    if kept.any() and beyond.sum() > 0.5 * kept.sum():
        text = (
            f"leave their picture by more than {BEYOND:g} px: are they [x0, y0, x1, y1]? expected "
            "bbox [x, y, width, height]"
        )
        annotations.find("box-xyxy", "warning", np.flatnonzero(beyond), text, "bbox")
    tiny = kept & (boxes[:, 2:] < 1).any(axis=1)
    text = "have a box less than 1 px wide or high, which is used; is it in pixels?"
    annotations.find("box-subpixel", "warning", np.flatnonzero(tiny), text, "bbox")
    _check_duplicates(annotations, place, boxes, kept)
    return np.where(kept, place, -1)


def _check_ids(annotations: Section) -> None:
    ids = annotations.column("id")
    if annotations.ids(ids) and min(ids, default=1) < 1:
        text = (
            "have an id below 1, and the evaluator takes a detection of annotation 0 for a miss; "
            "all annotations are numbered anew"
        )
        below = [i for i, x in enumerate(ids) if x < 1]
        annotations.find("id-zero", "mended", below, text)


def _check_category_ids(annotations: Section, declared: list[int]) -> None:
    categories, known = annotations.column("category_id"), set(declared)
    fit = annotations.expect_type("category_id", categories, {int}, "the id of a category")
    wrong = [i for i in np.flatnonzero(fit) if categories[i] not in known]
    text = "have a category that 'categories' does not declare; add it there"
    annotations.find("category-undeclared", "error", wrong, text, "category_id")


def _places(annotations: Section, places: dict[int, int]) -> np.ndarray:
    """(n,) place of the image of each annotation, -1 where there is none."""
    of = annotations.column("image_id")
    fit = annotations.expect_type("image_id", of, {int}, "the id of an image, a number")
    return np.fromiter(
        (places.get(x, -1) if ok else -1 for x, ok in zip(of, fit, strict=True)), int, len(of)
    )


def _report_elsewhere(annotations: Section, elsewhere: np.ndarray) -> None:
    text = "are of images that 'images' does not declare, and left out"
    severity = "training" if elsewhere.any() and elsewhere.all() else "warning"
    annotations.find("image-undeclared", severity, np.flatnonzero(elsewhere), text, "image_id")


def _check_duplicates(
    annotations: Section, place: np.ndarray, boxes: np.ndarray, kept: np.ndarray
) -> None:
    indices = np.flatnonzero(kept)
    if not len(indices):
        return
    categories = np.array([annotations.records[i]["category_id"] for i in indices], float)
    rows = np.column_stack((place[indices], categories, boxes[indices]))
    _, first = np.unique(rows, axis=0, return_index=True)
    again = np.delete(indices, first)
    text = "repeat a box of the same class and picture, and are trained on and measured twice"
    annotations.find("duplicate", "warning", again, f"{text}; delete them", "bbox")


def _crowds(annotations: Section) -> np.ndarray:
    """(n,) bool."""
    missing = object()
    values = annotations.column("iscrowd", missing)
    absent = [i for i, x in enumerate(values) if x is missing]
    annotations.find("iscrowd-missing", "mended", absent, "have no 'iscrowd'; it is taken as 0")
    wrong = [i for i, x in enumerate(values) if x is not missing and not _is_flag(x)]
    annotations.find("iscrowd", "error", wrong, "have an 'iscrowd' that is not 0 or 1", "iscrowd")
    return np.fromiter((_is_flag(x) and x == 1 for x in values), bool, len(values))


def _boxes(annotations: Section) -> np.ndarray:
    """(n, 4) of float64, XYWH; NaN where one is wrong."""
    boxes = annotations.column("bbox")
    around = {
        i: box
        for i, x in enumerate(boxes)
        if x is None and (box := polygon_box(annotations.records[i].get("segmentation")))
    }
    text = "have polygons and no 'bbox'; the box around the polygons is taken"
    annotations.find("box-of-polygons", "mended", around, text)
    boxes = [around.get(i, box) for i, box in enumerate(boxes)]
    fit = annotations.expect_type("bbox", boxes, {list}, EXPECTED_BOX)
    wrong = [i for i in np.flatnonzero(fit) if not _is_box(boxes[i])]
    annotations.find("box-type", "error", wrong, f"have a bbox that isn't {EXPECTED_BOX}", "bbox")
    fit[wrong] = False
    array = np.full((len(boxes), 4), np.nan)
    flat = list(itertools.chain.from_iterable(boxes[i] for i in np.flatnonzero(fit)))
    try:
        array[fit] = np.array(flat, dtype=np.float64).reshape(-1, 4)
    except OverflowError:  # an int that float64 can't hold
        array[fit] = np.array([max(-1e300, min(x, 1e300)) for x in flat]).reshape(-1, 4)
    infinite = fit & ~(np.abs(array) < MAX_PIXEL).all(axis=1)
    text = f"have a bbox that is not finite, or beyond {MAX_PIXEL:.0e} px; expected {EXPECTED_BOX}"
    annotations.find("box-infinite", "error", np.flatnonzero(infinite), text, "bbox")
    array[infinite] = np.nan
    negative = fit & (array[:, 2:] < 0).any(axis=1)
    text = f"have a bbox of negative width or height; expected {EXPECTED_BOX}"
    annotations.find("box-negative", "error", np.flatnonzero(negative), text, "bbox")
    return array


def _is_box(box: list) -> bool:
    return len(box) == 4 and set(map(type, box)) <= NUMBERS


def _check_areas(annotations: Section) -> None:
    areas = annotations.column("area")
    absent = [i for i, x in enumerate(areas) if x is None]
    text = "have no 'area'; it is taken from the box, width x height"
    annotations.find("area-missing", "mended", absent, text)
    wrong = [i for i, x in enumerate(areas) if x is not None and not _is_area(x)]
    text = "have an 'area' that is no finite number from 0; leave it out, or mend it"
    annotations.find("area", "error", wrong, text, "area")


def _check_segmentations(annotations: Section) -> None:
    shapes = annotations.column("segmentation")
    wrong = [i for i, x in enumerate(shapes) if x and not is_segmentation(x)]
    text = (
        "have a 'segmentation' that is neither polygons of at least three points nor RLE, for "
        "which detectron2 would leave the box out; the box is kept without it"
    )
    annotations.find("segmentation", "mended", wrong, text)


def is_segmentation(shape: object) -> bool:
    """Whether detectron2 keeps an annotation with this (not empty) 'segmentation'."""
    if type(shape) is dict:
        size, counts = shape.get("size"), shape.get("counts")
        if type(size) is not list or len(size) != 2 or {type(x) for x in size} != {int}:
            return False
        return type(counts) is str or (
            type(counts) is list and all(type(x) is int and 0 <= x < 2**32 for x in counts)
        )
    if type(shape) is not list or {type(x) for x in shape} != {list}:
        return False
    return any(len(x) >= 6 and len(x) % 2 == 0 for x in shape)


def polygon_box(shape: object) -> list[float] | None:
    """[x, y, width, height] around the polygons of a 'segmentation'; None where there are none."""
    if type(shape) is not list or not is_segmentation(shape):
        return None
    polygons = [x for x in shape if len(x) >= 6 and len(x) % 2 == 0]
    points = list(itertools.chain.from_iterable(polygons))
    if not set(map(type, points)) <= NUMBERS or not all(abs(x) < MAX_PIXEL for x in points):
        return None
    xs, ys = points[::2], points[1::2]
    return [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)]


def _is_area(x: object) -> bool:
    return type(x) in NUMBERS and 0 <= x < MAX_PIXEL**2


def _is_flag(x: object) -> bool:
    return type(x) in (int, bool) and x in (0, 1)
