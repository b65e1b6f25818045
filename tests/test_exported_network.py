"""The exported network computes what `FocalRetinaNet` computes, in fixed shapes."""

import json

import numpy as np
import pytest
import torch
from conftest import small_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_resnet_backbone
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_detector import CLASSES, metadata_of, noise, tiny_cfg, tiny_model
from torch import nn

from retina_focal.backbone import TimmBackbone
from retina_focal.export.folded import folded_copy
from retina_focal.export.metadata import Metadata
from retina_focal.export.network import ExportedNetwork


@pytest.fixture(scope="module")
def model():
    return tiny_model(tiny_cfg())


@pytest.mark.parametrize("own_operators", [True, False])
@settings(max_examples=10)
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


@pytest.mark.parametrize(
    ("backbone", "norm"),
    [
        ("resnet", "FrozenBN"),
        ("resnet", "BN"),
        ("resnet", "GN"),
        ("timm", "FrozenBN"),
        ("timm", "BN"),
    ],
)
def test_a_folded_copy_computes_the_same_without_norms(backbone, norm):
    torch.manual_seed(0)
    if backbone == "timm":
        pytest.importorskip("timm", reason="timm is not installed: make setup")
        own = TimmBackbone("tf_efficientnet_lite0", norm)
    else:
        cfg = small_cfg(norm=norm)
        cfg.MODEL.RESNETS.OUT_FEATURES = ["res3", "res4", "res5"]
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
