"""What is found in an annotation file, as data: commands print it, and training refuses by it."""

import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

# "error": nothing can be done with the dataset; "training": it can be measured with, not trained
# on; "outside": the user must allow it on the command line; "warning": it is used as it is;
# "mended": it is used as the text says; "note": for information. "picture": a picture that stops
# the training or evaluation that reads it.
Severity = Literal["error", "training", "outside", "picture", "warning", "mended", "note"]
SHOWN = 3  # records of a finding that its line shows
MAX_ID = 2**53  # the evaluator keeps ids as float64
SOURCE = "from"  # the key under which a reader keeps the file and record that it read
NAME = 200  # letters of the name of a class
TEXT = 60  # characters of a value that a line shows
RECORD = 400  # characters of a record, the path of a file and the reason included


@dataclass(frozen=True)
class Finding:
    """One kind of fault in one file, with every record that has it."""

    kind: str
    severity: Severity
    text: str  # what is wrong with the records, and what to do
    records: tuple[str, ...] = ()  # such as "annotations[17] (id 23): bbox [nan, 1, 2, 3]"
    section: str = ""  # where the records are at `indices`; "": nowhere in a COCO file
    indices: tuple[int, ...] = ()

    def __str__(self) -> str:
        more = len(self.records) - SHOWN
        shown = "; ".join(self.records[:SHOWN]) + (f"; and {more} more" if more > 0 else "")
        return f"{self.text} ({shown})" if shown else self.text


@dataclass
class Check:
    """Findings about the content of one file.

    `counts` has what becomes of each of the `num_annotations`: "boxes" are trained on and measured
    with, "crowds" are ignored, "empty" and "outside" are not trained on, "elsewhere" are of images
    that are not in the file; "faulty" have an error, and beside one in the ids or categories the
    others are "not looked at".
    """

    findings: list[Finding] = field(default_factory=list)
    classes: list[str] = field(default_factory=list)  # by rising category id
    category_ids: list[int] = field(default_factory=list)  # rising
    num_images: int = 0
    num_annotations: int = 0
    counts: dict[str, int] = field(default_factory=dict)

    def of(self, *severities: Severity) -> list[Finding]:
        return [finding for finding in self.findings if finding.severity in severities]

    def summary(self) -> str:
        """One line whose numbers add up."""
        parts = ", ".join(f"{n} {what}" for what, n in self.counts.items() if n)
        return (
            f"{self.num_images} images, {len(self.classes)} classes, "
            f"{self.num_annotations} annotations{': ' if parts else ''}{parts}"
        )


class Section:
    """The records of one section, a column at a time; what is found goes into `findings`."""

    def __init__(
        self, name: str, records: list[dict], findings: list[Finding], is_read: bool = False
    ):
        """
        Args:
            is_read: whether a reader of ours wrote the records, with their `SOURCE`.
        """
        self.name, self.records, self.findings = name, records, findings
        self.is_read = is_read
        self.faulty: set[int] = set()  # records with an error

    def column(self, key: str, default: object = None) -> list:
        return [record.get(key, default) for record in self.records]

    def find(
        self, kind: str, severity: Severity, indices: Iterable[int], text: str, key: str = ""
    ) -> None:
        """Add a finding where there are records; `text` comes after their number."""
        indices = [int(i) for i in indices]
        records = tuple(self._label(i, key) for i in indices)
        if severity == "error":
            self.faulty.update(indices)
        if records:
            text = f"{len(records)} of {len(self.records)} {self.name} {text}"
            where = (self.name, tuple(indices))
            self.findings.append(Finding(kind, severity, text, records, *where))

    def expect_type(
        self, key: str, values: Sequence, types: set[type], expected: str
    ) -> np.ndarray:
        """Which records have a value of these types, (n,) bool; the others are findings."""
        fits = np.ones(len(values), dtype=bool)
        if not set(map(type, values)) <= types:
            fits = np.fromiter((type(x) in types for x in values), bool, len(values))
            missing = [i for i in np.flatnonzero(~fits) if key not in self.records[i]]
            others = [i for i in np.flatnonzero(~fits) if key in self.records[i]]
            self.find(key, "error", missing, f"have no '{key}'; expected {expected}")
            text = f"have a '{key}' of another type; expected {expected}"
            self.find(key, "error", others, text, key)
        return fits

    def ids(self, values: Sequence) -> bool:
        """Whether the ids are whole numbers, each once."""
        if not self.expect_type("id", values, {int}, "a whole number of its own").all():
            return False
        huge = [i for i, x in enumerate(values) if abs(x) >= MAX_ID]
        text = "have an id that float64, which the evaluator uses, can't tell from its neighbours"
        self.find("id-huge", "error", huge, f"{text}; number them from 1", "id")
        if len(set(values)) == len(values):
            return not huge
        counts = Counter(values)
        twice = [i for i, x in enumerate(values) if counts[x] > 1]
        self.find("id-twice", "error", twice, "share their id with another; number them from 1")
        return False

    def _label(self, i: int, key: str) -> str:
        record = self.records[i]
        tag = record.get("id") if isinstance(record, dict) else None
        label = f"{self.name}[{i}]" + ("" if tag is None else f" (id {shortened(tag)})")
        if self.is_read and isinstance(record, dict):
            label = str(record.get(SOURCE, label))
        if key:
            label += f": {key} {shortened(record[key])}"
        return label


def is_class_name(text: str) -> bool:
    """Whether a text can stand in tables and messages."""
    return len(text) <= NAME and all(map(_is_shown, text))


def _is_shown(letter: str) -> bool:
    """Not a control character, the half of one (surrogate), or the end of a line.

    Nor a format character, which can turn a line round; but two that some scripts write with.
    """
    kind = unicodedata.category(letter)
    return kind not in ("Cc", "Cf", "Cs", "Zl", "Zp") or letter in "\u200c\u200d"


def shortened(value: object, limit: int = TEXT) -> str:
    """One line of at most `limit` characters, of a value of any size."""
    try:
        text = value if isinstance(value, str) else str(value)
    except (RecursionError, ValueError):  # nested too deeply, or an int of over 4,300 digits
        text = f"a {type(value).__name__}"
    text = "".join(x if _is_shown(x) else "?" for x in text[: limit + 1])
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


# All kinds but those of pictures and between datasets (`inspection`).
KINDS = (
    *(
        "structure",
        "encoding",
        "twice",
        "annotations-missing",
        "boxes-missing",
        "class-without-boxes",
    ),
    *("id", "id-huge", "id-twice", "id-zero", "name", "name-twice"),
    *("file_name", "outside", "width", "height", "image-empty"),
    *("category_id", "category-undeclared", "class-undeclared", "image_id", "image-undeclared"),
    *("bbox", "box-type", "box-infinite", "box-negative", "box-xyxy", "box-subpixel"),
    *("box-of-polygons", "box-in-pixels", "polygon", "duplicate", "empty"),
    *("crowds", "iscrowd", "iscrowd-missing", "ignore", "difficult", "segmentation"),
    *("area", "area-missing", "file-unreadable", "object-incomplete", "line", "row"),
)
