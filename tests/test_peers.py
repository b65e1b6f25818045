"""Who is missing: processes that do not come, end, are killed, stopped or hang."""

import json
import os
import re
import subprocess
import sys

import pytest
from test_processes import needs_cpu_processes

from retina_focal.errors import UserError
from retina_focal.training.peers import in_words

TIMEOUT = 9
# What process 0, process 1 and, after those, another 0 and 1 do; None never comes.
CASES = {
    "well": ["step", "step"],
    "missing": ["step", None],
    "nobody": [None, "step"],
    "fails": ["step", "fail"],
    "killed": ["step", "kill"],
    "killed store": ["kill", "step"],
    "stopped": ["step", "stop"],
    "hangs": ["step", "hang"],
    "taken port": ["step", "step", "late"],
    "twice": ["step", "step", None, "late"],
    "other size": ["step", "step of 3"],
}
SCRIPT = """
import json, os, signal, socket, sys, time
import torch
import torch.distributed as dist
from retina_focal.errors import UserError
from retina_focal.training.launchers import World
from retina_focal.training.peers import joined
from retina_focal.training.processes import closed_process_group

def hang_here():
    time.sleep(600)

def run(action, world):
    for step in range(20):
        if step == 5:
            if action == "fail":
                raise UserError("the picture 7.png is torn")
            if action == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if action == "stop":
                os.kill(os.getpid(), signal.SIGSTOP)
            if action == "hang":
                hang_here()
        dist.all_reduce(torch.ones(1))
        time.sleep(0.1)

torch.set_num_threads(1)
timeout, cases = json.loads(sys.argv[1])
running, ends, start = {}, {}, time.monotonic()
for name, actions in cases.items():
    with socket.socket() as server:
        server.bind(("", 0))
        port = server.getsockname()[1]
    for rank, action in enumerate(actions):
        if not action:
            continue
        read, write = os.pipe()
        pid = os.fork()
        if not pid:
            os.dup2(write, 2)
            status = 0
            try:
                if action == "late":
                    time.sleep(1)
                size = 3 if action == "step of 3" else 2
                world = World(size, rank % 2, rank % 2, "127.0.0.1", port)
                with closed_process_group(), joined(world, timeout):
                    run(action, world)
            except UserError as error:
                os.write(2, str(error).encode())
                status = 1
            os._exit(status)
        os.close(write)
        running[pid] = f"{name}/{rank}", read
while set(dict(running.values())) > {"stopped/1"} and time.monotonic() - start < 5 * timeout:
    pid, status = os.waitpid(-1, os.WNOHANG)
    if pid:
        name, read = running.pop(pid)
        words = os.read(read, 10000).decode()
        seconds = time.monotonic() - start
        ends[name] = os.waitstatus_to_exitcode(status), seconds, words
    time.sleep(0.05)
for pid, (name, read) in running.items():
    os.kill(pid, signal.SIGKILL)
    ends[name] = None, 0, ""
print(json.dumps(ends))
"""


@pytest.fixture(scope="module")
def ends() -> dict[str, tuple[int, float, str]]:
    """Of each process of each case: its exit status, seconds, and words."""
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT, json.dumps([TIMEOUT, CASES])],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"},
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout)


@needs_cpu_processes
def test_processes_that_all_take_part_end_well(ends):
    assert [ends[f"well/{rank}"][0] for rank in (0, 1)] == [0, 0]


@needs_cpu_processes
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("missing/0", f"of 2 processes 1 did not come to 127.0.0.1:.* within {TIMEOUT} s"),
        ("nobody/1", "process 1 of 2 found nobody at 127.0.0.1"),
        ("fails/1", "the picture 7.png is torn"),
        ("fails/0", r"process 1 of 2 \(on .*, pid .*\) ended: the picture 7.png is torn"),
        ("killed/0", r"process 1 of 2 \(on .* does not answer: it was killed \(out of memory"),
        ("killed store/1", "process 0 of 2 .* is gone: it was killed"),
        ("stopped/0", "process 1 of 2 .* does not answer"),
        ("hangs/0", r"all processes live.*process 1 of 2 .* is at .*:\d+ hang_here"),
        ("hangs/1", "process 1 of 2 .* ends: process 0 of 2 .* ended: all processes live"),
        ("taken port/2", "process 0 can't listen on port .*Address already in use.*--dist-url"),
        ("twice/3", "process 1 of 2 .* is there twice; give each machine its own --machine-rank"),
        # Whoever comes second finds the other's number.
        ("other size/1", "meets a process of 2 .* the same --num-gpus|lost process 0 at 127"),
    ],
)
def test_who_is_missing_is_said_in_time(name, words, ends):
    status, seconds, found = ends[name]
    assert status == 1, (status, found)
    assert re.search(words, found), found
    assert "Traceback" not in found
    # Half a second of steps comes first; who hangs gets some time after the others have ended.
    assert seconds < 1.5 * TIMEOUT


def test_a_lost_loader_worker_is_said_in_words_and_a_fault_is_not():
    killed = "DataLoader worker (pid 7) is killed by signal: Killed. \nmore"
    assert "killed by signal: Killed. Out of memory?" in in_words(RuntimeError(killed))
    full = "Caught RuntimeError in worker 0.\nunable to allocate shared memory(shm) for file </x>"
    bus = "DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that "
    for text in (full, f"{bus}dataloader's workers are out of shared memory."):
        assert "--shm-size" in in_words(RuntimeError(text))
    slow = "DataLoader timed out after 600 seconds"
    assert "TRAIN.TIMEOUT" in in_words(RuntimeError(slow))
    assert in_words(UserError("words")) == "words"
    assert in_words(RuntimeError("shapes differ")) is None
    assert in_words(KeyError("gloo")) is None
