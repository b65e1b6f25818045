"""What `predict` is given: pictures, folders, patterns and videos, found and decoded."""

import glob
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
from PIL import Image
from PIL.ExifTags import Base
from PIL.Image import Transpose

from retina_focal.data.images import BadPicture, check_head
from retina_focal.errors import UserError

# Endings that are taken from a folder; a file that is named is tried whatever its ending.
PICTURES = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
VIDEOS = {".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm", ".wmv"}
REMEDY = "mend the file; the others are predicted"
# By EXIF's number of the orientation.
TURNS = {
    2: Transpose.FLIP_LEFT_RIGHT,
    3: Transpose.ROTATE_180,
    4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270,
    7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_90,
}


@dataclass(frozen=True)
class Input:
    """A file that is predicted."""

    path: Path
    name: str  # of its outputs: a relative path without ending, which no other input has

    @property
    def is_video(self) -> bool:
        return self.path.suffix.lower() in VIDEOS


def find_inputs(texts: Sequence[str], leave_out: Path | None = None) -> list[Input]:
    """The files that arguments name, in their order, each once; those of a folder by name.

    Args:
        texts: files, folders, which are searched to any depth, and patterns such as "day*/*.jpg".
        leave_out: a folder whose files are not taken from other folders: of earlier outputs.
    Raises:
        UserError: nothing has such a name, or a folder or pattern has no picture.
    """
    excluded = leave_out.resolve() if leave_out else None
    inputs: dict[Path, Input] = {}
    names: set[str] = set()
    for text in texts:
        found = [
            (path, name)
            for path, name in _files_of(text)
            if excluded is None or excluded not in path.resolve().parents
        ]
        if not found:
            raise UserError(
                f"'{text}' holds no picture and no video; expected files that end in "
                f"{', '.join(sorted(PICTURES | VIDEOS))}"
            )
        for path, name in found:
            if path not in inputs:
                inputs[path] = Input(path, _unused(names, name))
    return list(inputs.values())


def _files_of(text: str) -> list[tuple[Path, str]]:
    """(file, path from the folder that was named) of one argument."""
    if os.path.isdir(text):
        return _files_in(Path(text))
    if os.path.exists(text):
        return [(Path(text), Path(text).name)]
    if not glob.has_magic(text):
        raise UserError(
            f"'{text}' does not exist (relative paths start from {os.getcwd()}); expected a "
            "picture, a video, a folder of them, or a pattern in quotes"
        )
    matches = [Path(x) for x in sorted(glob.glob(text, recursive=True))]
    return [(x, x.name) for x in matches if x.is_file() and _is_known(x.name)]


def _files_in(folder: Path) -> list[tuple[Path, str]]:
    found = []
    for root, folders, files in os.walk(folder):
        folders[:] = sorted(x for x in folders if not x.startswith("."))
        paths = [Path(root, x) for x in sorted(files) if _is_known(x)]
        found += [(x, x.relative_to(folder).as_posix()) for x in paths]
    return found


def _is_known(name: str) -> bool:
    return not name.startswith(".") and Path(name).suffix.lower() in PICTURES | VIDEOS


def _unused(names: set[str], name: str) -> str:
    """The name without its ending, or with it, or with a number: the first that is not taken."""
    stem, ending = os.path.splitext(name)
    candidates = [stem, f"{stem}_{ending.lstrip('.')}"]
    number = 1
    while candidates[0] in names:
        number += 1
        candidates = [*candidates[1:], f"{stem}_{number}"]
    names.add(candidates[0])
    return candidates[0]


def read_picture(path: Path, max_pixels: int) -> Image.Image:
    """A picture in RGB, turned by its EXIF orientation: what detectron2's `read_image` gives.

    As Pillow's image: parts of it can be resized without a copy of the whole.

    Raises:
        BadPicture: it can't be decoded, or has too many pixels.
    """
    try:
        check_head(str(path), max_pixels)
        with Image.open(path) as file:
            image = file if file.mode == "RGB" else file.convert("RGB")
            image.load()
            turn = TURNS.get(_orientation(file))
            return image if turn is None else image.transpose(turn)
    except BadPicture as error:
        raise bad_picture(path, error.reason) from error
    except Exception as error:  # Pillow may raise anything
        reason = str(error).strip() or type(error).__name__
        raise bad_picture(path, f"it can't be decoded: {reason}") from error


def _orientation(image: Image.Image) -> int | None:
    try:
        return image.getexif().get(Base.Orientation)
    except Exception:  # Pillow may raise anything of EXIF; detectron2 turns nothing then, either
        return None


def read_frames(path: Path, every: int) -> Iterator[tuple[int, Image.Image]]:
    """(number from 0, RGB picture) of every `every`-th frame of a video.

    Raises:
        BadPicture: OpenCV can't read a frame of it.
    """
    video = cv2.VideoCapture(str(path))
    try:
        number = 0
        while video.grab():
            if number % every == 0:
                decoded, frame = video.retrieve()
                if decoded:
                    yield number, Image.fromarray(cv2.cvtColor(frame, cv2.COLOR_BGR2RGB))
            number += 1
        if not number:
            raise bad_picture(path, "OpenCV can read no frame of it")
    finally:
        video.release()


def bad_picture(path: Path, reason: str) -> BadPicture:
    """What `predict` says of a picture or a video."""
    return BadPicture(f"'{path}' can't be used: {reason}; {REMEDY}", str(path), reason=reason)
