"""Exported files detect what the model detects, or are not written."""

import json

import cv2
import numpy as np
import onnx
import pytest
import torch
from conftest import pictures, small_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone, build_model
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from retina_focal import get_cfg
from retina_focal.backbone import TimmBackbone
from retina_focal.export import network as network_module
from retina_focal.export.folded import folded_copy
from retina_focal.export.metadata import Metadata
from retina_focal.export.network import ExportedNetwork
from retina_focal.export.onnx_format import write_onnx
from retina_focal.export.openvino_format import to_openvino
from retina_focal.export.proof import TOLERANCES, differences, prove
from retina_focal.export.runners import open_exported
from retina_focal.export.torch_formats import write_torch_export, write_torchscript
from retina_focal.tools import export

CLASSES = ("a", "b", "c")
SIZES = [(64, 96), (37, 130), (1, 1)]


@BACKBONE_REGISTRY.register()
class TwoConvolutions(Backbone):
    """Levels of stride 8 and 32, so that an export takes seconds."""

    def __init__(self, cfg, input_shape):
        super().__init__()
        self.first = nn.Conv2d(3, 16, 9, stride=8, padding=4)
        self.second = nn.Conv2d(16, 16, 3, stride=4, padding=1)

    @property
    def size_divisibility(self):
        return 32

    def output_shape(self):
        return {"p3": ShapeSpec(16, stride=8), "p5": ShapeSpec(16, stride=32)}

    def forward(self, images):
        p3 = self.first(images).relu()
        return {"p3": p3, "p5": self.second(p3).relu()}


def tiny_cfg(**keys):
    cfg = get_cfg()
    keys = {
        "MODEL.DEVICE": "cpu",
        "MODEL.WEIGHTS": "",
        "MODEL.RETINANET.NUM_CLASSES": 3,
        "MODEL.META_ARCHITECTURE": "FocalRetinaNet",
        "MODEL.BACKBONE.NAME": "TwoConvolutions",
        "MODEL.ANCHOR_GENERATOR.NAME": "OctaveAnchorGenerator",
        "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS": [[0.5, 1.0, 2.0]],
        "MODEL.RETINA_FOCAL.ANCHORS.BASE_SIZES": [24, 64],
        "MODEL.RETINANET.IN_FEATURES": ["p3", "p5"],
        "MODEL.RETINANET.NUM_CONVS": 1,
        "MODEL.RETINANET.SCORE_THRESH_TEST": 0.02,
        "MODEL.RETINANET.TOPK_CANDIDATES_TEST": 200,
        "INPUT.MIN_SIZE_TEST": 64,
        "INPUT.MAX_SIZE_TEST": 128,
        **{key.replace("__", "."): value for key, value in keys.items()},
    }
    cfg.merge_from_list([x for pair in keys.items() for x in pair])
    return cfg


def tiny_model(cfg):
    torch.manual_seed(0)
    model = build_model(cfg).eval()
    with torch.no_grad():
        model.head.cls_score.weight.normal_(0, 0.01)
        model.head.bbox_pred.weight.normal_(0, 0.001)
        for part in (model.head.cls_subnet, model.head.bbox_subnet):
            part[0].weight.normal_(0, 0.1)
    return model


def metadata_of(cfg, tmp_path, **flags):
    weights = tmp_path / "weights"
    weights.write_bytes(b"weights")
    return Metadata.of_run(cfg, CLASSES, weights, **flags)


def noise(count, size, seed=0):
    return [x["image"] for x in pictures([size] * count, [4] * count, seed=seed)]


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
        pytest.importorskip("openvino")
        to_openvino(files / "model.onnx", files, "fp32", metadata_of(tiny_cfg(), files))
    exported, number = open_exported(files / name, threads=1), 0
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


@pytest.mark.parametrize("name", ["model.onnx", "model.pt2", "model.torchscript"])
def test_a_blank_picture_has_no_detection(model, files, name):
    blank = model.pixel_mean.expand(3, 50, 70)
    (found,) = open_exported(files / name, threads=1)([{"image": blank}])
    assert not len(found["instances"])


def test_the_onnx_file_has_standard_operators_alone_and_no_path_of_this_machine(files):
    onnx.checker.check_model(str(files / "model.onnx"))
    content = onnx.load(str(files / "model.onnx"))
    assert {node.domain for node in content.graph.node} == {""} and not content.functions
    for name in ("model.onnx", "model.pt2"):
        assert __file__.encode() not in (files / name).read_bytes()
        assert network_module.__file__.encode() not in (files / name).read_bytes()


@pytest.mark.parametrize("own_operators", [True, False])
@settings(max_examples=15)
@given(
    seed=st.integers(0, 2**31),
    topk=st.sampled_from([1, 7, 300]),
    most=st.sampled_from([1, 10, 500]),
    thresholds=st.tuples(st.sampled_from([0.0, 0.1, 0.6]), st.sampled_from([0.0, 0.4, 1.0])),
    flags=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    size=st.sampled_from([(1, 1), (50, 33), (64, 96)]),
)
def test_fixed_shapes_give_what_the_postprocessor_gives(
    model, tmp_path_factory, own_operators, seed, topk, most, thresholds, flags, size
):
    generator = torch.Generator().manual_seed(seed)
    network = ExportedNetwork(
        model, metadata_of(tiny_cfg(), tmp_path_factory.getbasetemp()), own_operators
    )
    own = network.postprocessor
    own.topk_candidates, own.max_detections_per_image = topk, most
    own.score_thresh, own.nms_thresh = thresholds
    own.class_agnostic_nms, own.clip_before_nms, own.keep_empty_boxes = flags
    padded = [-(-length // 32) * 32 for length in size]
    cells = [[length // stride for length in padded] for stride in (8, 32)]
    anchors = 9
    logits = [2 * torch.randn(2, anchors * 3, *x, generator=generator) - 1 for x in cells]
    deltas = [0.5 * torch.randn(2, anchors * 4, *x, generator=generator) for x in cells]
    network._maps = lambda images: (logits, deltas)
    boxes, scores, classes = network(torch.zeros(2, 3, *size))
    generated = network.anchor_generator(logits)
    expected = own(generated, logits, deltas, [size] * 2, [size] * 2)
    for i, instances in enumerate(expected):
        used = classes[i] >= 0
        assert classes[i][used].tolist() == instances.pred_classes.tolist()
        torch.testing.assert_close(scores[i][used], instances.scores, rtol=1e-6, atol=0)
        torch.testing.assert_close(
            boxes[i][used], instances.pred_boxes.tensor, rtol=1e-5, atol=1e-3
        )
        assert not boxes[i][~used].any() and not scores[i][~used].any()


CALIBRATION = {
    "a": {"method": "platt", "scores": [0.1, 0.3, 0.9], "values": [0.0, 0.5, 0.95]},
    "c": {"method": "isotonic", "scores": [0.02], "values": [0.25]},
}


def test_flags_change_what_goes_in_and_out(model, tmp_path):
    cfg = tiny_cfg()
    images = torch.stack(noise(2, (60, 80)))
    plain = ExportedNetwork(model, metadata_of(cfg, tmp_path))(images.float())
    uint8 = metadata_of(cfg, tmp_path, uint8=True)
    for ours, theirs in zip(
        plain, ExportedNetwork(model, uint8)(images.permute(0, 2, 3, 1)), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)

    content = json.loads(metadata_of(cfg, tmp_path, scores="calibrated").to_json())
    calibrated = Metadata.from_json(json.dumps({**content, "calibration": CALIBRATION}), "")
    _, scores, classes = ExportedNetwork(model, calibrated)(images.float())
    for i in range(len(images)):
        raw, labels = plain[1][i].numpy(), plain[2][i].numpy()
        for label, name in enumerate(CLASSES):
            entry = CALIBRATION.get(name, {"scores": [0, 1], "values": [0, 1]})
            expected = np.interp(raw[labels == label], entry["scores"], entry["values"])
            found = scores[i][classes[i] == label]
            np.testing.assert_allclose(np.sort(found), np.sort(expected), rtol=1e-5, atol=1e-6)
        assert (scores[i].diff() <= 0).all()


def test_candidates_outside_give_the_same_after_nms(model, tmp_path):
    cfg = tiny_cfg()
    path = tmp_path / "model.torchscript"
    write_torchscript(model, metadata_of(cfg, tmp_path, nms="outside"), path)
    exported = open_exported(path, threads=1)
    rows = prove(exported, model, [x.permute(1, 2, 0).numpy() for x in noise(3, (64, 96))])
    assert len(rows) == 6 and {x.images for x in rows} == {1, 2}
    assert sum(x.detections for x in rows) > 100 and not sum(x.different for x in rows)


@pytest.mark.parametrize("norm", ["FrozenBN", "BN", "GN"])
@pytest.mark.parametrize("backbone", ["resnet", "timm"])
def test_a_folded_copy_computes_the_same_without_norms(backbone, norm):
    if backbone == "timm" and norm == "GN":
        pytest.skip("timm's norms are batch norms")
    torch.manual_seed(0)
    if backbone == "timm":
        pytest.importorskip("timm")
        own = TimmBackbone("tf_efficientnet_lite0", norm)
    else:
        cfg = small_cfg(norm=norm)
        cfg.MODEL.RESNETS.OUT_FEATURES = ["res3", "res4", "res5"]
        from detectron2.modeling import build_resnet_backbone

        own = build_resnet_backbone(cfg, ShapeSpec(3))
    for layer in own.modules():
        if hasattr(layer, "running_var"):
            layer.running_var.uniform_(0.5, 2)
            layer.running_mean.uniform_(-0.1, 0.1)
    model = nn.Module()
    model.backbone = own.eval()
    copy = folded_copy(model)
    images = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        expected, found = model.backbone(images), copy.backbone(images)
    for name, level in expected.items():
        scale = level.abs().max()
        torch.testing.assert_close(found[name] / scale, level / scale, rtol=0, atol=1e-5)
    assert norm == "GN" or not any(
        "Norm" in type(x).__name__ and type(x).__name__ != "FoldedTimmNorm"
        for x in copy.backbone.modules()
    )


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
    ],
)
def test_flags_that_contradict_each_other_are_wrong_usage(run, tmp_path, capsys, extra, message):
    with pytest.raises(SystemExit) as error:
        export.main([*arguments(run, tmp_path / "out"), *extra])
    assert error.value.code == 2 and message in capsys.readouterr().err
