"""What a dataset in COCO format has that can't be trained on or measured with, in one pass.

Nothing is left out in silence: the counts of what becomes of the annotations add up.
"""

import itertools
import math
from collections import Counter
from collections.abc import Callable

import numpy as np

from retina_focal.data.findings import MAX_ID, Check, Finding, Section, shortened
from retina_focal.files import leads_outside

MAX_PIXEL = 1e6  # a coordinate beyond is that of no picture
BEYOND = 2.0  # px by which a box may leave its picture unnoticed
NUMBERS = {int, float}
ALLOW_OUTSIDE = "MODEL.RETINA_FOCAL.DATA.ALLOW_OUTSIDE"
SECTIONS = ("images", "annotations", "categories")


def check_coco(content: object, is_read: bool = False) -> Check:
    """Check what `json.load` made of an annotation file.

    Where the structure or the ids are wrong, what depends on them is not looked at.

    Args:
        is_read: whether a reader of ours wrote it, with what it found in "info".
    """
    check = Check()
    if is_read:
        check.findings += [Finding(*x[:3], tuple(x[3])) for x in content["info"]["findings"]]
    sections = _sections(content, check.findings, is_read)
    if sections is None:
        return check
    images, annotations, categories = sections
    check.num_images, check.num_annotations = len(images.records), len(annotations.records)
    _check_categories(categories, check)
    places, sizes = _check_images(images)
    if check.classes and places:
        _check_annotations(annotations, places, sizes, check)
    return check


def _sections(content: object, findings: list[Finding], is_read: bool) -> list[Section] | None:
    """Images, annotations and categories; None where they are no lists of records."""
    expected = "expected COCO format, an object with 'images', 'annotations' and 'categories'"
    if not isinstance(content, dict):
        text = f"the file holds a {_noun(content)}; {expected}"
        findings.append(Finding("structure", "error", text))
        return None
    if "annotations" not in content:
        text = "there are no 'annotations'; expected them to train on or measure with"
        findings.append(Finding("annotations-missing", "training", text))
    sections = []
    for name in SECTIONS:
        records = content.get(name, [] if name == "annotations" else None)
        if not isinstance(records, list) or not (records or name == "annotations"):
            text = f"there are no '{name}'; {expected}"
            if name in content:
                text = f"'{name}' is {shortened(records)}; {expected}"
            findings.append(Finding("structure", "error", text))
            continue
        section = Section(name, records, findings, is_read)
        wrong = [i for i, x in enumerate(records) if type(x) is not dict]
        section.find("structure", "error", wrong, "are no objects")
        sections.append(section)
    return None if any(x.severity == "error" for x in findings) else sections


def _check_categories(categories: Section, check: Check) -> None:
    ids, names = categories.column("id"), categories.column("name")
    fit = categories.expect_type("name", names, {str}, 'a text, as in {"id": 1, "name": "cat"}')
    if categories.ids(ids) and fit.all():
        check.category_ids, check.classes = map(
            list, zip(*sorted(zip(ids, names, strict=True)), strict=True)
        )
        counts = Counter(names)
        twice = [i for i, x in enumerate(names) if counts[x] > 1]
        text = "share their name with another; they are told apart by their ids alone"
        categories.find("name-twice", "warning", twice, text, "name")


def _check_images(images: Section) -> tuple[dict[int, int], np.ndarray]:
    """The place of each image by its id, empty where an id is wrong; and (n + 1, 2) their widths
    and heights, inf where one is wrong and in the last row."""
    names = images.column("file_name")
    fit = images.expect_type("file_name", names, {str}, "the path of a picture, a text")
    wrong = [i for i in np.flatnonzero(fit) if not names[i].strip() or "\0" in names[i]]
    images.find("file_name", "error", wrong, "have no path as 'file_name'", "file_name")
    outside = [i for i in np.flatnonzero(fit) if leads_outside(names[i])]
    text = (
        "lie outside the image folder, which only a command can allow: name the folder above, or "
        f"add {ALLOW_OUTSIDE} True"
    )
    images.find("outside", "outside", outside, text, "file_name")
    sides = []
    for key in ("width", "height"):
        values = images.column(key)
        fit = images.expect_type(key, values, NUMBERS, "pixels, above 0")
        wrong = [i for i in np.flatnonzero(fit) if not _is_whole_side(values[i])]
        images.find(key, "error", wrong, f"have a '{key}' that is no whole number above 0", key)
        sides.append(
            [*(x if ok else math.inf for x, ok in zip(values, fit, strict=True)), math.inf]
        )
    ids = images.column("id")
    places = {x: i for i, x in enumerate(ids)} if images.ids(ids) else {}
    return places, np.array(sides).T


def _check_annotations(
    annotations: Section, places: dict[int, int], sizes: np.ndarray, check: Check
) -> None:
    ids = annotations.column("id")
    if annotations.ids(ids) and min(ids, default=1) < 1:
        text = (
            "have an id below 1, and the evaluator takes a detection of annotation 0 for a miss; "
            "all annotations are numbered anew"
        )
        below = [i for i, x in enumerate(ids) if x < 1]
        annotations.find("id-zero", "mended", below, text)
    categories, of = annotations.column("category_id"), annotations.column("image_id")
    if annotations.expect_type("category_id", categories, {int}, "the id of a category").all():
        declared = set(check.category_ids)
        wrong = [i for i, x in enumerate(categories) if x not in declared]
        text = "have a category that 'categories' does not declare; add it there"
        annotations.find("category-undeclared", "error", wrong, text, "category_id")
    if not annotations.expect_type("image_id", of, {int}, "the id of an image, a number").all():
        return
    place = np.fromiter((places.get(x, -1) for x in of), int, len(of))
    elsewhere = place < 0
    text = "are of images that 'images' does not declare, and left out"
    rest = "training" if elsewhere.any() and elsewhere.all() else "warning"
    annotations.find("image-undeclared", rest, np.flatnonzero(elsewhere), text, "image_id")
    is_crowd = _crowds(annotations)
    ignored = [i for i, x in enumerate(annotations.column("ignore", 0)) if x]
    text = "have 'ignore', which detectron2 does not know; set iscrowd to 1 instead"
    annotations.find("ignore", "error", ignored, text, "ignore")
    _check_segmentations(annotations)
    boxes = _boxes(annotations)
    _check_areas(annotations)
    if boxes is None or is_crowd is None or check.of("error"):
        return
    empty = (boxes[:, 2:] == 0).any(axis=1)
    width, height = sizes[place].T
    x0, y0, x1, y1 = *boxes[:, :2].T, *(boxes[:, :2] + boxes[:, 2:]).T
    outside = (x0 >= width) | (y0 >= height) | (x1 <= 0) | (y1 <= 0)
    beyond = (x1 > width + BEYOND) | (y1 > height + BEYOND)
    counts = {
        "elsewhere": elsewhere,
        "crowds": is_crowd & ~elsewhere,
        "empty": empty & ~is_crowd & ~elsewhere,
        "outside": outside & ~empty & ~is_crowd & ~elsewhere,
    }
    kept = ~np.any(list(counts.values()), axis=0)
    check.counts = {"boxes": int(kept.sum()), **{k: int(v.sum()) for k, v in counts.items()}}
    why = {
        "crowds": "are crowds (iscrowd 1), which are not trained on; set iscrowd to 0 for objects",
        "empty": "have a box without area, which is not trained on, and which no detection can "
        "match; mend or delete them",
        "outside": "have a box outside its picture, which is not trained on, and which no "
        "detection can match; expected bbox [x, y, width, height] in pixels of the picture",
    }
    for kind, text in why.items():
        is_all = not kept.any() and counts[kind].any()
        if is_all or kind != "crowds":
            severity = "training" if is_all else "warning"
            annotations.find(kind, severity, np.flatnonzero(counts[kind]), text, "bbox")
    if kept.any() and beyond[kept].mean() > 0.5:
        text = (
            f"leave their picture by more than {BEYOND:g} px: are they [x0, y0, x1, y1]? expected "
            "bbox [x, y, width, height]"
        )
        annotations.find("box-xyxy", "warning", np.flatnonzero(beyond & kept), text, "bbox")
    _check_classes(check, [categories[i] for i in np.flatnonzero(kept)])


def _check_classes(check: Check, categories: list[int]) -> None:
    """Which classes have no box, and whether there is any."""
    used = set(categories)
    unused = [n for i, n in zip(check.category_ids, check.classes, strict=True) if i not in used]
    if not used and not check.of("training"):
        text = "there is no box to train on or to measure with: an AP would be nan"
        check.findings.append(Finding("boxes-missing", "training", text))
    elif unused and used:
        text = f"{len(unused)} of {len(check.classes)} classes have no box, so their AP is nan"
        records = tuple(f"'{shortened(name)}'" for name in unused)
        check.findings.append(Finding("class-without-boxes", "warning", text, records))


def _crowds(annotations: Section) -> np.ndarray | None:
    """(n,) bool; None where a value is neither 0 nor 1."""
    missing = object()
    values = annotations.column("iscrowd", missing)
    absent = [i for i, x in enumerate(values) if x is missing]
    annotations.find("iscrowd-missing", "mended", absent, "have no 'iscrowd'; it is taken as 0")
    wrong = [i for i, x in enumerate(values) if x is not missing and not _is_flag(x)]
    annotations.find("iscrowd", "error", wrong, "have an 'iscrowd' that is not 0 or 1", "iscrowd")
    if wrong:
        return None
    return np.fromiter((x is not missing and x == 1 for x in values), bool, len(values))


def _boxes(annotations: Section) -> np.ndarray | None:
    """(n, 4) of float64, XYWH; None where one is wrong."""
    boxes = annotations.column("bbox")
    expected = "[x, y, width, height] in pixels"
    if not annotations.expect_type("bbox", boxes, {list}, expected).all():
        return None

    def wrong(is_right: Callable[[list], bool]) -> list[int]:
        return [i for i, box in enumerate(boxes) if not is_right(box)]

    flat = list(itertools.chain.from_iterable(boxes))
    if not set(map(type, flat)) <= NUMBERS or set(map(len, boxes)) - {4}:
        others = wrong(lambda box: len(box) == 4 and set(map(type, box)) <= NUMBERS)
        annotations.find("box-type", "error", others, f"have a bbox that isn't {expected}", "bbox")
        return None
    try:
        array = np.array(flat, dtype=np.float64).reshape(-1, 4)
    except OverflowError:  # an int that float64 can't hold
        array = np.array([max(-1e300, min(x, 1e300)) for x in flat]).reshape(-1, 4)
    infinite = ~(np.abs(array) < MAX_PIXEL).all(axis=1)
    text = f"have a bbox that is not finite, or beyond {MAX_PIXEL:.0e} px; expected {expected}"
    annotations.find("box-infinite", "error", np.flatnonzero(infinite), text, "bbox")
    negative = (array[:, 2:] < 0).any(axis=1)
    text = f"have a bbox of negative width or height; expected {expected}"
    annotations.find("box-negative", "error", np.flatnonzero(negative), text, "bbox")
    return None if infinite.any() or negative.any() else array


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


def _is_whole_side(x: float) -> bool:
    return 0 < x < MAX_ID and x == int(x)


def _is_area(x: object) -> bool:
    return type(x) in NUMBERS and 0 <= x < MAX_PIXEL**2


def _is_flag(x: object) -> bool:
    return type(x) in (int, bool) and x in (0, 1)


def _noun(content: object) -> str:
    nouns = {list: "list", str: "text", type(None): "null", bool: "true or false"}
    return nouns.get(type(content), "number")
