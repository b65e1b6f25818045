"""Alter what a run resumes from, in ways that load, and resume: words or the end, no traceback.

    OMP_NUM_THREADS=1 python tests/attacks/mutate.py --times 100 --seed 0

A value in the newest checkpoint, its bytes, its hash, last_checkpoint or metrics.json is altered at
random. The run must go on, from that checkpoint or an earlier one, to its last iteration, or end
with status 1 and a message that is no traceback.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch
from kill import arguments, in_a_child, prepare, run_to_its_end

from retina_focal.tools import train
from retina_focal.training.checkpoint_files import hash_file, write_checkpoint

ITERATIONS, NEWEST, EARLIER = 8, "model_0000005.pth", "model_0000002.pth"
TIMEOUT = 240  # s for one run
NAN = float("nan")
PLAIN = [
    *(None, True, -1, 0, 1, 7, 10**6, 2**63, 10**30, -0.0, 1e300, NAN, float("inf"), "", "text"),
    *(b"x", "\0", [], {}, (), [1], [None], {"a": 1}, {1: []}, (True, [(1.0, 2)]), [[[[]]]]),
]  # fmt: skip
ODD = [
    *(torch.tensor(NAN), torch.tensor(0), torch.zeros(2, 2), torch.zeros(0), torch.zeros(3) * 1j),
    *(torch.ones(2).to(torch.float8_e4m3fn), torch.ones(2).to_sparse(), torch.tensor([True])),
]  # fmt: skip
TENSORS = [
    lambda x: x.double(),
    lambda x: x.half(),
    lambda x: x.long(),
    lambda x: x + 0j,
    lambda x: x[None],
    lambda x: x.flatten()[:-1].clone(),
    lambda x: x * NAN,
    lambda x: x.float() * 3e38 * 3e38,
    lambda x: -x if x.is_floating_point() else x,
    lambda x: x.numpy() if x.dtype.is_floating_point else x,
    lambda x: x.bfloat16(),
]
TAGS = [b"", b"\0", b"/etc/passwd", b"../x.pth", b"model_0000002.pth\n\n", b"metrics.json"]
TAGS += [b"x" * 999, b"model_best.pth", b".", b"last_checkpoint", NEWEST.upper().encode(), None]
LINES = [b"\xff\xfe", b"[]", b"5", b"null", b"[" * 10**5, b"", b'{"iteration": NaN}']
LINES += [json.dumps({"iteration": x}).encode() for x in (None, "1", -5, 10**30, 1.5, [])]
KINDS = {"value": 0.7, "bytes": 0.08, "hash": 0.04, "tag": 0.06, "metrics": 0.12}


def main() -> None:
    """Run the attack and exit with 1 where a run ends otherwise than it should."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--times", type=int, default=100, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, help="folder; default: a temporary one")
    args = parser.parse_args()
    torch.set_num_threads(1)
    work = args.work or Path(tempfile.mkdtemp(prefix="mutate-"))
    prepare(work)
    whole = work / "process-whole"
    shutil.rmtree(whole, ignore_errors=True)
    run_to_its_end(work, "process", whole)
    ends: Counter[str] = Counter()
    for number in range(args.seed, args.seed + args.times):
        draw = random.Random(number)
        output = work / "altered"
        shutil.rmtree(output, ignore_errors=True)
        output.mkdir()
        for name in (NEWEST, EARLIER, "metrics.json"):
            shutil.copy(whole / name, output)
        for name in (NEWEST, EARLIER):
            shutil.copy(hash_file(whole / name), output)
        (output / "last_checkpoint").write_text(NEWEST)
        (kind,) = draw.choices(list(KINDS), list(KINDS.values()))
        said = ALTER[kind](output, draw)
        end = resumed(work, output)
        ends[f"{kind}: {end.split(':')[0]}"] += 1
        if "BAD" in end or end.startswith("words"):
            print(f"{number}: {said}: {end}", flush=True)
    for end, times in sorted(ends.items()):
        print(f"{times:4d} {end}")
    if not args.work:
        shutil.rmtree(work)
    sys.exit(any("BAD" in end for end in ends))


def alter_value(output: Path, draw: random.Random) -> str:
    """One node of the content, from the root down; the weights are one of a few."""
    path = output / NEWEST
    content = torch.load(path)
    holder, key, place = content, draw.choice([*content, "trainer", "trainer", "trainer"]), []
    while True:
        place.append(str(key))
        value = holder[key]
        if not (isinstance(value, dict | list) and value) or draw.random() < 0.2:
            break
        holder, key = (
            value,
            draw.choice(list(value if isinstance(value, dict) else range(len(value)))),
        )
    if draw.random() < 0.1:
        del holder[key]
        new = "deleted"
    elif draw.random() < 0.1 and isinstance(holder, dict):
        holder.clear()
        holder["x"] = new = draw.choice(PLAIN)
    elif isinstance(value, torch.Tensor) and draw.random() < 0.7:
        holder[key] = new = draw.choice(TENSORS)(value)
        new = new.dtype, new.shape
    else:
        holder[key] = new = draw.choice(PLAIN + ODD)
    write_checkpoint(path, content)
    return f"{'.'.join(place)} = {new!r:.60}"


def alter_bytes(output: Path, draw: random.Random) -> str:
    path = output / NEWEST
    content = bytearray(path.read_bytes())
    if draw.random() < 0.7:
        hash_file(path).unlink()
    if draw.random() < 0.3:
        del content[draw.randrange(len(content)) :]
    for _ in range(draw.randint(1, 9)):
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)
    return "bytes"


def alter_hash(output: Path, draw: random.Random) -> str:
    content = draw.choice([b"", b"\xff\xfe\0", b"0" * 64, b"\n" * 9, os.urandom(99)])
    hash_file(output / NEWEST).write_bytes(content)
    return f"hash {content!r:.40}"


def alter_tag(output: Path, draw: random.Random) -> str:
    tag = output / "last_checkpoint"
    content = draw.choice(TAGS)
    content = os.urandom(30) if content is None else content
    if draw.random() < 0.2:
        tag.unlink()
        tag.mkdir() if draw.random() < 0.5 else tag.symlink_to("last_checkpoint")
        return "tag is a folder or a loop"
    tag.write_bytes(content)
    return f"tag {content!r:.40}"


def alter_metrics(output: Path, draw: random.Random) -> str:
    path = output / "metrics.json"
    lines = path.read_bytes().splitlines(keepends=True)
    other = draw.choice(LINES) + b"\n"
    how = draw.choice(("insert", "flip", "swap", "double", "begin", "empty"))
    if how == "insert":
        lines.insert(draw.randrange(len(lines) + 1), other)
    elif how == "flip":
        content = bytearray(b"".join(lines))
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        lines = [bytes(content)]
    elif how == "swap":
        draw.shuffle(lines)
    elif how == "double":
        lines += lines
    elif how == "begin":
        lines = lines[1:]
    else:
        lines = []
    path.write_bytes(b"".join(lines))
    return f"metrics {how} {other!r:.30}"


ALTER = {
    "value": alter_value,
    "bytes": alter_bytes,
    "hash": alter_hash,
    "tag": alter_tag,
    "metrics": alter_metrics,
}


def command_line(work: Path, output: Path) -> list[str]:
    return [*arguments(work, "process", output), "SOLVER.MAX_ITER", str(ITERATIONS)]


def resumed(work: Path, output: Path) -> str:
    """How the run ends: "whole", "words: ..." or "BAD: ..."."""
    log = output.parent / "altered.log"
    log.unlink(missing_ok=True)
    pid = in_a_child(train.main, command_line(work, output), log=log)
    deadline = time.monotonic() + TIMEOUT
    while True:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            break
        if time.monotonic() > deadline:
            os.killpg(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return "BAD: hangs"
        time.sleep(0.02)
    text = log.read_text(errors="replace")
    if "Traceback" in text:
        return f"BAD: traceback: {text[-700:]}"
    if status:
        return f"words: {text.strip().splitlines()[-1][:300]}"
    last = torch.load(output / "model_final.pth")["iteration"]
    return "whole" if last == ITERATIONS - 1 else f"BAD: ends with iteration {last}"


if __name__ == "__main__":
    main()
