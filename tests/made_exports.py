"""A small exported model without a network, for the tests of what runs exported models."""

import json
from pathlib import Path

import numpy as np

METADATA = {
    "version": 1,
    "classes": ["red", "blue"],
    "input": {"format": "BGR", "dtype": "float32"},
    "resize": {"kind": "shortest_edge", "min": 32, "max": 1333},
    "score_thresh": 0.05,
    "nms_thresh": 0.5,
    "nms": "inside",
    "class_agnostic_nms": False,
    "topk_candidates": 1000,
    "detections_per_image": 100,
    "operating_points": None,
    "calibration": None,
    "scores": "raw",
    "precision": "fp32",
    "checkpoint_sha256": "0" * 64,
    "producer": "retina_focal 0.1.0",
}
# Of each image, as shares of its width, height, width and height.
BOXES = [[0.1, 0.2, 0.5, 0.6], [0.11, 0.2, 0.5, 0.6], [0.5, 0.5, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0]]
CLASSES = [0, 0, 1, -1]
SCORES = [0.9, 0.8, 0.7, 0.0]


def onnx_bytes(
    metadata: dict | str | None = METADATA,
    ir_version: int = 10,
    opset: int = 17,
    dtype: str = "float32",
    classes: list[int] = CLASSES,
    class_dtype: type = np.int64,
    outside: str | None = None,
    network: bool = False,
) -> bytes:
    """A graph that finds `BOXES` in every image.

    Args:
        class_dtype: of the output.
        outside: a file that holds the scores.
        network: whether scores come from three convolutions of the normalised image, the second
            depthwise, not `SCORES`.
    """
    from onnx import TensorProto, helper, numpy_helper

    image = ["N", "H", "W", 3] if dtype == "uint8" else ["N", 3, "H", "W"]
    at_height = 1 if dtype == "uint8" else 2
    constants = {
        "shares": np.array([BOXES], np.float32),
        "all_scores": np.array([SCORES], np.float32),
        "all_classes": np.array([classes], class_dtype),
        "width_height": np.array([at_height + 1, at_height] * 2),
        "first": np.array([0]),
        "rows": np.array([len(BOXES)]),
        "four": np.array([4]),
    }
    nodes = [
        helper.make_node("Shape", ["image"], ["shape"]),
        helper.make_node("Gather", ["shape", "width_height"], ["sides"]),
        helper.make_node("Cast", ["sides"], ["pixels"], to=TensorProto.FLOAT),
        helper.make_node("Gather", ["shape", "first"], ["number"]),
        helper.make_node("Concat", ["number", "rows"], ["size"], axis=0),
        helper.make_node("Concat", ["number", "rows", "four"], ["size_of_boxes"], axis=0),
        helper.make_node("Mul", ["shares", "pixels"], ["scaled"]),
        helper.make_node("Expand", ["scaled", "size_of_boxes"], ["boxes"]),
        helper.make_node("Expand", ["all_scores", "size"], ["scores"]),
        helper.make_node("Expand", ["all_classes", "size"], ["classes"]),
    ]
    if network:
        draw = np.random.default_rng(0).normal
        constants |= {
            "mean": np.full((1, 3, 1, 1), 128, np.float32),
            "std": np.full((1, 3, 1, 1), 64, np.float32),
            "first_weight": draw(0, 0.3, (8, 3, 3, 3)).astype(np.float32),
            "depthwise_weight": draw(0, 0.3, (8, 1, 3, 3)).astype(np.float32),
            "second_weight": draw(0, 0.5, (len(BOXES), 8, 3, 3)).astype(np.float32),
            "minus_one": np.array([0, -1]),
        }
        nodes[8:9] = [
            helper.make_node("Sub", ["image", "mean"], ["centred"]),
            helper.make_node("Div", ["centred", "std"], ["normal"]),
            helper.make_node("Conv", ["normal", "first_weight"], ["hidden"]),
            helper.make_node("Relu", ["hidden"], ["positive"]),
            helper.make_node("Conv", ["positive", "depthwise_weight"], ["filtered"], group=8),
            helper.make_node("Conv", ["filtered", "second_weight"], ["map"]),
            helper.make_node("GlobalAveragePool", ["map"], ["pooled"]),
            helper.make_node("Reshape", ["pooled", "minus_one"], ["logits"]),
            helper.make_node("Sigmoid", ["logits"], ["scores"]),
        ]
    kind = TensorProto.UINT8 if dtype == "uint8" else TensorProto.FLOAT
    class_kind = helper.np_dtype_to_tensor_dtype(np.dtype(class_dtype))
    graph = helper.make_graph(
        nodes,
        "made",
        [helper.make_tensor_value_info("image", kind, image)],
        [
            helper.make_tensor_value_info("boxes", TensorProto.FLOAT, ["N", "D", 4]),
            helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["N", "D"]),
            helper.make_tensor_value_info("classes", class_kind, ["N", "D"]),
        ],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    for tensor in graph.initializer:
        if outside is not None and tensor.name == "all_scores":
            tensor.ClearField("raw_data")
            tensor.data_location = TensorProto.EXTERNAL
            for key, value in {"location": outside, "offset": "0", "length": "16"}.items():
                tensor.external_data.add(key=key, value=value)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
    model.ir_version = ir_version
    if metadata is not None:
        text = metadata if isinstance(metadata, str) else json.dumps(metadata)
        helper.set_model_props(model, {"retina_focal": text})
    return model.SerializeToString()


def made_onnx(folder: Path, **options) -> Path:
    """`onnx_bytes` in a file."""
    path = folder / "model.onnx"
    path.write_bytes(onnx_bytes(**options))
    return path
