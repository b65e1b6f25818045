"""The network as an ONNX file, of standard operators alone."""

import warnings
from pathlib import Path

import torch

from retina_focal.export.metadata import KEY, Metadata
from retina_focal.export.network import ExportedNetwork, example
from retina_focal.export.operators import translations
from retina_focal.export.sessions import OUTPUTS, optional
from retina_focal.retinanet import FocalRetinaNet

OPSET = 18


def write_onnx(model: FocalRetinaNet, metadata: Metadata, path: Path) -> None:
    """Write a trained model as `path`; batch, height and width are dynamic.

    Raises:
        UserError: onnx or onnxscript is not installed, or see `ExportedNetwork`.
    """
    optional("onnx", "export")
    optional("onnxscript", "export")
    network = ExportedNetwork(model, metadata)
    height = 1 if metadata.dtype == "uint8" else 2
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            network,
            (example(metadata.dtype),),
            dynamo=True,
            opset_version=OPSET,
            input_names=["image"],
            output_names=list(OUTPUTS),
            dynamic_shapes={"image": {0: "N", height: "H", height + 1: "W"}},
            custom_translation_table=translations(),
            verbose=False,
        )
    for node in program.model.graph:
        node.metadata_props.clear()  # paths of this machine
    program.model.metadata_props[KEY] = metadata.to_json()
    program.save(path)
