"""Datasets by URI: read once into a COCO file in the cache, which all else reads.

The cache is keyed by the content of what was read: whoever changes a file gets another COCO file.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils.file_io import PathManager

from retina_focal.data.coco import CocoFile, read_coco
from retina_focal.data.readers import csv_rows, voc, yolo
from retina_focal.data.readers.base import Inputs, Reading, folder_of
from retina_focal.data.splits import held_out
from retina_focal.data.uri import Location, options_of, parse
from retina_focal.errors import UserError
from retina_focal.files import cache_folder, write_whole

READERS: dict[str, ModuleType] = {"voc": voc, "yolo": yolo, "csv": csv_rows}


@dataclass(frozen=True)
class Source:
    """A dataset as every part of the package reads it."""

    name: str  # as the user gave it
    json_file: Path  # in COCO format, checked
    image_root: Path  # folder that the file names start from
    classes: tuple[str, ...]  # by rising category id


def load(data: str, allow_outside: bool = False) -> Source:
    """The dataset of a registered name, a URI or a path.

    Args:
        data: as ``voc:FOLDER?split=train``; see docs/DATA.md.
        allow_outside: whether its files may name what lies outside of its folder.
    Raises:
        UserError: it is not there, or can't be used; with all findings.
    """
    file, image_root = find(data, allow_outside)
    file.refuse(data, trained_on=False, allow_outside=allow_outside)
    classes = MetadataCatalog.get(data).get("thing_classes") if data in DatasetCatalog else None
    return Source(data, Path(file.mended), image_root, tuple(classes or file.check.classes))


def find(data: str, allow_outside: bool = False) -> tuple[CocoFile, Path]:
    """The COCO file, checked and not refused yet, and the image folder; see `load`.

    Raises:
        UserError: there is no dataset, or nothing of it can be read.
    """
    if data not in DatasetCatalog:
        path, image_root = locate(data, allow_outside)
        return open_coco(data, path), image_root
    metadata = MetadataCatalog.get(data)
    json_file = metadata.get("json_file")
    if json_file is None or not PathManager.isfile(json_file):
        raise UserError(f"dataset '{data}' has no annotation file in COCO format: {json_file}")
    path = metadata.get("source_file") or PathManager.get_local_path(json_file)
    return read_coco(path, metadata.get("uri")), Path(metadata.image_root)


def open_coco(data: str, json_file: Path) -> CocoFile:
    """The COCO file that `locate` returned, checked; messages name it by `data`."""
    return read_coco(str(json_file), data if _is_cached(json_file) else None)


def splits(data: str) -> list[str]:
    """URIs of all splits that lie at a URI or path which names none; itself where there are none.

    Raises:
        UserError: see `uri.parse`.
    """
    location = parse(data)
    if location.split or location.format == "coco":
        return [data]
    names = READERS[location.format].splits(location)
    # VOC's trainval is train and val again.
    names = [x for x in names if x != "trainval" or not {"train", "val"} <= set(names)]
    order = ["train", "val", "valid", "test"]
    names.sort(key=lambda x: (order.index(x) if x in order else len(order), x))
    mark = "&" if "?" in data else "?"
    return [f"{data}{mark}split={name}" for name in names] or [data]


def locate(data: str, allow_outside: bool = False) -> tuple[Path, Path]:
    """The COCO file of a URI or path, in the cache where it was made, and the image folder.

    Args:
        allow_outside: see `load`.
    Raises:
        UserError: there is no dataset, or nothing of it can be read.
    """
    location = replace(parse(data), allow_outside=allow_outside)
    if not location.val:
        return _whole(location)
    names = () if location.format == "coco" else READERS[location.format].splits(location)
    if location.split in names and location.split != "train":
        raise UserError(
            f"'{data}': there is a split '{location.split}' already; take val={location.val:g} out"
        )
    whole = replace(location, val=None, split="train" if "train" in names else "")
    json_file, image_root = _whole(whole)
    return held_out(json_file, image_root, location), image_root


def _whole(location: Location) -> tuple[Path, Path]:
    """`locate` for a location without a held-out split."""
    if location.format == "coco":
        return _coco(location)
    reader = READERS[location.format]
    return _cached(location, reader), reader.image_root(location)


def _coco(location: Location) -> tuple[Path, Path]:
    """A COCO file as it stands, and where its pictures are."""
    if location.split:
        raise UserError(
            f"'{location.uri}': a COCO file has no splits; name a file for each, or add &val=0.2"
        )
    file = location.path
    if location.images:
        return file, location.images
    return file, folder_of(file, _first_image(file))


def _first_image(file: Path) -> str | None:
    """The first file name of a COCO file; None where it has none, which the check will say."""
    try:
        name = json.loads(file.read_bytes())["images"][0]["file_name"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None
    return name if isinstance(name, str) else None


def _cached(location: Location, reader: ModuleType) -> Path:
    """The COCO file in the cache that a reader makes of a location."""
    seen = Inputs(location.allow_outside)
    for _ in reader.visit(location, seen):
        pass
    path = _place(location, reader, seen)
    if not path.exists():
        inputs = Inputs(location.allow_outside)
        classes = yolo.class_names(location) if reader is yolo else location.classes
        reading = Reading(classes)
        for item in reader.visit(location, inputs):
            reader.add(item, location, reading)
        _refuse_empty(location, reading)
        path = _place(location, reader, inputs)  # should a file have changed since
        write_whole(path, json.dumps(_with_info(reading)))
    return path


def _place(location: Location, reader: ModuleType, inputs: Inputs) -> Path:
    options = (location.format, reader.VERSION, location.split, location.classes)
    options += (location.offset, location.difficult, location.allow_outside)
    key = inputs.key(repr(options))
    return cache_folder() / "datasets" / f"{location.format}-{location.split or 'all'}-{key}.json"


def _is_cached(path: Path) -> bool:
    return path.parent == cache_folder() / "datasets"


def _with_info(reading: Reading) -> dict:
    findings = [[x.kind, x.severity, x.text, list(x.records)] for x in reading.findings()]
    return {"info": {"findings": findings, "unread": reading.unread}, **reading.coco()}


def _refuse_empty(location: Location, reading: Reading) -> None:
    """Refuse where there is nothing that a COCO file could hold (UserError)."""
    faults = "; ".join(map(str, reading.findings()))
    if not reading.images:
        elsewhere = ""
        if "images" in options_of(location.format) and not location.images:
            mark = "&" if "?" in location.uri else "?"
            elsewhere = f"; where the pictures lie in another folder add {mark}images=FOLDER"
        raise UserError(
            f"'{location.uri}': no picture can be used: {faults or 'there is none'}{elsewhere}"
        )
    if not (reading.met or reading.classes):
        raise UserError(
            f"'{location.uri}': none of {len(reading.images)} pictures has a box, so that no class "
            f"is known{': ' if faults else ''}{faults}; for pictures without boxes add &classes=A,B"
        )
