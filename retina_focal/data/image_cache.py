"""The pictures of a training kept in memory, by ``MODEL.RETINA_FOCAL.TRAIN.CACHE_IMAGES``.

Each is read and decoded once, by whichever process comes to it first, into one block of memory that
the workers of a data loader share, as they are forked. detectron2's mapper reads its picture from
there as from any other place: through its `PathManager`.
"""

import io
import logging
import mmap
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from threading import get_ident

import numpy as np
from detectron2.data.detection_utils import _apply_exif_orientation
from detectron2.utils import comm
from detectron2.utils.file_io import PathHandler, PathManager
from PIL import Image

from retina_focal.data.images import MAX_PIXELS, check_head, naming
from retina_focal.errors import UserError

SHARE = 0.5  # of the memory that is free: the training itself needs the rest
HEADER = 32  # bytes of a PNM file before its pixels, at most
PREFIX = "retina-focal-cached://"
EMPTY, UNUSABLE = 0, -1  # in place of a picture's number of bytes
GB = 1e9
# Most and used bytes of a container: cgroups of version 2 and 1.
CGROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    (
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes",
    ),
)

logger = logging.getLogger(__name__)


class ImageCache:
    """Files of pictures in a block of memory: decoded, as PNM, or as they lie on the disk."""

    def __init__(self, sizes: Sequence[int], budget: int, is_decoded: bool):
        """
        Args:
            sizes: bytes of each picture at most; those behind the budget are not kept.
            budget: bytes of all of them.
            is_decoded: pictures are kept as pixels, which need no decoding again.
        """
        ends = np.cumsum(np.asarray(sizes, np.int64))
        self.num_kept = int((ends <= budget).sum())
        self.starts = np.concatenate([[0], ends])[: self.num_kept + 1]
        self.is_decoded = is_decoded
        # Anonymous and shared: a forked worker's writes are seen by the others, and memory that
        # nothing was written to takes no room.
        self.block = mmap.mmap(-1, max(1, int(self.starts[-1])))
        self._counts = mmap.mmap(-1, 8 * max(1, self.num_kept))
        self.lengths = np.frombuffer(self._counts, np.int64)

    def __reduce__(self) -> tuple:
        """In a process that is not forked nothing is kept: pictures are read from the disk."""
        return type(self), ((), 0, self.is_decoded)

    @property
    def num_bytes(self) -> int:
        """Of all pictures, once they are read."""
        return int(self.starts[-1])

    def get(self, index: int, record: dict, max_pixels: int) -> bytes | None:
        """A picture's file; None where it is to be read from the disk.

        Raises nothing: what is wrong with a picture is said where it is read from the disk.
        """
        if index >= self.num_kept:
            return None
        start = int(self.starts[index])
        if self.lengths[index] == EMPTY:
            try:
                content = self._read(record, max_pixels)
            except Exception:  # Pillow may raise anything
                content = None
            if content is None or len(content) > self.starts[index + 1] - start:
                self.lengths[index] = UNUSABLE
            else:
                self.block[start : start + len(content)] = content
                self.lengths[index] = len(content)  # last: others may read from now on
        length = int(self.lengths[index])
        return None if length == UNUSABLE else self.block[start : start + length]

    def _read(self, record: dict, max_pixels: int) -> bytes | None:
        """None for a picture of another size than the record says."""
        name = record["file_name"]
        check_head(name, max_pixels)
        with PathManager.open(name, "rb") as file:
            content = file.read()
        # As detectron2's `read_image`, up to where it converts to INPUT.FORMAT.
        image = _apply_exif_orientation(Image.open(io.BytesIO(content)))
        image.load()
        if image.size != (record.get("width", image.width), record.get("height", image.height)):
            return None
        if not self.is_decoded or image.mode not in ("L", "RGB"):
            return content  # PNM has no other modes: these are decoded each time
        kind = b"P6" if image.mode == "RGB" else b"P5"
        return b"%s %d %d 255\n" % (kind, *image.size) + image.tobytes()


class _Kept(PathHandler):
    """Opens what `CachedMapper` is about to read; its names begin with `PREFIX`."""

    def __init__(self) -> None:
        super().__init__()
        self.files: dict[str, bytes] = {}

    def _get_supported_prefixes(self) -> list[str]:
        return [PREFIX]

    def _open(self, path: str, mode: str = "r", buffering: int = -1, **options: object):
        return io.BytesIO(self.files[path])


KEPT = _Kept()


class CachedMapper:
    """What a mapper makes of a record, bit by bit, of pictures that are kept in memory."""

    def __init__(
        self,
        mapper: Callable[[dict], dict | None],
        cache: ImageCache,
        names: Sequence[str | None],
        max_pixels: int = MAX_PIXELS,
    ):
        """
        Args:
            mapper: reads "file_name" of a record through detectron2's `PathManager`.
            names: of the files, in the order of `cache`.
            max_pixels: of the largest picture that is decoded.
        """
        self.mapper, self.from_disk = mapper, naming(mapper, max_pixels)
        self.cache, self.max_pixels = cache, max_pixels
        self.places = {name: i for i, name in reversed([*enumerate(names)])}
        PathManager.register_handler(KEPT)

    def __call__(self, record: dict) -> dict | None:
        """
        Raises:
            BadPicture: see `images.map_record`.
        """
        name = record.get("file_name")
        index = self.places.get(name)
        kept = None if index is None else self.cache.get(index, record, self.max_pixels)
        if kept is None:
            return self.from_disk(record)
        path = f"{PREFIX}{get_ident()}"
        KEPT.files[path] = kept
        try:
            sample = self.mapper({**record, "file_name": path})
        except Exception:
            logger.error("the mapper failed at image '%s' (id %s)", name, record.get("image_id"))
            raise
        finally:
            del KEPT.files[path]
        if sample is not None and "file_name" in sample:
            sample["file_name"] = name
        return sample


def plan_cache(records: Sequence[dict]) -> ImageCache:
    """A cache for the pictures of a training: as pixels where all fit, else as files, else of some.

    Says in a line which, and how many.

    Args:
        records: in detectron2's format.
    Raises:
        UserError: the memory can't be had.
    """
    processes = comm.get_local_size()
    budget = int(free_memory() * SHARE / processes)
    pixels = [3 * x.get("width", 0) * x.get("height", 0) + HEADER for x in records]
    is_decoded = all("width" in x and "height" in x for x in records) and sum(pixels) <= budget
    sizes = pixels if is_decoded else [_file_size(x.get("file_name")) for x in records]
    try:
        cache = ImageCache(sizes, budget, is_decoded)
    except OSError as error:
        raise UserError(
            f"no memory for the pictures ({error.strerror}): {sum(sizes) / GB:.2f} GB; add: "
            "MODEL.RETINA_FOCAL.TRAIN.CACHE_IMAGES False"
        ) from error
    logger.info(
        "%d of %d pictures are kept in memory as %s once they are read: %.2f GB, of %.2f GB that "
        "are free%s (TRAIN.CACHE_IMAGES)",
        *(cache.num_kept, len(records), "pixels" if is_decoded else "files"),
        *(cache.num_bytes / GB, budget / SHARE * processes / GB),
        f", in each of {processes} processes" if processes > 1 else "",
    )
    return cache


def free_memory() -> int:
    """Bytes that may be taken: of the machine, or what is left to this container."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(1024 * int(x.split()[1]) for x in lines if x.startswith("MemAvailable:"))
    except (OSError, StopIteration):  # no Linux
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    for most, used in CGROUPS:
        try:
            free = min(free, int(Path(most).read_text()) - int(Path(used).read_text()))
        except (OSError, ValueError):  # not there, or "max"
            continue
    return max(free, 0)


def _file_size(name: str | None) -> int:
    """Bytes; 0 of what is not there, or not on this machine."""
    try:
        return os.path.getsize(name or "")
    except OSError:
        return 0
