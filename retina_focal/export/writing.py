"""A trained model becomes an exported file: written beside its place, proved, then moved there."""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from retina_focal.export.metadata import Metadata
from retina_focal.export.onnx_format import write_onnx
from retina_focal.export.proof import Row, prove
from retina_focal.export.runners import open_exported
from retina_focal.export.torch_formats import write_torch_export, write_torchscript
from retina_focal.files import write_error
from retina_focal.retinanet import FocalRetinaNet

Writer = Callable[[FocalRetinaNet, Metadata, Path], object]


@dataclass(frozen=True)
class Format:
    """One that `retina-focal export` writes."""

    file: str
    write: Writer
    precisions: tuple[str, ...] = ("fp32",)


FORMATS = {
    "onnx": Format("model.onnx", write_onnx),
    "torch-export": Format("model.pt2", write_torch_export),
    "torchscript": Format("model.torchscript", write_torchscript),
}


def export(
    model: FocalRetinaNet,
    metadata: Metadata,
    format: str,
    output: Path,
    pictures: list[np.ndarray],
) -> tuple[Path, list[Row]]:
    """Write an exported model into a folder, if it detects what the model does.

    Args:
        format: one of `FORMATS`.
        output: the folder; what it holds of another export of this format is replaced.
        pictures: see `prove`.
    Returns:
        The path of the model, and what was compared.
    Raises:
        UserError: see `prove` and the writer of the format; nothing is written then.
    """
    with whole_folder(output) as folder:
        path = folder / FORMATS[format].file
        FORMATS[format].write(model, metadata, path)
        rows = prove(open_exported(path), model, pictures)
    return output / path.name, rows


@contextmanager
def whole_folder(output: Path) -> Iterator[Path]:
    """A temporary folder whose files move to `output` at the end: all or none.

    Raises:
        UserError: the folder can't be written to, or the disk is full.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(dir=output, prefix=".writing-"))
    except OSError as error:
        raise write_error(output, error) from error
    try:
        yield folder
        for file in sorted(folder.iterdir()):
            os.replace(file, output / file.name)
    except OSError as error:
        raise write_error(output, error) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        with suppress(OSError):
            output.rmdir()  # where it is empty
