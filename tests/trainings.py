"""Trainings that run beside a test, to be stopped, killed and counted."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from test_train import train_command

# More steps than any test waits for, and no checkpoint but the one that is asked for.
LONG = ["SOLVER.MAX_ITER", "100000", "SOLVER.CHECKPOINT_PERIOD", "100000"]
WORKERS = ["DATALOADER.NUM_WORKERS", "1"]
STEPPING = "first step: "  # the line of the first step
PYTHON = (sys.executable, "-W", "ignore")


RUNNING: list["Training"] = []


@pytest.fixture(autouse=True)
def no_training_outlives_its_test() -> Iterator[None]:
    """Imported by the tests that use `Training`."""
    yield
    while RUNNING:
        for pid in RUNNING.pop().processes():
            os.kill(pid, signal.SIGKILL)


def is_alive(pid: int) -> bool:
    """Also not waiting to be reaped."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z"
    except OSError:
        return False


class Training:
    """A training in a process group of its own, whose output is read while it runs."""

    def __init__(
        self,
        folder: Path,
        data: Path,
        *arguments: str,
        opts: Sequence[str] = (),
        launcher: Sequence[str] = PYTHON,
        environment: dict[str, str] | None = None,
        log: str = "log",
    ):
        self.log, self.output = folder.with_suffix(f".{log}"), folder
        command, inherited = train_command(data, folder, *arguments, opts=opts)
        RUNNING.append(self)
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [*launcher, *command],
                env={**inherited, **(environment or {})},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait_for(self, words: str, seconds: float = 120) -> "Training":
        deadline = time.monotonic() + seconds
        while words not in self.text:
            assert time.monotonic() < deadline and self.process.poll() is None, self.text[-3000:]
            time.sleep(0.05)
        return self

    @property
    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def end(self, seconds: float = 60) -> int:
        """The exit status; asserts that no process is left two seconds later."""
        status = self.process.wait(seconds)
        deadline = time.monotonic() + 2
        while (left := self.processes()) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not left, f"{left} are left: {self.text[-3000:]}"
        return status

    def processes(self) -> list[int]:
        """All that live and write to this log."""
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            try:
                if is_alive(int(path.name)) and os.readlink(path / "fd/2") == str(self.log):
                    found.append(int(path.name))
            except OSError:  # it ended meanwhile
                continue
        return found

    def children(self, parent: int | None = None) -> list[int]:
        """The training's processes, or those of one of them: the workers of its loaders."""
        path = Path(f"/proc/{parent or self.process.pid}/task")
        pids = [int(x) for task in path.iterdir() for x in (task / "children").read_text().split()]
        return [
            x for x in pids if b"resource_tracker" not in Path(f"/proc/{x}/cmdline").read_bytes()
        ]

    @property
    def checkpoint(self) -> Path:
        return self.output / (self.output / "last_checkpoint").read_text()
