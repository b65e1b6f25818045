"""CSV: a row per box, with the header `image_path,xmin,ymin,xmax,ymax,label`, or keras-retinanet's
`path,x1,y1,x2,y2,class` without one. A row with a picture alone is one without boxes."""

import csv
import io
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from retina_focal.data.findings import shortened
from retina_focal.data.readers.base import (
    MAX_LIST,
    MAX_NAME,
    Inputs,
    Reading,
    box_record,
    folder_of,
    number,
    picture_size,
)
from retina_focal.data.uri import Location
from retina_focal.errors import UserError
from retina_focal.files import decoded, leads_outside

VERSION = 2  # of the rules of this reader
MAX_ROWS = 2_000_000  # about 1 GB while they are read
FIELDS = ("image_path", "xmin", "ymin", "xmax", "ymax", "label")
# Names that exporters give the same columns.
ALIASES = {"filename": "image_path", "image": "image_path", "path": "image_path", "class": "label"}


@dataclass(frozen=True)
class Item:
    """The rows of one picture: (line, its fields), or a row that can't be read."""

    file_name: str  # from the image folder
    path: Path
    rows: list[tuple[int, list[str]]]


def splits(location: Location) -> list[str]:
    """None: a file is one split."""
    return []


def image_root(location: Location) -> Path:
    """The folder that file names start from; default: that of the file, or images/ beside it."""
    if location.images:
        return location.images
    first = next(_rows(location.path, Inputs()), None)
    return folder_of(location.path, _name(first[1][0], location.path.parent) if first else None)


def visit(location: Location, inputs: Inputs) -> Iterator[Item]:
    """The pictures with their rows, in the order of their first row.

    Raises:
        UserError: the file is no CSV of these columns, or has no row.
    """
    if location.split and not location.val:
        raise UserError(
            f"'{location.uri}': a CSV has no splits; name a file for each, or add &val=0.2"
        )
    root = image_root(location)
    by_name: dict[str, list[tuple[int, list[str]]]] = {}
    for count, (line, fields) in enumerate(_rows(location.path, inputs)):
        if count >= MAX_ROWS:
            raise UserError(
                f"'{location.path}' has more than {MAX_ROWS:,} rows; write COCO format instead"
            )
        by_name.setdefault(_name(fields[0], root), []).append((line, fields[1:]))
    if not by_name:
        raise UserError(f"'{location.path}' has no rows; expected {','.join(FIELDS)}")
    for name, rows in by_name.items():
        path = root / name if "\0" not in name else root
        if not leads_outside(name) or inputs.allow_outside:
            inputs.stat(path)
        yield Item(name, path, rows)


def _name(text: str, root: Path) -> str:
    """A picture's path from the image folder; absolute where it lies elsewhere."""
    name = text.strip().replace("\\", "/")
    if os.path.isabs(name) and ".." not in name.split("/"):
        for folder in (root, root.absolute(), root.resolve()):
            if Path(name).is_relative_to(folder):
                return Path(name).relative_to(folder).as_posix()
    return name


def _rows(path: Path, inputs: Inputs) -> Iterator[tuple[int, list[str]]]:
    """(line, [picture, xmin, ymin, xmax, ymax, label]); fewer or more where a row is wrong."""
    rows = csv.reader(io.StringIO(decoded(inputs.read(path, MAX_LIST), path), newline=""))
    order, width = None, 0
    try:
        for fields in rows:
            if not any(x.strip() for x in fields):
                continue
            if order is None:
                order, width = _columns(fields, path), len(fields)
                if order:
                    continue
            if order and len(fields) > 1:
                fields = _in_order(fields, order, width)
            yield rows.line_num, fields
    except csv.Error as error:
        raise UserError(f"'{path}', line {rows.line_num}: {error}") from error


def _in_order(fields: list[str], order: list[int], width: int) -> list[str]:
    """A row's `FIELDS`; its picture and all the rest as one where it has more or fewer values."""
    if len(fields) > max(order) and not any(x.strip() for x in fields[width:]):
        return [fields[i] for i in order]
    picture = fields.pop(order[0]) if order[0] < len(fields) else ""
    return [picture, "".join(fields)]


def _columns(fields: list[str], path: Path) -> list[int]:
    """Where `FIELDS` stand in a header; empty where the first row is none."""
    names = [ALIASES.get(x.strip().lower(), x.strip().lower()) for x in fields]
    if all(name in names for name in FIELDS):
        twice = [name for name in FIELDS if names.count(name) > 1]
        if twice:
            raise UserError(
                f"'{path}', line 1: of the columns {shortened(','.join(fields))} several are "
                f"{twice[0]}; delete all but one"
            )
        return [names.index(name) for name in FIELDS]
    if len(fields) == len(FIELDS) and not {*FIELDS} & {*names}:
        return []
    raise UserError(
        f"'{path}', line 1: the columns are {shortened(','.join(fields))}; expected the header "
        f"{','.join(FIELDS)}, or rows path,x1,y1,x2,y2,class without a header"
    )


def add(item: Item, location: Location, reading: Reading) -> None:
    """Add a picture and the boxes of its rows."""
    source = location.path.name
    if not item.file_name or len(item.file_name) > MAX_NAME:
        for line, _ in item.rows:
            text = "rows name no picture"
            record = f"{source}, line {line}: {shortened(item.file_name)}"
            reading.fault("file_name", "error", text, record, True)
        return
    outside = leads_outside(item.file_name)
    try:
        # What may not be read is refused by its name alone, whatever size it has.
        size = (1, 1) if outside and not location.allow_outside else picture_size(item.path)
    except UserError as error:
        text = "pictures can't be opened, so that their size is not known"
        record = f"{source}, line {item.rows[0][0]}: {error}"
        reading.fault("picture-broken", "error", text, record)
        reading.unread += sum(not _is_background(fields) for _, fields in item.rows)
        return
    boxes = reading.add_image(item.file_name, *size, f"{source}, line {item.rows[0][0]}")
    for line, fields in item.rows:
        if not _is_background(fields):
            _add_row(fields, f"{source}, line {line}", reading, boxes)


def _is_background(fields: list[str]) -> bool:
    return not any(x.strip() for x in fields)


def _add_row(fields: list[str], record: str, reading: Reading, boxes: list[dict]) -> None:
    if len(fields) != len(FIELDS) - 1 or not all(x.strip() for x in fields):
        text = (
            f"rows are not {','.join(FIELDS)}; a picture without boxes has all but the first empty"
        )
        reading.fault("row", "error", text, record, True)
        return
    *corners, label = fields
    try:
        x0, y0, x1, y1 = map(number, corners)
    except (ValueError, OverflowError) as error:
        text = "rows have a corner that is no number; expected pixels"
        reading.fault("box-type", "error", text, f"{record}: {shortened(error)}", True)
        return
    name = label.strip()
    if reading.classes is not None and name not in reading.classes:
        text = f"rows are of a class that classes={','.join(reading.classes)} does not name; add it"
        reading.fault("class-undeclared", "error", text, f"{record}: {shortened(name)}", True)
        return
    reading.met.add(name)
    boxes.append(box_record(name, x0, y0, x1, y1, record))
