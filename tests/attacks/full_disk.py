"""Fill the disk or close the folder of a small training: words, and the last checkpoint stays.

    OMP_NUM_THREADS=1 python tests/attacks/full_disk.py

Needs root, to mount a tmpfs. After each run that ends so, the disk is made larger, or the folder
opened, and the run must go on to the weights of an uninterrupted one.
"""

import argparse
import ctypes
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from kill import arguments, compare, in_a_child, prepare, run_to_its_end

from retina_focal.tools import train
from retina_focal.training.checkpoint_files import checkpoints_of, read_checkpoint

CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH = 1, 2
CAPABILITY_VERSION, CAPSET = 0x20080522, {"x86_64": 126, "aarch64": 91}
KIB = 2**10


def main() -> None:
    """Run the attack and exit with 1 where anything differs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, help="folder; default: a temporary one")
    args = parser.parse_args()
    if os.geteuid():
        sys.exit("this attack mounts a tmpfs: run it as root")
    torch.set_num_threads(1)
    work = args.work or Path(tempfile.mkdtemp(prefix="full-"))
    prepare(work)
    whole = work / "process-whole"
    run_to_its_end(work, "process", whole)
    total = int(subprocess.run(["du", "-sk", whole], capture_output=True).stdout.split()[0]) * KIB
    final = (whole / "model_final.pth").stat().st_size
    for name, size in {"at once": 64 * KIB, "in mid-run": total // 2}.items():
        on_a_full_disk(work, whole, name, size)
    # The periodic checkpoints fit, the last does not.
    on_a_full_disk(work, whole, "in the last write", total - final // 2)
    in_a_closed_folder(work, whole, 3)
    in_a_closed_folder(work, whole, len(list(whole.glob("model_0*.pth"))))
    if not args.work:
        shutil.rmtree(work)


def on_a_full_disk(work: Path, whole: Path, name: str, size: int) -> None:
    output = work / f"disk-{name.replace(' ', '-')}"
    output.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", output], check=True)
    try:
        expect_words(work, output, "No space left on device")
        subprocess.run(["mount", "-o", "remount,size=1G", output], check=True)
        run_to_its_end(work, "process", output)
        compare(whole, output)
        print(f"disk full {name}: bit-equal once it is larger", flush=True)
    finally:
        subprocess.run(["umount", output], check=True)


def in_a_closed_folder(work: Path, whole: Path, after: int) -> None:
    """The folder is closed when it holds `after` checkpoints."""
    output = work / f"closed-{after}"
    output.mkdir()

    def close() -> bool:
        if len(list(output.glob("model_0*.pth"))) >= after:
            output.chmod(0o555)
        return output.stat().st_mode & 0o777 == 0o555

    expect_words(work, output, "Permission denied", until=close)
    output.chmod(0o755)
    run_to_its_end(work, "process", output)
    compare(whole, output)
    print(f"folder closed after {after} checkpoints: bit-equal once it is open", flush=True)


def expect_words(
    work: Path, output: Path, reason: str, until: Callable[[], bool] = lambda: True
) -> None:
    """The run ends with status 1 and without a traceback, and leaves whole checkpoints."""
    log = work / f"{output.name}.log"
    pid = in_a_child(without_privileges, arguments(work, "process", output), log=log)
    is_done = False
    while not (ended := os.waitpid(pid, os.WNOHANG))[0]:
        is_done = is_done or until()
    text = log.read_text()
    status = os.waitstatus_to_exitcode(ended[1])
    last = text.strip().splitlines()[-1]
    if status != 1 or "Traceback" in text or reason not in last:
        raise SystemExit(f"{output}: status {status}, with a traceback or without words: {log}")
    print(f"   {last}")
    left = checkpoints_of(output)
    for path in left:
        read_checkpoint(path)
    print(f"   {len(left)} whole checkpoints are left")


def without_privileges(command_line: list[str]) -> None:
    """A training to which a folder's mode means something, also where it is root's."""
    header = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION, 0)
    masks = (ctypes.c_uint32 * 6)()
    libc = ctypes.CDLL(None, use_errno=True)
    assert not libc.syscall(CAPSET[os.uname().machine] - 1, header, masks)  # capget
    for i in (0, 1, 2):
        masks[i] &= ~(1 << CAP_DAC_OVERRIDE | 1 << CAP_DAC_READ_SEARCH)
    assert not libc.syscall(CAPSET[os.uname().machine], header, masks), os.strerror(
        ctypes.get_errno()
    )
    train.main(command_line)


if __name__ == "__main__":
    main()
