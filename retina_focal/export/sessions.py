"""An exported file in its own runtime, as a function of numpy arrays.

A `.pt2` or `.torchscript` file is a program: opening one runs what it says.
"""

import logging
import re
import sys
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree

import numpy as np
import torch
from torch import Tensor

from retina_focal.errors import UserError
from retina_focal.export.metadata import AGAIN, KEY, Metadata
from retina_focal.files import check_regular

OUTPUTS = ("boxes", "scores", "classes")
IR_VERSIONS = (10, 11)  # of OpenVINO's .xml
METADATA_BYTES = 10**7  # more is no metadata
WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"  # onnxruntime's
STRIDE = 32  # an exported program takes images that are padded to multiples of it

Arrays = tuple[np.ndarray, np.ndarray, np.ndarray]
Run = Callable[[np.ndarray], Sequence[np.ndarray]]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Session:
    """A model that is ready to run."""

    metadata: Metadata
    run: Run

    def __call__(self, images: np.ndarray) -> Arrays:
        """
        Args:
            images: (N, 3, H, W) float32 in [0, 255], or (N, H, W, 3) uint8, as `metadata` says; in
                its channel order, and all of one size.
        Returns:
            boxes: (N, D, 4) float32, XYXY in pixels of the images.
            scores: (N, D) float32, falling in each image; 0 in unused rows.
            classes: (N, D) int64; -1 in unused rows.
        """
        boxes, scores, classes = self.run(images)
        return boxes, scores, classes


def open_onnx(path: Path, threads: int) -> Session:
    """A session of onnxruntime on the processor; see `runners.open_session`."""
    onnxruntime = optional("onnxruntime", "export")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4  # errors are raised
    # Its threads would go on to spin for 40 ms after each run, which slows what is run next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    # A stranger's model might name another file as its weights; below a file there is none.
    options.add_session_config_entry(WEIGHTS_FOLDER, str(path))
    try:
        model = path.read_bytes()  # given the path it would look beside the model
        session = onnxruntime.InferenceSession(model, options, ["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's errors have no other base in common
        raise UserError(_why_no_onnx(path, str(error), onnxruntime.__version__)) from error
    metadata = _metadata(path, session.get_modelmeta().custom_metadata_map.get(KEY))
    inputs, outputs = session.get_inputs(), session.get_outputs()
    _expect_names(path, [x.name for x in inputs], ("image",))
    _expect_names(path, [x.name for x in outputs], OUTPUTS)
    _expect_types(path, metadata, {x.name: x.type for x in (*inputs, *outputs)})
    return Session(metadata, lambda images: session.run(OUTPUTS, {"image": images}))


def open_openvino(path: Path, threads: int) -> Session:
    """A session of OpenVINO on the processor, in the precision that the metadata names."""
    openvino = optional("openvino", "openvino")
    _expect_ir(path)
    core = openvino.Core()
    try:
        model = core.read_model(path)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        raise UserError(f"OpenVINO can't read '{path}': {reason}; {AGAIN}") from error
    metadata = _metadata(path, model.get_rt_info(KEY).value if model.has_rt_info(KEY) else None)
    _expect_names(path, [x for y in model.inputs for x in y.names], ("image",))
    names = [x for y in model.outputs for x in y.names if x in OUTPUTS]
    _expect_names(path, names, OUTPUTS)
    ends = {"image": model.inputs[0], **{x: model.output(x) for x in OUTPUTS}}
    _expect_types(path, metadata, {name: str(x.element_type) for name, x in ends.items()})
    is_bf16 = metadata.precision == "bf16"
    if is_bf16 and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        logger.warning("'%s' is for bf16, which this processor lacks; it runs in fp32", path)
        is_bf16 = False
    settings = {
        # Left to itself OpenVINO takes bf16 where the processor has it.
        "INFERENCE_PRECISION_HINT": "bf16" if is_bf16 else "f32",
        "INFERENCE_NUM_THREADS": threads,
        "PERFORMANCE_HINT": "LATENCY",
    }
    request = core.compile_model(model, "CPU", settings).create_infer_request()

    def run(images: np.ndarray) -> list[np.ndarray]:
        request.infer({"image": images})
        return [request.get_tensor(name).data.copy() for name in OUTPUTS]

    return Session(metadata, run)


def open_torch_export(path: Path, threads: int) -> Session:
    """A session of a program of `torch.export`; it is given padded images and their sizes."""
    metadata = _metadata(path, _entry(path))
    try:
        model = torch.export.load(path).module()
    except Exception as error:  # what torch raises has no other base in common
        raise UserError(_why_no_program(path, error)) from error
    return Session(metadata, padded_run(model, metadata, threads))


def padded_run(model: Callable[..., Sequence[Tensor]], metadata: Metadata, threads: int) -> Run:
    """Call a program of `torch.export`, which takes padded images and their sizes."""
    is_uint8 = metadata.dtype == "uint8"

    def run(images: np.ndarray) -> list[np.ndarray]:
        height, width = images.shape[1:3] if is_uint8 else images.shape[2:]
        below, right = (_padded(x) - x for x in (height, width))
        around = [(0, 0), (0, below), (0, right), (0, 0)]
        if not is_uint8:
            around = [around[0], around[3], *around[1:3]]
        sizes = torch.tensor([[height, width]] * len(images))
        return _run_torch(model, threads, torch.from_numpy(np.pad(images, around)), sizes)

    return run


def open_torchscript(path: Path, threads: int) -> Session:
    """A session of TorchScript."""
    metadata = _metadata(path, _entry(path))
    try:
        model = torch.jit.load(path, map_location="cpu").eval()
    except Exception as error:
        raise UserError(_why_no_program(path, error)) from error
    return Session(metadata, lambda x: _run_torch(model, threads, torch.from_numpy(x)))


def _run_torch(
    model: Callable[..., Sequence[Tensor]], threads: int, *inputs: Tensor
) -> list[np.ndarray]:
    with torch.inference_mode(), _threads(threads):
        return [x.numpy() for x in model(*inputs)]


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """As many for torch inside; then as before."""
    before = torch.get_num_threads()
    if count == before:  # setting it anew would cost
        yield
        return
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _padded(side: int) -> int:
    return -(-side // STRIDE) * STRIDE


def _why_no_program(path: Path, error: Exception) -> str:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return (
        f"torch {torch.__version__} can't read '{path}': {reason}; it is damaged, or of a newer "
        f"torch: upgrade torch, copy the file again, or {AGAIN}"
    )


def optional(name: str, extra: str) -> ModuleType:
    """A package that not everybody has installed.

    Raises:
        UserError: it isn't installed.
    """
    try:
        with _silent():
            return import_module(name)
    except ImportError as error:
        raise UserError(
            f"{name} is not installed ({error}); type: pip install 'retina_focal[{extra}]'"
        ) from error


@contextmanager
def _silent() -> Iterator[None]:
    """Inside, OpenVINO and NNCF find no `openvino_telemetry`, by which they would report their use
    from their import on, unless the user has opted out. What they find at import they keep."""
    name = "openvino_telemetry"
    before = sys.modules.get(name)
    sys.modules[name] = None  # an import of it fails
    try:
        yield
    finally:
        del sys.modules[name]
        if before is not None:
            sys.modules[name] = before


def _why_no_onnx(path: Path, reason: str, version: str) -> str:
    newer = re.search(r"(IR version:|Opset) \d+", reason)
    if newer:
        return (
            f"'{path}' is of a newer version of ONNX than onnxruntime {version} knows "
            f"({newer[0]}): upgrade it (pip install -U onnxruntime), or {AGAIN}"
        )
    if re.search("External data|should be stored in", reason):
        return f"'{path}' keeps weights in another file, which is not read; {AGAIN}"
    reason = reason.rpartition("failed:")[2].strip() or reason
    with path.open("rb") as file:
        begins_as_onnx = file.read(1) == b"\x08"  # the field that a writer puts first
    if not begins_as_onnx:
        return f"'{path}' is no ONNX model ({reason}); {AGAIN}"
    return f"'{path}' is cut off or damaged ({reason}); copy it again, or {AGAIN}"


def _expect_ir(path: Path) -> None:
    """Look at the head of an `.xml`, which OpenVINO would also try to read as other formats."""
    check_regular(path)
    try:
        _, root = next(ElementTree.iterparse(path, ["start"]))
    except (ElementTree.ParseError, StopIteration) as error:
        raise UserError(f"'{path}' is no OpenVINO model ({error}); {AGAIN}") from error
    version = root.get("version", "")
    if root.tag != "net" or not version.isdecimal():
        raise UserError(f"'{path}' is no OpenVINO model (it begins with <{root.tag}>); {AGAIN}")
    if int(version) > IR_VERSIONS[-1]:
        raise UserError(
            f"'{path}' is of version {version} of OpenVINO's format; expected "
            f"{' or '.join(map(str, IR_VERSIONS))}: upgrade retina_focal and OpenVINO, or {AGAIN}"
        )
    weights = path.with_suffix(".bin")
    if not weights.exists():
        raise UserError(f"'{weights}' is missing: '{path.name}' holds no weights; copy both files")


def _entry(path: Path) -> str | None:
    """The metadata of a `.pt2` or `.torchscript`, without running anything; None: it has none."""
    check_regular(path)
    try:
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                if info.filename.endswith(f"/extra/{KEY}") and info.file_size < METADATA_BYTES:
                    return archive.read(info).decode()
    except (zipfile.BadZipFile, UnicodeDecodeError, NotImplementedError, RuntimeError) as error:
        with path.open("rb") as file:
            is_zip = file.read(2) == b"PK"
        what = "is cut off or damaged" if is_zip else "is no model"
        raise UserError(f"'{path}' {what} ({error}); copy it again, or {AGAIN}") from error
    return None


def _metadata(path: Path, text: str | None) -> Metadata:
    if text is None:
        raise UserError(f"'{path}' has no metadata '{KEY}', so it is no export of ours; {AGAIN}")
    return Metadata.from_json(text, str(path))


def _expect_names(path: Path, found: Sequence[str], expected: Sequence[str]) -> None:
    if sorted(found) != sorted(expected):
        raise UserError(
            f"'{path}' has {', '.join(found) or 'nothing'}, expected {', '.join(expected)}: its "
            f"metadata is of another model; {AGAIN}"
        )


def _expect_types(path: Path, metadata: Metadata, found: dict[str, str]) -> None:
    """`found` is as the runtime writes them: "tensor(float)", "<Type: 'uint8_t'>"."""
    image = "uint8" if metadata.dtype == "uint8" else "float"
    expected = {"image": image, "boxes": "float", "scores": "float", "classes": "int64"}
    for name, kind in expected.items():
        if not re.search(rf"\b{kind}(32|_t)?\b", found[name]):
            raise UserError(
                f"'{path}' is of another model than its metadata: its {name} is of the type "
                f"{found[name]}, expected {kind}; {AGAIN}"
            )
