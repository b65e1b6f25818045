"""The network as an ONNX file, of standard operators alone."""

import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from retina_focal.export.metadata import KEY, Metadata
from retina_focal.export.network import ExportedNetwork, example
from retina_focal.export.operators import EITHER, translations
from retina_focal.export.sessions import OUTPUTS, optional
from retina_focal.retinanet import FocalRetinaNet

if TYPE_CHECKING:
    import onnx_ir

OPSET = 18


def write_onnx(
    model: FocalRetinaNet, metadata: Metadata, path: Path, sparse_boxes: bool = False
) -> None:
    """Write a trained model as `path`; batch, height and width are dynamic.

    Args:
        sparse_boxes: see `ExportedNetwork`.
    Raises:
        UserError: onnx or onnxscript is not installed, or see `ExportedNetwork`.
    """
    optional("onnx", "export")
    optional("onnxscript", "export")
    network = ExportedNetwork(model, metadata, sparse_boxes=sparse_boxes)
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
    _compute_one_alone(program.model.graph)
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()  # paths of this machine
    program.model.metadata_props[KEY] = metadata.to_json()
    program.save(path)


def _compute_one_alone(graph: "onnx_ir.Graph") -> None:
    """Make an `If` of each `operators.either`; what one side alone needs is computed in it."""
    for where in [x for x in graph if EITHER in x.metadata_props]:
        condition, *sides = where.inputs
        ir = sys.modules["onnx_ir"]
        attributes = [
            ir.AttrGraph(name, ir.Graph([], [side], nodes=_cut_off(graph, side, where), name=name))
            for name, side in zip(("then_branch", "else_branch"), sides, strict=True)
        ]
        chosen = ir.Node("", "If", [condition], attributes, num_outputs=1)
        graph.insert_before(where, chosen)
        chosen.outputs[0].name = where.outputs[0].name
        where.outputs[0].replace_all_uses_with(chosen.outputs[0])
        graph.remove(where, safe=True)


def _cut_off(
    graph: "onnx_ir.Graph", output: "onnx_ir.Value", reader: "onnx_ir.Node"
) -> "list[onnx_ir.Node]":
    """The nodes that `output` needs and nothing but `reader` does; the graph loses them."""
    nodes = {output.producer()}
    for node in reversed(graph):
        readers = {x for value in node.outputs for x in value.consumers()}
        if readers and readers <= nodes:
            nodes.add(node)
    nodes = [x for x in graph if x in nodes]
    graph.remove(nodes)
    return nodes
