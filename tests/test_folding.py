"""Laws of folding: the same network, parameters and names, without the norms' passes."""

import copy
import io
from contextlib import nullcontext

import pytest
import torch
from conftest import PLUGIN, STOCK, pictures, small_cfg
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from test_head import outputs_of
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from retina_focal import folding
from retina_focal.folding import (
    FoldedConv2d,
    FoldedWeights,
    fold_frozen_norms,
)
from retina_focal.folding_timm import FoldedTimmConv2d, fold_timm_norms


def conv(bias=False, seed=0, **kwargs):
    """A convolution whose frozen norm has seen data."""
    generator = torch.Generator().manual_seed(seed)
    norm = FrozenBatchNorm2d(8)
    for buffer in (norm.weight, norm.bias, norm.running_mean):
        buffer.copy_(torch.randn(8, generator=generator))
    norm.running_var.copy_(0.5 + torch.rand(8, generator=generator))
    return Conv2d(6, 8, 3, bias=bias, norm=norm, **kwargs)


def image():
    return torch.randn(2, 6, 9, 11, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_output_and_gradients_are_those_of_convolution_and_norm(bias, training):
    plain = conv(bias, stride=2, padding=1, activation=torch.nn.functional.relu).train(training)
    folded = FoldedConv2d(copy.deepcopy(plain))
    assert folded.training is training
    results = []
    for module in (plain, folded):
        x = image().requires_grad_()
        y = module(x)
        y.square().sum().backward()
        results.append([y, x.grad, *(p.grad for p in module.parameters())])
    # Folding rounds w s instead of y s.
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-4)


def test_state_dict_is_the_same_folded_or_not():
    plain = conv()
    expected = copy.deepcopy(plain.state_dict())
    folded = FoldedConv2d(plain).eval()
    with torch.no_grad():
        folded(image())
    state = folded.state_dict()
    assert list(state) == list(expected)
    assert all(torch.equal(state[name], expected[name]) for name in expected)


def replace_weight(module):
    """By a tensor that can get the address of the old one."""
    values = 2 * module.weight.detach()
    module.weight.data = torch.empty(0)
    module.weight.data = values.clone()


CHANGES = {
    "parameter": lambda module: module.weight.mul_(2),
    "data": replace_weight,
    "buffer": lambda module: module.norm.running_var.mul_(2),
    "checkpoint": lambda module: module.load_state_dict(conv(seed=3).state_dict()),
    "assigned": lambda module: module.load_state_dict(conv(seed=3).state_dict(), assign=True),
    "dtype": lambda module: module.double(),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("state", ["inference", "frozen", "trained"])
def test_what_is_remembered_is_dropped_when_a_parameter_or_buffer_changes(change, state):
    folded = FoldedConv2d(conv()).train(state != "inference")
    folded.weight.requires_grad_(state == "trained")
    for _ in range(3):
        folded(image().to(folded.weight.dtype))
        with torch.no_grad():
            change(folded)
        x = image().to(folded.weight.dtype)
        torch.testing.assert_close(folded(x), conv_then_norm(folded, x), rtol=1e-4, atol=1e-4)


def conv_then_norm(module, x):
    y = torch.nn.functional.conv2d(x, module.weight)
    return module.norm(y)


@pytest.mark.parametrize(
    ("state", "operations"),
    [
        ("inference", ["convolution"]),
        ("frozen", ["convolution"]),
        # The product is a part of the graph: its gradient is one operation more.
        ("trained", ["mul", "convolution"]),
    ],
)
def test_only_what_has_a_gradient_is_computed_at_every_step(state, operations):
    folded = FoldedConv2d(conv()).train(state != "inference")
    folded.weight.requires_grad_(state == "trained")

    def run():
        with torch.set_grad_enabled(state != "inference"):
            folded(image())

    counts = [[name for name, _ in operators_of(run) if name in KERNELS] for _ in range(2)]
    assert counts[1] == operations and len(counts[0]) > len(counts[1])
    folded.train(folded.training)
    assert [name for name, _ in operators_of(run) if name in KERNELS] == counts[0]


KERNELS = {"mul", "add", "sub", "rsqrt", "addcmul", "convolution"}


def test_a_step_of_a_frozen_resnet_folds_its_trained_weights_alone():
    backbone = frozen_models()[1].backbone.train()
    images = torch.randn(1, 3, 64, 64)

    def forward():
        backbone(images)

    forward()
    names = [name for name, _ in operators_of(forward)]
    trained = sum(m.weight.requires_grad for m in backbone.modules() if isinstance(m, FoldedConv2d))
    assert names.count("mul") == trained > 10 and "rsqrt" not in names


def test_what_inference_remembers_serves_training():
    folded = FoldedConv2d(conv()).eval()
    folded.weight.requires_grad_(False)
    with torch.inference_mode():
        expected = folded(image())
    x = image().requires_grad_()
    y = folded(x)
    y.sum().backward()
    assert torch.equal(y, expected) and x.grad.abs().sum() > 0


def test_a_copy_takes_nothing_that_is_remembered():
    folded = FoldedConv2d(conv()).eval()
    with torch.no_grad():
        folded(image())
        other = copy.deepcopy(folded)
        assert not other.folded._whole._memory
        other.weight.zero_()
        torch.testing.assert_close(other(image()), conv_then_norm(other, image()))
    file = io.BytesIO()
    torch.save(folded, file)
    file.seek(0)
    assert not torch.load(file, weights_only=False).folded._whole._memory


def frozen_models():
    """Stock and plugin with the same weights and frozen norms that have seen data."""
    torch.manual_seed(0)
    stock, plugin = (build_model(small_cfg(norm="FrozenBN", **names)) for names in (STOCK, PLUGIN))
    generator = torch.Generator().manual_seed(0)
    for module in stock.modules():
        if isinstance(module, FrozenBatchNorm2d):
            # Small weights: each block adds to its input, and nothing norms the sum.
            module.weight.copy_(0.1 + 0.2 * torch.rand(module.weight.shape, generator=generator))
            module.running_var.copy_(0.5 + torch.rand(module.weight.shape, generator=generator))
    plugin.load_state_dict(stock.state_dict(), strict=True)
    return stock, plugin


def test_a_frozen_resnet_is_folded_whole_and_gives_stocks_losses_and_detections():
    stock, plugin = frozen_models()
    folded = [m for m in plugin.modules() if isinstance(m, FoldedConv2d)]
    norms = [m for m in plugin.modules() if isinstance(m, FrozenBatchNorm2d)]
    assert len(folded) == len(norms) > 0
    batch = pictures([(64, 96), (80, 64)], [3, 2])
    with EventStorage():
        expected, losses = stock.train()(batch), plugin.train()(batch)
    for name in expected:
        assert losses[name].item() == pytest.approx(expected[name].item(), rel=1e-5)
    stock.eval(), plugin.eval()
    stock.test_score_thresh = plugin.test_score_thresh = 0.0
    with torch.no_grad():
        for one, other in zip(stock(batch), plugin(batch), strict=True):
            one, other = one["instances"], other["instances"]
            torch.testing.assert_close(other.scores, one.scores, rtol=0, atol=1e-4)


def test_nothing_else_is_folded():
    model = torch.nn.Sequential(Conv2d(3, 4, 1, norm=torch.nn.BatchNorm2d(4)), Conv2d(4, 4, 1))
    before = list(model)
    fold_frozen_norms(model)
    assert all(one is other for one, other in zip(before, model, strict=True))


@pytest.mark.parametrize("part", ["backbone", "head"])
def test_backbone_and_head_compile_into_one_graph(part):
    _, plugin = frozen_models()
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        features = list(plugin.backbone(images).values())
        inputs = images if part == "backbone" else features
        module = getattr(plugin, part)
        # "eager" runs the captured graph as it is: no compiler needed.
        compiled = torch.compile(module, fullgraph=True, backend="eager")
        expected = outputs_of(module, inputs) if part == "head" else module(inputs)
        torch.testing.assert_close(compiled(inputs), expected, rtol=1e-5, atol=1e-5)


TIMM_MODELS = ["tf_efficientnet_lite0", "mobilenetv3_small_050", "resnet18", "regnety_002"]


@pytest.mark.parametrize("name", TIMM_MODELS)
@pytest.mark.parametrize("training", [False, True])
def test_a_timm_model_is_folded_whole_and_stays_the_same_function(name, training):
    plain = frozen_timm_model(name).train(training)
    folded = copy.deepcopy(plain)
    fold_timm_norms(folded)
    is_norm = [type(m).__name__.startswith("FrozenBatchNorm") for m in plain.modules()]
    assert sum(isinstance(m, FoldedTimmConv2d) for m in folded.modules()) == sum(is_norm) > 0
    assert list(folded.state_dict()) == list(plain.state_dict())
    results = []
    for model in (plain, folded):
        x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(2)).requires_grad_()
        # Dropout and drop path draw.
        torch.manual_seed(0)
        features = model.forward_features(x)
        features.square().mean().backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        results.append([features, x.grad, *gradients])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(
            other, one, rtol=1e-3, atol=1e-4 * float(one.detach().abs().max())
        )


def frozen_timm_model(name):
    """A timm model whose frozen norms have seen data."""
    timm = pytest.importorskip("timm", reason="timm is not installed: make setup")
    from timm.layers import freeze_batch_norm_2d

    torch.manual_seed(0)
    model = freeze_batch_norm_2d(timm.create_model(name))
    for buffer_name, buffer in model.named_buffers():
        if buffer_name.endswith("running_var"):
            buffer.copy_(0.5 + torch.rand_like(buffer))
        elif buffer.is_floating_point():
            buffer.add_(0.1 * torch.randn_like(buffer))
    return model


def test_weights_of_trained_timm_norms_load_strictly():
    timm = pytest.importorskip("timm", reason="timm is not installed: make setup")
    folded = frozen_timm_model("resnet18")
    fold_timm_norms(folded)
    folded.load_state_dict(timm.create_model("resnet18").state_dict(), strict=True)


def test_a_copy_folds_its_own_weights():
    one = frozen_timm_model("resnet18").eval()
    fold_timm_norms(one)
    other = copy.deepcopy(one)
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        before = one(image)
        for parameter in one.parameters():
            parameter.zero_()
        torch.testing.assert_close(other(image), before)


def operators_of(function):
    """Each operator that it calls, with its arguments."""

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            calls.append((func.overloadpacket.__name__, args))
            return func(*args, **(kwargs or {}))

    calls = []
    with Recorder():
        function()
    return calls


def step(model):
    model(torch.randn(2, 3, 64, 64)).float().square().mean().backward()


def test_depthwise_gradients_on_a_cpu_are_fp32_under_autocast():
    model = frozen_timm_model("tf_efficientnet_lite0")
    fold_timm_norms(model)
    with torch.autocast("cpu", torch.bfloat16):
        calls = operators_of(lambda: step(model))
    dtypes = {True: set(), False: set()}  # by whether it is depthwise
    for name, args in calls:
        if name == "convolution_backward":
            dtypes[args[2].shape[1] == 1].add(args[1].dtype)
    assert dtypes == {True: {torch.float32}, False: {torch.bfloat16}}


def test_depthwise_convolutions_without_gradients_stay_in_bf16():
    model = frozen_timm_model("tf_efficientnet_lite0").requires_grad_(False)
    fold_timm_norms(model)
    with torch.autocast("cpu", torch.bfloat16):
        calls = operators_of(lambda: model(torch.randn(2, 3, 64, 64)))
    assert {args[0].dtype for name, args in calls if name == "convolution"} == {torch.bfloat16}


def test_activations_in_place_clone_no_map_for_their_gradient():
    model = frozen_timm_model("tf_efficientnet_lite0")
    counts = []
    for fold in (False, True):
        if fold:
            fold_timm_norms(model)
        calls = operators_of(lambda: step(model))
        counts.append(sum(name == "clone" and args[0].dim() == 4 for name, args in calls))
    assert counts[0] > 0 == counts[1]


class ConvUsedTwice(torch.nn.Module):
    """Its convolution's output goes to a norm and to a sum."""

    def __init__(self, norm):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 4, 1)
        self.norm = norm

    def forward(self, x):
        x = self.conv(x)
        return x + self.norm(x)


def test_a_convolution_that_something_else_uses_too_is_not_folded():
    pytest.importorskip("timm", reason="timm is not installed: make setup")
    from timm.layers import FrozenBatchNormAct2d

    model = ConvUsedTwice(FrozenBatchNormAct2d(4))
    fold_timm_norms(model)
    assert type(model.conv) is torch.nn.Conv2d


class ConvAndNorm(torch.nn.Module):
    """A convolution and the norm after it, so many times in a row."""

    def __init__(self, times: int = 1, **kwargs):
        from timm.layers import FrozenBatchNormAct2d

        super().__init__()
        self.conv = torch.nn.Conv2d(4, 4, 3, padding=1, **kwargs)
        self.norm = FrozenBatchNormAct2d(4)
        self.times = times

    def forward(self, x):
        for _ in range(self.times):
            x = self.norm(self.conv(x))
        return x


@pytest.mark.parametrize(
    "options, is_folded",
    [({}, True), ({"padding_mode": "reflect"}, False), ({"times": 2}, False)],
    ids=["plain", "reflected border", "called twice"],
)
def test_what_a_folded_convolution_cannot_do_stays_as_it_is(options, is_folded):
    pytest.importorskip("timm", reason="timm is not installed: make setup")
    model, x = ConvAndNorm(**options).eval(), torch.randn(1, 4, 6, 5)
    expected = model(x)
    fold_timm_norms(model)
    assert (type(model.conv) is FoldedTimmConv2d) == is_folded
    torch.testing.assert_close(model(x), expected)


# Folded together


def network():
    """Trained and frozen convolutions, with and without a bias, one behind the other."""
    torch.manual_seed(0)
    layers = [conv(seed=0), conv(seed=1), conv(bias=True, seed=2), conv(seed=3)]
    for i, layer in enumerate(layers[1:], 1):
        layer.weight = torch.nn.Parameter(layer.weight.detach().repeat(1, 2, 1, 1)[:, :8] * i)
    layers[1].weight.requires_grad = False
    net = torch.nn.Sequential(*layers)
    fold_frozen_norms(net)
    return net


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("group_bytes", [1, 1 << 30])
def test_folded_together_or_one_by_one_is_the_same_to_the_last_bit(
    monkeypatch, autocast, layout, group_bytes
):
    monkeypatch.setattr(folding, "GROUP_BYTES", group_bytes)
    results = []
    for together in (False, True):
        net = network().to(memory_format=layout)
        weights = FoldedWeights(net)
        folded = weights.folded() if together else nullcontext()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast), folded:
            y = net(image().to(memory_format=layout))
        (y.float().square().sum() * 1e-6).backward()
        results.append([y.detach(), *(p.grad for p in net.parameters())])
    assert [x is None for x in results[0]] == [x is None for x in results[1]]
    for one, other in zip(*results, strict=True):
        assert one is None or torch.equal(one, other)


def test_folding_together_costs_one_operation_a_convolution_and_pass():
    net, products = network(), []
    weights = FoldedWeights(net)

    @torch.autocast("cpu", torch.bfloat16)
    def fold():
        with weights.folded():
            products[:] = [net[i].folded()[0] for i in (0, 3)]

    def gradients():
        torch.autograd.grad(products, [net[0].weight, net[3].weight], products)

    fold()  # what is remembered
    assert [name for name, _ in operators_of(fold) if name != "empty_like"] == ["mul", "mul"]
    assert [x.dtype for x in products] == [torch.bfloat16] * 2
    assert [name for name, _ in operators_of(gradients) if name != "detach"] == ["mul", "mul"]


def test_what_was_folded_before_does_not_outlive_its_network():
    net = network()
    weights = FoldedWeights(net)
    with pytest.raises(ZeroDivisionError), weights.folded():
        assert net[0].folded.folded_before is not None
        raise ZeroDivisionError
    assert all(layer.folded.folded_before is None for layer in net)
    with torch.no_grad(), weights.folded():
        assert net[0].folded.folded_before is None


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_recomputes_what_was_folded_together(use_reentrant):
    gradients = []
    for is_checkpointed in (False, True):
        net, x = network(), image().requires_grad_()
        with FoldedWeights(net).folded():
            y = checkpoint(net, x, use_reentrant=use_reentrant) if is_checkpointed else net(x)
        y.square().sum().backward()
        gradients.append([p.grad for p in net.parameters()])
        assert all(layer.folded.of_step is None for layer in net)
    for one, other in zip(*gradients, strict=True):
        assert (one is None and other is None) or torch.equal(one, other)


def test_weights_are_rounded_once_for_an_autocast_and_kept():
    net, x = network().eval(), image()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = net(x)
        names = [name for name, _ in operators_of(lambda: net(x))]
        assert torch.equal(net(x), expected)
        assert names.count("_to_copy") == 1  # of the image; a convolution would round each weight
    with torch.no_grad():
        assert net(x).dtype == torch.float32


def test_another_eps_is_seen():
    net, x = network().eval(), image()
    with torch.no_grad():
        before = net(x)
        net[0].norm.eps = 1.0
        assert not torch.equal(net(x), before)
