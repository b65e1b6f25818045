"""The network of a training step as CUDA graphs, by ``MODEL.RETINA_FOCAL.CUDA_GRAPHS``.

A graph launches the hundreds of kernels of backbone and head, forward or backward, as one. It reads
and writes at the addresses that it was captured with, so it is for one size of images, for weights
that stay where they are, and for one backward pass after each forward pass.
"""

import logging
from collections.abc import Callable

import torch
from detectron2.utils import comm
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from retina_focal.errors import UserError
from retina_focal.folding import FoldedWeights, folded_inside
from retina_focal.network import run_network

KEY = "MODEL.RETINA_FOCAL.CUDA_GRAPHS"
DEVICE_TYPE = "cuda"
# Sizes of images that are captured; each keeps the activations of a step.
MAX_SIZES = 4

logger = logging.getLogger(__name__)


class Network(nn.Module):
    """Backbone and head as one function, with the autocast that is around them."""

    def __init__(
        self,
        backbone: nn.Module,
        head: nn.Module,
        in_features: list[str],
        folded_weights: FoldedWeights,
    ):
        super().__init__()
        self.backbone, self.head = backbone, head  # whose parameters a graph has to know
        self.parts = backbone, head, in_features, folded_weights
        device_type = next(head.parameters()).device.type
        self.autocast = {
            "device_type": device_type,
            "dtype": torch.get_autocast_dtype(device_type),
            "enabled": torch.is_autocast_enabled(device_type),
        }

    def forward(self, images: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """(N, C, H, W) to logits and deltas, as the head gives them."""
        # The cache would keep half-precision weights of the step that was captured.
        with torch.autocast(**self.autocast, cache_enabled=False):
            _, logits, deltas = run_network(*self.parts, images)
        return logits, deltas


class GraphedNetwork:
    """Captures the network for each of the first sizes of images, and replays it from then on."""

    def __init__(self):
        self._state: list[tuple] = []
        self._captured: dict[tuple, Callable] = {}
        self._num_forwards = 0

    def __call__(
        self,
        backbone: nn.Module,
        head: nn.Module,
        in_features: list[str],
        folded_weights: FoldedWeights,
        images: Tensor,
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Logits and deltas of a training step; the same as without graphs.

        Args:
            backbone, head: in training; without gradients they run as they are.
            in_features: names of the backbone's outputs that the head sees.
            folded_weights: of the backbone.
            images: (N, C, H, W) on a GPU.
        Raises:
            UserError: the network cannot be captured, or (in backward) gradients are accumulated.
        """
        network = Network(backbone, head, in_features, folded_weights)
        if not torch.is_grad_enabled():
            return network(images)
        key = (images.shape, images.stride(), *network.autocast.values())
        state = _state(network)
        if state != self._state:  # a graph would go on with what it was captured with
            self._captured, self._state = {}, state
        if key not in self._captured:
            if len(self._captured) == MAX_SIZES:
                return network(images)
            _refuse(network, images)
            self._captured[key] = _capture(network, images)
            if len(self._captured) == MAX_SIZES:
                logger.warning(
                    f"{KEY}: {MAX_SIZES} sizes of images are captured, all others run without "
                    "graphs; graphs are for images of one size"
                )
        logits, deltas = self._captured[key](images)
        self._num_forwards += 1
        self._check_at_backward(network, [x for x in (*logits, *deltas) if x.requires_grad])
        return logits, deltas

    def _check_at_backward(self, network: Network, outputs: list[Tensor]) -> None:
        number = self._num_forwards

        def check(gradient: Tensor) -> None:
            if number != self._num_forwards:
                raise UserError(
                    f"{KEY} is True, but another forward pass came before the backward pass and "
                    f"replaced its activations; set {KEY} False"
                )
            # The next replay would write into the gradients that it is added to.
            if any(x.grad is not None for x in network.parameters()):
                raise UserError(
                    f"{KEY} is True, but there are gradients of an earlier backward pass; set "
                    "MODEL.RETINA_FOCAL.ACCUMULATE_STEPS 1 and let zero_grad set them to None, or "
                    f"set {KEY} False"
                )

        for output in outputs[:1]:
            output.register_hook(check)

    def __reduce__(self) -> tuple:
        return GraphedNetwork, ()  # a copy has weights of its own


def _state(network: Network) -> list[tuple]:
    """Where the weights lie, and the values of those that are not trained."""
    tensors = [*network.parameters(), *network.buffers()]
    return [
        (id(x), x.data_ptr(), x.requires_grad, None if x.requires_grad else x._version)
        for x in tensors
    ]


def _capture(network: Network, images: Tensor) -> Callable:
    network(images)  # what is remembered of frozen weights must not lie in a graph's memory
    folded = folded_inside(network)
    for own in folded:
        own.of_step = None  # its graph lies on this stream, for which no capture may wait
    remembered = [own.remembered() for own in folded]
    with torch.autocast(images.device.type, enabled=False, cache_enabled=False):
        graphed = torch.cuda.make_graphed_callables(
            network, (images.clone(),), allow_unused_input=True
        )
    # The graph reads them where they lie, also after the modules have forgotten them.
    graphed.remembered = remembered
    return graphed


def _refuse(network: Network, images: Tensor) -> None:
    """Refuse, in words, what would run and be wrong, or would fail without words."""
    norms = [
        name
        for name, x in network.named_modules()
        if isinstance(x, _NormBase) and x.training and x.track_running_stats
    ]
    hooked = [
        name
        for name, x in network.named_modules()
        if x._forward_hooks or x._forward_pre_hooks or x._backward_hooks or x._backward_pre_hooks
    ]
    reasons = {
        f"the model is on the device '{images.device.type}'": images.device.type != DEVICE_TYPE,
        f"there are {comm.get_world_size()} processes": comm.get_world_size() > 1,
        f"{norms[:1]} keeps statistics, which capturing would change": norms,
        f"{hooked[:1]} has a hook, which a graph would not call": hooked,
    }
    for reason, holds in reasons.items():
        if holds:
            raise UserError(f"{KEY} is True, but {reason}; set {KEY} False")
