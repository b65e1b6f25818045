"""Files of weights from a stranger: nothing runs, memory is bounded, and the file is named."""

import copy
import io
import json
import os
import pickle
import re
import socket
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Canary

from retina_focal.errors import UserError
from retina_focal.weights.load import Checkpointer
from retina_focal.weights.torch_files import LEGACY_TORCH


class State:
    """Pickled it is a call of `make` and a state that is then set."""

    def __init__(self, make: Callable, args: tuple, state: object = None):
        self.reduced = (make, args) if state is None else (make, args, state)

    def __reduce__(self) -> tuple:
        return self.reduced


def python(*instructions: bytes) -> bytes:
    return b"\x80\x04" + b"".join(instructions) + b"."


def zoo(value: object, protocol: int = 4) -> bytes:
    return pickle.dumps({"model": {"w": value}, "__author__": "zoo"}, protocol)


def saved(value: object, is_legacy: bool = False) -> bytes:
    buffer = io.BytesIO()
    torch.save({"model": {"w": value}}, buffer, _use_new_zipfile_serialization=not is_legacy)
    return buffer.getvalue()


def torch_zip(
    program: bytes, storage: bytes = b"\0" * 16, method: int = 0, extra: str = "x"
) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        archive.writestr(f"archive/{extra}", "")
        archive.writestr("archive/data.pkl", program)
        archive.writestr("archive/byteorder", "little")
        archive.writestr("archive/data/0", storage)
        archive.writestr("archive/version", "3\n")
    return buffer.getvalue()


def repeated_record() -> bytes:
    """Each storage is as large as the file says, all together are larger than the file."""
    buffer = io.BytesIO(torch_zip(b"}."))
    with zipfile.ZipFile(buffer, "a") as archive:
        for i in range(1, 100):
            record = copy.copy(archive.getinfo("archive/data/0"))
            record.filename = f"archive/data/{i}"
            archive.filelist.append(record)
        record.file_size = record.compress_size = 10**6
        archive.writestr("archive/more", "")
    return buffer.getvalue()


def tensor(num_elements: int, size: str, stride: str = "1", hooks: bytes = b"}") -> bytes:
    """The program of a file of torch with one tensor; pickle's protocol 0."""
    storage = f"(Vstorage\nctorch\nFloatStorage\nV0\nVcpu\nI{num_elements}\ntQ"
    shape = "".join(f"(I{x}\nt".replace(",", "\nI") for x in (size, stride))
    call = f"ctorch._utils\n_rebuild_tensor_v2\n({storage}I0\n{shape}I00\n"
    return b"\x80\x02}Vmodel\n}Vw\n" + call.encode() + hooks + b"tRss."


def safetensors(header: str, length: int | None = None) -> bytes:
    return (
        struct.pack("<Q", len(header) if length is None else length) + header.encode() + b"\0" * 8
    )


def reduced_array(state: tuple) -> State:
    return State(np._core.multiarray._reconstruct, (np.ndarray, (0,), b"b"), state)


TEXT = b"X" + struct.pack("<I", 10**6) + b"x" * 10**6
# What it is: its contents, and what is said of it.
CONTENTS: dict[str, tuple[Callable[[], bytes], str]] = {
    "pickle of a call": (lambda: zoo(Canary()), "import 'io.open'"),
    "pickle of a call, text protocol": (lambda: zoo(Canary(), 0), "import '.*open'"),
    "pickle that calls at its end": (lambda: pickle.dumps(Canary()), "import 'io.open'"),
    "pickle of eval": (lambda: zoo(State(eval, ("1",))), "import 'builtins.eval'"),
    "pickle of a dotted name": (
        lambda: python(b"\x8c\x05numpy\x8c\x0ccore.os.exec\x93"),
        "import 'numpy.core.os.exec'",
    ),
    "pickle of a name that is no text": (lambda: python(b"]]\x93"), "name of an import"),
    "pickle of INST": (lambda: b"(S'true'\nios\nsystem\n.", "instruction INST"),
    "pickle of OBJ": (lambda: python(b"(cnumpy\nndarray\no"), "instruction OBJ"),
    "pickle of an extension": (lambda: python(b"\x82\x01"), "instruction EXT1"),
    "pickle of a persistent id": (lambda: python(b"Nq\x00Q"), "instruction BINPERSID"),
    "pickle that calls a class": (lambda: python(b"cnumpy\nndarray\n)R"), "call numpy.ndarray"),
    "pickle that changes a class": (lambda: python(b"cnumpy\nndarray\n}b"), "change a Name"),
    "array with attributes": (lambda: zoo(reduced_array({"__class__": 1})), "not a whole"),
    "array of objects": (lambda: zoo(np.array([None], object)), "what is no numbers"),
    "array of structures": (lambda: zoo(np.zeros(1, "f4,O")), "what is no numbers"),
    "array larger than its bytes": (
        lambda: zoo(reduced_array((1, (10**6, 10**6), np.dtype("f4"), False, b"1234"))),
        "not a whole pickle",
    ),
    "array of negative size": (
        lambda: zoo(reduced_array((1, (-1, -1), np.dtype("f4"), False, b"1234"))),
        "shape of an array",
    ),
    "number of the memo": (lambda: python(b"Nr\xf0\xff\xff\xff"), "holds a NoneType"),
    "length of a text": (lambda: python(b"\x8d" + b"\xff" * 7 + b"\x3f"), "not a whole pickle"),
    "length of bytes": (lambda: python(b"B\xff\xff\xff\x7f"), "not a whole pickle"),
    "length of a frame": (lambda: python(b"\x95" + b"\xff" * 7 + b"\x3f"), "not a whole pickle"),
    "length of a number": (lambda: python(b"\x8b\xff\xff\xff\x7f"), "not a whole pickle"),
    "digits of a number": (lambda: python(b"I" + b"9" * 10**5 + b"\n"), "not a whole pickle"),
    "half a million dicts": (lambda: python(b"(" + b"}" * 500_000 + b"t"), "500,000 instructions"),
    "a text copied": (
        lambda: python(
            TEXT, b"q\x00c_codecs\nencode\nq\x01(", b"h\x01h\x00\x8c\x06latin1\x86R" * 999, b"t"
        ),
        "more memory",
    ),
    "nested key": (
        lambda: python(b"})" + b"\x85" * 100_000 + b"Ns"),
        "key of a dict",
    ),
    "dict in itself": (lambda: python(b"}q\x00\x8c\x05blobsh\x00s"), "holds a dict under 'blobs'"),
    "zip of a call": (lambda: saved(Canary()), "import 'io.open'"),
    "legacy file of a call": (lambda: saved(Canary(), is_legacy=True), "import 'io.open'"),
    "whole module": (lambda: saved(torch.nn.Linear(1, 1)), "import 'torch.nn.modules"),
    "zip bomb": (
        lambda: torch_zip(tensor(10**7, "1"), bytes(5 * 10**7), zipfile.ZIP_DEFLATED),
        "compressed zip",
    ),
    "compressed zip": (
        lambda: torch_zip(tensor(4, "1"), method=zipfile.ZIP_DEFLATED),
        "compressed zip",
    ),
    "zip of one record under many names": (lambda: repeated_record(), "compressed zip"),
    "storage larger than its record": (lambda: torch_zip(tensor(10**12, "1")), "expected 4,0"),
    "tensor larger than its storage": (lambda: torch_zip(tensor(4, "9")), "larger than what"),
    "tensor beyond its storage": (lambda: torch_zip(tensor(4, "4", "5")), "larger than what"),
    "tensor that repeats its storage": (
        lambda: torch_zip(tensor(4, "1000000,1000000", "0,0")),
        "larger than what",
    ),
    "tensor of negative size": (lambda: torch_zip(tensor(4, "-1")), "no whole numbers"),
    "tensor that calls": (
        lambda: torch_zip(tensor(4, "1", hooks=b"(I0\nctorch\nSize\nd")),
        "calls functions",
    ),
    "nested storage key": (
        lambda: torch_zip(
            b"\x80\x02(Vstorage\nctorch\nFloatStorage\n)" + b"\x85" * 100_000 + b"NI1\ntQ."
        ),
        "a storage has",
    ),
    "nested storage type": (
        lambda: torch_zip(b"\x80\x02(Vstorage\n)" + b"\x85" * 100_000 + b"V0\nNI1\ntQ."),
        "a storage has",
    ),
    "negative storage": (lambda: torch_zip(tensor(-4, "1")), "a storage has"),
    "legacy storage": (
        lambda: saved(torch.zeros(4), True).replace(b"K\x04N", b"J\xff\xff\xff\x7fN", 1),
        "smaller than its tensors",
    ),
    "legacy keys of storages": (
        lambda: LEGACY_TORCH + b"".join(pickle.dumps(x, 2) for x in (1, {}, {"model": {}}, [()])),
        "keys of its storages",
    ),
    "sparse tensor": (lambda: saved(torch.eye(2).to_sparse()), "import 'torch._utils._rebuild_sp"),
    "no tensors": (lambda: saved(3), "holds a int under 'w'"),
    "zip of another program": (
        lambda: torch_zip(b"N.").replace(b"data.pkl", b"date.pkl"),
        "not one of torch.save",
    ),
    "TorchScript": (lambda: torch_zip(b"N.", extra="constants.pkl"), "TorchScript program"),
    "safetensors of a long header": (lambda: safetensors("{}", 2**39), "header of 549,755,813,888"),
    "safetensors of wrong offsets": (
        lambda: safetensors(
            json.dumps({"w": {"dtype": "F32", "shape": [10**6, 10**6], "data_offsets": [0, 8]}})
        ),
        "not a whole safetensors",
    ),
    "safetensors of nested metadata": (
        lambda: safetensors(json.dumps({"__metadata__": {"retina_focal": "[" * 10**6}})),
        "not a whole safetensors",
    ),
    "nothing": (lambda: b"", "is empty"),
    "page of HTML": (lambda: b"\n<!DOCTYPE html><html>404</html>", "page of HTML"),
    "pointer of git-lfs": (lambda: b"version https://git-lfs.github.com/spec/v1\n", "git-lfs"),
    "text": (lambda: b'{"model": {}}', "begins with"),
}  # fmt: skip


def refused(path: Path | str, *, as_tag: bool = False) -> str:
    model = torch.nn.Module()
    model.w = torch.nn.Parameter(torch.zeros(1))
    with pytest.raises(UserError) as raised:
        if as_tag:
            Checkpointer(model, str(Path(path).parent)).resume_or_load("", resume=True)
        else:
            Checkpointer(model).load(str(path))
    assert str(path) in str(raised.value) and "more memory than there is" not in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize("name", CONTENTS)
def test_a_hostile_file_is_named_and_runs_nothing(name, attacked):
    make, message = CONTENTS[name]
    path = attacked / "model.pth"  # what it holds counts, not how it is called
    path.write_bytes(make())
    assert re.search(message, found := refused(path)), found


def test_a_tag_that_names_a_pickle_runs_nothing(attacked):
    (attacked / "model.pkl").write_bytes(zoo(Canary()))
    (attacked / "last_checkpoint").write_text("model.pkl")
    assert "import 'io.open'" in refused(attacked / "model.pkl", as_tag=True)


def make_tar(path: Path) -> None:
    with tarfile.open(path, "w") as archive:
        archive.addfile(tarfile.TarInfo("pickle"))


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))


@pytest.mark.parametrize(
    "make, message",
    [
        (Path.mkdir, "is a folder"),
        (os.mkfifo, "is a FIFO"),
        (make_socket, "is a socket"),
        (make_tar, "begins with b'pickle"),
        (lambda path: path.symlink_to("/dev/zero"), "is a device"),
        (lambda path: path.symlink_to(path.name), "symbolic links"),
        (lambda path: path.symlink_to("absent"), "does not exist"),
    ],
    ids=["folder", "FIFO", "socket", "tar", "device", "link to itself", "link to nothing"],
)
def test_what_is_no_regular_file_is_named_and_not_waited_for(make, message, attacked):
    make(attacked / "model.pth")
    assert message in refused(attacked / "model.pth")
