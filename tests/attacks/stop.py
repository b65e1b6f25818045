"""How long a training lives after SIGTERM: at most one step and the save.

    OMP_NUM_THREADS=1 python tests/attacks/stop.py --times 3

1 and 2 processes, the signal to the launcher alone and to its whole group, at a random moment of a
step. A step's time is what the run wrote into metrics.json; a save's is that of writing the same
checkpoint again. What comes beyond is the end of the processes: Python, torch's threads, the
launcher's wait.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from kill import arguments, prepare

from retina_focal.training.checkpoint_files import read_checkpoint, write_checkpoint

SPARE = 2.0  # s for the end of the processes
TIMEOUT = 300  # s until the run has written its first metrics
ENDLESS = [
    "SOLVER.MAX_ITER",
    "100000",
    "SOLVER.CHECKPOINT_PERIOD",
    "100000",
    "TEST.EVAL_PERIOD",
    "0",
]
TRAIN = [sys.executable, "-W", "ignore", str(Path(__file__).parents[2] / "train_net.py")]


def main() -> None:
    """Stop the runs, print their times, and exit with 1 where one is late."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--times", type=int, default=3, help="per case; default: %(default)s")
    args = parser.parse_args()
    torch.set_num_threads(1)
    work, late = Path(tempfile.mkdtemp(prefix="stop-")), 0
    prepare(work)
    for number in range(4 * args.times):
        kind, to_group = ("process", "gloo")[number // 2 % 2], bool(number % 2)
        late += stop(work, kind, to_group, work / str(number))
    print(f"{late} of {4 * args.times} ended late")
    shutil.rmtree(work)
    sys.exit(late > 0)


def stop(work: Path, kind: str, to_group: bool, output: Path) -> bool:
    """Whether the run ended late."""
    with output.with_suffix(".log").open("w") as log:
        command = [*TRAIN, *arguments(work, kind, output), *ENDLESS]
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    deadline = time.monotonic() + TIMEOUT
    while not (step := seconds_of_a_step(output / "metrics.json")):
        if process.poll() is not None or time.monotonic() > deadline:
            os.killpg(process.pid, signal.SIGKILL)
            sys.exit(output.with_suffix(".log").read_text()[-1500:])
        time.sleep(0.05)
    time.sleep(random.uniform(0, step))
    sent = time.time()
    (os.killpg if to_group else os.kill)(process.pid, signal.SIGTERM)
    status = process.wait()
    ended = time.time()
    tag = output / "last_checkpoint"
    path = output / tag.read_text()
    content = read_checkpoint(path)
    start = time.time()
    write_checkpoint(path, content)
    save = time.time() - start
    saved = tag.stat().st_mtime  # the last that a save writes
    processes = "2 processes" if kind == "gloo" else "1 process"
    receiver = "the whole group" if to_group else "the launcher alone"
    print(
        f"{processes}, SIGTERM to {receiver}: status {status}; {ended - sent:.2f} s from signal to "
        f"exit ({saved - sent:.2f} to the end of the save) against a step of {step:.2f} and a save "
        f"of {save:.2f}",
        flush=True,
    )
    return status != 128 + signal.SIGTERM or ended - sent > step + save + SPARE


def seconds_of_a_step(metrics: Path) -> float | None:
    """The median of the last steps that the run has written; None before the second time.

    After the first, TensorBoard is imported.
    """
    lines = metrics.read_text().splitlines() if metrics.is_file() else []
    times = [row["time"] for row in map(json.loads, lines) if "time" in row]
    return times[1] if len(times) > 1 else None


if __name__ == "__main__":
    main()
