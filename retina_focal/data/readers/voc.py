"""PASCAL VOC: an XML file per picture, read as a stream.

expat itself, not ElementTree or defusedxml: it tells the line of each object, keeps no tree, and
ends at the first `<!DOCTYPE`, without which there are no entities. defusedxml would guard
ElementTree alone, and be one more package.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from xml.parsers import expat

from retina_focal.data.findings import shortened
from retina_focal.data.readers.base import (
    MAX_NAME,
    SUFFIXES,
    Inputs,
    Reading,
    box_record,
    by_stem,
    number,
    picture_size,
)
from retina_focal.data.uri import Location
from retina_focal.errors import UserError
from retina_focal.files import leads_outside

VERSION = 2  # of the rules of this reader
MAX_DEPTH = 50  # of elements
MAX_LETTERS = 10_000  # of one text
SPLITS = Path("ImageSets", "Main")
CORNERS = ("xmin", "ymin", "xmax", "ymax")
WANTED = {
    "annotation/filename": "filename",
    "annotation/size/width": "width",
    "annotation/size/height": "height",
    "annotation/object/name": "name",
    "annotation/object/difficult": "difficult",
    **{f"annotation/object/bndbox/{corner}": corner for corner in CORNERS},
}


@dataclass(frozen=True)
class Item:
    """One annotation file."""

    source: str  # as messages name it
    content: bytes | None  # None: there is no such file
    picture: str | None  # name of the picture that has its name
    in_split: bool  # the others only tell the classes, so that all splits have the same


def splits(location: Location) -> list[str]:
    """Names of the splits that the folder has."""
    names = Inputs().names(location.path / SPLITS, [".txt"])
    stems = [name.removesuffix(".txt") for name in names]
    # VOC itself has cat_train.txt too, a list per class.
    stems = [x for x in stems if not any(x.endswith(f"_{other}") for other in stems)]
    if not stems and not (location.path / "Annotations").is_dir():
        stems = sorted(
            x.name for x in location.path.iterdir() if x.is_dir() and any(x.glob("*.xml"))
        )
    return stems


def image_root(location: Location) -> Path:
    """The folder that file names start from."""
    if location.images:
        return location.images
    folder = _folder(location)
    named = [folder / name for name in ("JPEGImages", "images", "Images")]
    return next((x for x in named if x.is_dir()), folder)


def _folder(location: Location) -> Path:
    """The folder of a split that has one of its own, else that of the dataset."""
    folder = location.path
    if not folder.is_dir():
        raise UserError(
            f"'{location.uri}': '{folder}' is no folder; expected one with Annotations/"
        )
    own = folder / location.split
    if location.split and not (folder / "Annotations").is_dir() and own.is_dir():
        return own
    return folder


def visit(location: Location, inputs: Inputs) -> Iterator[Item]:
    """The annotation files, those of the split in its order.

    Raises:
        UserError: the folder or the split has none.
    """
    folder = _folder(location)
    annotations = folder / "Annotations" if (folder / "Annotations").is_dir() else folder
    names = inputs.names(annotations, [".xml"])
    if not names:
        raise UserError(f"'{location.uri}': '{annotations}' has no .xml file")
    pictures = by_stem(inputs.names(image_root(location), SUFFIXES))
    stems = [os.path.splitext(name)[0] for name in names]
    wanted = _ids(location, folder, inputs)
    order = stems if wanted is None else [*wanted, *(set(stems) - set(wanted))]
    by_name = dict(zip(stems, names, strict=True))
    for stem in order:
        path = annotations / by_name.get(stem, f"{stem}.xml")
        source = path.relative_to(location.path).as_posix()
        if stem not in by_name:
            source = f"{_list_of(location).relative_to(location.path)}: {source}"
        content = inputs.read(path) if stem in by_name else None
        yield Item(source, content, pictures.get(stem), wanted is None or stem in wanted)


def _ids(location: Location, folder: Path, inputs: Inputs) -> dict[str, None] | None:
    """What the list of the split names, each once; None: all."""
    if not location.split or folder != location.path:
        return None
    path = _list_of(location)
    if leads_outside(location.split) or not path.is_file():
        found = ", ".join(splits(location)) or "no split"
        raise UserError(
            f"'{location.uri}': there is no split '{location.split}', in '{path}'; found {found}"
            + ("" if location.val else "; add &val=0.2 to hold out a part as val")
        )
    ids = {}
    for line in inputs.lines(path):
        name, *flag = line.split()
        if leads_outside(name) or len(name) > MAX_NAME:
            raise UserError(f"'{path}' names '{shortened(name)}', which is no name of a picture")
        if flag != ["-1"]:  # in cat_train.txt: there is no cat
            ids[name] = None
    if not ids:
        raise UserError(f"'{path}' names no picture")
    return ids


def _list_of(location: Location) -> Path:
    """The file that names the pictures of the split."""
    return location.path / SPLITS / f"{location.split}.txt"


def add(item: Item, location: Location, reading: Reading) -> None:
    """Add the image of an annotation file and its boxes."""
    if item.content is None:
        reading.fault(
            *("annotations-missing", "error"),
            "pictures of the split have no annotation file; take them out of the list, or add it",
            item.source,
        )
        return
    try:
        found = _parse(item.content)
    except (expat.ExpatError, LookupError, UserError, ValueError) as error:
        if item.in_split:
            text = "annotation files are not PASCAL VOC; expected <annotation> with <object>"
            reading.fault("file-unreadable", "error", text, f"{item.source}: {error}")
        return
    if not item.in_split:
        reading.met.update(x["name"].strip() for x in found["objects"] if x.get("name", "").strip())
        return
    if "twice" in found:
        text = "annotation files have an element twice, with different values; delete one"
        reading.fault("twice", "error", text, f"{item.source}: <{found['twice']}>")
    file_name = item.picture
    if file_name is None:
        given = found.get("filename", "").strip()
        is_name = given and len(given) <= MAX_NAME
        file_name = given if is_name else f"{Path(item.source).stem}.jpg"
    boxes = reading.add_image(file_name, *_size(found, file_name, item, location), item.source)
    for i, fields in enumerate(found["objects"]):
        _add_object(
            fields, f"{item.source}, object[{i}] (line {fields['line']})", location, reading, boxes
        )


def _size(found: dict, file_name: str, item: Item, location: Location) -> tuple[object, object]:
    """Width and height as written, or where they are missing or 0 those of the picture."""
    try:
        size = number(found["width"]), number(found["height"])
        if min(size) > 0:
            return size
    except (KeyError, ValueError, OverflowError):
        pass
    try:
        return picture_size(image_root(location) / file_name)
    except UserError:
        return found.get("width"), found.get("height")  # which the check names


def _add_object(
    fields: dict, record: str, location: Location, reading: Reading, boxes: list[dict]
) -> None:
    name = fields.get("name", "").strip()
    if "twice" in fields:
        text = "objects have an element twice, with different values; delete one"
        reading.fault("twice", "error", text, f"{record}: <{fields['twice']}>", True)
        return
    missing = [key for key in ("name", *CORNERS) if not fields.get(key, "").strip()]
    if missing:
        text = f"objects lack one of <name>, {', '.join(f'<{x}>' for x in CORNERS)}"
        reading.fault("object-incomplete", "error", text, f"{record}: {missing[0]}", True)
        return
    try:
        x0, y0, x1, y1 = (number(fields[corner]) for corner in CORNERS)
    except (ValueError, OverflowError) as error:
        text = "objects have a corner that is no number; expected pixels"
        reading.fault("box-type", "error", text, f"{record}: {shortened(error)}", True)
        return
    if reading.classes is not None and name not in reading.classes:
        text = (
            f"objects are of a class that classes={','.join(reading.classes)} does not name; add it"
        )
        reading.fault("class-undeclared", "error", text, f"{record}: {shortened(name)}", True)
        return
    is_difficult = fields.get("difficult", "0").strip() not in ("", "0")
    if is_difficult and location.difficult == "drop":
        text = "objects are difficult and left out, as difficult=drop says"
        reading.fault("difficult", "note", text, record)
        return
    reading.met.add(name)
    box = box_record(name, x0 - location.offset, y0 - location.offset, x1, y1, record)
    if is_difficult:
        box["difficult"] = 1
        box["iscrowd"] = int(location.difficult == "ignore")
    boxes.append(box)


def _parse(content: bytes) -> dict:
    """{"filename", "width", "height", "objects": [{"line", "name", "difficult", "xmin", ...}]}, all
    as text, and only what is there; "twice" is an element that is there with two values.

    Raises:
        ExpatError, LookupError (of an encoding), UserError, ValueError: it is no such XML.
    """
    found: dict = {"objects": []}
    path: list[str] = []
    text: list[str] = []
    parser = expat.ParserCreate()
    parser.buffer_text = True

    def start(tag: str, attributes: dict) -> None:
        path.append(tag)
        text.clear()
        if len(path) > MAX_DEPTH:
            raise UserError(f"elements are nested deeper than {MAX_DEPTH}")
        if path[0] != "annotation":
            raise UserError(f"it has <{shortened(tag)}> in place of <annotation>")
        if path == ["annotation", "object"]:
            found["objects"].append({"line": parser.CurrentLineNumber})

    def end(tag: str) -> None:
        key = WANTED.get("/".join(path))
        if key:
            value = "".join(text)
            if len(value) > MAX_LETTERS:
                raise UserError(f"<{tag}> has more than {MAX_LETTERS:,} letters")
            into = found["objects"][-1] if path[1] == "object" else found
            if into.setdefault(key, value) != value:
                into.setdefault("twice", tag)
        path.pop()
        text.clear()

    def refuse(*declaration: object) -> None:
        raise UserError(
            "it has a <!DOCTYPE>, which annotations do not need and attacks use; delete it"
        )

    parser.StartElementHandler, parser.EndElementHandler = start, end
    parser.CharacterDataHandler = text.append
    parser.StartDoctypeDeclHandler = refuse
    parser.Parse(content, True)
    return found
