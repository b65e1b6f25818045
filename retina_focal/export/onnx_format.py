"""The network as an ONNX file, of standard operators alone."""

import warnings
from pathlib import Path

import torch
from torch import Tensor

from retina_focal.errors import UserError
from retina_focal.export.metadata import KEY, Metadata
from retina_focal.export.network import ExportedNetwork
from retina_focal.export.operators import translations
from retina_focal.retinanet import FocalRetinaNet

OPSET = 18
OUTPUTS = ["boxes", "scores", "classes"]
# A batch that no length of the network equals: torch.export would take the two for one.
EXAMPLE = (2, 3, 224, 288)


def write_onnx(model: FocalRetinaNet, metadata: Metadata, path: Path) -> None:
    """Write a trained model as `path`; batch, height and width are dynamic.

    Raises:
        UserError: onnx or onnxscript is not installed, or see `ExportedNetwork`.
    """
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"export to onnx needs {error.name}, which is not installed; type: "
            "pip install 'retina_focal[export]'"
        ) from error
    uint8 = metadata.dtype == "uint8"
    network = ExportedNetwork(model, uint8=uint8, nms=metadata.nms == "inside").eval()
    dims = (0, "N"), (1 if uint8 else 2, "H"), (2 if uint8 else 3, "W")
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            network,
            (example(uint8),),
            dynamo=True,
            opset_version=OPSET,
            input_names=["image"],
            output_names=OUTPUTS,
            dynamic_shapes={"image": dict(dims)},
            custom_translation_table=translations(),
            verbose=False,
        )
    for node in program.model.graph:
        node.metadata_props.clear()  # paths of this machine
    program.model.metadata_props[KEY] = metadata.to_json()
    program.save(path)


def example(uint8: bool) -> Tensor:
    """An image of the kind that the network takes."""
    count, channels, height, width = EXAMPLE
    if uint8:
        return torch.zeros(count, height, width, channels, dtype=torch.uint8)
    return torch.zeros(count, channels, height, width)
