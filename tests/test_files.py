"""Files written whole or not at all; wheels fetched once and checked."""

import errno
import hashlib
import os
import zipfile
from types import SimpleNamespace

import pytest

from retina_focal import files
from retina_focal.errors import UserError
from retina_focal.files import (
    Wheel,
    cached_wheel,
    leads_outside,
    open_regular,
    whole_file,
    write_whole,
)


def test_an_interrupted_write_leaves_the_file_as_it_was(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("whole")
    with pytest.raises(KeyboardInterrupt), whole_file(path) as temporary:
        temporary.write_text("ha")
        raise KeyboardInterrupt
    assert path.read_text() == "whole"
    assert list(tmp_path.iterdir()) == [path]


def test_text_and_bytes_take_the_place_of_the_file_and_folders_are_made(tmp_path):
    path = tmp_path / "new" / "folder" / "a"
    for content in ("old", "\u03b3 = 2\n", b"\x89PNG"):
        write_whole(path, content)
        assert path.read_bytes() == (content if isinstance(content, bytes) else content.encode())
    assert list(path.parent.iterdir()) == [path]


def test_what_cannot_be_written_is_named_with_what_to_do(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match=r"can't write '.*file/a': .*name a folder"):
        write_whole(tmp_path / "file" / "a", "")
    with pytest.raises(UserError, match=r"can't write '.*folder': Is a directory"):
        write_whole(tmp_path / "folder", "")
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with (
        pytest.raises(UserError, match=r"can't write '.*full': No space left.*free space"),
        whole_file(tmp_path / "full"),
    ):
        raise full
    assert sorted(x.name for x in tmp_path.iterdir()) == ["file", "folder"]


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError(errno.ENOENT, "No such file", "photo.png"),
        OSError("cannot identify image file"),  # as PIL's, which names no file
    ],
    ids=["another file", "no system error"],
)
def test_an_error_of_what_the_body_reads_is_not_one_of_writing(tmp_path, error):
    with pytest.raises(OSError) as raised, whole_file(tmp_path / "a"):
        raise error
    assert raised.value is error
    assert list(tmp_path.iterdir()) == []


def test_a_device_is_not_even_opened(monkeypatch):
    monkeypatch.setattr("builtins.open", None)
    with pytest.raises(UserError, match="'/dev/zero' is a device"):
        open_regular("/dev/zero")


def test_what_became_a_fifo_since_it_was_looked_at_is_not_waited_for(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "x")
    monkeypatch.setattr(files, "check_regular", lambda path: None)
    with pytest.raises(UserError, match="x' is a FIFO"):
        open_regular(tmp_path / "x")


@pytest.mark.parametrize("name", ["..", "../a", "a/../../b", "a/..", "/a", "/a/../b"])
def test_a_path_leads_outside(name):
    assert leads_outside(name)


@pytest.mark.parametrize("name", ["a", "a/b", "./a", "..a", "a..", "a/...", ""])
def test_a_path_stays_inside(name):
    assert not leads_outside(name)


@pytest.fixture
def index(tmp_path, monkeypatch) -> SimpleNamespace:
    """A folder of one wheel as pip's only source, and an empty cache."""
    folder = tmp_path / "index"
    folder.mkdir()
    path = folder / "retina_focal_sample-1.0-py3-none-any.whl"
    info = "retina_focal_sample-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        # No Python has this version: the contents are data, so that must not matter.
        archive.writestr(
            f"{info}/METADATA",
            "Metadata-Version: 2.1\nName: retina-focal-sample\nVersion: 1.0\n"
            "Requires-Python: >=9\nRequires-Dist: retina-focal-absent\n",
        )
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    return SimpleNamespace(
        wheel=Wheel("retina-focal-sample==1.0", sha256),
        path=path,
        cache=tmp_path / "cache" / "retina_focal",
    )


def test_a_wheel_is_fetched_once_and_again_when_its_copy_is_damaged(index, monkeypatch):
    cached = cached_wheel(index.wheel)
    content = index.path.read_bytes()
    assert cached.read_bytes() == content
    cached.write_bytes(content[:-9])
    assert cached_wheel(index.wheel).read_bytes() == content
    monkeypatch.delenv("PIP_FIND_LINKS")  # from here on pip finds nothing
    assert cached_wheel(index.wheel).read_bytes() == content
    assert list(index.cache.iterdir()) == [cached]


def test_a_wheel_with_another_hash_is_refused_and_not_kept(index):
    with pytest.raises(UserError, match=r"isn't 000000.* refused it.*type"):
        cached_wheel(Wheel(index.wheel.requirement, "0" * 64))
    assert list(index.cache.iterdir()) == []
