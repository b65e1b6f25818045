"""Items made in a thread while earlier ones are used."""

import queue
import threading
from collections.abc import Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")
WAIT = 0.1  # seconds after which a full queue looks whether anybody still reads


def ahead(items: Iterable[Item], size: int) -> Iterator[Item]:
    """The same items; a thread makes up to `size` of them ahead. What it raises is raised here.

    When nobody reads any more, the thread ends after the item that it is making.
    """
    waiting: queue.Queue = queue.Queue(size)
    stopped = threading.Event()

    def put(kind: str, value: object) -> bool:
        while not stopped.is_set():
            try:
                waiting.put((kind, value), timeout=WAIT)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        try:
            for item in items:
                if not put("item", item):
                    return
                del item  # a large picture is not kept while the next one is made
            put("end", None)
        except BaseException as error:
            put("error", error)

    threading.Thread(target=work, daemon=True).start()
    try:
        while True:
            kind, value = waiting.get()
            if kind == "end":
                return
            if kind == "error":
                raise value
            yield value
            del value
    finally:
        stopped.set()
