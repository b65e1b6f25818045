"""Signals to a training: finish the step, save, and end with the status that schedulers expect."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from test_processes import needs_cpu_processes
from trainings import (
    LONG,
    STEPPING,
    WORKERS,
    Training,
    is_alive,
    no_training_outlives_its_test,  # noqa: F401
)

from retina_focal.training.signals import STOPS, Stop, StoppableLoader


def checkpoint_of(training: Training) -> dict:
    return torch.load(training.checkpoint, weights_only=True)


@needs_cpu_processes
@pytest.mark.parametrize(("processes", "to_group"), [("1", True), ("2", False)])
def test_sigterm_saves_after_the_step_and_ends_everything(processes, to_group, data, tmp_path):
    opts = [*LONG, *WORKERS] if to_group else LONG
    training = Training(tmp_path / "run", data, "--num-gpus", processes, opts=opts)
    training.wait_for(STEPPING)
    os.kill(-training.process.pid if to_group else training.process.pid, signal.SIGTERM)
    assert training.end() == 143
    assert training.checkpoint.name == f"model_{checkpoint_of(training)['iteration']:07d}.pth"
    assert training.text.count("SIGTERM: finishes the step") == 1
    assert "Traceback" not in training.text


def in_a_process(script: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", "import os, signal, time\n" + script],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


SENT = [  # signals and the seconds after each, and the exit status
    ([(signal.SIGTERM, 0.2)], 0),  # whoever runs the step ends it
    # What the launcher passes on, of a signal that the whole group got.
    ([(signal.SIGTERM, 0.2), (signal.SIGTERM, 0.2)], 0),
    ([(signal.SIGTERM, 1.2), (signal.SIGTERM, 9)], 143),
    ([(signal.SIGINT, 1.2), (signal.SIGINT, 9)], 130),
    ([(signal.SIGUSR1, 0.2), (signal.SIGTERM, 9)], 138),  # the first one's
]


def test_a_second_signal_ends_at_once_with_the_status_of_the_first():
    run = in_a_process(
        f"""
from retina_focal.training import signals
children = []
for sent in {[[(int(x), wait) for x, wait in sent] for sent, _ in SENT]}:
    children.append(os.fork())
    if not children[-1]:
        with signals.handled_signals():
            asked = []
            signals.STOPS.on_request = asked.append
            for signum, wait in sent:
                os.kill(os.getpid(), signum)
                time.sleep(wait)
            assert asked == [sent[0][0]]
            os._exit(0)
print(*[os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children])
"""
    )
    assert run.stdout.split() == [str(status) for _, status in SENT], run.stderr
    assert run.stderr.count("again: ends at once;") == 3


def test_a_signal_ends_at_once_where_nothing_would_be_finished_even_inside_a_library():
    run = in_a_process(
        """
import torch
from retina_focal.training import signals
store = torch.distributed.TCPStore("127.0.0.1", 0, 1, True)
with signals.handled_signals():
    pid = os.getpid()
    if os.fork() == 0:
        time.sleep(0.5)
        os.kill(pid, signal.SIGTERM)
        os._exit(0)
    try:
        store.wait(["never"], torch.distributed.default_pg_timeout)  # not Python: no handler runs
    finally:
        print("never")
"""
    )
    assert run.returncode == 143, run.stderr
    assert "SIGTERM outside of the training's steps" in run.stderr and not run.stdout


def test_a_signal_that_was_ignored_stays_ignored_and_handlers_come_back():
    run = in_a_process(
        """
from retina_focal.training import signals
signal.signal(signal.SIGINT, signal.SIG_IGN)
before = [signal.getsignal(x) for x in signals.SIGNALS]
with signals.handled_signals():
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.3)
assert [signal.getsignal(x) for x in signals.SIGNALS] == before
assert signal.set_wakeup_fd(-1) == -1
os.kill(os.getpid(), signal.SIGTERM)
time.sleep(5)
"""
    )
    assert run.returncode == -signal.SIGTERM, run.stderr


def test_a_loaders_workers_leave_signals_to_their_process_and_die_with_it():
    run = in_a_process(
        """
import torch
from retina_focal.training import signals

class Slow(torch.utils.data.Dataset):
    def __len__(self):
        return 40
    def __getitem__(self, i):
        time.sleep(0.02)
        return os.getpid()

signals.STOPS.__init__()
with signals.handled_signals():
    signals.STOPS.on_request = print
    seen = set()
    for i, pids in enumerate(torch.utils.data.DataLoader(Slow(), num_workers=2)):
        seen.update(pids.tolist())
        if i == 4:
            for pid in seen:
                for signum in signals.SIGNALS:
                    if os.fork() == 0:  # from another process than the loader's
                        os.kill(pid, signum)
                        os._exit(0)
    print(len(seen), i)
    it = iter(torch.utils.data.DataLoader(Slow(), num_workers=2))
    print(*{int(next(it)) for _ in range(4)}, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""
    )
    assert run.returncode == -signal.SIGKILL, run.stderr
    all_seen, pids = run.stdout.splitlines()
    assert all_seen == "2 39"
    time.sleep(0.5)
    assert not [pid for pid in pids.split() if is_alive(int(pid))]


def test_an_evaluation_stops_after_its_batch(monkeypatch):
    monkeypatch.setattr(STOPS, "requested", 0)
    assert list(StoppableLoader([1, 2], 9)) == [1, 2] and len(StoppableLoader([1, 2], 9)) == 2
    seen = []
    with pytest.raises(Stop) as stop:
        for batch in StoppableLoader([1, 2, 3], 9):
            seen.append(batch)
            STOPS.requested = signal.SIGUSR1
    assert seen == [1] and stop.value.code == 138
