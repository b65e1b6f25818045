"""What the benchmark measures with: time, memory, recorded products, IEEE fp32."""

import gc
import math
import os
import signal
import time
import weakref
from unittest import mock

import pytest
import torch
from detectron2.utils.analysis import FlopCountAnalysis
from test_benchmark_cases import setting_of

from retina_focal import box_tower
from retina_focal.tools.benchmark import cases, inputs, instruments, models
from retina_focal.tools.benchmark.instruments import Stopwatch, Unwatched
from retina_focal.tools.benchmark.models import Setting


@pytest.fixture(scope="module")
def setting() -> Setting:
    return setting_of()


def test_the_stopwatch_times_what_lies_before_each_mark(monkeypatch):
    ticks = iter([0.0, 1.0, 3.0, 7.0, 15.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(ticks))
    stopwatch = Stopwatch("cpu")
    stopwatch.start()
    stopwatch.mark("a")
    stopwatch.resume()
    stopwatch.mark("a")
    stopwatch.mark("b")
    assert stopwatch.seconds() == {"a": 1.0 + 4.0, "b": 8.0}


def test_a_graph_keeps_the_tensors_that_it_reads(monkeypatch):
    """Elsewhere their memory would become another tensor's, and a replay read that."""
    graph = mock.MagicMock()
    for name in ("Stream", "current_stream", "stream", "graph"):
        monkeypatch.setattr(torch.cuda, name, mock.MagicMock())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: graph)

    def made() -> tuple[instruments.Run, weakref.ref]:
        tensor = torch.ones(3)
        return instruments.graph_of("part", lambda: tensor.sum()), weakref.ref(tensor)

    run, tensor = made()
    assert tensor() is not None and run(Unwatched("cpu")) == 3 and graph.replay.call_count == 1
    del run
    gc.collect()
    assert tensor() is None


def flops_of(arguments: tuple) -> int:
    """Multiply-adds of a forward convolution, from its output's size."""
    x, weight, _, stride, padding, dilation, transposed, *_ = arguments
    assert not transposed
    out = [
        (side + 2 * p - d * (k - 1) - 1) // s + 1
        for side, k, s, p, d in zip(
            x.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True
        )
    ]
    return x.shape[0] * out[0] * out[1] * weight.shape.numel()


def test_recorded_convolutions_are_those_of_the_model(setting, monkeypatch):
    monkeypatch.setattr(box_tower, "COST_OF_A_CELL", math.inf)  # the box tower on whole maps
    step = cases.training_step(setting, ["ours"])["ours"]
    with instruments.ConvolutionRecorder() as recorder:
        step(Stopwatch("cpu"))
    forward = [args for func, args in recorder.calls if func is instruments.CONVOLUTIONS[0]]
    backward = [args for func, args in recorder.calls if func is instruments.CONVOLUTIONS[1]]
    model = models.build("ours", setting).eval()
    counted = FlopCountAnalysis(model, (inputs.pictures(setting),)).by_operator()["conv"]
    assert sum(map(flops_of, forward)) == counted
    # FREEZE_AT 2: the stem and the four convolutions of res2 come first and have no backward.
    weights = [[args[1].shape for args in forward[5:]], [args[2].shape for args in backward]]
    assert sorted(weights[0]) == sorted(weights[1])
    frozen = [p for p in model.backbone.parameters() if p.dim() == 4 and not p.requires_grad]
    assert [x.shape for x in frozen] == [args[1].shape for args in forward[:5]]


def test_the_products_of_a_box_tower_at_few_cells_are_recorded(setting, monkeypatch):
    monkeypatch.setattr(box_tower, "COST_OF_A_CELL", 0)
    step = cases.training_step(setting, ["ours"])["ours"]
    with instruments.ConvolutionRecorder() as recorder:
        step(Stopwatch("cpu"))
    forward = [args for func, args in recorder.calls if func is instruments.MATRIX_PRODUCTS[0]]
    # Four convolutions and the output, on fewer and fewer cells.
    assert [args[2].shape[0] for args in forward] == [9 * 256] * 5
    cells = [args[1].shape[0] for args in forward]
    assert cells == sorted(cells, reverse=True)


def test_the_replay_makes_tensors_like_those_of_the_step():
    x = torch.rand(2, 8, 5, 7).to(memory_format=torch.channels_last).bfloat16()
    weight = torch.rand(4, 8, 3, 3, dtype=torch.bfloat16)
    with instruments.ConvolutionRecorder() as recorder:
        torch.nn.functional.conv2d(x, weight)
    ((_, (like_x, like_weight, bias, *_)),) = recorder.calls
    for made, tensor in ((like_x.make(), x), (like_weight.make(), weight)):
        assert (made.shape, made.stride(), made.dtype) == (
            tensor.shape,
            tensor.stride(),
            tensor.dtype,
        )
    assert bias is None


def allocates_200_mb(setting, names):
    """A case whose runs allocate 200e6 bytes; "stock" dies as by the kernel's hand."""

    def run(name: str, stopwatch: Stopwatch) -> None:
        if name == "stock":
            os.kill(os.getpid(), signal.SIGKILL)
        torch.ones(50_000_000)

    return {name: lambda stopwatch, name=name: run(name, stopwatch) for name in names}


@pytest.mark.slow
def test_memory_is_that_of_a_fresh_process_however_large_this_one_is(setting):
    large = torch.ones(150_000_000)  # 600 MB, which a child replaced by exec would start with
    probes = instruments.memory_probes(allocates_200_mb, setting, ["ours", "stock"])
    assert len(large) and probes["ours"]()["memory"] == pytest.approx(200e6, rel=0.1)
    assert probes["stock"]() == {}


@pytest.mark.slow
def test_memory_of_our_loss_is_its_gradient_and_little_more():
    """A gradient is as large as the logits; building has freed more than that before."""
    setting = setting_of((768, 1024))  # large beside the code that a first run pages in
    logits, _ = inputs.random_outputs(setting, std=1.0)
    size = sum(x.nbytes for x in logits)
    probes = instruments.memory_probes(cases.classification_loss, setting, ["ours"])
    # A tenth less: the kernel counts pages in batches. Half more: a chunk's temporaries.
    assert 0.9 * size < probes["ours"]()["memory"] < 1.5 * size


def test_fp32_that_is_not_ieee_is_refused(monkeypatch):
    instruments.check_fp32("cpu")
    precision = torch.backends.mkldnn.conv.fp32_precision
    torch.backends.mkldnn.conv.fp32_precision = "bf16"
    try:
        with pytest.raises(ValueError, match=r"mkldnn\.conv\.fp32_precision is 'bf16'"):
            instruments.check_fp32("cpu")
    finally:
        torch.backends.mkldnn.conv.fp32_precision = precision
    monkeypatch.setenv("ONEDNN_DEFAULT_FPMATH_MODE", "BF16")
    with pytest.raises(ValueError, match="ONEDNN_DEFAULT_FPMATH_MODE is 'BF16'"):
        instruments.check_fp32("cpu")


def test_on_a_gpu_the_rows_choose_tf32_unless_a_variable_does(monkeypatch):
    monkeypatch.delenv("NVIDIA_TF32_OVERRIDE", raising=False)
    instruments.check_fp32("cuda")
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")
    with pytest.raises(ValueError, match=r"NVIDIA_TF32_OVERRIDE is '0'; unset the variable"):
        instruments.check_fp32("cuda")


@pytest.mark.parametrize("allowed", [False, True])
def test_tf32_is_what_it_was_after_a_row(allowed):
    def flags() -> tuple[bool, bool]:
        return torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32

    before = flags()
    with pytest.raises(KeyboardInterrupt), instruments.tf32(allowed):
        assert flags() == (allowed, allowed)
        raise KeyboardInterrupt
    assert flags() == before


def test_a_likeness_knows_how_much_memory_it_spans():
    for x in (torch.ones(2, 3, 4, 5), torch.ones(2, 3, 4)[:, 1:, ::2], torch.ones(0, 3)):
        like = instruments.Likeness(x.shape, x.stride(), x.dtype, x.device)
        assert torch.ones(like.length()).as_strided(x.shape, x.stride()).shape == x.shape
        if x.numel():
            with pytest.raises(RuntimeError):
                torch.ones(like.length() - 1).as_strided(x.shape, x.stride())
