"""The network as a program of torch.export, and as TorchScript."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.export import Dim

from retina_focal.errors import UserError
from retina_focal.export.metadata import KEY, Metadata
from retina_focal.export.network import ExportedNetwork, example
from retina_focal.export.sessions import STRIDE
from retina_focal.retinanet import FocalRetinaNet

MOST_STRIDES = 1 << 12  # 131,072 pixels a side


@contextmanager
def single_cells() -> Iterator[None]:
    """Inside, a program may be of maps of one cell: torch would else say that none has one."""
    import torch.fx.experimental._config as config

    before = config.backed_size_oblivious
    config.backed_size_oblivious = True
    try:
        yield
    finally:
        config.backed_size_oblivious = before


def write_torch_export(model: FocalRetinaNet, metadata: Metadata, path: Path) -> None:
    """Write a trained model as a `.pt2`, whose images are padded and come with their sizes.

    Raises:
        UserError: the backbone pads to no divisor of `STRIDE`, or see `ExportedNetwork`.
    """
    network = ExportedNetwork(model, metadata, own_operators=False)
    if STRIDE % network.stride:
        raise UserError(
            f"the backbone pads to multiples of {network.stride} pixels; expected a divisor of "
            f"{STRIDE}, which exported programs pad to: --format onnx takes any"
        )
    image = example(metadata.dtype)
    batch = Dim("N", min=1)
    sides = [STRIDE * Dim(name, min=1, max=MOST_STRIDES) for name in ("rows", "columns")]
    first = 1 if metadata.dtype == "uint8" else 2
    with torch.no_grad(), single_cells():
        program = torch.export.export(
            network,
            (image, torch.tensor([image.shape[first : first + 2]] * len(image))),
            dynamic_shapes={
                "image": {0: batch, first: sides[0], first + 1: sides[1]},
                "sizes": {0: batch},
            },
        )
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # paths of this machine
    torch.export.save(program, path, extra_files={KEY: metadata.to_json()})


def write_torchscript(model: FocalRetinaNet, metadata: Metadata, path: Path) -> None:
    """Write a trained model as TorchScript, which torch calls deprecated, by tracing it.

    Raises:
        UserError: see `ExportedNetwork`.
    """
    network = ExportedNetwork(model, metadata, own_operators=False)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is deprecated, and that constants stay
        traced = torch.jit.trace(network, (example(metadata.dtype),), check_trace=False)
        torch.jit.save(traced, path, _extra_files={KEY: metadata.to_json()})
