"""Pictures of a dataset: what can't be read, or would reach the network changed, is named.

detectron2 reads a picture through Pillow as 8 bits per channel: the first frame, turned by its EXIF
orientation, without transparency; CMYK, palettes and 16-bit colour are converted rightly.
"""

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from traceback import walk_tb

from detectron2.data.detection_utils import SizeMismatchError
from detectron2.utils.file_io import PathManager
from detectron2.utils.logger import log_first_n
from PIL import Image
from PIL.ExifTags import Base

from retina_focal.data.findings import RECORD, shortened
from retina_focal.errors import UserError
from retina_focal.files import open_regular

MAX_PIXELS = 50_000_000  # as DATA.MAX_PIXELS
# Pillow cuts these off at 255, so that they would be white.
WIDE_MODES = ("I", "F")
# Pillow has another program run PostScript, whose head alone it may read for a minute.
POSTSCRIPT = (b"%!PS", b"\xc5\xd0\xd3\xc6")
REMEDY = "mend the file, or take the image out of the dataset's annotations"

logger = logging.getLogger(__name__)


class BadPicture(UserError):
    """A picture that can't be used, which a training may skip; `file_name` is as in its record.

    `kind` is the kind of its finding in `check`, and `reason` the text there.
    """

    def __init__(self, message: str, file_name: str = "", kind: str = "", reason: str = ""):
        # torch makes it anew from its message alone where it comes from a worker.
        super().__init__(message)
        self.file_name, self.kind, self.reason = file_name, kind, reason

    def __reduce__(self) -> tuple:
        return type(self), (str(self), self.file_name, self.kind, self.reason)


def naming(mapper: Callable[[dict], dict], max_pixels: int = MAX_PIXELS) -> Callable[[dict], dict]:
    """A mapper that checks a picture before `mapper` decodes it; see `map_record`."""
    return partial(map_record, mapper, max_pixels=max_pixels)


def map_record(
    mapper: Callable[[dict], dict], record: dict, max_pixels: int = MAX_PIXELS
) -> dict | None:
    """What `mapper`, such as `DatasetMapper`, makes of a record of a dataset.

    Args:
        max_pixels: of the largest picture that is decoded.
    Raises:
        BadPicture: the picture is missing, can't be decoded, has too many pixels or another size
            than the record says, or would reach the network changed.
    """
    name = record.get("file_name")
    if name is None:  # the mapper takes its picture from elsewhere
        return mapper(record)
    check_head(name, max_pixels)
    try:
        return mapper(record)
    except SizeMismatchError as error:
        reason = f"its width x height is not {record['width']} x {record['height']} as annotated"
        if _is_turned(name):
            reason += (
                ", once it is turned by its EXIF orientation, as detectron2 does; where the boxes "
                "fit the picture as it is stored, delete that tag: exiftool -Orientation= FILE"
            )
        raise _bad(name, "picture-size", reason) from error
    except Exception as error:
        frames = {frame.f_code.co_name for frame, _ in walk_tb(error.__traceback__)}
        if isinstance(error, UserError):
            raise
        if isinstance(error, OSError) or "read_image" in frames:  # Pillow may raise anything
            reason = str(error).strip() or type(error).__name__
            raise _bad(name, "picture-broken", f"it can't be decoded: {reason}") from error
        name, image_id = shortened(name, RECORD), record.get("image_id")
        logger.error("the mapper failed at image '%s' (id %s)", name, image_id)
        raise


def check_head(name: str, max_pixels: int) -> None:
    """Refuse what must not be decoded (BadPicture), by the first bytes of the file."""
    fault = None
    try:
        path = PathManager.get_local_path(name)
        if is_postscript(path):
            reason = "it is PostScript, a program that would be run; convert it to PNG"
            raise _bad(name, "picture-program", reason)
        with Image.open(path) as image:
            fault = _fault(image, max_pixels)
            if image.format == "PNG" and not fault:
                # By its checksums: detectron2 looks for EXIF in a way that decodes a PNG, swallows
                # the error, and goes on with what was decoded till then.
                image.verify()
    except BadPicture:
        raise
    except UserError as error:
        raise _bad(name, "picture-missing", str(error)) from error
    except Image.DecompressionBombError as error:
        reason = f"{error}; DATA.MAX_PIXELS is {max_pixels}"
        raise _bad(name, "picture-too-large", reason) from error
    except Exception as error:  # Pillow may raise anything
        reason = "it is empty" if _is_empty(name) else f"it is no whole picture: {error}"
        raise _bad(name, "picture-broken", reason) from error
    if fault:
        raise _bad(name, *fault)


def _fault(image: Image.Image, max_pixels: int) -> tuple[str, str] | None:
    """The kind of the finding, and the reason."""
    width, height = image.size
    if width * height > max_pixels:
        return "picture-too-large", (
            f"it has {width} x {height} pixels, more than MODEL.RETINA_FOCAL.DATA.MAX_PIXELS "
            f"{max_pixels}; cut it into tiles, or raise that key"
        )
    if image.mode.partition(";")[0] in WIDE_MODES:
        return "picture-wide", (
            f"its pixels have more than 8 bits (Pillow's mode {image.mode}) and would be cut off "
            "at 255, white; scale them to 8 bits"
        )
    if image.format != "MPO" and getattr(image, "n_frames", 1) > 1:  # MPO: a camera's previews
        name = shortened(image.filename, RECORD)
        text = f"image '{name}' has {image.n_frames} frames; of such, the first is used"
        log_first_n(logging.WARNING, text, name=__name__)
    return None


def is_postscript(path: str | Path) -> bool:
    """By the first bytes of a regular file (UserError: it is none)."""
    with open_regular(path) as file:
        return file.read(4) in POSTSCRIPT


def _is_turned(name: str) -> bool:
    """Whether EXIF swaps width and height."""
    with Image.open(PathManager.get_local_path(name)) as image:
        return image.getexif().get(Base.Orientation) in (5, 6, 7, 8)


def _is_empty(name: str) -> bool:
    try:
        with PathManager.open(name, "rb") as file:
            return not file.read(1)
    except OSError:
        return False


def _bad(name: str, kind: str, reason: str) -> BadPicture:
    reason = shortened(reason, 2 * RECORD)
    message = f"image '{shortened(name, RECORD)}' can't be used: {reason}; {REMEDY}"
    return BadPicture(message, name, kind, reason)
