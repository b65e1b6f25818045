"""The processes that train one model: who is missing when one does not answer, and why.

Beside the collectives each process beats: about once a second it tells all others, through
process 0's store, that it lives and what its main thread does. A collective that fails says only
that it failed; the beats say why.
"""

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch.distributed as dist
from detectron2.utils import comm

from retina_focal.errors import UserError
from retina_focal.training.launchers import World
from retina_focal.training.meeting import Meeting, keys_of
from retina_focal.training.signals import STOPS

LOST = "it was killed (out of memory?) or stopped, or its machine or the link to it is lost"
# What torch says of a full /dev/shm; a write to it that has no room is a bus error.
NO_SHARED_MEMORY = ("unable to allocate shared memory", "out of shared memory")
# What torch says when another process is the reason; other errors of collectives are faults.
LOST_PEER = ("gloo", "NCCL", "ncclRemoteError", "Connection closed by peer", "Connection reset")


class Peers:
    """This process's view of all processes of a training, once they have met."""

    def __init__(self, meeting: Meeting):
        self.world, self.timeout, self.store = meeting.world, meeting.timeout, meeting.store
        self.period, self.patience, self.names = meeting.period, meeting.patience, meeting.names
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="beat", daemon=True)
        self._thread.start()

    def tell(self, reason: str) -> None:
        """Tell the others why this process ends."""
        fault = f"{self.world.rank} {reason}"
        self._answer(lambda: self.store.compare_set("fault", "", fault), 2)

    def explain(self) -> str:
        """Why a collective failed: who is missing, in words."""
        who = self._answer(self._who_is_missing, 8) or f"{self.names[0]} does not answer: {LOST}"
        return f"{who}; every process answers within {self.timeout:g} s (TRAIN.TIMEOUT)"

    def _answer(self, ask: Callable[[], Any], periods: float) -> Any:
        """What the store answers, or None: behind a cut link it never does."""
        found = []

        def run() -> None:
            with suppress(RuntimeError):
                found.append(ask())

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        thread.join(periods * self.period)
        return found[0] if found else None

    def _who_is_missing(self) -> str:
        others = [rank for rank in range(self.world.size) if rank != self.world.rank]
        try:
            before, silent = self._beats(self.store), others
            for _ in range(5):
                time.sleep(self.period)
                fault, after = self._fault(self.store), self._beats(self.store)
                silent = [rank for rank in others if before[rank] == after[rank]]
                if fault or not silent:
                    break
        except RuntimeError:
            return f"{self.names[0]} is gone: {LOST}"
        if fault or silent:
            names = " and ".join(self.names[rank] for rank in silent)
            return fault or f"{names} does not answer: {LOST}"
        places = "; ".join(f"{self.names[r]} is at {after[r].split(' ', 1)[1]}" for r in others)
        return f"all processes live, but one took no part: {places}"

    def _beats(self, store: dist.Store) -> list[str]:
        return [x.decode() for x in store.multi_get(keys_of("beat", self.world.size))]

    def _fault(self, store: dist.Store) -> str:
        """What another process said when it ended; "" where none did."""
        if not store.check(["fault"]):
            return ""
        rank, reason = store.get("fault").decode().split(" ", 1)
        return "" if int(rank) == self.world.rank else f"{self.names[int(rank)]} ended: {reason}"

    def _beat(self) -> None:
        """The thread: beats, passes signals on, and ends a process whose main thread hangs."""
        store, number, reason, since = self.store, 0, "", 0.0
        beats, changed = self._beats(store), [time.monotonic()] * self.world.size
        while not self._closed.wait(self.period):
            now, number = time.monotonic(), number + 1
            try:
                store.set(f"beat/{self.world.rank}", f"{number} {main_thread_place()}")
                if STOPS.requested:
                    store.set("stop", str(STOPS.requested))
                elif store.check(["stop"]):
                    STOPS.request(int(store.get("stop")))
                reason = reason or self._fault(store)
                if number % 10 == 0:  # all of all: not at every beat
                    for rank, beat in enumerate(self._beats(store)):
                        changed[rank] = now if beat != beats[rank] else changed[rank]
                        beats[rank] = beat
                        if now - changed[rank] > self.patience and not reason:
                            reason = f"{self.names[rank]} does not answer: {LOST}"
            except RuntimeError:
                reason = reason or f"{self.names[0]} is gone: {LOST}"
            since = since or (now if reason else 0.0)
            # By now the main thread has ended by itself, unless it hangs.
            if since and now - since > 10 * self.period:
                print(f"{self.names[self.world.rank]} ends: {reason}", file=sys.stderr, flush=True)
                os._exit(1)

    def close(self) -> None:
        """Stop beating, before process 0 takes the store away."""
        self._closed.set()
        self._thread.join(2 * self.period)


@contextmanager
def joined(world: World, timeout: float) -> Iterator[None]:
    """Run the block with the process group of all processes of a world.

    Args:
        timeout: seconds that a process may let the others wait.
    Raises:
        UserError: somebody is missing, at the start or when a collective fails in the block.
    """
    peers = None
    if world.size > 1:
        meeting = Meeting(world, timeout)
        meeting.join()
        peers = Peers(meeting)
    try:
        yield
        comm.synchronize()
    except Exception as error:
        reason = peers.explain() if peers and is_lost_peer(error) else in_words(error)
        if peers:
            peers.tell(reason or f"{type(error).__name__}: {error}")
            if world.rank == 0:
                time.sleep(2 * peers.period)  # for the others to read it, before the store goes
        if reason and not isinstance(error, UserError):
            raise UserError(reason) from error
        raise
    finally:
        if peers:
            peers.close()


def in_words(error: BaseException) -> str | None:
    """What a user can read of an error, or None for a fault of the program."""
    if isinstance(error, UserError):
        return str(error)
    text = str(error)
    if is_lost_peer(error):
        return text
    if isinstance(error, RuntimeError) and any(x in text for x in NO_SHARED_MEMORY):
        return (
            "the data loader's workers pass batches through /dev/shm, which is full (docker run "
            "--shm-size 8g); or load without them: DATALOADER.NUM_WORKERS 0"
        )
    if type(error) is RuntimeError and text.startswith("DataLoader "):
        if "timed out" in text:
            return f"{text} (MODEL.RETINA_FOCAL.TRAIN.TIMEOUT); is the disk or network stuck?"
        return f"{text.splitlines()[0].strip()} Out of memory? Try fewer: DATALOADER.NUM_WORKERS"
    return None


def is_lost_peer(error: BaseException) -> bool:
    """Whether a collective failed for want of another process."""
    is_of_torch = isinstance(error, dist.DistError) or type(error) is RuntimeError
    return is_of_torch and any(word in str(error) for word in LOST_PEER)


def main_thread_place() -> str:
    """File, line and function that the main thread is at."""
    frame = sys._current_frames().get(threading.main_thread().ident)
    if frame is None:
        return "its end"
    path = "/".join(frame.f_code.co_filename.split(os.sep)[-2:])
    return f"{path}:{frame.f_lineno} {frame.f_code.co_name}"
