"""Files of torch.save: looked through without running them, then read by torch.load.

`weights_only` keeps torch.load from running what a file asks for. It does not bound memory: a size
in the file is taken at its word. So the file's program is run as data first (`pickles`).
"""

import math
import zipfile
from collections.abc import Callable, Mapping
from pickle import UnpicklingError
from typing import BinaryIO, NamedTuple

import torch

from retina_focal.weights.pickles import (
    Name,
    NotWeights,
    encode_latin1,
    ordered_dict,
    read_pickle,
)

# The pickle that a file of torch.save began with before it was a zip.
LEGACY_TORCH = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19."
LEGACY_PARTS = 5  # that mark, a version, the machine, the contents, the keys of the storages


class _Storage(NamedTuple):
    """Of tensors in a file of torch."""

    key: str
    num_elements: int
    num_bytes: int


def _storage(key: object) -> _Storage:
    """("storage", type, key, device, elements, ...), as torch writes it."""
    kind, type_name, name, _, num_elements = key[:5]
    types = [type(x) for x in (type_name, name, num_elements)]
    # Before the type is looked up: the hash of a nested tuple recurses as deep as that.
    if kind != "storage" or types != [Name, str, int] or num_elements < 0:
        raise TypeError("a storage has another description than torch gives it")
    return _Storage(name, num_elements, num_elements * _ITEM_BYTES[type_name])


def _tensor(
    storage: _Storage,
    offset: int,
    size: tuple,
    stride: tuple,
    requires_grad: bool = False,
    hooks: dict | None = None,
) -> None:
    """Its elements lie in its storage: a size can't ask for more memory than the file has."""
    _check_tensor(storage.num_elements, offset, size, stride, hooks)


def _tensor_of_bytes(
    storage: _Storage,
    offset: int,
    size: tuple,
    stride: tuple,
    requires_grad: bool,
    hooks: dict,
    dtype: str,
) -> None:
    """As `_tensor`, of a dtype that no storage has a name for."""
    if type(dtype) is not Name:
        raise TypeError("a tensor has no dtype")
    _check_tensor(storage.num_bytes // _DTYPE_BYTES[dtype], offset, size, stride, hooks)


def _check_tensor(
    num_elements: int, offset: int, size: tuple, stride: tuple, hooks: dict | None
) -> None:
    numbers = [offset, *size, *stride]
    if any(type(x) is not int or x < 0 for x in numbers) or len(size) != len(stride):
        raise TypeError("a tensor has no whole numbers as its size")
    if hooks:
        raise NotWeights("has a tensor that calls functions")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if 0 not in size and (last >= num_elements or math.prod(size) > num_elements):
        raise NotWeights("has a tensor that is larger than what the file holds of it")


def _counter(counts: dict) -> dict:
    if type(counts) is not dict:
        raise TypeError("a Counter of no dict")
    return dict(counts)


_ITEM_BYTES = {
    "torch.storage.UntypedStorage": 1,
    **{
        f"torch.{name}Storage": size
        for size, names in {
            1: ("Byte", "Char", "Bool"),
            2: ("Half", "BFloat16", "Short"),
            4: ("Float", "Int"),
            8: ("Double", "Long", "ComplexFloat"),
            16: ("ComplexDouble",),
        }.items()
        for name in names
    },
}
_DTYPE_BYTES = {str(x): x.itemsize for x in vars(torch).values() if isinstance(x, torch.dtype)}
# Ours only look; what the file holds is made by torch.load.
_TORCH: Mapping[str, Callable | None] = {
    **dict.fromkeys(_ITEM_BYTES),
    **dict.fromkeys(_DTYPE_BYTES),
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_of_bytes,
    "torch._utils._rebuild_parameter": lambda *_: None,
    "torch.Size": lambda *_: None,
    "torch.device": lambda *_: None,
    "__builtin__.complex": lambda *_: None,
    "_codecs.encode": encode_latin1,
    "collections.OrderedDict": ordered_dict,
    "collections.Counter": _counter,
}


def read_torch_zip(file: BinaryIO, size: int, mmap: bool = False) -> dict:
    """A checkpoint of torch.save.

    Args:
        size: bytes of the file.
        mmap: leave the tensors in the file until they are used, without a look at its checksums.
    Raises:
        NotWeights: it is not whole, or holds more than weights.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            records = {record.filename: record for record in archive.infolist()}
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OSError) as error:
        raise NotWeights(f"is not a whole file of weights ({error})") from error
    is_stored = all(record.compress_type == zipfile.ZIP_STORED for record in records.values())
    if not is_stored or sum(record.file_size for record in records.values()) > size:
        raise NotWeights("is a compressed zip, which torch.save does not write")
    programs = [name for name in records if name.endswith("/data.pkl")]
    if len(programs) != 1:
        raise NotWeights("is a zip, but not one of torch.save")
    (program,) = programs
    folder = program.removesuffix("data.pkl")
    if f"{folder}constants.pkl" in records:
        raise NotWeights("is a TorchScript program, not weights alone")
    file.seek(_contents_offset(file, records[program]))

    def stored(key: object) -> _Storage:
        storage = _storage(key)
        record = records[f"{folder}data/{storage.key}"]
        if storage.num_bytes != record.file_size:
            raise NotWeights(
                f"holds {record.file_size:,} bytes of storage {storage.key}, expected "
                f"{storage.num_bytes:,}"
            )
        return storage

    read_pickle(file, file.tell() + records[program].file_size, _TORCH, stored)
    # torch looks at no checksum, and may be told to write none.
    if not mmap and any(record.CRC for record in records.values()):
        _check_sums(file)
    return _load_torch(file, mmap)


def _check_sums(file: BinaryIO) -> None:
    """0.7 s for 300 MB, which torch.load reads in 0.4."""
    try:
        with zipfile.ZipFile(file) as archive:
            wrong = archive.testzip()
    except (zipfile.BadZipFile, EOFError, OSError, RuntimeError, ValueError) as error:
        wrong = str(error)
    if wrong:
        raise NotWeights(f"is not a whole file of weights: {wrong} is damaged")


def _contents_offset(file: BinaryIO, record: zipfile.ZipInfo) -> int:
    """Where a record's contents begin. Not left to `zipfile`, which refuses the zips of torch.save
    that have no checksums."""
    file.seek(max(record.header_offset, 0))
    header = file.read(30)
    lengths = [int.from_bytes(header[i : i + 2], "little") for i in (26, 28)]
    return file.tell() + sum(lengths)


def read_legacy_torch(file: BinaryIO, size: int) -> dict:
    """See `read_torch_zip`; as torch wrote it before 1.6."""
    known: set[str] = set()
    left = size

    def stored(key: object) -> _Storage:
        nonlocal left
        storage = _storage(key)
        left -= 0 if storage.key in known else storage.num_bytes
        known.add(storage.key)
        if left < 0:
            raise NotWeights("is not a whole file of weights: it is smaller than its tensors")
        return storage

    for _ in range(LEGACY_PARTS):
        part = read_pickle(file, size, _TORCH, stored)
    if not isinstance(part, list) or any(type(key) is not str for key in part):
        raise NotWeights("is not a whole file of weights (the keys of its storages)")
    return _load_torch(file)


def _load_torch(file: BinaryIO, mmap: bool = False) -> dict:
    file.seek(0)
    source = file.name if mmap else file
    try:
        loaded = torch.load(source, map_location="cpu", weights_only=True, mmap=mmap)
    # Of half a file, after what has been looked at above.
    except (
        AssertionError,
        AttributeError,
        EOFError,
        LookupError,
        RuntimeError,
        TypeError,
        UnpicklingError,
        ValueError,
    ) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise NotWeights(f"is not a whole file of weights ({reason})") from error
    if not isinstance(loaded, dict):
        raise NotWeights(f"holds a {type(loaded).__name__}, not names and tensors")
    if "model_state" in loaded and "model" not in loaded:  # of pycls
        model = loaded["model_state"]
        if isinstance(model, dict):
            model = {k: x for k, x in model.items() if not str(k).endswith("num_batches_tracked")}
        return {"model": model, "__author__": "pycls", "matching_heuristics": True}
    if isinstance(loaded.get("state_dict"), dict) and "model" not in loaded:  # of mmdetection
        return {"model": loaded["state_dict"], "meta": loaded.get("meta")}
    return loaded if "model" in loaded else {"model": loaded}
