"""Frozen batch norms folded into the convolutions before them.

Both are linear, so conv(x, w) s + b = conv(x, w s) + b: the feature map is read and written once
instead of three times. Where w is trained, the product w s is a part of the graph. Parameters,
buffers and their names stay those of the modules that are replaced.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from torch import Tensor, nn

from retina_focal.precision import product_dtype

# As DDP's buckets: it exchanges the gradients of one while backward computes the next.
GROUP_BYTES = 25 << 20


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
        self.of_step: tuple[Tensor, Tensor] | None = None  # what was, until its backward pass
        self._norm = Remembered()
        self._whole = Remembered()

    def __call__(self) -> tuple[Tensor, Tensor]:
        if self.folded_before is not None:
            self.of_step = self.folded_before if torch.is_grad_enabled() else None
            return self.folded_before
        if self.of_step is not None and torch._C._current_graph_task_id() >= 0:
            return self.of_step  # activation checkpointing computes once more what there was
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
        """The tensors that a convolution reads and no step computes."""
        return self._norm.results + self._whole.results

    def forget(self) -> None:
        """Compute all anew at the next call."""
        self._norm.forget()
        self._whole.forget()


class FoldedWeights:
    """Folds all trained convolutions of a network before it runs.

    Each takes one operation forward and one backward, product and rounding together, with little
    work for the host between them. One by one in an autocast they take two forward and two
    backward, and autograd and autocast make the host work for each.
    """

    def __init__(self, network: nn.Module):
        self._all = folded_inside(network)

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
                weights = _Products.apply(group, dtypes, scales, *(x.conv.weight for x in group))
                for own, weight, (_, shift) in zip(group, weights, norms, strict=True):
                    own.folded_before = weight, shift
            yield
        finally:
            for own in trained:
                own.folded_before = None


def folded_inside(network: nn.Module) -> list[FoldedWeight]:
    """Those of all convolutions that have one, in their order."""
    found = (getattr(x, "folded", None) for x in network.modules())
    return [x for x in found if isinstance(x, FoldedWeight)]


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
    def forward(ctx, group, dtypes, scales, *weights):
        ctx.group, ctx.scales = group, scales
        ctx.set_materialize_grads(False)
        return tuple(
            torch.mul(weight, scale, out=torch.empty_like(weight, dtype=dtype))
            for dtype, scale, weight in zip(dtypes, scales, weights, strict=True)
        )

    @staticmethod
    def backward(ctx, *grads):
        for own in ctx.group:
            own.of_step = None
        pairs = zip(grads, ctx.scales, strict=True)
        return None, None, None, *(None if grad is None else grad * scale for grad, scale in pairs)


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
        super().__init__(**arguments_of(conv), norm=conv.norm, activation=conv.activation)
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


def fold_frozen_norms(module: nn.Module) -> None:
    """Replace, in place, every detectron2 `Conv2d` inside that has a `FrozenBatchNorm2d`."""
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if type(child) is Conv2d and isinstance(child.norm, FrozenBatchNorm2d):
                setattr(parent, name, FoldedConv2d(child))


def arguments_of(conv: nn.Conv2d) -> dict:
    """What makes a convolution of the same shape, without memory for its weights."""
    names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation")
    arguments = {name: getattr(conv, name) for name in (*names, "groups")}
    return {**arguments, "bias": conv.bias is not None, "device": "meta"}
