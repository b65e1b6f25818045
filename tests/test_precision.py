"""Laws of PRECISION: what backbone and head compute in, and what the rest never leaves."""

import pytest
import torch
from conftest import PLUGIN, pictures, small_cfg
from detectron2.modeling import build_model

from retina_focal import FocalRetinaNet, add_retina_focal_config, precision
from retina_focal.precision import PRECISIONS, computation

SIZES = [(64, 96), (80, 64)]


def model(value):
    cfg = small_cfg(**PLUGIN)
    add_retina_focal_config(cfg)
    cfg.MODEL.RETINA_FOCAL.PRECISION = value
    torch.manual_seed(0)
    return build_model(cfg)


def seen_by_the_criterion(model, batch):
    """Dtypes of logits and deltas, and the losses."""
    seen = []
    hook = model.criterion.register_forward_pre_hook(
        lambda module, args: seen.extend(x.dtype for x in [*args[1], *args[2].maps()])
    )
    losses = model.train()(batch)
    hook.remove()
    return set(seen), losses


@pytest.mark.parametrize("value, dtype", [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_backbone_and_head_compute_in_the_precision_and_the_losses_in_fp32(value, dtype):
    batch = pictures(SIZES, [3, 2])
    dtypes, losses = seen_by_the_criterion(model(value), batch)
    assert dtypes == {dtype}
    assert {loss.dtype for loss in losses.values()} == {torch.float32}
    sum(losses.values()).backward()


def test_fp32_leaves_an_outer_autocast_alone():
    with torch.autocast("cpu", torch.bfloat16):
        dtypes, _ = seen_by_the_criterion(model("fp32"), pictures(SIZES, [3, 2]))
    assert dtypes == {torch.bfloat16}


def test_bf16_changes_losses_and_gradients_by_its_rounding():
    batch = pictures(SIZES, [3, 2])
    results = []
    for value in ("fp32", "bf16"):
        module = model(value).train()
        losses = module(batch)
        sum(losses.values()).backward()
        results.append((losses, module.head.cls_score.weight.grad))
    (full, full_grad), (half, half_grad) = results
    for name in full:
        # bf16 has 8 bits; some 25 layers.
        assert half[name].item() == pytest.approx(full[name].item(), rel=0.05)
        assert half[name].item() != full[name].item()
    cosine = torch.cosine_similarity(full_grad.flatten(), half_grad.flatten(), dim=0)
    assert cosine > 0.99


@pytest.mark.parametrize("value", ["bf16", "fp16"])
def test_detections_come_in_fp32(value):
    module = model(value).eval()
    module.test_score_thresh = 0.0
    with torch.no_grad():
        instances = module(pictures(SIZES, [1, 1]))[0]["instances"]
    assert len(instances) > 0
    assert instances.scores.dtype == instances.pred_boxes.tensor.dtype == torch.float32


def test_auto_is_bf16_where_the_processor_has_it(monkeypatch):
    for available, dtype in ((True, torch.bfloat16), (False, None)):
        monkeypatch.setattr(precision, "has_bf16", lambda _, found=available: found)
        with computation("auto", "cpu", training=True).autocast:
            found = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
        assert found is dtype


def test_half_precision_runs_in_channels_last_and_fp32_as_it_comes():
    formats = {}
    for value in ("fp32", "bf16"):
        module = model(value).eval()
        module.backbone.register_forward_pre_hook(
            lambda _, args, value=value: formats.update(
                {value: args[0].is_contiguous(memory_format=torch.channels_last)}
            )
        )
        with torch.no_grad():
            module(pictures(SIZES, [1, 1]))
    assert formats == {"fp32": False, "bf16": True}


def test_what_cannot_be_meant_is_refused_in_words():
    with pytest.raises(ValueError, match=r"PRECISION is 'int8'; expected one of fp32, bf16"):
        model("int8")
    with pytest.raises(ValueError, match=r"fp16 is for inference.*SOLVER.AMP.ENABLED True"):
        model("fp16").train()(pictures(SIZES, [1, 1]))
    with (
        torch.autocast("cpu", torch.float16),
        pytest.raises(
            ValueError, match=r"inside an autocast to torch\.float16; set PRECISION fp32"
        ),
    ):
        computation("bf16", "cpu", training=False)
    assert PRECISIONS == ("fp32", "bf16", "fp16", "auto")


@pytest.mark.parametrize(
    "precision, memory_format",
    [("fp32", torch.preserve_format), ("bf16", torch.channels_last), ("fp16", torch.channels_last)],
)
def test_half_precision_runs_in_channels_last(precision, memory_format):
    assert computation(precision, "cpu", training=False).memory_format == memory_format


@pytest.mark.parametrize("device_type", ["cpu", "cuda", "meta"])
@pytest.mark.parametrize("outer", [False, True])
def test_fp32_and_amp_compute_in_channels_last_on_a_gpu_and_as_it_comes_elsewhere(
    device_type, outer, monkeypatch
):
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device_type: outer)
    _, memory_format = computation("fp32", device_type, training=True)
    expected = torch.channels_last if device_type == "cuda" else torch.preserve_format
    assert memory_format == expected


@pytest.mark.parametrize(
    ("device", "value", "amp", "is_channels_last"),
    [
        ("cuda", "fp32", False, True),
        ("cuda", "fp32", True, True),
        ("cuda", "bf16", False, True),
        ("cuda:1", "fp16", False, True),
        ("cuda", "auto", False, True),
        ("cpu", "bf16", False, False),
        ("cpu", "auto", True, False),
    ],
)
def test_weights_are_stored_in_the_layout_that_a_device_computes_in(
    device, value, amp, is_channels_last, monkeypatch
):
    monkeypatch.setattr(precision, "has_bf16", lambda _: True)
    cfg = small_cfg(**PLUGIN)
    add_retina_focal_config(cfg)
    cfg.MODEL.RETINA_FOCAL.PRECISION = value
    cfg.MODEL.DEVICE, cfg.SOLVER.AMP.ENABLED = device, amp
    module = FocalRetinaNet(cfg)
    weights = [x for x in module.parameters() if x.dim() == 4 and x[0, 0].numel() > 1]
    assert len(weights) > 10
    for weight in weights:
        assert weight.is_contiguous(memory_format=torch.channels_last) == is_channels_last


def test_the_layout_of_the_weights_changes_neither_losses_nor_the_layout_of_gradients():
    batch, results = pictures(SIZES, [3, 2]), []
    for memory_format in (torch.preserve_format, torch.channels_last):
        module = model("fp32").train().to(memory_format=memory_format)
        losses = module(batch)
        sum(losses.values()).backward()
        results.append([*losses.values(), module.head.cls_score.weight.grad])
    for one, other in zip(*results, strict=True):
        # The order of the sums differs.
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-5)
    trained = [p for p in module.parameters() if p.grad is not None]
    assert all(p.grad.stride() == p.stride() for p in trained)
