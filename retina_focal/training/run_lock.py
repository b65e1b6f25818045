"""One training at a time in an output folder, of all processes and machines that see it."""

import errno
import fcntl
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from detectron2.utils import comm

from retina_focal.errors import UserError
from retina_focal.files import write_error
from retina_focal.training.launchers import is_requeued, is_restarted
from retina_focal.training.processes import raised_in_all

LOCK = ".lock"
# Seconds that a training waits for one that is about to end; and one that a launcher starts again,
# whose predecessor's machine may be lost: an NFS server then waits 90 s before it drops a lock.
WAIT, WAIT_OF_RESTART = 5.0, 120.0
HELD = (errno.EACCES, errno.EAGAIN)
# What a file system says that has no locks (Lustre without -o flock, NFS without its daemon).
WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)

logger = logging.getLogger(__name__)


@contextmanager
def sole_run(folder: str, timeout: float, goes_on: bool) -> Iterator[None]:
    """Run the block as the only training in a folder.

    All processes of the training come here, before anything is written; the main one holds the
    lock. The system drops it with its process, however that ends: a file that a killed one left
    behind locks nothing. Loaders' workers don't inherit it.

    Args:
        folder: is made where it isn't there, and removed where the block leaves it empty.
        timeout: seconds that a process may let the others wait.
        goes_on: from a checkpoint of the folder, where there is one.
    Raises:
        UserError: another training holds the folder, it can't be written to, or is none.
    """
    _expect_local(folder)
    path, file, error = Path(folder, LOCK), None, None
    made = [x for x in path.parents if not os.path.exists(x)]
    if comm.is_main_process():
        try:
            again = goes_on and (is_restarted(os.environ) or is_requeued(os.environ))
            file = _locked(path, min(WAIT_OF_RESTART if again else WAIT, timeout / 2))
        except OSError as wrong:
            error = write_error(path, wrong)
        except UserError as wrong:
            error = wrong
    raised_in_all(error)
    try:
        yield
    finally:
        if file is not None:
            with suppress(OSError):
                path.unlink()  # before the lock goes: whoever locks next makes another
            os.close(file)
            with suppress(OSError):
                for x in made:
                    x.rmdir()


def _expect_local(folder: str) -> None:
    """Refuse (UserError) what TensorBoard and the checkpoints would take for different places."""
    is_utf8 = not any("\ud800" <= letter <= "\udfff" for letter in folder)
    if "://" in folder or not is_utf8:
        raise UserError(
            f"OUTPUT_DIR is {folder!r}; expected the path of a folder here, in UTF-8 (in "
            "a LazyConfig: train.output_dir)"
        )
    if os.path.lexists(folder) and not os.path.isdir(folder):
        raise UserError(f"OUTPUT_DIR is '{folder}', which is there and no folder; name another")


def _locked(path: Path, patience: float) -> int:
    """The locked file, open, with this process in it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    deadline, waits = time.monotonic() + patience, False
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
        try:
            # Not flock: workers that are forked would hold it too.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_there(path, file):
                break
        except OSError as error:
            if error.errno in WITHOUT_LOCKS:
                logger.warning(
                    "the file system of '%s' has no locks (%s): a second training in this folder "
                    "would not be noticed",
                    path.parent,
                    error.strerror,
                )
                break
            if error.errno not in HELD:
                os.close(file)
                raise
            if time.monotonic() > deadline:
                raise UserError(_in_use(path, file)) from error
            if not waits:
                waits = True
                logger.warning("waits up to %g s: %s", patience, _in_use(path, file))
        os.close(file)
        time.sleep(min(0.2, patience))
    with suppress(OSError):  # a full disk
        os.truncate(file, 0)
        now = time.strftime("%Y-%m-%d %H:%M:%S %z")
        os.pwrite(file, f"process {os.getpid()} on {socket.gethostname()} since {now}".encode(), 0)
    return file


def _is_there(path: Path, file: int) -> bool:
    """Whether a locked file still has its name: its holder removes it."""
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(file), path.stat())
    return False


def _in_use(path: Path, file: int) -> str:
    holder = os.pread(file, 200, 0).decode(errors="replace") or "a process that doesn't say which"
    return (
        f"another training holds '{path.parent}': {holder}; wait for its end, or name another "
        "folder: OUTPUT_DIR ANOTHER (in a LazyConfig: train.output_dir=...)"
    )
