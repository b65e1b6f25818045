"""What the readers share: files read with a limit and hashed, and a COCO dict put together."""

import hashlib
import math
import os
from collections.abc import Iterable
from pathlib import Path

from PIL import Image
from PIL.ExifTags import Base

from retina_focal.data.findings import RECORD, SOURCE, Finding, Severity, shortened
from retina_focal.data.images import is_postscript
from retina_focal.errors import UserError
from retina_focal.files import decoded, leads_outside, open_regular, read_bounded

MAX_BYTES = 10_000_000  # of one annotation file of one picture: 20,000 boxes as VOC
MAX_NAME = 1000  # letters of a path
MAX_LIST = 100_000_000  # bytes of a file that lists pictures
SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
ALLOW_OUTSIDE = "MODEL.RETINA_FOCAL.DATA.ALLOW_OUTSIDE"
TURNED = (5, 6, 7, 8)  # EXIF orientations that swap width and height


class Inputs:
    """Reads the files of a dataset, and hashes what was read of them, in any order."""

    def __init__(self, allow_outside: bool = False):
        """
        Args:
            allow_outside: whether what a file names may lie outside of the dataset's folder.
        """
        self.allow_outside = allow_outside
        self._digests: dict[str, str] = {}

    def read(self, path: Path, limit: int = MAX_BYTES) -> bytes:
        """A file's bytes.

        Raises:
            UserError: it is missing, no regular file, or has more than `limit` bytes.
        """
        content = read_bounded(path, limit, "such file")
        self._digests[str(path)] = hashlib.sha256(content).hexdigest()
        return content

    def lines(self, path: Path) -> list[str]:
        """The lines of a list, without space around them and empty ones (UserError: as `read`)."""
        return [
            x.strip() for x in decoded(self.read(path, MAX_LIST), path).splitlines() if x.strip()
        ]

    def names(self, folder: Path, suffixes: Iterable[str]) -> list[str]:
        """Sorted names of the files in a folder that end so, in any case; none where it is none."""
        wanted = tuple(sorted(suffixes))  # a set of texts has another order in each process
        try:
            with os.scandir(folder) as entries:
                found = sorted(x.name for x in entries if x.name.lower().endswith(wanted))
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            raise UserError(f"can't read the folder '{folder}': {error.strerror}") from error
        digest = hashlib.sha256("\0".join(found).encode(errors="surrogateescape"))
        self._digests[f"{folder}/ {wanted}"] = digest.hexdigest()
        return found

    def stat(self, path: Path) -> None:
        """Hash a picture's size in bytes and its time of change in place of its content."""
        try:
            status = os.stat(path)
            self._digests[str(path)] = f"{status.st_size} {status.st_mtime_ns}"
        except (OSError, ValueError):
            self._digests[str(path)] = "missing"

    def key(self, options: str) -> str:
        """A hash of all that was read, and of the options that it was read with."""
        text = f"{options}\n" + "\n".join(
            f"{name}\t{digest}" for name, digest in sorted(self._digests.items())
        )
        return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:24]

    def refuse_outside(self, name: str, where: str) -> None:
        """Refuse a path out of a file that is none, or leads out of its folder (UserError)."""
        expect_path(name, where)
        if leads_outside(name) and not self.allow_outside:
            raise UserError(
                f"{where} names '{shortened(name)}', outside of its folder, which only a command "
                f"can allow: add {ALLOW_OUTSIDE} True"
            )


def expect_path(name: str, where: str) -> None:
    """Refuse what can't be a path (UserError)."""
    if not name.strip() or "\0" in name or len(name) > MAX_NAME:
        raise UserError(f"{where} names '{shortened(name)}', which is no path")


class Reading:
    """A COCO dict under way, and what of the files could not be read."""

    def __init__(self, classes: Iterable[str] | None):
        """
        Args:
            classes: by rising category id; None: those that are met, by name.
        """
        self.classes = None if classes is None else list(classes)
        self.images: list[dict] = []
        self.met: set[str] = set()  # classes
        self.unread = 0  # records that stand for a box, and can't be read
        self._faults: dict[tuple[str, Severity, str], list[str]] = {}

    def add_image(self, file_name: str, width: float, height: float, source: str) -> list[dict]:
        """Add an image; returns the list that its boxes go into.

        Args:
            file_name: from the image folder.
            width, height: px.
            source: the file that its annotations are in, as messages name it.
        """
        image = {"file_name": file_name, "width": width, "height": height, SOURCE: source}
        self.images.append({"image": image, "boxes": []})
        return self.images[-1]["boxes"]

    def fault(self, kind: str, severity: Severity, text: str, record: str, of_box=False) -> None:
        """Note a fault of a record; `text` comes after the number of those that share it."""
        self._faults.setdefault((kind, severity, text), []).append(shortened(record, RECORD))
        self.unread += of_box

    def findings(self) -> list[Finding]:
        return [
            Finding(kind, severity, f"{len(records)} {text}", tuple(records))
            for (kind, severity, text), records in self._faults.items()
        ]

    def coco(self) -> dict:
        """The COCO dict: images by name, ids from 1, boxes in the order of their files."""
        classes = sorted(self.met) if self.classes is None else self.classes
        ids = {name: i for i, name in enumerate(classes, start=1)}
        images, annotations = [], []
        for image_id, entry in enumerate(
            sorted(self.images, key=lambda x: x["image"]["file_name"]), start=1
        ):
            images.append({"id": image_id, **entry["image"]})
            for box in entry["boxes"]:
                head = {"id": len(annotations) + 1, "image_id": image_id}
                annotations.append({**head, "category_id": ids[box.pop("class")], **box})
        categories = [{"id": i, "name": name} for name, i in ids.items()]
        return {"images": images, "annotations": annotations, "categories": categories}


def box_record(name: str, x0: float, y0: float, x1: float, y1: float, source: str) -> dict:
    """A box in COCO's words, from its corners in px; `source`: file and record."""
    return xywh_record(name, x0, y0, x1 - x0, y1 - y0, source)


def xywh_record(name: str, x: float, y: float, width: float, height: float, source: str) -> dict:
    """A box in COCO's words; `name`: of its class, until `Reading.coco` numbers the classes."""
    record = {"class": name, "bbox": [x, y, width, height], "iscrowd": 0, SOURCE: source}
    area = width * height
    if 0 <= area < math.inf:  # else the box is a finding, once
        record["area"] = area
    return record


def number(text: str) -> float:
    """A number as the formats write it (ValueError: it is none); whole ones as int."""
    if "_" in text or len(text) > 100:
        raise ValueError(f"{shortened(text)} is no number")
    value = float(text)
    return int(value) if value.is_integer() else value


def picture_size(path: Path) -> tuple[int, int]:
    """(width, height) in px from a picture's head, as detectron2 turns it by its EXIF.

    Raises:
        UserError: it is no picture.
    """
    if is_postscript(path):
        raise UserError(f"'{path}' is PostScript, and no picture")
    try:
        with open_regular(path) as file, Image.open(file) as image:
            width, height = image.size
            turned = image.getexif().get(Base.Orientation) in TURNED
    except UserError:
        raise
    except Exception as error:  # Pillow may raise anything
        raise UserError(f"'{path}' is no picture: {error}") from error
    return (height, width) if turned else (width, height)


def folder_of(file: Path, picture: str | None) -> Path:
    """The folder near an annotation file that a picture which it names lies in, else its own."""
    # train2017 beside annotations/instances_train2017.json, images/ beside train.json.
    folder, stem = file.parent, file.stem.removeprefix("instances_")
    named = [folder, folder / "images", folder / stem, folder / "images" / stem]
    named += [folder.parent / stem, folder.parent / "images", folder.parent / "images" / stem]
    if not picture or os.path.isabs(picture):
        return folder
    return next((x for x in named if os.path.isfile(x / picture)), folder)


def by_stem(names: Iterable[str]) -> dict[str, str]:
    """Names of pictures by their names without suffix; of two the first, so .jpg before .png."""
    found: dict[str, str] = {}
    for name in names:
        found.setdefault(os.path.splitext(name)[0], name)
    return found
