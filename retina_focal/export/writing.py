"""A trained model becomes an exported file: written beside its place, proved, then moved there."""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from retina_focal.errors import UserError
from retina_focal.export.beside import write_runtime
from retina_focal.export.metadata import Metadata
from retina_focal.export.onnx_format import write_onnx
from retina_focal.export.openvino_format import quantize, to_openvino
from retina_focal.export.page import write_page
from retina_focal.export.proof import Row, prove
from retina_focal.export.runners import open_exported
from retina_focal.export.sessions import optional
from retina_focal.export.torch_formats import write_torch_export, write_torchscript
from retina_focal.export.triton_repository import write_triton_repository
from retina_focal.files import write_error
from retina_focal.retinanet import FocalRetinaNet

PAGE, TRITON = "page.html", "triton"
WRITING = ".exporting-"
ONNX = (("onnx", "export"), ("onnxscript", "export"), ("onnxruntime", "export"))


@dataclass(frozen=True)
class Format:
    """One that `retina-focal export` writes."""

    file: str
    precisions: tuple[str, ...] = ("fp32",)
    needs: tuple[tuple[str, str], ...] = ()  # packages, and the extra that each is of


FORMATS = {
    "onnx": Format("model.onnx", needs=ONNX),
    "openvino": Format(
        "model.xml", ("fp32", "bf16", "int8"), (*ONNX[:2], ("openvino", "openvino"))
    ),
    "torch-export": Format("model.pt2"),
    "torchscript": Format("model.torchscript"),
}


def expect_installed(format: str, precision: str) -> None:
    """Look for what writes and runs a format, before all else takes minutes (UserError)."""
    quantizer = (("nncf", "openvino"),) if precision == "int8" else ()
    for name, extra in (*FORMATS[format].needs, *quantizer):
        optional(name, extra)


def export(
    model: FocalRetinaNet,
    metadata: Metadata,
    format: str,
    output: Path,
    pictures: list[np.ndarray],
    calibration: Iterable[np.ndarray] = (),
    page: bool = False,
    triton: str | None = None,
    sparse_boxes: bool = False,
) -> tuple[Path, list[Row]]:
    """Write an exported model into a folder, if it detects what the model does.

    Args:
        metadata: its precision is one of the format's.
        format: one of `FORMATS`.
        output: the folder; what it holds of another export of this format is replaced.
        pictures: see `prove`.
        calibration: for int8; see `quantize`.
        page: whether `PAGE` is written too; of onnx.
        triton: name of the model in the repository `TRITON`, which is then written too; of onnx.
        sparse_boxes: see `ExportedNetwork`; of onnx, and of openvino but in int8.
    Returns:
        The path of the model, and what was compared.
    Raises:
        UserError: see `prove` and the writer of the format; nothing is written then.
    """
    assert metadata.precision in FORMATS[format].precisions, metadata.precision
    with whole_folder(output) as folder:
        path = folder / FORMATS[format].file
        if format == "openvino":
            _write_openvino(model, metadata, folder, calibration, sparse_boxes)
        elif format == "onnx":
            write_onnx(model, metadata, path, sparse_boxes)
        else:
            WRITERS[format](model, metadata, path)
        exported = open_exported(path)
        exported.label = str(output / path.name)
        rows = prove(exported, model, pictures)
        if format == "onnx" and metadata.nms == "inside":
            write_runtime(folder)
        if page:
            write_page(path, folder / PAGE)
        if triton is not None:
            write_triton_repository(path, folder / TRITON, triton)
    return output / path.name, rows


WRITERS: dict[str, Callable[[FocalRetinaNet, Metadata, Path], None]] = {
    "torch-export": write_torch_export,
    "torchscript": write_torchscript,
}


def _write_openvino(
    model: FocalRetinaNet,
    metadata: Metadata,
    folder: Path,
    calibration: Iterable[np.ndarray],
    sparse_boxes: bool,
) -> None:
    onnx = folder / "model.onnx"
    write_onnx(model, replace(metadata, precision="fp32"), onnx, sparse_boxes)
    if metadata.precision == "int8":
        quantize(onnx, folder, calibration, metadata)
    else:
        to_openvino(onnx, folder, metadata.precision, metadata)
    onnx.unlink()


@contextmanager
def whole_folder(output: Path) -> Iterator[Path]:
    """A temporary folder whose files move to `output` at the end: all or none.

    Raises:
        UserError: the folder can't be written to, the disk is full, or another export holds it.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
        held = os.open(output, os.O_RDONLY)
    except OSError as error:
        raise write_error(output, error) from error
    try:
        if _hold(output, held):
            for left in output.glob(f"{WRITING}*"):  # by an export that was killed
                shutil.rmtree(left, ignore_errors=True)
        with _moved(output) as folder:
            yield folder
    finally:
        os.close(held)


def _hold(output: Path, held: int) -> bool:
    """Lock an open folder until it is closed; the system drops the lock of a killed process.

    Returns:
        False: its file system has no locks, so that another export may write into it.
    """
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UserError(
            f"another export writes into '{output}'; wait for its end, or name another folder: "
            "--output DIR"
        ) from error
    except OSError:
        return False
    return True


@contextmanager
def _moved(output: Path) -> Iterator[Path]:
    try:
        folder = Path(tempfile.mkdtemp(dir=output, prefix=WRITING))
    except OSError as error:
        raise write_error(output, error) from error
    try:
        yield folder
        for file in sorted(x for x in folder.rglob("*") if x.is_file()):
            target = output / file.relative_to(folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(file, target)
    except OSError as error:
        raise write_error(output, error) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        with suppress(OSError):
            output.rmdir()  # where it is empty
