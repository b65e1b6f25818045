"""Laws of the CUDA graphs: the same losses and gradients, or a refusal in words.

No graph is captured here. A stand-in for torch's `make_graphed_callables` has what a graph has: one
size, fixed addresses of inputs, outputs, gradients and weights, and one backward pass.
"""

import copy
import weakref

import pytest
import torch
from conftest import PLUGIN, pictures, small_cfg
from detectron2.modeling import build_model

from retina_focal import add_retina_focal_config, graphs, head
from retina_focal.folding import FoldedConv2d
from retina_focal.graphs import KEY

SIZE = (32, 64)


def stand_in(network, sample_args, allow_unused_input):
    """What `torch.cuda.make_graphed_callables` returns, replayed by calling the network."""
    assert not (torch.is_autocast_enabled("cpu") and torch.is_autocast_cache_enabled())
    captures.append(network)
    # Else CUDA invalidates the capture: autograd's nodes of another stream would be waited for.
    assert all(x.folded.of_step is None for x in network.modules() if isinstance(x, FoldedConv2d))
    (static_images,) = sample_args
    network(static_images)  # torch's warm-up
    parameters = tuple(network.parameters())
    trained = [x for x in parameters if x.requires_grad]
    addresses = [x.data_ptr() for x in (*parameters, *network.buffers())]
    folded = [x.folded for x in network.modules() if isinstance(x, FoldedConv2d)]
    read = [weakref.ref(x) for weight in folded for x in weight.remembered()]
    original, kept, static_outputs, static_gradients = network.forward, [], [], []

    class Graphed(torch.autograd.Function):
        @staticmethod
        def forward(ctx, images, *inputs):
            assert images.shape == static_images.shape
            assert addresses == [x.data_ptr() for x in (*parameters, *network.buffers())]
            assert all(x() is not None for x in read)
            replays.append(images.shape)
            static_images.copy_(images)
            with torch.enable_grad():
                logits, deltas = original(static_images)
            kept[:] = [*logits, *deltas]
            if not static_outputs:
                static_outputs.extend(x.detach().clone() for x in kept)
            for static, output in zip(static_outputs, kept, strict=True):
                static.copy_(output.detach())
            return tuple(x.detach() for x in static_outputs)

        @staticmethod
        def backward(ctx, *gradients):
            new = torch.autograd.grad(kept, trained, gradients, allow_unused=True)
            if not static_gradients:
                static_gradients.extend(x.clone() for x in new)
            for static, gradient in zip(static_gradients, new, strict=True):
                static.copy_(gradient)
            of = dict(zip(map(id, trained), static_gradients, strict=True))
            return None, *(of[id(x)].detach() if id(x) in of else None for x in parameters)

    def graphed(images):
        outputs = Graphed.apply(images, *parameters)
        return list(outputs[: len(outputs) // 2]), list(outputs[len(outputs) // 2 :])

    return graphed


captures, replays = [], []


@pytest.fixture(autouse=True)
def _cpu_as_gpu(monkeypatch):
    captures.clear(), replays.clear()
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", stand_in)
    monkeypatch.setattr(graphs, "DEVICE_TYPE", "cpu")
    # As on a device: deltas of all cells.
    monkeypatch.setattr(head, "split_tower", lambda layers: (layers, []))


def model(cuda_graphs=True, norm="FrozenBN", freeze_at=2):
    cfg = small_cfg(norm=norm, **PLUGIN)
    add_retina_focal_config(cfg)
    cfg.MODEL.BACKBONE.FREEZE_AT = freeze_at
    cfg.MODEL.RETINA_FOCAL.CUDA_GRAPHS = cuda_graphs
    torch.manual_seed(0)
    return build_model(cfg).train()


def train(module, sizes, after_step=lambda module, step: None, amp=False):
    """Losses of one step per size, and the weights after them."""
    optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], 1e-3)
    losses = []
    for step, size in enumerate(sizes):
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            found = module(pictures([size], [2], seed=step))
        optimizer.zero_grad()
        sum(found.values()).backward()
        optimizer.step()
        losses.append([x.item() for x in found.values()])
        after_step(module, step)
    return losses, list(module.state_dict().values())


def load_other_frozen_weights(module, step):
    if step == 1:
        state = {name: 1.1 * x for name, x in module.state_dict().items() if "stem" in name}
        module.load_state_dict(state, strict=False)


def evaluate(module, step):
    module.eval()
    with torch.no_grad():
        module(pictures([SIZE], [1]))
    module.train()


@pytest.mark.parametrize(
    ("change", "num_captures"),
    [(lambda module, step: None, 1), (load_other_frozen_weights, 2), (evaluate, 1)],
    ids=["nothing", "load", "evaluate"],
)
def test_steps_are_those_without_graphs(change, num_captures):
    expected = train(model(cuda_graphs=False), [SIZE] * 4, change)
    losses, weights = train(model(), [SIZE] * 4, change)
    assert len(captures) == num_captures and len(replays) == 4
    assert losses == expected[0]
    assert all(map(torch.equal, weights, expected[1]))


def test_steps_under_amp_are_those_without_graphs_but_for_the_rounding():
    expected, _ = train(model(cuda_graphs=False), [SIZE] * 3, amp=True)
    losses, _ = train(model(), [SIZE] * 3, amp=True)
    assert len(captures) == 1 and len(replays) == 3
    # Without the cache of autocast, the gradients of shared weights are added in fp32.
    torch.testing.assert_close(losses, expected, rtol=1e-3, atol=0)
    assert losses[0] == expected[0]


def test_only_the_first_sizes_are_captured(monkeypatch, caplog):
    monkeypatch.setattr(graphs, "MAX_SIZES", 2)
    sizes = [(32, 32), (32, 64), (64, 64), (32, 32), (32, 96)]
    expected = train(model(cuda_graphs=False), sizes)
    losses, _ = train(model(), sizes)
    assert losses == expected[0]
    assert len(captures) == 2 and len(replays) == 3
    assert caplog.text.count("2 sizes of images are captured") == 1


def test_without_gradients_and_in_inference_nothing_is_captured():
    module = model()
    with torch.no_grad():
        module(pictures([SIZE], [1]))
        module.eval()(pictures([SIZE], [1]))
    assert not captures


def test_a_copy_captures_its_own_weights():
    module = model()
    train(module, [SIZE])
    train(copy.deepcopy(module), [SIZE])
    assert len(captures) == 2
    assert not any(x is y for x, y in zip(*(c.parameters() for c in captures), strict=True))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda m, patch: patch.setattr(graphs, "DEVICE_TYPE", "cuda"), "on the device 'cpu'"),
        (
            lambda m, patch: patch.setattr(graphs.comm, "get_world_size", lambda: 2),
            "there are 2 processes",
        ),
        (
            lambda m, patch: m.backbone.fpn_output3.register_forward_hook(lambda *x: None),
            r"'backbone.fpn_output3'\] has a hook",
        ),
    ],
)
def test_what_a_graph_cannot_do_is_refused_in_words(spoil, message, monkeypatch):
    module = model()
    spoil(module, monkeypatch)
    with pytest.raises(ValueError, match=f"{KEY} is True, but .*{message}.*set {KEY} False"):
        train(module, [SIZE])


def test_norms_that_are_trained_are_refused_in_words():
    with pytest.raises(ValueError, match=r"norm'.* keeps statistics, which capturing would change"):
        train(model(norm="BN"), [SIZE])


def test_accumulated_gradients_are_refused_in_words():
    module = model()
    sum(module(pictures([SIZE], [1])).values()).backward()
    losses = module(pictures([SIZE], [1]))
    with pytest.raises(ValueError, match=r"gradients of an earlier backward pass.*STEPS 1"):
        sum(losses.values()).backward()


def test_two_forward_passes_before_a_backward_pass_are_refused_in_words():
    module = model()
    losses = [*module(pictures([SIZE], [1])).values(), *module(pictures([SIZE], [2])).values()]
    with pytest.raises(ValueError, match="another forward pass came before the backward pass"):
        sum(losses).backward()
