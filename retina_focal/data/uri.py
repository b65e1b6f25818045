"""Where a dataset is and how it is read, in one text: ``voc:FOLDER?split=train&classes=A,B``."""

import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

from retina_focal.errors import UserError
from retina_focal.files import open_regular

DIFFICULT = ("keep", "ignore", "drop")
DATA_YAML = ("data.yaml", "data.yml", "dataset.yaml")
COCO_NAMES = ("_annotations.coco.json", "annotations.json", "instances.json", "ann.json")
MAX_CLASSES = 1_000_000  # bytes of a file of names
EXAMPLES = {
    "voc": "voc:FOLDER?split=train",
    "yolo": "yolo:data.yaml?split=train",
    "csv": "csv:boxes.csv?images=FOLDER",
    "coco": "coco:train.json?images=FOLDER",
}


def _part(text: str) -> float:
    value = float(text)
    if not 0 < value < 1:
        raise ValueError
    return value


def _offset(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError
    return value


def _seed(text: str) -> int:
    if not text.isdecimal():
        raise ValueError
    return int(text)


def _classes(text: str) -> tuple[str, ...]:
    """Names with commas between them, or those of a file."""
    if text.startswith("@"):
        names = _names_in(Path(unquote(text[1:])).expanduser())
    else:
        names = tuple(unquote(name) for name in text.split(","))
    if not names or not all(map(str.strip, names)) or len(set(names)) < len(names):
        raise ValueError
    return names


def _names_in(path: Path) -> tuple[str, ...]:
    """A name a line, in this order; or keras-retinanet's `name,number`, by numbers from 0."""
    with open_regular(path) as file:
        content = file.read(MAX_CLASSES + 1)
    if len(content) > MAX_CLASSES:
        raise UserError(f"'{path}' has more than {MAX_CLASSES:,} bytes")
    lines = map(str.strip, content.decode("utf-8-sig").splitlines())
    names = [line for line in lines if line]
    rows = [name.rpartition(",") for name in names]
    numbers = [int(x) if x.strip().isdecimal() else -1 for *_, x in rows]
    if sorted(numbers) == list(range(len(names))):
        names = [rows[numbers.index(i)][0].strip() for i in range(len(names))]
    return tuple(names)


def _text(text: str) -> str:
    if not text or "\0" in text:
        raise ValueError
    return text


def _difficult(text: str) -> str:
    if text not in DIFFICULT:
        raise ValueError
    return text


# What each option is, of which formats, and how its value is written.
OPTIONS: dict[str, tuple[Callable[[str], object], tuple[str, ...], str]] = {
    "split": (_text, ("voc", "yolo", "csv", "coco"), "train, val, ..."),
    "classes": (
        _classes,
        ("voc", "csv"),
        "A,B,C, each once (%2C for a comma in a name), or @FILE with a name a line",
    ),
    "images": (_text, ("voc", "csv", "coco"), "the folder of the pictures"),
    "val": (_part, ("voc", "yolo", "csv", "coco"), "the part that is held out, such as 0.2"),
    "seed": (_seed, ("voc", "yolo", "csv", "coco"), "a whole number from 0"),
    "offset": (_offset, ("voc",), "pixels to take from xmin and ymin, such as 1"),
    "difficult": (_difficult, ("voc",), ", ".join(DIFFICULT)),
}


@dataclass(frozen=True)
class Location:
    """A parsed URI: the options have their defaults."""

    uri: str  # as it was typed
    format: str  # a key of EXAMPLES
    path: Path
    split: str = ""  # "": all
    classes: tuple[str, ...] | None = None  # None: those that are found
    images: Path | None = None  # None: where the format has them
    val: float | None = None  # None: the splits are those of the dataset
    seed: int = 0
    offset: float = 0  # px
    difficult: str = "keep"
    # Whether what the files name may lie outside of their folder; no URI says so.
    allow_outside: bool = False


def has_scheme(data: str) -> bool:
    """Whether it is a URI of a dataset, not a name or a path."""
    scheme, colon, _ = data.partition(":")
    return bool(colon) and scheme in EXAMPLES


def options_of(scheme: str) -> list[str]:
    """Names of the options that a format has."""
    return [name for name, (_, formats, _) in OPTIONS.items() if scheme in formats]


def with_whole_rows(argv: Sequence[str] | None) -> list[str]:
    """A command line in which `--dataset NAME URI` has the third value that argparse expects."""
    argv = list(sys.argv[1:] if argv is None else argv)
    for i in reversed(range(len(argv) - 2)):
        if argv[i] == "--dataset" and has_scheme(argv[i + 2]):
            argv.insert(i + 3, "")
    return argv


def parse(data: str) -> Location:
    """A URI, or a bare path, whose format is seen from what lies there.

    Raises:
        UserError: the path is not there or of no known format; an option is unknown, there twice,
            or has a value of another kind.
    """
    scheme, rest = "", data
    if has_scheme(data):
        scheme, _, rest = data.partition(":")
    path, options = rest, ""
    if "?" in rest and not os.path.exists(rest):
        path, _, options = rest.rpartition("?")
    expected = f"expected for example {EXAMPLES.get(scheme, ', '.join(EXAMPLES.values()))}"
    if not path or "\0" in path:
        raise UserError(f"{data!r} names no path; {expected}")
    found = Path(path).expanduser()
    if not os.path.exists(found):
        raise UserError(
            f"'{data}': '{path}' does not exist (relative paths start from {Path.cwd()}); "
            f"{expected}"
        )
    if not scheme:
        scheme, found = _recognise(found)
    return Location(data, scheme, found, **_options(data, scheme, options))


def _options(data: str, scheme: str, text: str) -> dict[str, object]:
    allowed = options_of(scheme)
    values: dict[str, object] = {}
    for pair in filter(None, text.split("&")):
        name, _, value = pair.partition("=")
        if name not in allowed:
            raise UserError(
                f"'{data}': {scheme} has no option '{name}'; expected {', '.join(allowed)}"
            )
        if name in values:
            raise UserError(f"'{data}': '{name}' is there twice")
        read, _, expected = OPTIONS[name]
        try:
            # A comma in a class's name is written %2C, so the list is split before it is decoded.
            values[name] = read(value if name == "classes" else unquote(value))
        except UserError as error:
            raise UserError(f"'{data}': {name} is '{value}', but {error}") from error
        except ValueError as error:
            raise UserError(f"'{data}': {name} is '{value}'; expected {expected}") from error
    if "val" in values and values.get("split") not in ("train", "val"):
        raise UserError(
            f"'{data}': val={values['val']:g} divides a dataset; add &split=train for the one part "
            "and &split=val for the other"
        )
    if "seed" in values and "val" not in values:
        raise UserError(f"'{data}': seed belongs to val, the part that is held out; add &val=0.2")
    if "images" in values:
        values["images"] = Path(values["images"]).expanduser()
        if not os.path.isdir(values["images"]):
            raise UserError(
                f"'{data}': the image folder '{values['images']}' does not exist (relative paths "
                f"start from {Path.cwd()})"
            )
    return values


def _recognise(path: Path) -> tuple[str, Path]:
    """The format of what lies at a bare path, and the path that the format starts from."""
    by_suffix = {".json": "coco", ".yaml": "yolo", ".yml": "yolo", ".csv": "csv"}
    if not path.is_dir():
        if path.suffix.lower() not in by_suffix:
            raise UserError(
                f"'{path}' is no dataset that is known by its name; expected a folder, or one of "
                f"{', '.join(by_suffix)}"
            )
        return by_suffix[path.suffix.lower()], path
    if (path / "Annotations").is_dir():
        return "voc", path
    for name in DATA_YAML:
        if (path / name).is_file():
            return "yolo", path / name
    json_files, csv_files = sorted(path.glob("*.json")), sorted(path.glob("*.csv"))
    named = [x for x in json_files if x.name in COCO_NAMES]
    if len(named or json_files) == 1:
        return "coco", (named or json_files)[0]
    if len(csv_files) == 1 and not json_files:
        return "csv", csv_files[0]
    if any(path.glob("*.xml")) or any(path.glob("*/*.xml")):
        return "voc", path
    several = [x.name for x in (*json_files, *csv_files)][:5]
    raise UserError(
        f"'{path}' has no dataset that is known by its files"
        + (f", or several: {', '.join(several)}; name one" if several else "")
        + f"; expected Annotations/ with XML (VOC), {DATA_YAML[0]} (YOLO), one .json (COCO) or one "
        f".csv; or say what it is, for example {json.dumps(EXAMPLES['voc'])}"
    )
