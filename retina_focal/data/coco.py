"""Annotation files in COCO format: read, checked, and mended where the meaning is plain."""

import gc
import hashlib
import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from detectron2.data import MetadataCatalog
from detectron2.utils.file_io import PathManager

from retina_focal.data.annotations import is_segmentation, polygon_box
from retina_focal.data.check import check_coco
from retina_focal.data.findings import Check, Finding
from retina_focal.data.repeated import loads
from retina_focal.errors import UserError
from retina_focal.files import cache_folder, open_regular, write_whole

MENDING = 2  # of the rules of `mend`: other rules write another file

logger = logging.getLogger(__name__)
_KNOWN: dict[tuple, "CocoFile"] = {}


@dataclass(frozen=True)
class CocoFile:
    """An annotation file and what is found in it."""

    path: str  # as messages name it
    check: Check
    mended: str  # the file that is to be read: the one itself, or a mended copy of it
    digest: str  # SHA-256 of its content

    def refuse(self, name: str, trained_on: bool, allow_outside: bool = True) -> None:
        """Refuse what can't be used.

        Args:
            name: of the dataset.
            trained_on: else it is only measured with.
            allow_outside: whether pictures may lie outside the image folder.
        Raises:
            UserError: with all findings that forbid the use, and their first records.
        """
        forbidden = {"error": True, "training": trained_on, "outside": not allow_outside}
        findings = self.check.of(*(severity for severity, x in forbidden.items() if x))
        if findings:
            text = "; ".join(map(str, findings))
            raise UserError(f"dataset '{name}': {self.path} can't be used: {text}")

    def refuse_unmended(self, name: str) -> None:
        """Refuse for measuring what the evaluator can't read or reads wrongly as it stands.

        Raises:
            UserError: something is mended in the copy, which this dataset does not use.
        """
        findings = [x for x in self.check.of("mended") if x.kind != "segmentation"]
        if findings:
            raise UserError(
                f"dataset '{name}': {self.path} can't be measured with as it stands: "
                f"{'; '.join(map(str, findings))}; this happens where it is registered by: "
                "--dataset NAME JSON IMAGES, or retina_focal.register_coco_json"
            )

    def report(self, name: str, trained_on: bool) -> None:
        """Log what the dataset has, and what is found in it."""
        logger.info("dataset '%s': %s", name, self.check.summary())
        kinds = ("warning", "mended", *(() if trained_on else ("training",)))
        for finding in self.check.of(*kinds):
            logger.warning("dataset '%s': %s: %s", name, self.path, finding)


def read_coco(path: str, uri: str | None = None) -> CocoFile:
    """Read and check a file once, and mend a copy in the cache where something is to be mended.

    Args:
        uri: of the dataset that a reader of ours made the file of, for messages.
    Raises:
        UserError: it is missing, no regular file, no JSON, or the copy can't be written.
    """
    try:
        with open_regular(path) as file:
            status = os.stat(file.fileno())
            key = (path, uri, status.st_mtime_ns, status.st_size)
            data = None if key in _KNOWN else file.read()
    except UserError as error:
        raise UserError(f"the annotation file {error}") from error
    if data is not None:
        _KNOWN[key] = _read(path, uri, data)
    return _KNOWN[key]


def coco_file(name: str) -> CocoFile | None:
    """The annotation file of a registered dataset that COCO's evaluator reads, checked."""
    metadata = MetadataCatalog.get(name)
    if metadata.get("evaluator_type") != "coco" or metadata.get("json_file") is None:
        return None
    path = metadata.get("source_file") or PathManager.get_local_path(metadata.json_file)
    return read_coco(path, metadata.get("uri"))


def _read(path: str, uri: str | None, data: bytes) -> CocoFile:
    with _without_garbage_collection():
        try:
            content, repeated = loads(data)
        except RecursionError as error:
            raise UserError(f"{path} is not JSON: it is nested too deeply") from error
        except ValueError as error:  # no JSON, no text, or a number of over 4,300 digits
            raise UserError(f"{path} is not JSON: {error}") from error
        check = check_coco(content, is_read=uri is not None, repeated=repeated)
        if json.detect_encoding(data) != "utf-8":
            text = f"the text is {json.detect_encoding(data)}; expected UTF-8 without a mark"
            check.findings.append(Finding("encoding", "mended", text))
        mended, digest = path, hashlib.sha256(data).hexdigest()
        if check.of("mended") and not check.of("error"):
            name = f"{Path(path).stem}-{digest[:24]}-{MENDING}.json"
            mended = str(cache_folder() / "datasets" / name)
            if not os.path.exists(mended):
                mend(content)
                write_whole(Path(mended), json.dumps(content))
    return CocoFile(uri or path, check, mended, digest)


def mend(content: dict) -> None:
    """Complete annotations, in place, where their meaning is plain: see `check_coco`."""
    annotations = content.get("annotations", [])
    anew = min((x["id"] for x in annotations), default=1) < 1
    for number, annotation in enumerate(annotations, start=1):
        annotation.setdefault("iscrowd", 0)
        if annotation.get("bbox") is None:
            annotation["bbox"] = polygon_box(annotation["segmentation"])
        if annotation.get("area") is None:
            annotation["area"] = annotation["bbox"][2] * annotation["bbox"][3]
        if anew:
            annotation["id"] = number
        if annotation.get("segmentation") and not is_segmentation(annotation["segmentation"]):
            del annotation["segmentation"]


@contextmanager
def _without_garbage_collection() -> Iterator[None]:
    """It would look at millions of new records again and again: half the time of reading."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
