"""Files of checkpoints: written whole or not at all, and looked through before use."""

import hashlib
import itertools
import logging
import os
import re
import shutil
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import torch
from detectron2.utils.logger import log_first_n
from torch.optim import Optimizer

from retina_focal.errors import UserError
from retina_focal.files import whole_file, write_error, write_whole
from retina_focal.training.saved_state import RESUME_HOOK, check_labels, check_state, tensors_of
from retina_focal.weights.formats import read_weights

TAG = "last_checkpoint"
RUN = "run_id"  # the file that names the run that the folder is of
RUN_ID = re.compile(r"[0-9a-f]{16}")
PERIODIC = re.compile(r"model_(\d{7})\.pth")
BLOCK = 2**22

logger = logging.getLogger(__name__)


def write_checkpoint(path: Path, content: dict) -> None:
    """`torch.save` to a file that replaces `path` when it lies on the disk, and its hash.

    Raises:
        UserError: it can't be written.
    """
    for folder in path.parent.glob(".writing-*"):  # of a process that was killed
        shutil.rmtree(folder, ignore_errors=True)
    with durable_file(path) as file:
        hashed = _HashedFile(file)
        try:
            torch.save(content, hashed)
        except RuntimeError:  # torch hides why it couldn't write
            raise hashed.error or hashed.unknown from None
        # A hash beside another file's content would condemn it; without one its own CRCs count.
        hash_file(path).unlink(missing_ok=True)
    with durable_file(hash_file(path)) as file:
        file.write(f"{hashed.hash.hexdigest()}  {path.name}\n".encode())


@contextmanager
def durable_file(path: Path) -> Iterator[BinaryIO]:
    """`whole_file`, on the disk when the block ends: a power cut leaves it, or the one before."""
    try:
        with whole_file(path) as temporary, temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise write_error(path, error) from error


class _HashedFile:
    """Takes what `torch.save` writes, in order."""

    unknown = OSError(None, "torch gives no reason")

    def __init__(self, file: BinaryIO):
        self.file, self.hash, self.error = file, hashlib.sha256(), None

    def write(self, content: bytes) -> int:
        try:
            self.hash.update(content)
            return self.file.write(content)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self.file.flush()


def checkpoints_of(folder: str | Path) -> list[Path]:
    """A run's checkpoints in the order in which resuming tries them: tagged, then newest."""
    found = [x for x in Path(folder).glob("model_*.pth") if is_regular(x)]
    tagged = [path for path in (tagged_checkpoint(folder),) if path and is_regular(path)]
    others = sorted(set(found) - set(tagged), key=lambda x: (_iteration(x), x.name), reverse=True)
    return tagged + others


def tagged_checkpoint(folder: str | Path) -> Path | None:
    """What `last_checkpoint` names, unless that is no `.pth` in the folder itself."""
    tag = Path(folder, TAG)
    if not is_regular(tag):
        return None
    with tag.open("rb") as file:
        name = file.read(256).decode(errors="replace").strip()
    path = os.path.abspath(os.path.join(folder, name))  # some write the whole path
    is_inside = os.path.dirname(path) == os.path.abspath(folder) and name.endswith(".pth")
    return tag.with_name(os.path.basename(path)) if is_inside and "\0" not in name else None


def run_of(folder: str | Path) -> str | None:
    """The id of the run that the folder is of; None: it isn't known, as of earlier versions."""
    path = Path(folder, RUN)
    if not is_regular(path):
        return None
    with path.open("rb") as file:
        text = file.read(64).decode(errors="replace").strip()
    if RUN_ID.fullmatch(text):
        return text
    # A power cut can leave zeros. It is read again and again.
    message = f"'{path}' holds no id of a run, and counts as missing"
    log_first_n(logging.WARNING, message, name=__name__, key="message")
    return None


def expect_run_file(folder: str | Path) -> None:
    """Refuse (UserError) a `run_id` that no training wrote: a folder, a FIFO, a link."""
    path = Path(folder, RUN)
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise UserError(
            f"'{path}' is no regular file; a training writes the id of its run there: delete it"
        )


def keep_earlier(path: Path, run: str | None) -> None:
    """Give a checkpoint of another run than this one a second name before its own is taken.

    It is ``earlier-<n>_NAME``, with the first free number and a hash beside it, which no run takes
    for one of its checkpoints. The first name stays until it is replaced: `last_checkpoint` may
    have it.

    Raises:
        UserError: the folder can't be written to.
    """
    if not is_regular(path) or not is_of_another_run(path, run):
        return
    names = (path.with_name(f"earlier-{n}_{path.name}") for n in itertools.count(1))
    kept = next(x for x in names if not os.path.lexists(x))
    try:
        if is_regular(hash_file(path)):
            found = hash_file(path).read_text(errors="replace").split()[:1]
            write_whole(hash_file(kept), f"{''.join(found)}  {kept.name}\n")
        try:
            os.link(path, kept)
        except OSError:  # a file system without hard links
            os.rename(path, kept)
    except OSError as error:
        raise write_error(kept, error) from error


def is_of_another_run(path: Path, run: str | None) -> bool:
    """Whether a checkpoint that can be read is of another run than this one; None: not known."""
    trainer = peek(path).get("trainer") if run is not None else None
    return trainer is not None and trainer.get("hooks", {}).get(RESUME_HOOK, {}).get("run") != run


def own_checkpoints(folder: str | Path) -> Iterator[Path]:
    """`checkpoints_of`, without those that an earlier run left in the folder."""
    run = run_of(folder)
    return (path for path in checkpoints_of(folder) if not is_of_another_run(path, run))


def own_first(paths: Sequence[Path], run: str | None) -> Iterator[Path]:
    """Checkpoints of a run, then, with a warning, those of others, each in their order."""
    yield from (x for x in paths if not is_of_another_run(x, run))
    for path in (x for x in paths if is_of_another_run(x, run)):
        logger.warning(
            "the folder's run has no whole checkpoint: '%s' is used, which is of an earlier run "
            "than config.yaml",
            path,
        )
        yield path


def _iteration(path: Path) -> int:
    number = number_of(path)
    if number is not None:
        return number
    content = peek(path)
    return content["iteration"] if isinstance(content.get("iteration"), int) else -1


def number_of(path: Path) -> int | None:
    """The iteration in the name of a periodic checkpoint, None for another file."""
    match = PERIODIC.fullmatch(path.name)
    return int(match[1]) if match else None


def peek(path: Path) -> Mapping:
    """What a checkpoint holds, without reading its tensors; empty where no run can go on."""
    try:
        content = read_weights(path, mmap=True)
        check_state(path, content)
    except UserError:
        return {}
    return content


def read_checkpoint(path: Path, optimizer: Optimizer | None = None) -> dict:
    """A checkpoint that is whole and whose tensors are finite.

    Args:
        optimizer: of a run that must be able to go on from it; None: it is to be evaluated.
    Raises:
        UserError: it is not; the file is named, and why.
    """
    _check_content(path)
    content = read_weights(path, "it is no checkpoint of a run")
    if optimizer is None:
        check_labels(path, content)
    else:
        check_state(path, content, optimizer)
    wrong = not_finite(content)
    if wrong:
        raise UserError(f"'{path}' is not finite: {wrong}")
    return content


def _check_content(path: Path) -> None:
    """By the hash beside it; without one the checksums count that `read_weights` looks at."""
    beside = hash_file(path)
    if is_regular(beside):
        found = hashlib.sha256()
        with path.open("rb") as file:
            while block := file.read(BLOCK):
                found.update(block)
        expected = beside.read_text(errors="replace").split()[:1]
        if [found.hexdigest()] != expected:
            raise UserError(f"'{path}' is not whole: its SHA-256 isn't that of {beside.name}")


def hash_file(path: Path) -> Path:
    """Where a file's SHA-256 stands, as `sha256sum --check` reads it."""
    return path.with_name(f"{path.name}.sha256")


def not_finite(content: Mapping) -> str:
    """The place of a floating point tensor that has a NaN or an infinity, or "".

    The host waits for a device once.
    """
    floats = {place: x for place, x in tensors_of(content) if x.is_floating_point()}
    if not floats:
        return ""
    # Not `isfinite` of each, which makes three copies: a NaN or an infinity stays in a sum.
    device = next(iter(floats.values())).device
    sums = torch.stack([x.sum(dtype=torch.float32).to(device) for x in floats.values()])
    if sums.isfinite().all():
        return ""
    return next((name for name, x in floats.items() if not x.isfinite().all()), "")


def is_regular(path: Path) -> bool:
    """Whether it is a regular file, or a link to one: no FIFO is waited for."""
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except OSError:
        return False
