"""What a dataset in COCO format has that can't be trained on or measured with, in one pass.

Nothing is left out in silence: the counts of what becomes of the annotations add up.
"""

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np

from retina_focal.data.annotations import NUMBERS, check_annotations
from retina_focal.data.findings import (
    MAX_ID,
    NAME,
    Check,
    Finding,
    Section,
    is_class_name,
    shortened,
)
from retina_focal.data.repeated import Repeated
from retina_focal.files import leads_outside

ALLOW_OUTSIDE = "MODEL.RETINA_FOCAL.DATA.ALLOW_OUTSIDE"
SECTIONS = ("images", "annotations", "categories")


def check_coco(content: object, is_read: bool = False, repeated: Sequence[Repeated] = ()) -> Check:
    """Check what `json.load` made of an annotation file.

    Where the structure or the ids are wrong, what depends on them is not looked at, and is counted
    as such.

    Args:
        is_read: whether a reader of ours wrote it, with what it found in "info".
        repeated: of `repeated.loads`.
    """
    check, unread = Check(), 0
    sections = _sections(content, check.findings, is_read, repeated)
    if is_read:
        check.findings += [Finding(*x[:3], tuple(x[3])) for x in content["info"]["findings"]]
        unread = content["info"]["unread"]
    if sections is None:
        return check
    images, annotations, categories = sections
    check.num_images, check.num_annotations = len(images.records), len(annotations.records)
    _check_categories(categories, check)
    places, sizes = _check_images(images)
    if check.classes:
        place = check_annotations(annotations, places, sizes, check)
        if not check.of("error"):
            _check_classes(check, [annotations.records[i] for i in np.flatnonzero(place >= 0)])
            empty = np.setdiff1d(np.arange(len(images.records)), place)
            text = (
                "have no box: a training leaves them out, unless "
                "DATALOADER.FILTER_EMPTY_ANNOTATIONS is False"
            )
            images.find("image-empty", "note", empty, text, "file_name")
    elif annotations.records:
        check.counts = {"not looked at": len(annotations.records)}
    if unread:
        check.num_annotations += unread
        check.counts["faulty"] = check.counts.get("faulty", 0) + unread
    return check


def _sections(
    content: object, findings: list[Finding], is_read: bool, repeated: Sequence[Repeated]
) -> list[Section] | None:
    """Images, annotations and categories; None where they are no lists of records."""
    expected = "expected COCO format, an object with 'images', 'annotations' and 'categories'"
    if not isinstance(content, dict):
        text = f"the file holds a {_noun(content)}; {expected}"
        findings.append(Finding("structure", "error", text))
        return None
    keys_of = {id(x.record): x.keys for x in repeated}
    if twice := [key for key in keys_of.pop(id(content), ()) if key in SECTIONS]:
        text = f"the file has {' and '.join(twice)} twice, of which the last would count; join them"
        findings.append(Finding("twice", "error", text))
    is_pictures = not content.get("annotations") and "categories" not in content
    if "annotations" not in content or is_pictures:
        text = "there are no 'annotations'; expected them to train on or measure with"
        findings.append(Finding("annotations-missing", "training", text))
    sections = []
    for name in SECTIONS:
        may_be_empty = name == "annotations" or (name == "categories" and is_pictures)
        records = content.get(name, [] if may_be_empty else None)
        if not isinstance(records, list) or not (records or may_be_empty):
            text = f"there are no '{name}'; {expected}"
            if name in content:
                text = f"'{name}' is {shortened(records)}; {expected}"
            findings.append(Finding("structure", "error", text))
            continue
        section = Section(name, records, findings, is_read)
        wrong = [i for i, x in enumerate(records) if type(x) is not dict]
        section.find("structure", "error", wrong, "are no objects")
        if keys_of:
            twice = [i for i, x in enumerate(records) if keys_of.pop(id(x), None)]
            text = "have a key twice, with different values; delete one"
            section.find("twice", "error", twice, text)
        sections.append(section)
    if keys_of:
        keys = tuple(f"'{shortened(key)}'" for of_one in keys_of.values() for key in of_one)
        text = f"{len(keys_of)} other objects have a key twice, of which the last value counts"
        findings.append(Finding("twice", "warning", text, keys))
    return None if any(x.kind == "structure" for x in findings) else sections


def _check_categories(categories: Section, check: Check) -> None:
    ids, names = categories.column("id"), categories.column("name")
    fit = categories.expect_type("name", names, {str}, 'a text, as in {"id": 1, "name": "cat"}')
    if ids and categories.ids(ids) and fit.all():
        check.category_ids, check.classes = map(
            list, zip(*sorted(zip(ids, names, strict=True)), strict=True)
        )
        counts = Counter(names)
        twice = [i for i, x in enumerate(names) if counts[x] > 1]
        text = "share their name with another; they are told apart by their ids alone"
        categories.find("name-twice", "warning", twice, text, "name")
        wrong = [i for i, x in enumerate(names) if not is_class_name(x)]
        text = f"have a name of control characters, or of more than {NAME} letters; rename them"
        categories.find("name", "error", wrong, text, "name")


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
        fit[wrong] = False
        sides.append(
            [*(x if ok else math.inf for x, ok in zip(values, fit, strict=True)), math.inf]
        )
    ids = images.column("id")
    places = {x: i for i, x in enumerate(ids)} if images.ids(ids) else {}
    return places, np.array(sides).T


def _check_classes(check: Check, trained_on: list[dict]) -> None:
    """Which classes have no box among the annotations that are trained on, and whether any has."""
    used = {x["category_id"] for x in trained_on}
    unused = [n for i, n in zip(check.category_ids, check.classes, strict=True) if i not in used]
    if not used and not check.of("training"):
        text = "there is no box to train on or to measure with: an AP would be nan"
        check.findings.append(Finding("boxes-missing", "training", text))
    elif unused and used:
        text = f"{len(unused)} of {len(check.classes)} classes have no box, so their AP is nan"
        records = tuple(f"'{shortened(name)}'" for name in unused)
        check.findings.append(Finding("class-without-boxes", "warning", text, records))


def _is_whole_side(x: float) -> bool:
    return 0 < x < MAX_ID and x == int(x)


def _noun(content: object) -> str:
    nouns = {list: "list", str: "text", type(None): "null", bool: "true or false"}
    return nouns.get(type(content), "number")
