"""OpenVINO's files find what the ONNX file does, in the precision that they name."""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from made_exports import made_onnx

from retina_focal.errors import UserError
from retina_focal.export import sessions
from retina_focal.export.openvino_format import beside_network, quantize, to_openvino
from retina_focal.export.runners import open_session
from retina_focal.export.sessions import optional

pytestmark = pytest.mark.skipif(
    not (find_spec("openvino") and find_spec("nncf")),
    reason="OpenVINO and NNCF are not installed; type: pip install 'retina_focal[openvino]'",
)


@pytest.fixture
def images() -> np.ndarray:
    return np.random.default_rng(0).uniform(0, 255, (2, 3, 40, 60)).astype(np.float32)


def made(folder: Path, precision: str, images: np.ndarray | None = None, **options) -> Path:
    """The small ONNX file and what is made of it, in one folder each; the path of the second."""
    metadata = open_session(made_onnx(folder, **options)).metadata
    onnx = folder / "model.onnx"
    if precision == "int8":
        return quantize(onnx, folder / "int8", [x[None] for x in images], metadata)
    return to_openvino(onnx, folder / precision, precision, metadata)


@pytest.mark.parametrize(
    # 1e-6: fp32. bf16 has 8 bits, int8 has 8 of each range; both after three convolutions.
    ("precision", "tolerance"), [("fp32", 1e-6), ("bf16", 0.02), ("int8", 0.02)]
)  # fmt: skip
def test_each_precision_finds_what_the_onnx_file_does(tmp_path, images, precision, tolerance):
    path = made(tmp_path, precision, images, network=True)
    expected = open_session(tmp_path / "model.onnx")(images)
    session = open_session(path.parent)
    found = session(images)
    assert session.metadata.precision == precision
    np.testing.assert_allclose(found[0], expected[0], atol=1e-3)
    error = np.abs(found[1] - expected[1]).max()
    assert error <= tolerance and (precision == "fp32" or error > 1e-6), error
    assert np.array_equal(found[2], expected[2])
    assert [x.dtype for x in found] == [np.float32, np.float32, np.int64]
    assert sorted(x.name for x in path.parent.iterdir()) == ["model.bin", "model.xml"]


def test_what_a_session_returned_stays_when_it_runs_again(tmp_path, images):
    session = open_session(made(tmp_path, "fp32", network=True))
    first = session(images[:1])
    before = [x.copy() for x in first]
    session(255 - images)
    assert all(np.array_equal(x, y) for x, y in zip(first, before, strict=True))


@pytest.mark.parametrize(
    ("precision", "capabilities", "hint"),
    [("fp32", "BF16", "f32"), ("bf16", "BF16", "bf16"), ("bf16", "FP32", "f32")],
)
def test_the_precision_is_set_and_not_left_to_openvino(
    tmp_path, monkeypatch, caplog, precision, capabilities, hint
):
    path = made(tmp_path, precision)
    core, seen = optional("openvino", "openvino").Core, []

    class Noted:
        def read_model(self, path):
            return core().read_model(path)

        def get_property(self, *_):
            return [capabilities]

        def compile_model(self, model, device, settings):
            seen.append(settings)
            return core().compile_model(model, device, {"INFERENCE_PRECISION_HINT": "f32"})

    monkeypatch.setattr(sys.modules["openvino"], "Core", Noted)
    open_session(path, threads=3)
    assert seen[0]["INFERENCE_PRECISION_HINT"] == hint
    assert seen[0]["INFERENCE_NUM_THREADS"] == 3
    assert ("this processor lacks" in caplog.text) == (precision == "bf16" and hint == "f32")


def test_only_what_lies_between_convolutions_is_in_int8(tmp_path, images):
    made(tmp_path, "int8", images, network=True)
    core = optional("openvino", "openvino").Core()
    model = core.read_model(tmp_path / "model.onnx")
    left_out = set(beside_network(model))
    kinds = {x.get_friendly_name(): x.get_type_name() for x in model.get_ordered_ops()}
    assert {kinds[x] for x in left_out} >= {"Parameter", "Subtract", "Sigmoid", "Result"}
    assert not {kinds[x] for x in left_out} & {"Convolution", "Relu"}
    quantized = core.read_model(tmp_path / "int8/model.xml")
    quantizers = [x for x in quantized.get_ordered_ops() if x.get_type_name() == "FakeQuantize"]
    readers = [
        y.get_node().get_type_name() for x in quantizers for y in x.output(0).get_target_inputs()
    ]
    assert readers == ["Convolution", "GroupConvolution", "Convolution"]
    # Of activations alone: a weight that is rounded at each call is computed with in fp32.
    sources = [x.input_value(0).get_node().get_type_name() for x in quantizers]
    assert not {"Constant", "Reshape"} & set(sources), sources


def test_int8_without_a_picture_is_refused(tmp_path, images):
    with pytest.raises(UserError, match="add: --calibration FOLDER"):
        made(tmp_path, "int8", images[:0])


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda xml: xml.write_text("hello"), "is no OpenVINO model"),
        (lambda xml: xml.write_text(""), "is no OpenVINO model"),
        (lambda xml: xml.write_text("<html></html>"), "it begins with <html>"),
        (cut, r"OpenVINO can't read .*model\.xml"),
        (lambda xml: cut(xml.with_suffix(".bin")), "OpenVINO can't read .*bin file"),
        (lambda xml: xml.with_suffix(".bin").unlink(), r"model\.bin' is missing"),
        (
            lambda xml: xml.write_text(xml.read_text().replace('version="11"', 'version="99"', 1)),
            "is of version 99 of OpenVINO's format; expected 10 or 11",
        ),
        (
            lambda xml: xml.write_text(xml.read_text().replace("<retina_focal ", "<other ")),
            "has no metadata 'retina_focal'",
        ),
        (
            lambda xml: xml.write_text(xml.read_text().replace("float32", "uint8")),
            "image is .*float32.*, expected uint8",
        ),
    ],
)
def test_a_file_that_is_no_export_of_ours_is_refused_in_words(tmp_path, change, words, capfd):
    path = made(tmp_path, "fp32", network=True)
    change(path)
    with pytest.raises(UserError, match=words):
        open_session(path)
    assert capfd.readouterr() == ("", "")


def test_without_openvino_the_extra_is_named(tmp_path, monkeypatch):
    path = made(tmp_path, "fp32")

    def missing(name):
        raise ModuleNotFoundError(f"No module named '{name}'")

    monkeypatch.setattr(sessions, "import_module", missing)
    with pytest.raises(UserError, match=r"pip install 'retina_focal\[openvino\]'"):
        open_session(path)
    with pytest.raises(UserError, match=r"pip install 'retina_focal\[openvino\]'"):
        quantize(path, tmp_path, [], open_session)


# Of a process of its own: what has been imported stays imported, and NNCF is silent under pytest.
SILENT = """
import sys
home = sys.argv[1]
def watch(event, args):
    if event in ("socket.connect", "socket.getaddrinfo"):
        print("connects", args)
    if event == "open" and str(args[0]).startswith(home) and args[2] & 3:
        print("writes", args)
sys.addaudithook(watch)
import numpy as np
from retina_focal.export.openvino_format import quantize, to_openvino
from retina_focal.export.runners import open_session
folder = sys.argv[2]
metadata = open_session(folder).metadata
to_openvino(folder + "/model.onnx", folder + "/fp32", "fp32", metadata)
images = [np.zeros((1, 3, 40, 60), np.float32)]
open_session(quantize(folder + "/model.onnx", folder + "/int8", images, metadata))(images[0])
assert sys.modules.get("openvino_telemetry") is None
"""


@pytest.mark.slow
def test_nothing_of_its_use_is_reported(tmp_path, monkeypatch):
    made_onnx(tmp_path, network=True)
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    command = [sys.executable, "-c", SILENT, str(home), str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "connects" not in result.stdout and "writes" not in result.stdout
    assert [x.name for x in home.rglob("intel*")] == []
