"""Every picture of a dataset looked at on all cores: can it be used, and which others is it like?

Pillow gives up Python's lock while it decodes, so threads keep the cores busy. A JPEG is decoded at
an eighth of its size: that takes a third of the time, and still reads all bytes, so that truncated
files are found.
"""

import hashlib
import os
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
from detectron2.utils.file_io import PathManager
from PIL import Image
from PIL.ExifTags import Base
from tqdm import tqdm

from retina_focal.data.duplicates import HEIGHT, WIDTH
from retina_focal.data.images import MAX_PIXELS, BadPicture, check_head
from retina_focal.files import open_regular

CHUNK = 1 << 20  # bytes
LARGE = 8_000_000  # pixels; larger ones are decoded one at a time, for the memory
_ONE_LARGE = threading.Lock()


@dataclass(frozen=True)
class Look:
    """What is found in one picture's file."""

    kind: str = ""  # of the finding that it makes; "": it can be used
    reason: str = ""
    size: tuple[int, int] = (0, 0)  # width and height in px, turned as EXIF says
    is_turned: bool = False  # by EXIF, on its side
    num_frames: int = 1
    digest: bytes = b""  # SHA-256 of the file
    thumbnail: bytes = b""  # HEIGHT x WIDTH grey values

    def with_fault(self, kind: str, reason: str) -> "Look":
        return replace(self, kind=kind, reason=reason)


class Interrupted(KeyboardInterrupt):
    """Ctrl-C while pictures are looked at; `looks` are those of the first ones."""

    def __init__(self, looks: list[Look]):
        super().__init__()
        self.looks = looks


def look_at_all(
    paths: Sequence[str], max_pixels: int = MAX_PIXELS, what: str = "pictures"
) -> list[Look]:
    """Look at picture files, with a progress bar.

    Args:
        max_pixels: of the largest that is decoded.
        what: the word before the bar.
    Raises:
        Interrupted: by Ctrl-C, with what is done.
    """
    done: list[Look] = []
    workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    with ThreadPoolExecutor(workers) as pool:
        looks = pool.map(lambda path: look_at(path, max_pixels), paths)
        try:
            for look in tqdm(looks, what, len(paths), disable=None, leave=False, unit=""):
                done.append(look)
        except KeyboardInterrupt as error:
            pool.shutdown(wait=False, cancel_futures=True)
            raise Interrupted(done) from error
    return done


def look_at(path: str, max_pixels: int = MAX_PIXELS) -> Look:
    """Look at one file; nothing that is in it raises."""
    look = Look()
    try:
        check_head(path, max_pixels)
        local = PathManager.get_local_path(path)
        look = replace(look, digest=_digest(local))
        with Image.open(local) as image:
            turned = image.getexif().get(Base.Orientation) in (5, 6, 7, 8)
            size = image.size[::-1] if turned else image.size
            frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
            look = replace(look, size=size, is_turned=turned, num_frames=frames)
            return replace(look, thumbnail=_thumbnail(image))
    except BadPicture as error:
        return look.with_fault(error.kind, error.reason)
    except Exception as error:  # Pillow may raise anything
        reason = f"it can't be decoded: {str(error).strip() or type(error).__name__}"
        return look.with_fault("picture-broken", reason)


def _digest(path: str) -> bytes:
    digest = hashlib.sha256()
    with open_regular(path) as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.digest()


def _thumbnail(image: Image.Image) -> bytes:
    """(HEIGHT, WIDTH) grey values; decodes all of the picture."""
    if image.width * image.height > LARGE:
        with _ONE_LARGE:
            return _decode(image)
    return _decode(image)


def _decode(image: Image.Image) -> bytes:
    image.draft("L", (4 * WIDTH, 4 * HEIGHT))  # does nothing where it is no JPEG
    return image.convert("L").resize((WIDTH, HEIGHT), Image.Resampling.BOX).tobytes()


def thumbnails(looks: Sequence[Look]) -> np.ndarray:
    """(n, HEIGHT, WIDTH) of uint8, of pictures that can be used."""
    joined = b"".join(look.thumbnail for look in looks)
    return np.frombuffer(joined, np.uint8).reshape(-1, HEIGHT, WIDTH)
