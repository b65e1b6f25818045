"""Faults that a user can put right end a training in words: a wrong value, a full disk."""

import errno
import logging
import os
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from retina_focal.errors import UserError
from retina_focal.training.peers import in_words
from retina_focal.training.run_files import SETTINGS

# What libraries raise for a value that they don't take.
FAULTS = (ArithmeticError, AssertionError, AttributeError, LookupError, MemoryError)
FAULTS += (RuntimeError, TypeError, ValueError)
FULL_OR_CLOSED = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


@contextmanager
def faults_of_the_config() -> Iterator[None]:
    """What a library refuses while parts are looked up and built ends as a UserError.

    What our own code raises, and what other processes cause, stays as it is.
    """
    try:
        yield
    except UserError:
        raise
    except FAULTS as error:
        names = [f.f_globals["__name__"] for f, _ in traceback.walk_tb(error.__traceback__)]
        libraries = ("detectron2.", "fvcore.", "torch.", "yacs.", "timm.")
        if not names[-1].startswith(libraries) or any("distributed" in x for x in names):
            raise
        SETTINGS.info("what the config asks for can't be built", exc_info=True)
        reason = error.args[0] if isinstance(error, KeyError) else str(error).partition("\n")[0]
        if names[-1].startswith(("fvcore.common.registry", "detectron2.config")):
            raise UserError(f"{reason}; correct that name in the config") from error
        raise UserError(
            f"{names[-1]} can't build what the config asks for ({type(error).__name__}: {reason}); "
            "correct the value of the key that this is about"
        ) from error


@contextmanager
def words_only(folder: str, last_checkpoint: Callable[[], str]) -> Iterator[None]:
    """In the block their tracebacks are not logged; errors of the output folder become UserErrors.

    Args:
        folder: that the training writes to.
        last_checkpoint: its path, or "".
    """

    def is_of_folder(error: BaseException) -> bool:
        return isinstance(error, OSError) and (
            error.errno in FULL_OR_CLOSED or _is_in(error.filename, folder)
        )

    def without_traceback(record: logging.LogRecord) -> bool:
        error = record.exc_info and record.exc_info[1]
        return not error or (in_words(error) is None and not is_of_folder(error))

    logger = logging.getLogger("detectron2.engine.train_loop")
    logger.addFilter(without_traceback)
    # TensorBoard writes in a thread, and raises what that raised at its next call.
    hook = threading.excepthook
    threading.excepthook = lambda args: is_of_folder(args.exc_value) or hook(args)
    try:
        yield
    except OSError as error:
        if not is_of_folder(error):
            raise
        path = last_checkpoint()
        where = os.fsdecode(error.filename) if error.filename else folder
        raise UserError(
            f"can't write to '{where}': {error.strerror}; free space on the disk, or open the "
            f"folder, and type --resume; the last checkpoint is {path or 'none'}"
        ) from error
    finally:
        threading.excepthook = hook
        logger.removeFilter(without_traceback)


def _is_in(path: str | bytes | int | None, folder: str) -> bool:
    if not isinstance(path, (str, bytes)):
        return False
    path, folder = os.path.abspath(os.fsdecode(path)), os.path.abspath(folder)
    return path == folder or path.startswith(folder + os.sep)
