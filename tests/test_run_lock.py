"""Two trainings at once in one folder: the second is refused; a killed one stands in no way."""

import contextlib
import errno
import fcntl
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_train import train_command

from retina_focal.errors import UserError
from retina_focal.tools.train import parse_args, run
from retina_focal.training import run_lock
from retina_focal.training.run_lock import LOCK, sole_run


@pytest.fixture
def holder(tmp_path) -> Iterator[int]:
    """A process that holds the lock of `tmp_path / "run"`, with a fork as a loader's worker is."""
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        with sole_run(str(tmp_path / "run"), 9, False):
            worker = os.fork()
            if worker:
                os.write(write, b"%d" % worker)
            time.sleep(60)
            os._exit(0)
    worker = int(os.read(read, 20))
    yield pid
    for x in (pid, worker):
        with contextlib.suppress(ProcessLookupError):
            os.kill(x, signal.SIGKILL)
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, 0)
    os.close(read)
    os.close(write)


def test_a_second_training_is_refused_and_the_lock_of_a_killed_one_is_free(
    holder, data, tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(run_lock, "WAIT", 0.1)
    folder = tmp_path / "run"
    before = {x: x.read_bytes() for x in folder.iterdir()}
    words = rf"another training holds '{folder}': process {holder} on .* since 2"
    args = parse_args(train_command(data, folder)[0][1:])
    with pytest.raises(SystemExit, match=words):
        run(args)
    assert {x: x.read_bytes() for x in folder.iterdir()} == before
    assert "waits up to 0.1 s: another training holds" in caplog.text
    os.kill(holder, signal.SIGKILL)
    os.waitpid(holder, 0)
    assert (folder / LOCK).exists()
    with sole_run(str(folder), 9, False):
        assert f"process {os.getpid()} on " in (folder / LOCK).read_text()
    assert folder.is_dir() and not (folder / LOCK).exists()  # another has made the folder


def test_a_training_waits_for_one_that_is_about_to_end(holder, tmp_path):
    before = time.monotonic()
    threading.Timer(0.5, os.kill, (holder, signal.SIGKILL)).start()
    with sole_run(str(tmp_path / "run"), 9, False):
        assert 0.2 < time.monotonic() - before < 3


@pytest.mark.parametrize(
    ("environment", "goes_on", "seconds"),
    [
        ({}, True, 5),
        ({"SLURM_RESTART_COUNT": "0"}, True, 5),
        ({"SLURM_RESTART_COUNT": "1"}, True, 120),
        ({"TORCHELASTIC_RESTART_COUNT": "2"}, True, 120),
        ({"TORCHELASTIC_RESTART_COUNT": "2"}, False, 5),
    ],
)
def test_what_a_launcher_starts_again_waits_as_long_as_a_lost_machine_holds(
    environment, goes_on, seconds, tmp_path, monkeypatch
):
    waits = []
    monkeypatch.setattr(run_lock, "_locked", lambda path, wait: waits.append(wait))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    for timeout in (1000, 20):
        with sole_run(str(tmp_path), timeout, goes_on):
            pass
    assert waits == [seconds, min(seconds, 10)]


def test_a_folder_that_was_made_for_nothing_is_removed(tmp_path):
    with sole_run(str(tmp_path / "a/b"), 9, False):
        assert (tmp_path / "a/b" / LOCK).is_file()
    assert not list(tmp_path.iterdir())
    with sole_run(str(tmp_path / "a/b"), 9, False):
        (tmp_path / "a/kept").write_text("")
    assert [x.name for x in tmp_path.rglob("*")] == ["a", "kept"]


def test_a_file_that_was_removed_meanwhile_locks_nothing(tmp_path, monkeypatch):
    """The holder ends between another's opening and locking of the same file."""
    lockf, opened = fcntl.lockf, []

    def removed_before(file, flags):
        if not opened:
            (tmp_path / LOCK).unlink()
        opened.append(file)
        return lockf(file, flags)

    monkeypatch.setattr(fcntl, "lockf", removed_before)
    with sole_run(str(tmp_path), 9, False):
        assert (tmp_path / LOCK).is_file() and len(opened) == 2


def test_a_file_system_without_locks_is_warned_of(tmp_path, monkeypatch, caplog):
    def without(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", without)
    with sole_run(str(tmp_path), 9, False):
        assert "has no locks (No locks available): a second training" in caplog.text


@pytest.mark.parametrize(
    "folder",
    ["s3://a/x", "https://a/x", "x/\udcff", "a" * 300, "file", "link", "fifo"],
)
def test_what_is_no_folder_is_refused_in_words(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    Path("link").symlink_to("nowhere")
    os.mkfifo("fifo")
    before = sorted(tmp_path.iterdir())
    words = "OUTPUT_DIR is|File name too long"
    with pytest.raises(UserError, match=words), sole_run(folder, 9, False):
        pass
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("kind", ["folder", "link"])
def test_a_lock_that_is_no_file_is_refused_in_words(kind, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    if kind == "folder":
        (folder / LOCK).mkdir()
    else:
        (folder / LOCK).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"can't write '.*lock'"), sole_run(str(folder), 9, False):
        pass
    assert not (tmp_path / "elsewhere").exists()
