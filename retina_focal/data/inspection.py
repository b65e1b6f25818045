"""Datasets looked at as a whole, for `retina-focal check`: annotations, pictures, and splits."""

import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from retina_focal.data.classes import difference
from retina_focal.data.duplicates import near_pairs
from retina_focal.data.findings import RECORD, Check, Finding, Severity, shortened
from retina_focal.data.images import MAX_PIXELS
from retina_focal.data.pictures import Interrupted, Look, look_at_all, thumbnails
from retina_focal.data.sources import find
from retina_focal.errors import UserError
from retina_focal.files import leads_outside

# What a finding of each severity means for the dataset.
DONE: dict[Severity, str] = {
    "error": "the dataset is refused",
    "training": "refused for training, but measured with",
    "outside": "refused, unless the command line says MODEL.RETINA_FOCAL.DATA.ALLOW_OUTSIDE True",
    "picture": "a training or evaluation stops there; DATA.MAX_BAD_IMAGES lets a training skip it",
    "warning": "used as it is",
    "mended": "used, mended in a copy",
    "note": "used",
}
REFUSED: tuple[Severity, ...] = ("error", "training", "outside", "picture")
# In the order of reports, and what each kind of a finding of pictures says after its number.
PICTURES: dict[str, tuple[Severity, str]] = {
    "picture-missing": ("picture", "are missing, or no regular files"),
    "picture-outside": ("outside", "lie outside the image folder, and are not looked at"),
    "picture-broken": ("picture", "can't be decoded: truncated, empty, or no pictures"),
    "picture-too-large": ("picture", "have too many pixels, and are not decoded"),
    "picture-wide": ("picture", "have more than 8 bits per channel, which Pillow cuts off"),
    "picture-program": ("picture", "are programs that would be run"),
    "picture-size": ("picture", "have another size than their annotations say"),
    "picture-turned": ("note", "lie on their side, and are turned as their EXIF tag says"),
    "picture-frames": ("warning", "have several frames; the first is used"),
    "picture-twice": ("warning", "have the bytes of an earlier one of the dataset"),
    "picture-near": ("note", "look like an earlier one of the dataset"),
}
SPLITS = ("split-unreadable", "split-classes", "split-class-unseen", "split-equal", "split-near")


@dataclass
class Inspected:
    """One dataset and what is found in it."""

    data: str
    check: Check = field(default_factory=Check)
    findings: list[Finding] = field(default_factory=list)  # of the check and of the pictures
    images: list[dict] = field(default_factory=list)
    annotations: list[dict] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)  # of the pictures, one per image
    looks: list[Look] = field(default_factory=list)  # one per image, or of the first ones, or none
    is_interrupted: bool = False  # by Ctrl-C
    boxes_per_class: dict[str, int] = field(default_factory=dict)

    @property
    def picture_counts(self) -> dict[str, int]:
        """How many pictures can be used, and what the others have; the sum is all."""
        counts = Counter(look.kind.removeprefix("picture-") or "usable" for look in self.looks)
        return dict(sorted(counts.items(), key=lambda x: x[0] != "usable"))


def inspect(
    data: str,
    with_pictures: bool = True,
    max_pixels: int = MAX_PIXELS,
    allow_outside: bool = False,
) -> Inspected:
    """Look at one dataset; what can't be read at all is a finding too, and Ctrl-C ends the looking.

    Args:
        data: a registered name, a URI or a path.
        with_pictures: whether to decode them.
        max_pixels: of the largest that is decoded.
        allow_outside: see `sources.load`.
    """
    seen = Inspected(data)
    try:
        file, root = find(data, allow_outside)
    except UserError as error:
        seen.findings.append(Finding("split-unreadable", "error", shortened(error, 3 * RECORD)))
        return seen
    seen.check, seen.findings = file.check, list(file.check.findings)
    if allow_outside:
        seen.findings = [x for x in seen.findings if x.severity != "outside"]
    if not file.check.num_images or any(x.kind == "structure" for x in file.check.findings):
        return seen
    content = json.loads(Path(file.mended).read_bytes())
    seen.images, seen.annotations = content["images"], content.get("annotations", [])
    seen.boxes_per_class = _boxes_per_class(seen)
    if with_pictures:
        seen.paths = [_path(image, root, allow_outside) for image in seen.images]
        try:
            looks = look_at_all(seen.paths, max_pixels, data)
        except Interrupted as error:
            looks, seen.is_interrupted = error.looks, True
        seen.looks = [_compared(*x) for x in zip(looks, seen.images, seen.paths, strict=False)]
        seen.findings += _picture_findings(seen)
    return seen


def _boxes_per_class(seen: Inspected) -> dict[str, int]:
    names = dict(zip(seen.check.category_ids, seen.check.classes, strict=True))
    ids = Counter(x["category_id"] for x in seen.annotations if _is_known(x, names))
    return {name: ids[i] for i, name in names.items()}


def _is_known(annotation: dict, names: dict[int, str]) -> bool:
    category = annotation.get("category_id")
    return type(category) is int and category in names and not annotation.get("iscrowd")


def _path(image: dict, root: Path, allow_outside: bool) -> str:
    """Of a picture; "" where there is none that may be looked at."""
    name = image.get("file_name")
    if not isinstance(name, str) or "\0" in name or not name.strip():
        return ""
    return "" if leads_outside(name) and not allow_outside else os.path.join(root, name)


def _compared(look: Look, image: dict, path: str) -> Look:
    """A picture compared with the size that the annotations say."""
    if not path:
        return look.with_fault("picture-outside", "")
    expected = (image.get("width"), image.get("height"))
    if look.kind or look.size == expected:
        return look
    reason = "it is {} x {} px, as annotated {} x {}".format(*look.size, *expected)
    if look.is_turned and look.size[::-1] == expected:
        reason += (
            ": it is turned by its EXIF orientation, as detectron2 does; where the boxes fit the "
            "picture as it is stored, delete that tag: exiftool -Orientation= FILE"
        )
    return look.with_fault("picture-size", reason)


def _picture_findings(seen: Inspected) -> list[Finding]:
    found: dict[str, list[tuple[int, str]]] = {kind: [] for kind in PICTURES}
    for i, look in enumerate(seen.looks):
        if look.kind:
            found[look.kind].append((i, look.reason))
        if look.is_turned:
            found["picture-turned"].append((i, ""))
        if look.num_frames > 1:
            found["picture-frames"].append((i, f"{look.num_frames} frames"))
    usable = [i for i, look in enumerate(seen.looks) if not look.kind]
    equal, near = _alike([seen.looks[i] for i in usable])
    for kind, pairs in (("picture-twice", equal), ("picture-near", near)):
        firsts = {usable[j]: usable[i] for i, j in reversed(pairs)}
        found[kind] = [(j, _name(seen, firsts[j])) for j in sorted(firsts)]
    return [
        Finding(
            *(kind, PICTURES[kind][0]),
            f"{len(places)} of {len(seen.looks)} pictures {PICTURES[kind][1]}",
            tuple(_record(_name(seen, i), why) for i, why in places),
            *("images", tuple(i for i, _ in places)),
        )
        for kind, places in found.items()
        if places
    ]


def _name(seen: Inspected, i: int) -> str:
    return shortened(seen.images[i].get("file_name"), RECORD)


def _record(name: str, reason: str) -> str:
    return shortened(f"{name}: {reason}" if reason else name, RECORD)


def _alike(looks: Sequence[Look]) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Pairs i < j of pictures with the same bytes, and of others that look the same."""
    first: dict[bytes, int] = {}
    equal = [(i, j) for j, look in enumerate(looks) if (i := first.setdefault(look.digest, j)) != j]
    near = [
        (i, j)
        for i, j in near_pairs(thumbnails(looks)).tolist()
        if looks[i].digest != looks[j].digest
    ]
    return equal, near


def compare(datasets: Sequence[Inspected]) -> list[Finding]:
    """What is wrong between datasets: classes that differ, and pictures that are in several.

    The first is taken to be trained on.
    """
    found: list[Finding] = []
    readable = [x for x in datasets if x.check.classes]
    for other in readable[1:]:
        found += _compare_classes(readable[0], other)
    for k, dataset in enumerate(datasets):
        for other in datasets[k + 1 :]:
            found += _leakage(dataset, other)
    return found


def _compare_classes(train: Inspected, other: Inspected) -> list[Finding]:
    own, others = train.check.classes, other.check.classes
    if sorted(own) != sorted(others):
        text = (
            f"'{other.data}' has other classes than '{train.data}': {difference(others, own)}; "
            "name all in both, for VOC and CSV with &classes=A,B"
        )
        return [Finding("split-classes", "error", text)]
    unseen = [x for x, n in other.boxes_per_class.items() if n and not train.boxes_per_class.get(x)]
    if not unseen or not train.boxes_per_class:
        return []
    text = f"{len(unseen)} classes have boxes in '{other.data}' and none in '{train.data}'"
    return [Finding("split-class-unseen", "warning", text, tuple(f"'{x}'" for x in unseen))]


def _leakage(one: Inspected, other: Inspected) -> list[Finding]:
    """Pictures that two datasets share, by their bytes or by how they look."""
    places = [(x, i) for x in (one, other) for i, look in enumerate(x.looks) if not look.kind]
    looks = [x.looks[i] for x, i in places]
    found = []
    texts = ("are the same, byte by byte", "look the same")
    for kind, text, pairs in zip(("split-equal", "split-near"), texts, _alike(looks), strict=True):
        across = [(i, j) for i, j in pairs if places[i][0] is one and places[j][0] is other]
        if across:
            records = tuple(
                f"{_name(one, places[i][1])} = {_name(other, places[j][1])}" for i, j in across
            )
            number = len({j for _, j in across})
            text = (
                f"{number} of {len(other.images)} pictures of '{other.data}' {text} as some of "
                f"'{one.data}', so that what is measured there is too high"
            )
            found.append(Finding(kind, "warning", text, records))
    return found
