"""Frozen batch norms folded into the convolutions before them.

Both are linear, so conv(x, w) s + b = conv(x, w s) + b: the feature map is read and written once
instead of three times. In training the product w s is a part of the graph.
"""

import torch
import torch.nn.functional as F
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from torch import Tensor, nn


class FoldedConv2d(Conv2d):
    """detectron2's `Conv2d` with a frozen norm, folded as it runs.

    Parameters, buffers and their names are those of the convolution that it is made from.
    """

    def __init__(self, conv: Conv2d):
        super().__init__(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,
            conv.stride,
            conv.padding,
            conv.dilation,
            conv.groups,
            bias=conv.bias is not None,
            norm=conv.norm,
            activation=conv.activation,
            device="meta",
        )
        self.weight, self.bias = conv.weight, conv.bias
        self._cache: tuple[list, tuple[Tensor, Tensor]] | None = None
        self.train(conv.training)

    def train(self, mode: bool = True) -> "FoldedConv2d":
        self._cache = None
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self._cached() if self._may_cache() else self._fold()
        x = F.conv2d(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)
        return x if self.activation is None else self.activation(x)

    def _may_cache(self) -> bool:
        needs_graph = torch.is_grad_enabled() and self.weight.requires_grad
        return not (self.training or needs_graph or torch.compiler.is_compiling())

    def _cached(self) -> tuple[Tensor, Tensor]:
        """What `_fold` returned last, unless a parameter or buffer has changed since."""
        tensors = [*self.parameters(), *self.buffers()]
        state = [(x.data_ptr(), x._version) for x in tensors]
        if self._cache is None or self._cache[0] != state:
            self._cache = state, self._fold()
        return self._cache[1]

    def _fold(self) -> tuple[Tensor, Tensor]:
        norm = self.norm
        scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
        mean = norm.running_mean if self.bias is None else norm.running_mean - self.bias
        return self.weight * scale.view(-1, 1, 1, 1), norm.bias - mean * scale


def fold_frozen_norms(module: nn.Module) -> None:
    """Replace, in place, every `Conv2d` inside that has a `FrozenBatchNorm2d`."""
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if type(child) is Conv2d and isinstance(child.norm, FrozenBatchNorm2d):
                setattr(parent, name, FoldedConv2d(child))
