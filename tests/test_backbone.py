"""Laws of the backbones: P3 to P7 on ResNets and timm models, and the ResNet without a pyramid."""

import sys

import pytest
import timm
import torch
from conftest import PLUGIN, STOCK, small_cfg
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import build_backbone
from torch import nn

from retina_focal import backbone, get_cfg
from retina_focal.backbone import ImageByImage
from retina_focal.errors import UserError

TIMM_MODEL = "mobilenetv3_small_050"
LEVELS = {f"p{i}": 2**i for i in range(3, 8)}


def timm_cfg(**options):
    cfg = get_cfg()
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.BACKBONE.NAME = "build_retina_focal_timm_fpn_backbone"
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    cfg.MODEL.FPN.IN_FEATURES = ["res3", "res4", "res5"]
    cfg.MODEL.FPN.OUT_CHANNELS = 16
    cfg.MODEL.RETINA_FOCAL.TIMM.NAME = TIMM_MODEL
    cfg.merge_from_list([x for pair in options.items() for x in pair])
    return cfg


def assert_makes_p3_to_p7(backbone, channels, height=128, width=256):
    shapes = backbone.output_shape()
    assert {name: shape.stride for name, shape in shapes.items()} == LEVELS
    assert backbone.size_divisibility == 32
    with torch.no_grad():
        features = backbone.eval()(torch.zeros(1, 3, height, width))
    for name, stride in LEVELS.items():
        assert shapes[name].channels == channels
        assert features[name].shape == (1, channels, height // stride, width // stride)


@pytest.mark.parametrize("depth, norm", [(18, "BN"), (50, "GN")])
def test_resnet_pyramid_has_stock_names_weights_and_outputs(depth, norm):
    backbones = []
    for names in (PLUGIN, STOCK):
        torch.manual_seed(0)
        backbones.append(build_backbone(small_cfg(depth, norm, **names)).eval())
    ours, theirs = (backbone.state_dict() for backbone in backbones)
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    image = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        a, b = (backbone(image) for backbone in backbones)
    assert list(a) == list(b) == list(LEVELS)
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_resnet_pyramid_makes_p3_to_p7_at_their_strides():
    assert_makes_p3_to_p7(build_backbone(small_cfg(**PLUGIN)), 64)


def test_resnext_has_its_groups():
    cfg = small_cfg(50, **PLUGIN)
    cfg.merge_from_list(["MODEL.RESNETS.NUM_GROUPS", 32, "MODEL.RESNETS.WIDTH_PER_GROUP", 8])
    block = build_backbone(cfg).bottom_up.res2[0]
    assert (block.conv2.groups, block.conv2.out_channels) == (32, 256)


@pytest.mark.parametrize("in_feature, channels", [("res5", 512), ("p5", 64)])
def test_p6_stands_on_the_feature_that_the_config_names(in_feature, channels):
    cfg = get_cfg()
    cfg.merge_from_other_cfg(small_cfg(**PLUGIN))
    cfg.MODEL.RETINA_FOCAL.TOP_BLOCK_IN_FEATURE = in_feature
    backbone = build_backbone(cfg).eval()
    p6, p7 = backbone.top_block.p6, backbone.top_block.p7
    assert (p6.in_channels, p6.kernel_size, p6.stride) == (channels, (3, 3), (2, 2))
    with torch.no_grad():
        image = torch.randn(1, 3, 128, 128, generator=torch.Generator().manual_seed(0))
        features = {**backbone.bottom_up(image), **backbone(image)}
        assert torch.equal(features["p6"], p6(features[in_feature]))
        assert torch.equal(features["p7"], p7(features["p6"].relu()))


def test_single_level_backbone_is_res5_and_one_1x1_convolution():
    cfg = small_cfg(
        **{**PLUGIN, "MODEL.BACKBONE.NAME": "build_retina_focal_resnet_single_backbone"}
    )
    backbone = build_backbone(cfg).eval()
    shape = backbone.output_shape()
    assert list(shape) == ["p5"] and (shape["p5"].stride, shape["p5"].channels) == (32, 64)
    assert backbone.size_divisibility == 32 and backbone.lateral5.kernel_size == (1, 1)
    image = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        expected = backbone.lateral5(backbone.bottom_up(image)["res5"])
        assert torch.equal(backbone(image)["p5"], expected)


def test_timm_pyramid_makes_p3_to_p7_at_their_strides():
    assert_makes_p3_to_p7(build_backbone(timm_cfg()), 16)


def test_a_timm_state_dict_loads_by_detectron2s_matching_and_gives_timms_features(tmp_path):
    torch.manual_seed(0)
    model = timm.create_model(TIMM_MODEL, pretrained=False).eval()
    for name, buffer in model.named_buffers():  # statistics that a mix-up would show
        if name.endswith("running_mean"):
            buffer.normal_()
    path = tmp_path / "timm.pth"
    torch.save(model.state_dict(), path)
    backbone = build_backbone(timm_cfg()).eval()
    holder = nn.Module()
    holder.backbone = backbone
    DetectionCheckpointer(holder).load(f"{path}?matching_heuristics=True")
    expected = model.state_dict()
    body = backbone.bottom_up.body.state_dict()
    assert body
    for name in body:
        assert torch.equal(body[name], expected[name.removeprefix("model.")])
    image = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        features = backbone.bottom_up(image)
        theirs = model.forward_intermediates(image, intermediates_only=True)
    for name, stride in (("res3", 8), ("res4", 16), ("res5", 32)):
        (same,) = (x for x in theirs if x.shape[-1] == 64 // stride)
        # 1e-4: a frozen norm multiplies by one factor where timm's divides by a root.
        torch.testing.assert_close(features[name], same, rtol=1e-4, atol=1e-5)


def test_frozen_norms_stand_still_and_trained_ones_move():
    image = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    for norm, moves in (("FrozenBN", False), ("BN", True)):
        backbone = build_backbone(timm_cfg(**{"MODEL.RETINA_FOCAL.TIMM.NORM": norm})).train()
        names = [n for n, _ in backbone.named_buffers() if n.endswith("running_mean")]
        before = {n: x.clone() for n, x in backbone.named_buffers()}
        backbone(image)
        after = dict(backbone.named_buffers())
        assert names and all(torch.equal(before[n], after[n]) != moves for n in names)
        affine = [n for n, _ in backbone.named_parameters() if ".bn" in n]
        assert bool(affine) == moves


def test_sync_norms_replace_all_norms():
    backbone = build_backbone(timm_cfg(**{"MODEL.RETINA_FOCAL.TIMM.NORM": "SyncBN"}))
    norms = [m for m in backbone.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert norms and all(isinstance(m, nn.SyncBatchNorm) for m in norms)


@pytest.mark.parametrize("freeze_at", [0, 1, 2, 3, 5])
@pytest.mark.parametrize("name", [TIMM_MODEL, "resnet10t"])  # the latter's stride 2 is a ReLU's
def test_freeze_at_freezes_all_that_leads_to_that_stride(freeze_at, name):
    cfg = timm_cfg(**{"MODEL.BACKBONE.FREEZE_AT": freeze_at, "MODEL.RETINA_FOCAL.TIMM.NAME": name})
    body = build_backbone(cfg).bottom_up.body
    image = torch.randn(1, 3, 64, 64)
    features = body(image)
    for stride, feature in zip(body.feature_info.reduction(), features, strict=True):
        assert feature.requires_grad == (stride > 2**freeze_at)
    if freeze_at < 5:
        features[-1].sum().backward()
        trained = [p for p in body.parameters() if p.requires_grad]
        assert all(p.grad is not None for p in trained)


def test_frozen_stages_see_one_image_at_a_time_and_give_what_a_batch_gives():
    cfg = timm_cfg(**{"MODEL.BACKBONE.FREEZE_AT": 2, "MODEL.RETINA_FOCAL.TIMM.NAME": "resnet10t"})
    torch.manual_seed(0)
    bottom_up = build_backbone(cfg).bottom_up.train()
    stages = [m for m in bottom_up.modules() if isinstance(m, ImageByImage)]
    inside = [m for stage in stages for m in stage.modules() if isinstance(m, nn.Conv2d)]
    assert inside and not any(p.requires_grad for stage in stages for p in stage.parameters())
    sizes = set()
    for convolution in inside:
        convolution.register_forward_hook(lambda _, inputs, __: sizes.add(len(inputs[0])))
    images = torch.randn(3, 3, 64, 96)
    features = bottom_up(images)
    assert sizes == {1}
    bottom_up.requires_grad_(False)  # a trace holds no weights that are trained
    torch.jit.trace(lambda x: tuple(bottom_up(x).values()), images, check_trace=False)
    assert sizes == {1, 3}  # a graph has one for the batch
    for stage in stages:
        stage.__class__ = nn.Sequential
    expected = bottom_up(images)
    for name, feature in features.items():
        torch.testing.assert_close(feature, expected[name], rtol=1e-4, atol=1e-5)


def test_stages_whose_norms_see_the_batch_get_the_batch():
    options = {"MODEL.BACKBONE.FREEZE_AT": 2, "MODEL.RETINA_FOCAL.TIMM.NORM": "BN"}
    modules = build_backbone(timm_cfg(**options)).modules()
    assert not any(isinstance(module, ImageByImage) for module in modules)


def test_frozen_stages_of_a_resnet_are_detectron2s():
    cfg = small_cfg(**PLUGIN)
    cfg.MODEL.BACKBONE.FREEZE_AT = 2
    bottom_up = build_backbone(cfg).bottom_up
    assert not any(
        p.requires_grad for p in [*bottom_up.stem.parameters(), *bottom_up.res2.parameters()]
    )
    assert all(p.requires_grad for p in bottom_up.res3.parameters())
    assert any(isinstance(m, FrozenBatchNorm2d) for m in bottom_up.res2.modules())


@pytest.mark.parametrize(
    "options, message",
    [
        ({"MODEL.RETINA_FOCAL.TIMM.NAME": ""}, "TIMM.NAME is ''.*for example: tf_efficientnet"),
        ({"MODEL.RETINA_FOCAL.TIMM.NAME": "mobilenetv3_small"}, "it has .*mobilenetv3_small_050"),
        ({"MODEL.RETINA_FOCAL.TIMM.NAME": "vit_tiny_patch16_224"}, r"none of stride \[8, 32\]"),
        ({"MODEL.RETINA_FOCAL.TIMM.NORM": "GN"}, "NORM is 'GN'; expected one of FrozenBN, BN"),
        ({"MODEL.RETINA_FOCAL.TOP_BLOCK_IN_FEATURE": "p6"}, "is 'p6'; expected one of res5, p5"),
        ({"MODEL.FPN.IN_FEATURES": ["res2", "res3", "res4", "res5"]}, "needs .*'res2'"),
        ({"MODEL.FPN.IN_FEATURES": ["res4", "res5"]}, "P3 to P7 without P2 need"),
    ],
)
def test_what_cannot_make_p3_to_p7_is_refused_in_words(options, message):
    with pytest.raises(ValueError, match=message):
        build_backbone(timm_cfg(**options))


def test_a_resnet_without_the_features_is_refused_in_words():
    cfg = small_cfg(**PLUGIN)
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res4", "res5"]
    with pytest.raises(ValueError, match=r"needs \['res3'\].*set MODEL.RESNETS.OUT_FEATURES"):
        build_backbone(cfg)


def test_a_dilated_res5_is_refused_in_words():
    cfg = small_cfg(50, **PLUGIN)
    cfg.MODEL.RESNETS.RES5_DILATION = 2
    with pytest.raises(ValueError, match=r"res5 has stride 16; expected 32 .*RES5_DILATION"):
        build_backbone(cfg)


def test_a_missing_timm_is_named_with_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match="pip install timm"):
        build_backbone(timm_cfg())


def test_a_timm_model_is_refused_while_it_grows_beyond_any_detector(monkeypatch):
    monkeypatch.setattr(backbone, "MAX_BYTES", 1000)
    with pytest.raises(UserError, match=r"lcnet_035 has more than .* GB of parameters"):
        backbone.TimmBackbone("lcnet_035")
    nn.Linear(100, 100)  # is counted no more
