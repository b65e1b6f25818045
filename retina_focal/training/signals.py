"""SIGTERM, SIGINT and SIGUSR1: finish the step, save, and end with the status schedulers expect.

A thread receives the signals, since Python's own handlers wait for the main thread, which may be
inside a collective.
"""

import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress

from detectron2.engine import HookBase
from detectron2.utils import comm
from torch.utils.data import DataLoader

from retina_focal.training.processes import die_with_parent

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
# A signal to the whole group comes twice, from its sender and from the launcher, and a launcher may
# send another one beside it: seconds in which all are one request.
FORWARDED_WITHIN = 1.0

logger = logging.getLogger(__name__)


class Stop(SystemExit):
    """The end of a process that a signal asked for; its status is 128 + the signal."""

    def __init__(self, signum: int):
        super().__init__(128 + signum)
        self.signum = signum


@contextmanager
def ended_at_once(by_words: bool = False) -> Iterator[None]:
    """A `Stop` that leaves the block ends the process, when all is saved and closed.

    Python's own end, with torch's libraries, takes 1.4 s of a core, and longer where all processes
    of a machine end together. The loaders' workers die with their parent.

    Args:
        by_words: any other SystemExit ends it too. A thread that still waits for process 0's store
            would abort a process that goes to its end in Python.
    """
    try:
        yield
    except SystemExit as end:
        if not (by_words or isinstance(end, Stop)):
            raise
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        logging.shutdown()
        with suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(1 if isinstance(end.code, str) else end.code or 0)


class Stops:
    """What signals asked of this process."""

    def __init__(self):
        self.handled = False
        self.speaks = True  # to the user; one of several processes does
        self.requested = 0  # a signal's number
        self.since: float | None = None  # when this process itself received a signal first
        # Told of the request; None: nobody would finish anything, so a signal ends at once.
        self.on_request: Callable[[int], None] | None = None

    def receive(self, signum: int) -> None:
        """A signal came, to this process or to its launcher."""
        now = time.monotonic()
        if self.since and now - self.since < FORWARDED_WITHIN:
            return
        name = signal.Signals(signum).name
        # Without `since` another process has told of the signal that its launcher sends to all.
        if self.requested and self.since:
            self._exit(f"{name} again: ends at once; --resume goes on from the last checkpoint")
        if self.on_request is None:
            self.requested = signum
            self._exit(f"{name} outside of the training's steps: ends at once, nothing is saved")
        self.since = now
        self.request(signum)
        self.say(f"{name}: finishes the step, saves and ends; another signal: ends at once")

    def request(self, signum: int) -> None:
        """Ask for a stop after the step, unless that is asked already."""
        if self.on_request and not self.requested:
            self.requested = signum
            self.on_request(signum)

    def say(self, words: str) -> None:
        if self.speaks:
            print(words, file=sys.stderr, flush=True)

    def _exit(self, words: str) -> None:
        self.say(words)
        # Not sys.exit: this is a thread. The loader's workers die with their parent.
        os._exit(128 + self.requested)


STOPS = Stops()


@contextmanager
def handled_signals(speaks: bool = True) -> Iterator[None]:
    """Receive the signals in the block; ignored ones (nohup) stay ignored."""
    if STOPS.handled or threading.current_thread() is not threading.main_thread():
        yield
        return
    STOPS.__init__()
    STOPS.handled, STOPS.speaks = True, speaks
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    names = [x for x in SIGNALS if signal.getsignal(x) != signal.SIG_IGN]
    before = {signum: signal.signal(signum, lambda *_: None) for signum in names}
    fd = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    FORKS.guard()
    threading.Thread(target=_listen, args=(reader, names), name="signals", daemon=True).start()
    try:
        yield
    finally:
        STOPS.handled = False
        signal.set_wakeup_fd(fd)
        for signum, handler in before.items():
            signal.signal(signum, handler)
        writer.close()


def _listen(reader: socket.socket, names: list[int]) -> None:
    with reader:
        while number := reader.recv(1):
            if number[0] in names:
                STOPS.receive(number[0])


class _Forks:
    """Lets forked processes, which are the loaders' workers, leave all signals to this one."""

    registered = False

    def guard(self) -> None:
        if not self.registered:
            self.registered = True
            os.register_at_fork(
                before=self._before, after_in_parent=self._in_parent, after_in_child=self._in_child
            )

    def _before(self) -> None:
        self.guarded = STOPS.handled
        if self.guarded:
            self.parent = os.getpid()
            # Already here: libraries that start threads in the child do it before `_in_child`.
            self.mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)

    def _in_parent(self) -> None:
        if self.guarded:
            signal.pthread_sigmask(signal.SIG_SETMASK, self.mask)

    def _in_child(self) -> None:
        if self.guarded:
            STOPS.handled = False
            signal.set_wakeup_fd(-1)  # it is the parent's
            die_with_parent(self.parent)
            # Blocked, since torch gives its workers a handler that ends them whoever sent SIGTERM.
            # The parent's, which ends a loader, is obeyed.
            threading.Thread(target=self._obey, daemon=True).start()

    def _obey(self) -> None:
        while signal.sigwaitinfo(SIGNALS).si_pid != self.parent:
            pass
        os._exit(0)


FORKS = _Forks()


class StopOnSignal(HookBase):
    """Saves and raises `Stop` after the step in which a process received a signal."""

    def before_train(self) -> None:
        STOPS.on_request = self._pass_on

    def after_step(self) -> None:
        signum = self.trainer._trainer.stop_signal
        if signum:
            self.save()
            raise Stop(signum)

    def save(self) -> None:
        """In every process: save after this step, unless that is done."""
        trainer = self.trainer
        if trainer.iter + 1 < trainer.max_iter:  # else model_final.pth is there
            name = f"model_{trainer.iter:07d}"
            last = trainer.checkpointer.get_checkpoint_file()
            if os.path.basename(last) != f"{name}.pth":
                trainer.checkpointer.save(name, iteration=trainer.iter)
        comm.synchronize()  # no process ends, and takes the others along, before all is saved
        STOPS.say(f"saved after iteration {trainer.iter}; go on with --resume")

    def _pass_on(self, signum: int) -> None:
        self.trainer._trainer.requested_stop = signum


class StoppableLoader:
    """A loader for an evaluation that ends early, in all processes, when a signal came."""

    def __init__(self, loader: Iterable, timeout: float):
        """
        Args:
            timeout: seconds that a worker of the loader may take for a batch.
        """
        self.loader = loader
        if isinstance(loader, DataLoader) and loader.num_workers:
            loader.timeout = timeout

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator:
        for batch in self.loader:
            if STOPS.requested:
                break
            yield batch
        # All come here before any evaluator gathers.
        signum = agreed(STOPS.requested)
        if signum:
            raise Stop(signum)


def agreed(signum: int) -> int:
    """The largest of all processes' numbers."""
    return max(comm.all_gather(signum))
