"""OpenVINO's format, made of an exported ONNX file; in int8 after training by NNCF.

Of a torch module or program OpenVINO makes no model that finds the same.
"""

import logging
import os
import sys
from collections.abc import Iterable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np

from retina_focal.errors import UserError
from retina_focal.export.metadata import KEY, Metadata
from retina_focal.export.sessions import optional
from retina_focal.files import whole_file

if TYPE_CHECKING:
    import openvino

FILE = "model.xml"  # beside it model.bin, with the weights
CONVOLUTIONS = ("Convolution", "GroupConvolution")
# Pictures whose activations give the ranges.
MOST_PICTURES = 100


def to_openvino(
    onnx_path: str | Path, output_dir: str | Path, precision: str, metadata: Metadata
) -> Path:
    """Write model.xml and model.bin of an exported ONNX file.

    Args:
        precision: "fp32" or "bf16". The files are the same but for the metadata: the precision is
            chosen when the model is compiled, as `sessions.open_openvino` does.
        metadata: of the ONNX file.
    Returns:
        The path of model.xml.
    Raises:
        UserError: OpenVINO is not installed, or the folder can't be written to.
    """
    assert precision in ("fp32", "bf16"), precision
    model = optional("openvino", "openvino").Core().read_model(onnx_path)
    return _save(model, Path(output_dir), replace(metadata, precision=precision))


def quantize(
    onnx_path: str | Path,
    output_dir: str | Path,
    images: Iterable[np.ndarray],
    metadata: Metadata,
) -> Path:
    """Write model.xml and model.bin whose convolutions compute in int8; as `to_openvino`.

    Args:
        images: a batch each, as the model takes it (see `Session`): pictures like those that it
            will see; `MOST_PICTURES` of them count.
    Raises:
        UserError: see `to_openvino`; NNCF is not installed, or there is no picture.
    """
    nncf = _nncf()
    model = optional("openvino", "openvino").Core().read_model(onnx_path)
    _fold_constants(model)
    images = list(images)[:MOST_PICTURES]
    if not images:
        raise UserError("int8 needs pictures to be calibrated on; add: --calibration FOLDER")
    quantized = nncf.quantize(
        model,
        nncf.Dataset(images),
        subset_size=len(images),
        ignored_scope=nncf.IgnoredScope(names=beside_network(model), validate=False),
        # It would correct the biases of the head, which the levels share, once for each level.
        advanced_parameters=nncf.AdvancedQuantizationParameters(disable_bias_correction=True),
    )
    return _save(quantized, Path(output_dir), replace(metadata, precision="int8"))


def beside_network(model: "openvino.Model") -> list[str]:
    """Names of the operations before the first and behind the last convolution.

    Those normalise pixels, and make boxes of deltas: eight bits are too few for either.
    """
    operations = model.get_ordered_ops()
    is_behind, is_before = set(), set()  # of a convolution
    for operation in operations:
        inputs = {x.get_source_output().get_node().get_friendly_name() for x in operation.inputs()}
        name = operation.get_friendly_name()
        if operation.get_type_name() in CONVOLUTIONS or inputs & is_behind:
            is_behind.add(name)
    for operation in reversed(operations):
        outputs = {y.get_node().get_friendly_name() for x in operation.outputs()
                   for y in x.get_target_inputs()}  # fmt: skip
        name = operation.get_friendly_name()
        if operation.get_type_name() in CONVOLUTIONS or outputs & is_before:
            is_before.add(name)
    names = [x.get_friendly_name() for x in operations if x.get_type_name() != "Constant"]
    return [x for x in names if not (x in is_behind and x in is_before)]


def _fold_constants(model: "openvino.Model") -> None:
    """Compute what depends on no input.

    A depthwise convolution's weight is a constant that is reshaped, in which NNCF sees no weight:
    it would stay in fp32, be rounded at each call, and its convolution be computed in fp32.
    """
    passes = import_module("openvino.passes")
    manager = passes.Manager()
    manager.register_pass(passes.ConstantFolding())
    manager.run_passes(model)


def _save(model: "openvino.Model", folder: Path, metadata: Metadata) -> Path:
    model.set_rt_info(metadata.to_json(), [KEY])
    path = folder / FILE
    with whole_file(path) as temporary:
        sys.modules["openvino"].save_model(model, temporary, compress_to_fp16=False)
        os.replace(temporary.with_suffix(".bin"), path.with_suffix(".bin"))
    return path


def _nncf() -> ModuleType:
    nncf = optional("nncf", "openvino")
    logging.getLogger("nncf").setLevel(logging.WARNING)
    return nncf
