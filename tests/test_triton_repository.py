"""Triton's model repository: its configuration parses, and says what the model is."""

import json

import pytest

from retina_focal.errors import UserError

pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: make setup")
pytest.importorskip("onnx", reason="onnx is not installed: make setup")
import onnx
from made_exports import METADATA, made_onnx

from retina_focal.export.triton_repository import write_triton_repository

HOSTILE = 'a "b" \\ c\n{ } # été'
TYPES = {"FLOAT": "TYPE_FP32", "UINT8": "TYPE_UINT8", "INT64": "TYPE_INT64"}


@pytest.mark.parametrize("dtype", ["float32", "uint8"])
def test_names_types_and_shapes_are_the_models(tmp_path, dtype):
    service = pytest.importorskip(
        "tritonclient.grpc.model_config_pb2",
        reason="tritonclient is not installed: pip install 'tritonclient[grpc]'",
    )
    from google.protobuf import text_format

    metadata = METADATA | {
        "classes": ["red", HOSTILE], "input": {"format": "RGB", "dtype": dtype},
    }  # fmt: skip
    model = made_onnx(tmp_path, metadata=metadata, dtype=dtype)
    folder = write_triton_repository(model, tmp_path / "repository", "cells-1.0")
    assert folder == tmp_path / "repository" / "cells-1.0"
    assert sorted(x.relative_to(folder).as_posix() for x in folder.rglob("*")) == [
        "1", "1/model.onnx", "config.pbtxt",
    ]  # fmt: skip
    assert (folder / "1" / "model.onnx").read_bytes() == model.read_bytes()
    text = (folder / "config.pbtxt").read_text(encoding="utf-8")
    config = text_format.Parse(text, service.ModelConfig())
    assert (config.name, config.backend) == ("cells-1.0", "onnxruntime")
    assert config.max_batch_size > 1 and config.HasField("dynamic_batching")
    graph = onnx.load(model).graph
    for own, theirs in ((graph.input, config.input), (graph.output, config.output)):
        assert [x.name for x in own] == [x.name for x in theirs]
        for mine, other in zip(own, theirs, strict=True):
            tensor = mine.type.tensor_type
            kind = onnx.TensorProto.DataType.Name(tensor.elem_type)
            assert TYPES[kind] == service.DataType.Name(other.data_type)
            shape = [x.dim_value if x.HasField("dim_value") else -1 for x in tensor.shape.dim]
            assert shape == [-1, *other.dims]
    said = json.loads(config.parameters["retina_focal"].string_value)
    assert said["classes"] == ["red", HOSTILE] and said["resize"] == METADATA["resize"]


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "../a", 'a"', "a b", "-a", "é"])
def test_a_name_that_is_no_folder_of_triton_is_refused(tmp_path, name):
    with pytest.raises(UserError, match="can't be a model's name in Triton; expected letters"):
        write_triton_repository(made_onnx(tmp_path), tmp_path / "repository", name)
    assert not (tmp_path / "repository").exists()


def test_a_file_that_is_no_model_is_refused(tmp_path):
    path = tmp_path / "model.onnx"
    path.write_text("no model")
    with pytest.raises(UserError, match=r"model\.onnx"):
        write_triton_repository(path, tmp_path / "repository", "cells")
    assert not (tmp_path / "repository").exists()
