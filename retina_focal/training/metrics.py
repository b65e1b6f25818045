"""The file metrics.json: each iteration once and in order, also of a run that is resumed."""

import itertools
import json
import logging
import os
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path

from detectron2.engine import hooks
from detectron2.utils.events import EventWriter, JSONWriter, TensorboardXWriter, get_event_storage

from retina_focal.files import check_regular

logger = logging.getLogger(__name__)


class MetricsHook(hooks.PeriodicWriter):
    """`PeriodicWriter`, after each evaluation too: the next one would take its results' place."""

    def after_step(self) -> None:
        if self.trainer.evaluated == self.trainer.iter:
            for writer in self._writers:
                writer.write()
        else:
            super().after_step()

    def after_train(self) -> None:
        if self.trainer._trainer.stop_signal:
            # The import of TensorBoard takes seconds that a process which is to end hasn't got.
            self._writers = [x for x in self._writers if not _is_unused_tensorboard(x)]
        super().after_train()


def _is_unused_tensorboard(writer: EventWriter) -> bool:
    return isinstance(writer, TensorboardXWriter) and "_writer" not in vars(writer)


class EventsWriter(TensorboardXWriter):
    """`TensorboardXWriter` whose faults end the events, not the training.

    An OSError stays: the folder is full or closed, for checkpoints too.
    """

    _is_broken = False

    def write(self) -> None:
        self._try(super().write)

    def close(self) -> None:
        self._try(super().close)

    def _try(self, act: Callable[[], None]) -> None:
        if self._is_broken:
            return
        try:
            act()
        except OSError:
            raise
        except Exception as error:
            self._is_broken = True
            logger.warning(
                "TensorBoard failed, and gets no more events (%s: %s); metrics.json has them all",
                type(error).__name__,
                error,
            )


class MetricsWriter(JSONWriter):
    """Writes the lines in order, where a `JSONWriter` goes by the names of its scalars."""

    def __init__(self, path: str):
        """Raises UserError where `path` is a FIFO, a device or a folder."""
        if os.path.lexists(path):
            check_regular(path)
        super().__init__(path)

    def write(self) -> None:
        latest = get_event_storage().latest_with_smoothing_hint(self._window_size)
        rows: dict[int, dict[str, float]] = defaultdict(dict)
        for name, (value, iteration) in latest.items():
            if iteration > self._last_write:
                rows[iteration][name] = value
        for iteration, row in sorted(rows.items()):
            line = json.dumps({**row, "iteration": iteration}, sort_keys=True)
            self._file_handle.write(f"{line}\n")
            self._last_write = iteration
        self._file_handle.flush()
        os.fsync(self._file_handle.fileno())


def cut_metrics(path: Path, iteration: int, begin: int = 0) -> int:
    """Cut `metrics.json` off before the first line from `iteration` on, and a torn one.

    Args:
        begin: bytes of earlier runs in the same folder, which stay.
    Returns:
        The last iteration of this run that stays; -1 where none does.
    """
    if not path.is_file():
        return -1
    last, end, content = -1, begin, path.read_bytes()
    for line in content[begin:].splitlines(keepends=True):
        current = _iteration(line)
        if current is None or current >= iteration or not line.endswith(b"\n"):
            break
        # Those of detectron2's own writer are in no order.
        last, end = max(last, current), end + len(line)
    if end < len(content):
        os.truncate(path, end)
    return last


def set_aside(path: Path, writers: Iterable[EventWriter] = ()) -> None:
    """Rename the file of an earlier run to `metrics-<n>.json`, with the first free number.

    Args:
        writers: of these, those that have the file open go on in a new one.
    """
    if not path.is_file() or not path.stat().st_size:
        return
    names = (path.with_name(f"{path.stem}-{n}{path.suffix}") for n in itertools.count(1))
    aside = next(x for x in names if not os.path.lexists(x))
    os.rename(path, aside)  # not emptied: it may be a link, or have another name
    for writer in writers:
        file = getattr(writer, "_file_handle", None)
        if file is not None and os.path.samestat(os.fstat(file.fileno()), aside.stat()):
            writer._file_handle = path.open("a")
            file.close()


def _iteration(line: bytes) -> int | None:
    """Of a whole line, None of another."""
    try:
        value = json.loads(line)["iteration"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return value if type(value) is int else None


def results_in_metrics(path: Path, iteration: int) -> dict | None:
    """The results, {"bbox": {"AP": ...}}, that were written at an iteration; None: none were."""
    try:
        line = json.loads(path.read_text().splitlines()[-1])
    except (OSError, ValueError, IndexError, RecursionError):
        return None
    if not isinstance(line, dict) or line.pop("iteration", None) != iteration:
        return None
    results: dict = {}
    for name, value in line.items():
        *groups, metric = name.split("/")
        node = results
        for group in groups:
            node = node.setdefault(group, {})
            if not isinstance(node, dict):
                return None
        if not isinstance(value, int | float):
            return None
        node[metric] = value
    return results
