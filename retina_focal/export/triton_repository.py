"""A model repository for Triton Inference Server, which serves it over HTTP and gRPC."""

import re
import shutil
from pathlib import Path

from retina_focal.errors import UserError
from retina_focal.export.metadata import KEY
from retina_focal.export.runners import open_session
from retina_focal.export.sessions import optional
from retina_focal.files import whole_file, write_whole

# Requests for images of one size that wait at the same time are run together.
MAX_BATCH_SIZE = 8
TYPES = {1: "TYPE_FP32", 2: "TYPE_UINT8", 7: "TYPE_INT64"}  # by onnx.TensorProto.DataType


def write_triton_repository(model: str | Path, folder: str | Path, name: str) -> Path:
    """Write ``NAME/config.pbtxt`` and ``NAME/1/model.onnx`` below a folder.

    The metadata is the parameter `retina_focal`: a client has to resize pictures by it.

    Args:
        model: the ONNX file that `retina-focal export` wrote.
        folder: for ``tritonserver --model-repository``.
        name: that clients ask for.
    Returns:
        the folder ``NAME``.
    Raises:
        UserError: the model can't be used, or the name is none.
    """
    check_name(name)
    model, target = Path(model), Path(folder, name)
    metadata = open_session(model, threads=1).metadata
    graph = optional("onnx", "export").load(model, load_external_data=False).graph
    lines = [
        f'name: "{name}"',
        'backend: "onnxruntime"',
        f"max_batch_size: {MAX_BATCH_SIZE}",
        *(f"input {_tensor(value)}" for value in graph.input),
        *(f"output {_tensor(value)}" for value in graph.output),
        "dynamic_batching { }",
        f'parameters {{ key: "{KEY}" value {{ string_value: {_quoted(metadata.to_json())} }} }}',
    ]
    with whole_file(target / "1" / "model.onnx") as temporary:
        shutil.copyfile(model, temporary)
    write_whole(target / "config.pbtxt", "\n".join([*lines, ""]))
    return target


def check_name(name: str) -> None:
    """Raises UserError where the name, which becomes a folder's, can't be a model's."""
    if not re.fullmatch(r"\w[\w.-]*", name, re.ASCII):
        raise UserError(
            f"'{name}' can't be a model's name in Triton; expected letters, digits, '_', '-' and "
            "'.', such as --triton cells"
        )


def _tensor(value: object) -> str:
    """An input or output of the graph, without the images of a batch."""
    kind = value.type.tensor_type
    dims = [x.dim_value or -1 for x in kind.shape.dim][1:]
    return f'{{ name: "{value.name}" data_type: {TYPES[kind.elem_type]} dims: {dims} }}'


def _quoted(text: str) -> str:
    """A string of protobuf's text format, in UTF-8."""
    return '"' + text.replace("\\", r"\\").replace('"', r"\"") + '"'
