"""Files of weights, read without running any of their contents, and written."""

import hashlib
import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np
import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor

from retina_focal.errors import UserError
from retina_focal.files import open_regular, whole_file
from retina_focal.weights.pickles import NUMPY, NotWeights, read_pickle
from retina_focal.weights.torch_files import LEGACY_TORCH, read_legacy_torch, read_torch_zip

OTHER_FILE = "name another: MODEL.WEIGHTS FILE (in a LazyConfig: train.init_checkpoint=FILE)"
# Where a safetensors file keeps, as JSON, all of a checkpoint that is not a tensor.
METADATA = "retina_focal"
MAX_HEADER = 10_000_000  # bytes of a safetensors file: the names and shapes of 100,000 tensors


def read_weights(path: str | Path, remedy: str = OTHER_FILE, mmap: bool = False) -> dict:
    """The contents of a file of weights; which format it has, its first bytes tell.

    ``.pth`` of torch.save, ``.pkl`` of detectron2's zoo, of Detectron or Caffe2, ``.safetensors``.

    Args:
        path: of a regular file, or of a link to one.
        remedy: what to type, at the end of an error.
        mmap: leave the tensors of a zip of torch.save in the file until they are used, without a
            look at its checksums.
    Returns:
        "model": names and tensors, or numpy arrays; and what else a checkpoint holds, such as
        "matching_heuristics" True where names are to be matched by their ends, "meta" of
        mmdetection, or "momentum" with the names of Detectron's that are left out.
    Raises:
        UserError: there is no such file, it is not whole, or it holds more than weights.
    """
    with open_regular(path) as file:
        try:
            size = os.fstat(file.fileno()).st_size
            head = file.read(64)
            file.seek(0)
            checkpoint = _reader(head, mmap)(file, size)
            _check_model(checkpoint["model"])
        except NotWeights as error:
            raise UserError(f"'{path}' {error}; {remedy}") from error
        except OSError as error:
            raise UserError(f"can't read '{path}' ({error}); {remedy}") from error
        except MemoryError as error:
            raise UserError(f"'{path}' needs more memory than there is; {remedy}") from error
    return checkpoint


def write_weights(path: Path, checkpoint: dict) -> None:
    """Write a checkpoint whole or not at all; as safetensors where its name ends so.

    Args:
        checkpoint: "model", names and tensors; the rest must be JSON where it is safetensors.
    Raises:
        UserError: the folder can't be written to, or the disk is full.
    """
    with whole_file(path) as temporary:
        if path.suffix == ".safetensors":
            rest = {key: value for key, value in checkpoint.items() if key != "model"}
            # Copies: it refuses tensors that share memory.
            model = {
                name: x.detach().cpu().contiguous().clone()
                for name, x in checkpoint["model"].items()
            }
            save_file(model, temporary, {"format": "pt", METADATA: json.dumps(rest)})
        else:
            torch.save(checkpoint, temporary)


def sha256_of(path: str | Path) -> str:
    """The hash of a file, in hexadecimal digits."""
    with open_regular(path) as file:
        digest = hashlib.sha256()
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()


def check_sha256(path: str, expected: str) -> None:
    """Compare a file with the hash that its user gave (UserError)."""
    found = sha256_of(path)
    if found != expected.lower():
        raise UserError(
            f"'{path}' has the SHA-256 {found}, expected {expected}; delete it, or name the hash "
            "of the file that you want"
        )


def _reader(head: bytes, mmap: bool) -> Callable[[BinaryIO, int], dict]:
    """What reads a file that begins so."""
    # First: its first 8 bytes are a length, and can look like anything.
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 2**40:
        return _read_safetensors
    if head.startswith(b"PK\x03\x04"):
        return partial(read_torch_zip, mmap=mmap)
    if head.startswith(LEGACY_TORCH):
        return read_legacy_torch
    if head[:1] in (b"\x80", b"(", b"}", b"c"):
        return _read_zoo_pickle
    if not head:
        raise NotWeights("is empty; it is not a whole file of weights")
    if head.startswith(b"version https://git-lfs"):
        raise NotWeights("is a pointer of git-lfs, not a whole file of weights (git lfs pull)")
    if head.lstrip().startswith(b"<"):
        raise NotWeights("is a page of HTML or XML, as servers send, not a whole file of weights")
    raise NotWeights(f"is not a whole file of weights (it begins with {head[:8]!r})")


def _check_model(model: object) -> None:
    if not isinstance(model, dict):
        raise NotWeights(f"holds a {type(model).__name__} as its model, not names and tensors")
    for name, value in model.items():
        # numpy's numbers too: Detectron wrote its learning rate among the arrays.
        is_tensor = isinstance(value, Tensor | np.ndarray | np.generic)
        if not isinstance(name, str) or not is_tensor:
            raise NotWeights(
                f"holds a {type(value).__name__} under {str(name)[:100]!r} among its weights, "
                "expected a tensor"
            )


def _read_zoo_pickle(file: BinaryIO, size: int) -> dict:
    loaded = read_pickle(file, size, NUMPY)
    if not isinstance(loaded, dict):
        raise NotWeights(f"holds a {type(loaded).__name__}, not names and tensors")
    if "model" in loaded and "__author__" in loaded:
        return loaded
    # Of Detectron; the ImageNet weights that it starts from have no "blobs".
    blobs, momentum = loaded.get("blobs", loaded), []
    if isinstance(blobs, dict):
        momentum = [name for name in blobs if str(name).endswith("_momentum")]
        blobs = {name: x for name, x in blobs.items() if name not in momentum}
    kind = {"__author__": "Caffe2", "matching_heuristics": True}
    return {"model": blobs, **kind, "momentum": momentum}


def _read_safetensors(file: BinaryIO, size: int) -> dict:
    length = int.from_bytes(file.read(8), "little")
    if length > min(size - 8, MAX_HEADER):
        raise NotWeights(f"is not a whole safetensors file (a header of {length:,} bytes)")
    try:
        with safetensors.safe_open(file.name, framework="pt") as tensors:
            model = {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
            rest = json.loads((tensors.metadata() or {}).get(METADATA, "{}"))
    except (safetensors.SafetensorError, ValueError, RecursionError) as error:
        raise NotWeights(f"is not a whole safetensors file ({error})") from error
    return {**(rest if isinstance(rest, dict) else {}), "model": model}
