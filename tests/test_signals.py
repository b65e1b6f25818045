"""Signals to a training: finish the step, save, and end with the status that schedulers expect."""

import json
import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from detectron2.utils.events import EventStorage
from test_processes import needs_cpu_processes
from trainings import (
    LONG,
    STEPPING,
    WORKERS,
    Training,
    no_training_outlives_its_test,  # noqa: F401
)

from retina_focal.training.metrics import EventsWriter, MetricsHook, MetricsWriter
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


IN_A_STEP = """
with signals.handled_signals():
    asked = []
    signals.STOPS.on_request = asked.append
    for signum, wait in {sent}:
        os.kill(os.getpid(), signum)
        time.sleep(wait)
    assert asked == [{sent}[0][0]]
"""
# What runs in a process of its own, and the exit status that it has.
SCENARIOS = {
    # Signals, and the seconds after each. Whoever runs the step ends it.
    "one": (IN_A_STEP.format(sent=[(15, 0.2)]), 0),
    # What the launcher passes on, of a signal that the whole group got.
    "passed on": (IN_A_STEP.format(sent=[(15, 0.2), (15, 0.2)]), 0),
    "second SIGTERM": (IN_A_STEP.format(sent=[(15, 1.2), (15, 9)]), 143),
    "second SIGINT": (IN_A_STEP.format(sent=[(2, 1.2), (2, 9)]), 130),
    "told by another process first": (
        IN_A_STEP.replace("for signum", "signals.STOPS.request(15)\n    for signum").format(
            sent=[(15, 0.2), (15, 0.2)]
        ),
        0,
    ),
    "told, and again": (
        IN_A_STEP.replace("for signum", "signals.STOPS.request(15)\n    for signum").format(
            sent=[(15, 1.2), (15, 9)]
        ),
        143,
    ),
    "SIGUSR1, then SIGTERM": (IN_A_STEP.format(sent=[(10, 1.2), (15, 9)]), 138),
    # Who ends a whole group may send several kinds.
    "SIGUSR1 beside SIGTERM": (IN_A_STEP.format(sent=[(10, 0.2), (15, 0.2), (2, 0.2)]), 0),
    "told of another, beside": (
        IN_A_STEP.replace("for signum", "signals.STOPS.request(10)\n    for signum")
        .replace("{sent}[0][0]", "10")
        .format(sent=[(15, 0.2), (10, 0.2)]),
        0,
    ),
    "inside a library": (
        """
store = torch.distributed.TCPStore("127.0.0.1", 0, 1, True)
with signals.handled_signals():
    pid = os.getpid()
    if os.fork() == 0:
        time.sleep(0.5)
        os.kill(pid, signal.SIGTERM)
        os._exit(0)
    store.wait(["never"], torch.distributed.default_pg_timeout)  # not Python: no handler runs
""",
        143,
    ),
    "stopped": (
        """
with signals.ended_at_once():
    print("whole")
    raise signals.Stop(signal.SIGUSR1)
""",
        138,
    ),
    "words": (
        """
with signals.ended_at_once(by_words=True):
    sys.exit("said")
""",
        1,
    ),
    "ignored": (
        """
signal.signal(signal.SIGINT, signal.SIG_IGN)
before = [signal.getsignal(x) for x in signals.SIGNALS]
with signals.handled_signals():
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.3)
assert [signal.getsignal(x) for x in signals.SIGNALS] == before
assert signal.set_wakeup_fd(-1) == -1
os.kill(os.getpid(), signal.SIGTERM)
time.sleep(9)
""",
        -signal.SIGTERM,
    ),
    "loader": (
        """
class Slow(torch.utils.data.Dataset):
    def __len__(self):
        return 40
    def __getitem__(self, i):
        time.sleep(0.02)
        return os.getpid()

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
read, write = os.pipe()
killed = os.fork()
if not killed:
    with signals.handled_signals():
        it = iter(torch.utils.data.DataLoader(Slow(), num_workers=2))
        for _ in range(4):
            os.write(write, b"%d " % int(next(it)))
        os.kill(os.getpid(), signal.SIGKILL)
os.waitpid(killed, 0)
def state(pid):
    try:
        return open(b"/proc/%s/stat" % pid).read().rpartition(") ")[2][0]
    except OSError:
        return "gone"

pids = set(os.read(read, 1000).split())
end = time.monotonic() + 4  # torch's own workers look for their parent every five seconds
while time.monotonic() < end and {state(pid) for pid in pids} - {"gone", "Z"}:
    time.sleep(0.1)
for pid in pids:
    print(state(pid))
""",
        0,
    ),
}
SCRIPT = """
import json, os, signal, sys, tempfile, time, traceback
import torch
from retina_focal.training import signals

signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in the background of a shell
running = {}
for name, code in json.loads(sys.argv[1]).items():
    files = [tempfile.TemporaryFile("w+") for _ in range(2)]
    pid = os.fork()
    if not pid:
        os.dup2(files[0].fileno(), 1)
        os.dup2(files[1].fileno(), 2)
        status = 0
        try:
            exec(code, globals())
        except BaseException:
            traceback.print_exc()
            status = 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    running[pid] = name, files
ends = {}
for pid, (name, files) in running.items():
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    for file in files:
        file.seek(0)
    ends[name] = [status, *(file.read() for file in files)]
print(json.dumps(ends))
"""


@pytest.fixture(scope="module")
def ends() -> dict[str, tuple[int, str, str]]:
    """Of each scenario the exit status and what it printed, to stdout and to stderr."""
    codes = json.dumps({name: code for name, (code, _) in SCENARIOS.items()})
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT, codes],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@pytest.mark.parametrize("name", SCENARIOS)
def test_each_process_ends_with_its_status(name, ends):
    assert ends[name][0] == SCENARIOS[name][1], ends[name]


def test_a_second_signal_ends_at_once_and_says_so(ends):
    said = {name for name, (_, _, text) in ends.items() if "again: ends at once; --resume" in text}
    assert said == {"second SIGTERM", "second SIGINT", "told, and again", "SIGUSR1, then SIGTERM"}


def test_what_was_said_before_the_end_is_kept(ends):
    assert ends["stopped"][1] == "whole\n"
    assert ends["words"][2] == "said\n"  # and no traceback


def test_a_signal_where_nothing_would_be_finished_ends_at_once_in_words(ends):
    assert "SIGTERM outside of the training's steps" in ends["inside a library"][2]


def test_a_loaders_workers_leave_signals_to_their_process_and_die_with_it(ends):
    all_seen, *states = ends["loader"][1].splitlines()
    assert all_seen == "2 39"
    assert len(states) == 2 and set(states) <= {"gone", "Z"}


def test_an_evaluation_stops_after_its_batch(monkeypatch):
    monkeypatch.setattr(STOPS, "requested", 0)
    assert list(StoppableLoader([1, 2], 9)) == [1, 2] and len(StoppableLoader([1, 2], 9)) == 2
    seen = []
    with pytest.raises(Stop) as stop:
        for batch in StoppableLoader([1, 2, 3], 9):
            seen.append(batch)
            STOPS.requested = signal.SIGUSR1
    assert seen == [1] and stop.value.code == 138


def test_a_fault_of_tensorboard_ends_its_events_and_not_the_training(tmp_path, caplog):
    events = EventsWriter(str(tmp_path))

    def fail(*_) -> None:
        raise UnicodeEncodeError("utf-8", "x", 0, 1, "no")

    events.__dict__["_writer"] = SimpleNamespace(add_scalar=fail, close=fail)
    with EventStorage(3) as storage:
        storage.put_scalar("loss", 1.0)
        events.write()
        events.write()
        events.close()
    assert caplog.text.count("TensorBoard failed, and gets no more events (UnicodeEnc") == 1
    events = EventsWriter(str(tmp_path))
    (tmp_path / "file").touch()
    events._writer_args["log_dir"] = str(tmp_path / "file/x")
    with EventStorage(3) as storage, pytest.raises(OSError, match="Not a directory"):
        storage.put_scalar("loss", 1.0)
        events.write()


@pytest.mark.parametrize("stop_signal", [0, signal.SIGTERM])
def test_a_stopped_run_imports_no_tensorboard_to_write_its_last_line(stop_signal, tmp_path):
    tensorboard = EventsWriter(str(tmp_path))
    hook = MetricsHook([MetricsWriter(str(tmp_path / "metrics.json")), tensorboard])
    hook.trainer = SimpleNamespace(_trainer=SimpleNamespace(stop_signal=stop_signal))
    with EventStorage(3) as storage:
        storage.put_scalar("loss", 1.0)
        hook.after_train()
    assert json.loads((tmp_path / "metrics.json").read_text()) == {"iteration": 3, "loss": 1.0}
    assert ("_writer" in vars(tensorboard)) == (not stop_signal)
