"""YOLO: data.yaml, and beside each picture's folder one of text files, `class cx cy w h` a line."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from retina_focal.data.findings import RECORD, shortened
from retina_focal.data.readers.base import (
    SUFFIXES,
    Inputs,
    Reading,
    expect_path,
    number,
    picture_size,
    xywh_record,
)
from retina_focal.data.uri import DATA_YAML, Location
from retina_focal.errors import UserError
from retina_focal.files import decoded, leads_outside
from retina_focal.safe_yaml import read_yaml

VERSION = 1  # of the rules of this reader
SPLITS = ("train", "val", "test")
ALIASES = {"val": ("val", "valid"), "valid": ("val", "valid")}


@dataclass(frozen=True)
class Item:
    """One picture."""

    picture: Path
    file_name: str  # from the image folder
    source: str  # its labels, as messages name them
    content: bytes | None  # None: it has no labels, so no boxes


def _yaml(location: Location) -> Path:
    if not location.path.is_dir():
        return location.path
    for name in DATA_YAML:
        if (location.path / name).is_file():
            return location.path / name
    raise UserError(f"'{location.uri}': '{location.path}' has no {DATA_YAML[0]}")


def splits(location: Location) -> list[str]:
    """Names of the splits that data.yaml gives."""
    keys = read_yaml(_yaml(location), numbered=True)
    return [name for name in SPLITS if any(keys.get(x) for x in ALIASES.get(name, (name,)))]


def image_root(location: Location) -> Path:
    """The folder that file names start from: that of data.yaml."""
    return _yaml(location).parent


def class_names(location: Location) -> list[str]:
    """By rising index.

    Raises:
        UserError: data.yaml does not name them in a list, or by index from 0.
    """
    path = _yaml(location)
    keys = read_yaml(path, numbered=True)
    names = keys.get("names")
    expected = "expected names: [cat, dog], or 0: cat and 1: dog below names:"
    if isinstance(names, dict):
        indices = sorted(names, key=lambda x: (isinstance(x, str), x))
        if indices != list(range(len(names))):
            raise UserError(f"{path}: names has the indices {shortened(indices)}; {expected}")
        names = [names[i] for i in indices]
    if not isinstance(names, list) or not names:
        raise UserError(f"{path}: names is {shortened(names)}; {expected}")
    wrong = [x for x in names if type(x) not in (str, int, float) or not str(x).strip()]
    if wrong:
        raise UserError(
            f"{path}: names has {shortened(wrong[0])}, which is no text; put it in quotes"
        )
    names = [str(name) for name in names]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(f"{path}: names has '{shortened(twice[0])}' twice; rename one")
    if keys.get("nc") not in (None, len(names)):
        raise UserError(f"{path}: nc is {shortened(keys['nc'])}, but names has {len(names)}")
    return names


def visit(location: Location, inputs: Inputs) -> Iterator[Item]:
    """The pictures of the split, or of all, with their labels.

    Raises:
        UserError: data.yaml has no such split, or what it names has no pictures.
    """
    path = _yaml(location)
    inputs.read(path)
    keys = read_yaml(path, numbered=True)
    root = path.parent
    names = [location.split] if location.split else splits(location)
    seen = set()
    for name in names:
        found = [keys[x] for x in ALIASES.get(name, (name,)) if keys.get(x)]
        if not found:
            there = ", ".join(splits(location)) or "no split"
            raise UserError(
                f"{path} has no split '{name}'; found {there}"
                + ("" if location.val else "; add &val=0.2 to hold out a part as val")
            )
        places = found[0] if isinstance(found[0], list) else [found[0]]
        for place in places:
            where = f"{path}: {name}"
            if not isinstance(place, str):
                raise UserError(
                    f"{where} is {shortened(place)}; expected a folder or a list of pictures"
                )
            for picture in _pictures(
                _resolve(root, keys.get("path"), place, where, inputs), inputs
            ):
                if picture not in seen:
                    seen.add(picture)
                    yield _item(picture, root, inputs)
    if not seen:
        raise UserError(f"'{location.uri}': there are no pictures in what {path} names")


def _resolve(root: Path, base: object, place: str, where: str, inputs: Inputs) -> Path:
    """Where a place of data.yaml is; `base` is its `path`."""
    if base is not None and not isinstance(base, str):
        raise UserError(f"{where}: path is {shortened(base)}; expected a folder")
    joined = os.path.join(base or "", place)
    expect_path(joined, where)
    # Exporters write ../train/images for what lies beside data.yaml.
    inside = [
        x
        for x in (joined, place, place.removeprefix("../"))
        if not leads_outside(x) and os.path.exists(root / x)
    ]
    if inside:
        return root / inside[0]
    inputs.refuse_outside(joined, where)
    found = root / joined
    if not os.path.exists(found):
        raise UserError(f"{where} names '{shortened(found, RECORD)}', which does not exist")
    return found


def _pictures(place: Path, inputs: Inputs) -> Iterator[Path]:
    """The pictures in a folder and those below it, or in a list."""
    if os.path.isfile(place):
        for line in inputs.lines(place):
            inputs.refuse_outside(line, f"'{place}'")
            yield Path(os.path.normpath(place.parent / line))
        return
    for name in inputs.names(place, SUFFIXES):
        yield place / name
    try:
        folders = sorted(x for x in place.iterdir() if x.is_dir() and not x.is_symlink())
    except OSError as error:
        raise UserError(f"can't read the folder '{place}': {error.strerror}") from error
    for below in folders:
        yield from _pictures(below, inputs)


def _item(picture: Path, root: Path, inputs: Inputs) -> Item:
    parts = list(picture.with_suffix(".txt").parts)
    for i in range(len(parts) - 2, -1, -1):  # the last folder of that name, as everybody does
        if parts[i] == "images":
            parts[i] = "labels"
            break
    label = Path(*parts)
    inputs.stat(picture)
    content = inputs.read(label) if os.path.isfile(label) else None
    if content is None:
        inputs.stat(label)
    return Item(picture, _below(picture, root), _below(label, root), content)


def _below(path: Path, root: Path) -> str:
    """From the folder of data.yaml, or as an absolute path where it lies outside."""
    if path.is_relative_to(root):
        return path.relative_to(root).as_posix()
    return path.absolute().as_posix()


def add(item: Item, location: Location, reading: Reading) -> None:
    """Add a picture and the boxes of its labels."""
    try:
        lines = [] if item.content is None else decoded(item.content, item.source).split("\n")
    except UserError as error:
        text = "label files can't be read"
        reading.fault("file-unreadable", "error", text, str(error))
        return
    records = [(i, x) for i, x in enumerate(map(str.split, lines), start=1) if x]
    try:
        width, height = picture_size(item.picture)
    except UserError as error:
        text = "pictures can't be opened, and without their size their labels have no pixels"
        reading.fault("picture-broken", "error", text, f"{item.source}: {error}")
        reading.unread += len(records)
        return
    boxes = reading.add_image(item.file_name, width, height, item.source)
    for line, fields in records:
        record = f"{item.source}, line {line}"
        _add_line(fields, record, (width, height), _yaml(location).name, reading, boxes)


def _add_line(
    fields: list[str],
    record: str,
    size: tuple[int, int],
    yaml: str,
    reading: Reading,
    boxes: list[dict],
) -> None:
    assert reading.classes is not None
    width, height = size
    if len(fields) != 5 and (len(fields) < 7 or len(fields) % 2 == 0):
        text = (
            "lines are neither a box, class cx cy w h, nor a polygon, class x0 y0 x1 y1 x2 y2 ..."
        )
        reading.fault("line", "error", text, f"{record}: {len(fields)} values", True)
        return
    try:
        index, *values = map(number, fields)
    except (ValueError, OverflowError) as error:
        text = "lines have a value that is no number"
        reading.fault("box-type", "error", text, f"{record}: {shortened(error)}", True)
        return
    if index not in range(len(reading.classes)):
        last = len(reading.classes) - 1
        text = f"lines have a class that names in {yaml} does not have; expected 0 to {last}"
        reading.fault("class-undeclared", "error", text, f"{record}: class {fields[0]}", True)
        return
    name = reading.classes[int(index)]
    if len(values) == 4:
        cx, cy, w, h = (x * side for x, side in zip(values, (width, height) * 2, strict=True))
        boxes.append(xywh_record(name, cx - w / 2, cy - h / 2, w, h, record))
        if max(values) > 2:
            text = "lines have values above 2; expected parts of the picture's sides, 0 to 1"
            reading.fault("box-in-pixels", "warning", text, record)
        return
    xs, ys = [x * width for x in values[::2]], [y * height for y in values[1::2]]
    x, y = min(xs), min(ys)
    boxes.append(xywh_record(name, x, y, max(xs) - x, max(ys) - y, record))
    reading.fault("polygon", "note", "lines are polygons; the box around each is taken", record)
