"""Exported files detect what the model detects, or are not written."""

import signal

import cv2
import numpy as np
import onnx
import pytest
import torch
from tiny_detector import CLASSES, metadata_of, noise, tiny_cfg, tiny_model

from retina_focal.errors import UserError
from retina_focal.export import network as network_module
from retina_focal.export import writing
from retina_focal.export.metadata import Metadata
from retina_focal.export.network import ExportedNetwork
from retina_focal.export.onnx_format import write_onnx
from retina_focal.export.openvino_format import to_openvino
from retina_focal.export.proof import TOLERANCES, differences, expect_contract, prove
from retina_focal.export.runners import open_exported
from retina_focal.export.torch_formats import write_torch_export, write_torchscript
from retina_focal.export.writing import whole_folder
from retina_focal.tools import export
from retina_focal.tools.export import command

SIZES = [(64, 96), (37, 130), (1, 1)]


@pytest.fixture(scope="module")
def model():
    return tiny_model(tiny_cfg())


@pytest.fixture(scope="module")
def files(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    metadata = metadata_of(tiny_cfg(), folder)
    for name, write in {
        "model.onnx": write_onnx,
        "model.pt2": write_torch_export,
        "model.torchscript": write_torchscript,
    }.items():
        write(model, metadata, folder / name)
    return folder


@pytest.mark.parametrize("name", ["model.onnx", "model.pt2", "model.torchscript", "model.xml"])
def test_an_exported_file_detects_what_the_model_does(model, files, name):
    if name == "model.xml":
        pytest.importorskip(
            "openvino", reason="OpenVINO is not installed: pip install '.[openvino]'"
        )
        to_openvino(files / "model.onnx", files, "fp32", metadata_of(tiny_cfg(), files))
    exported, number = open_exported(files / name, threads=1), 0
    blank = model.pixel_mean.expand(3, 50, 70)
    (found,) = exported([{"image": blank}])
    assert not len(found["instances"])
    for size in SIZES:
        for count in (1, 3):
            batch = [{"image": image} for image in noise(count, size)]
            with torch.no_grad():
                expected = model(batch)
            for ours, theirs in zip(expected, exported(batch), strict=True):
                instances = ours["instances"], theirs["instances"]
                found, box, score, different = differences(
                    *instances, exported.metadata, TOLERANCES["fp32"]
                )
                assert len(instances[0]) == len(instances[1]) == found and not different
                assert box < 1e-3 and score < 1e-5
                number += found
    assert number > 300


def test_the_onnx_file_has_standard_operators_alone_and_no_path_of_this_machine(files):
    onnx.checker.check_model(str(files / "model.onnx"))
    content = onnx.load(str(files / "model.onnx"))
    assert {node.domain for node in content.graph.node} == {""} and not content.functions
    # torch's own translation of a division of integers is by floats, wrong from 2^24 on.
    assert "Floor" not in {node.op_type for node in content.graph.node}
    for name in ("model.onnx", "model.pt2"):
        assert __file__.encode() not in (files / name).read_bytes()
        assert network_module.__file__.encode() not in (files / name).read_bytes()


def test_candidates_outside_give_the_same_after_nms(model, tmp_path):
    cfg = tiny_cfg()
    path = tmp_path / "model.torchscript"
    write_torchscript(model, metadata_of(cfg, tmp_path, nms="outside"), path)
    exported = open_exported(path, threads=1)
    rows = prove(exported, model, [x.permute(1, 2, 0).numpy() for x in noise(3, (64, 96))])
    assert len(rows) == 6 and {x.images for x in rows} == {1, 2}
    assert sum(x.detections for x in rows) > 100 and not sum(x.different for x in rows)


@pytest.fixture
def run(model, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text(tiny_cfg().dump())
    checkpoint = {"model": model.state_dict(), "classes": list(CLASSES)}
    torch.save(checkpoint, folder / "model_final.pth")
    for i, image in enumerate(noise(3, (64, 96))):
        cv2.imwrite(str(tmp_path / f"{i}.png"), image.permute(1, 2, 0).numpy())
    return folder


def arguments(run, output):
    named = ["--pictures", str(run.parent / "*.png"), "--output", str(output)]
    return [str(run), "--format", "torchscript", *named]


def test_the_command_writes_a_file_that_says_where_it_comes_from(run, tmp_path, capsys):
    export.main(arguments(run, tmp_path / "out"))
    assert "| 2 | 64 x 96 |" in capsys.readouterr().out
    assert [x.name for x in (tmp_path / "out").iterdir()] == ["model.torchscript"]
    metadata = open_exported(tmp_path / "out").metadata
    assert metadata.classes == CLASSES and metadata.resize["min"] == 64
    assert Metadata.from_json(metadata.to_json(), "") == metadata


@pytest.mark.parametrize("format", ["onnx", "openvino"])
@pytest.mark.parametrize("flags", [[], ["--sparse-boxes"]])
def test_boxes_are_sparse_where_the_command_says_so(run, tmp_path, monkeypatch, format, flags):
    def noted(model, metadata, path, sparse_boxes=False):
        raise UserError(f"sparse boxes: {sparse_boxes}")

    monkeypatch.setattr(writing, "write_onnx", noted)
    monkeypatch.setattr(command, "expect_installed", lambda *_: None)
    with pytest.raises(SystemExit, match=f"sparse boxes: {bool(flags)}"):
        export.main([*arguments(run, tmp_path / "out"), "--format", format, *flags])


def moved(self, found, limits):
    return found._replace(boxes=found.boxes.clamp(min=0).minimum(limits) * 0.99), limits.new_ones(
        1
    ) > 0


def unsorted(self, found, limits):
    boxes = found.boxes.clamp(min=0).minimum(limits)
    return found._replace(boxes=boxes, scores=found.scores.flip(1)), limits.new_ones(1) > 0


@pytest.mark.parametrize(
    ("broken", "message"),
    [(moved, "differs from the model"), (unsorted, "differs from the model")],
)
def test_a_broken_graph_is_not_written(run, tmp_path, monkeypatch, broken, message):
    monkeypatch.setattr(ExportedNetwork, "_clipped", broken)
    with pytest.raises(SystemExit, match=message):
        export.main(arguments(run, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def outputs():
    boxes, scores = np.zeros((1, 100, 4), np.float32), np.zeros((1, 100), np.float32)
    classes = np.full((1, 100), -1)
    boxes[0, :2], scores[0, :2], classes[0, :2] = [1, 2, 30, 40], [0.9, 0.3], [2, 0]
    return boxes, scores, classes


@pytest.mark.parametrize(
    ("place", "row", "value", "message"),
    [
        (0, 1, [1, 2, 51, 40], "the boxes"),
        (0, 2, [1, 2, 3, 4], "the unused rows"),
        (1, 2, 0.1, "the unused rows"),
        (1, 1, 0.95, "the order"),
        (2, 1, 3, "the classes"),
        (2, 0, -1, "the unused rows, the place of unused rows"),
    ],
)
def test_outputs_that_break_the_contract_are_named(tmp_path, place, row, value, message):
    metadata = metadata_of(tiny_cfg(), tmp_path)
    arrays = outputs()
    expect_contract("model.onnx", arrays, metadata, (60, 50))
    arrays[place][0, row] = value
    with pytest.raises(UserError, match=f"is wrong in {message} of its outputs"):
        expect_contract("model.onnx", arrays, metadata, (60, 50))


def test_what_detects_nothing_proves_nothing(run, tmp_path):
    with pytest.raises(SystemExit, match="detects nothing in these pictures"):
        strict = ["--opts", "MODEL.RETINANET.SCORE_THRESH_TEST", "0.9999"]
        export.main([*arguments(run, tmp_path / "out"), *strict])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--precision", "int8"], "--precision int8 needs --format openvino"),
        (["--calibrated", "--nms", "outside"], "--calibrated needs --nms inside"),
        (["--sparse-boxes"], "--sparse-boxes needs --format onnx, or openvino in"),
        (["MODEL.WEIGHTS", "w.pth"], "MODEL.WEIGHTS looks like a key of the config; put KEY VALUE"),
        (
            ["--sparse-boxes", "--format", "openvino", "--precision", "int8"],
            "--sparse-boxes needs --format onnx, or openvino in",
        ),
    ],
)
def test_flags_that_contradict_each_other_are_wrong_usage(run, tmp_path, capsys, extra, message):
    with pytest.raises(SystemExit) as error:
        export.main([*arguments(run, tmp_path / "out"), *extra])
    assert error.value.code == 2 and message in capsys.readouterr().err


def test_a_norm_of_the_head_is_named_before_weights_are_read(run, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "run_model", None)
    with pytest.raises(SystemExit, match=r"MODEL.RETINANET.NORM is 'GN'.* leave out: --sparse"):
        flags = ["--format", "onnx", "--sparse-boxes", "--opts", "MODEL.RETINANET.NORM", "GN"]
        export.main([*arguments(run, tmp_path / "out"), *flags])


@pytest.mark.parametrize("missing", ["openvino", "nncf"])
def test_a_missing_package_is_named_before_weights_are_read(run, tmp_path, monkeypatch, missing):
    def looked_for(name, extra):
        if name == missing:
            raise UserError(f"{name} is not installed; type: pip install 'retina_focal[{extra}]'")

    monkeypatch.setattr(writing, "optional", looked_for)
    monkeypatch.setattr(command, "run_model", lambda run: pytest.fail("weights are read"))
    extra = ["--format", "openvino", "--precision", "int8"]
    with pytest.raises(SystemExit, match=f"{missing} is not installed.*retina_focal.openvino"):
        export.main([*arguments(run, tmp_path / "out"), *extra])


def test_what_a_killed_export_left_is_removed_by_the_next(tmp_path):
    (tmp_path / ".exporting-old/triton").mkdir(parents=True)
    (tmp_path / ".writing-other").mkdir()  # of whom else writes here
    with whole_folder(tmp_path) as folder:
        (folder / "triton").mkdir()
        (folder / "triton/a").write_text("a")
    assert sorted(x.name for x in tmp_path.iterdir()) == [".writing-other", "triton"]
    assert (tmp_path / "triton/a").read_text() == "a"


def test_one_export_at_a_time_writes_into_a_folder(tmp_path):
    with whole_folder(tmp_path) as folder:
        (folder / "a").write_text("a")
        with pytest.raises(UserError, match=r"another export writes into '.*--output DIR"):
            whole_folder(tmp_path).__enter__()
        assert (folder / "a").exists()
    with whole_folder(tmp_path):
        pass


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_one_line_and_leaves_nothing(run, tmp_path, capsys, monkeypatch, number):
    def interrupted(*args):
        with whole_folder(args[3]):
            signal.raise_signal(number)

    before = signal.getsignal(signal.SIGTERM)
    # A job in the background of a shell ignores SIGINT.
    of_the_job = signal.signal(signal.SIGINT, signal.default_int_handler)
    monkeypatch.setattr(command, "export", interrupted)
    with pytest.raises(SystemExit) as stopped:
        export.main(arguments(run, tmp_path / "out"))
    signal.signal(signal.SIGINT, of_the_job)
    assert signal.getsignal(signal.SIGTERM) == before
    assert stopped.value.code == 128 + number and not (tmp_path / "out").exists()
    assert capsys.readouterr().err.endswith("export: interrupted; nothing was written\n")
