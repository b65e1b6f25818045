"""Frozen batch norms folded into the convolutions before them.

Both are linear, so conv(x, w) s + b = conv(x, w s) + b: the feature map is read and written once
instead of three times. Where w is trained, the product w s is a part of the graph. Parameters,
buffers and their names stay those of the modules that are replaced.
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy

import torch
import torch.nn.functional as F
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from torch import Tensor, fx, nn

from retina_focal.precision import product_dtype

# As DDP's buckets: it exchanges the gradients of one while backward computes the next.
GROUP_BYTES = 25 << 20

logger = logging.getLogger(__name__)


class FoldedWeight:
    """Weight and bias of a convolution with the frozen norm inside, as the convolution reads them.

    What needs no gradient is computed once: scale and shift of the norm, and the whole product of a
    frozen convolution, or of any in inference. It is computed anew when a tensor that it comes from
    was replaced or changed in place. A change that torch does not count (through `tensor.data`, or
    by a fused optimizer) is seen after the next `train` or `eval`.

    Args:
        conv: gives weight and bias.
        norm: with the buffers of detectron2's `FrozenBatchNorm2d`, and `eps`.
        keeps_dtype: whether the convolution reads fp32 in an autocast of a CPU too.
    """

    def __init__(self, conv: nn.Conv2d, norm: nn.Module, keeps_dtype: bool = False):
        self.conv = conv
        self.norm = norm
        self.keeps_dtype = keeps_dtype
        self.folded_before: tuple[Tensor, Tensor] | None = None  # by `FoldedWeights`
        self._norm = Remembered()
        self._whole = Remembered()

    def __call__(self) -> tuple[Tensor, Tensor]:
        if self.folded_before is not None:
            return self.folded_before
        weight, bias = self.conv.weight, self.conv.bias
        if torch.compiler.is_compiling():
            return self.fold(*self.scale_and_shift())
        parameters = [weight] if bias is None else [weight, bias]
        is_trained = any(x.requires_grad for x in parameters)
        if is_trained and (self.conv.training or torch.is_grad_enabled()):
            return self.fold(*self.remembered_norm(weight.dtype))
        dtype, buffers = self.dtype(), self.buffers()

        def whole() -> tuple[Tensor, ...]:
            return tuple(x.to(dtype) for x in self.fold(*self.scale_and_shift()))

        return self._whole(parameters + buffers, whole, dtype, self.norm.eps)

    def dtype(self) -> torch.dtype:
        """What the convolution reads here: an autocast would round to it at each step."""
        weight = self.conv.weight
        return weight.dtype if self.keeps_dtype and weight.is_cpu else product_dtype(weight)

    def buffers(self) -> list[Tensor]:
        norm = self.norm
        return [norm.weight, norm.bias, norm.running_mean, norm.running_var]

    def remembered_norm(self, shift_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """`scale_and_shift`, the shift in this dtype."""

        def compute() -> tuple[Tensor, Tensor]:
            scale, shift = self.scale_and_shift()
            return scale, shift.to(shift_dtype)

        return self._norm(self.buffers(), compute, shift_dtype, self.norm.eps)

    def scale_and_shift(self) -> tuple[Tensor, Tensor]:
        """(C, 1, 1, 1) and (C,): the norm is x scale + shift."""
        norm = self.norm
        scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
        return scale.view(-1, 1, 1, 1), norm.bias - norm.running_mean * scale

    def fold(self, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
        weight, bias = self.conv.weight, self.conv.bias
        shift = shift if bias is None else torch.addcmul(shift, bias, scale.flatten())
        return weight * scale, shift

    def remembered(self) -> tuple[Tensor, ...]:
        """What a convolution reads that no step computes."""
        return self._norm.results + self._whole.results

    def forget(self) -> None:
        """Compute all anew at the next call."""
        self._norm.forget()
        self._whole.forget()


class FoldedWeights:
    """Folds all trained convolutions of a network before it runs.

    Each takes one operation forward and one backward, product and rounding together, and the host
    little between them. One by one in an autocast they are two forward and two backward, each
    with what autograd and autocast ask of the host.
    """

    def __init__(self, network: nn.Module):
        convolutions = (FoldedConv2d, FoldedTimmConv2d)
        self._all = [x.folded for x in network.modules() if isinstance(x, convolutions)]

    @contextmanager
    def folded(self) -> Iterator[None]:
        """Inside, in the autocast that is around it, each convolution finds its weight."""
        if not torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.jit.is_tracing():
            yield
            return
        trained = [x for x in self._all if x.conv.weight.requires_grad and x.conv.bias is None]
        try:
            for group in _groups(trained):
                dtypes = [x.dtype() for x in group]
                norms = [x.remembered_norm(y) for x, y in zip(group, dtypes, strict=True)]
                scales = [scale for scale, _ in norms]
                weights = _Products.apply(dtypes, scales, *(x.conv.weight for x in group))
                for own, weight, (_, shift) in zip(group, weights, norms, strict=True):
                    own.folded_before = weight, shift
            yield
        finally:
            for own in trained:
                own.folded_before = None


def _groups(folded: list[FoldedWeight]) -> Iterator[list[FoldedWeight]]:
    """Neighbours whose gradients are ready at about the same time."""
    group, nbytes = [], 0
    for own in folded:
        group.append(own)
        nbytes += own.conv.weight.nbytes
        if nbytes >= GROUP_BYTES:
            yield group
            group, nbytes = [], 0
    if group:
        yield group


class _Products(torch.autograd.Function):
    """Weights times scales, each rounded once to a dtype; gradients in that of the weight."""

    @staticmethod
    def forward(ctx, dtypes, scales, *weights):
        ctx.scales = scales
        ctx.set_materialize_grads(False)
        return tuple(
            torch.mul(weight, scale, out=torch.empty_like(weight, dtype=dtype))
            for dtype, scale, weight in zip(dtypes, scales, weights, strict=True)
        )

    @staticmethod
    def backward(ctx, *grads):
        pairs = zip(grads, ctx.scales, strict=True)
        return None, None, *(None if grad is None else grad * scale for grad, scale in pairs)


class Remembered:
    """The last results of a function of tensors, until one of these changes."""

    def __init__(self):
        self.forget()

    def forget(self) -> None:
        self._state: tuple = ()
        self._memory: list[Tensor] = []
        self.results: tuple[Tensor, ...] = ()

    def __call__(
        self, tensors: list[Tensor], function: Callable[[], tuple[Tensor, ...]], *others: object
    ) -> tuple[Tensor, ...]:
        """
        Args:
            tensors: all that the results come from.
            function: computes the results, without gradients.
            others: what else they come from, comparable.
        """
        state = (others, [(id(x), x.data_ptr(), x._version) for x in tensors])
        if state != self._state:
            # Results of inference mode could not be used in training.
            with torch.inference_mode(False), torch.no_grad():
                self.results = function()
                # As long as these live, no other tensor has their identities or addresses.
                self._memory = [*tensors, *(x.detach() for x in tensors)]
            self._state = state
        return self.results

    def __reduce__(self) -> tuple:
        return Remembered, ()  # a copy has tensors of its own


class FoldedConv2d(Conv2d):
    """detectron2's `Conv2d`, which holds its norm."""

    def __init__(self, conv: Conv2d):
        super().__init__(**_arguments(conv), norm=conv.norm, activation=conv.activation)
        self.weight, self.bias = conv.weight, conv.bias
        self.folded = FoldedWeight(self, conv.norm)
        self.train(conv.training)

    def train(self, mode: bool = True) -> "FoldedConv2d":
        self.folded.forget()
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.folded()
        x = F.conv2d(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)
        return x if self.activation is None else self.activation(x)


class FoldedTimmConv2d(nn.Conv2d):
    """A convolution of timm, whose norm is a module beside it."""

    def __init__(self, conv: nn.Conv2d, norm: "FoldedTimmNorm"):
        from timm.layers import Conv2dSame
        from timm.layers.conv2d_same import conv2d_same

        super().__init__(**_arguments(conv))
        self.weight, self.bias = conv.weight, conv.bias
        self._conv2d = conv2d_same if isinstance(conv, Conv2dSame) else F.conv2d
        self._is_depthwise = is_depthwise(conv)
        self.folded = FoldedWeight(self, norm, keeps_dtype=self._is_depthwise)
        self.train(conv.training)

    def train(self, mode: bool = True) -> "FoldedTimmConv2d":
        self.folded.forget()
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.folded()
        needs_grad = x.requires_grad or weight.requires_grad
        if not (self._is_depthwise and needs_grad and x.device.type == "cpu"):
            return self._conv(x, weight, bias)
        # Its gradients take up to thirty times as long in bf16 as in the weights' fp32.
        with torch.autocast("cpu", enabled=False):
            return self._conv(x.to(weight.dtype), weight, bias).to(x.dtype)

    def _conv(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return self._conv2d(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)


class FoldedTimmNorm(nn.Module):
    """The buffers of timm's frozen norm, and what it does after the norm."""

    def __init__(self, norm: nn.Module):
        super().__init__()
        self.eps = norm.eps
        for name, buffer in norm.named_buffers(recurse=False):
            self.register_buffer(name, buffer)
        # A plain frozen norm of timm has neither.
        self.drop = getattr(norm, "drop", nn.Identity())
        self.act = getattr(norm, "act", nn.Identity())
        # In place, torch copies what the gradient needs first; a ReLU's needs the result alone.
        self.act_with_gradient = self.act
        if getattr(self.act, "inplace", False) and not isinstance(self.act, nn.ReLU):
            self.act_with_gradient = copy(self.act)
            self.act_with_gradient.inplace = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(x)
        return self.act_with_gradient(x) if x.requires_grad else self.act(x)

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args) -> None:
        # Weights of a norm that was trained count its batches.
        state_dict.pop(f"{prefix}num_batches_tracked", None)
        super()._load_from_state_dict(state_dict, prefix, *args)


def is_depthwise(conv: nn.Conv2d) -> bool:
    """Whether each of several channels is convolved on its own."""
    return conv.groups == conv.in_channels > 1


def fold_frozen_norms(module: nn.Module) -> None:
    """Replace, in place, every detectron2 `Conv2d` inside that has a `FrozenBatchNorm2d`."""
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if type(child) is Conv2d and isinstance(child.norm, FrozenBatchNorm2d):
                setattr(parent, name, FoldedConv2d(child))


def fold_timm_norms(model: nn.Module) -> None:
    """Replace, in place, the convolutions of a timm model that only a frozen norm follows."""
    for conv_name, norm_name in _timm_pairs(model):
        norm = FoldedTimmNorm(model.get_submodule(norm_name))
        conv = FoldedTimmConv2d(model.get_submodule(conv_name), norm)
        for name, folded in ((conv_name, conv), (norm_name, norm)):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, folded)


def _timm_pairs(model: nn.Module) -> list[tuple[str, str]]:
    """Names of convolutions and of the frozen norms that are all that uses their outputs."""
    from timm.layers import Conv2dSame, FrozenBatchNormAct2d
    from timm.layers.norm_act import FrozenBatchNorm2d

    leaves = (nn.Conv2d, FrozenBatchNormAct2d, FrozenBatchNorm2d)

    class Tracer(fx.Tracer):
        def is_leaf_module(self, module: nn.Module, name: str) -> bool:
            return isinstance(module, leaves) or super().is_leaf_module(module, name)

    try:
        nodes = Tracer().trace(model).nodes
    except Exception as error:  # whatever a model's own code raises on a stand-in for a tensor
        logger.info("frozen norms of %s are not folded: %s", type(model).__name__, error)
        return []
    calls = {node: model.get_submodule(node.target) for node in nodes if node.op == "call_module"}
    times = Counter(node.target for node in calls)
    return [
        (node.args[0].target, node.target)
        for node, norm in calls.items()
        if isinstance(norm, leaves[1:])
        and type(calls.get(node.args[0])) in (nn.Conv2d, Conv2dSame)
        and calls[node.args[0]].padding_mode == "zeros"
        and len(node.args[0].users) == times[node.args[0].target] == times[node.target] == 1
    ]


def _arguments(conv: nn.Conv2d) -> dict:
    """What makes a convolution of the same shape, without memory for its weights."""
    names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation")
    arguments = {name: getattr(conv, name) for name in (*names, "groups")}
    return {**arguments, "bias": conv.bias is not None, "device": "meta"}
