"""Frozen norms of timm models folded into the convolutions before them."""

import logging
from collections import Counter
from copy import copy

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from retina_focal.folding import FoldedWeight, arguments_of

logger = logging.getLogger(__name__)


class FoldedTimmConv2d(nn.Conv2d):
    """A convolution of timm, whose norm is a module beside it."""

    def __init__(self, conv: nn.Conv2d, norm: "FoldedTimmNorm"):
        from timm.layers import Conv2dSame
        from timm.layers.conv2d_same import conv2d_same

        super().__init__(**arguments_of(conv))
        self.weight, self.bias = conv.weight, conv.bias
        self.is_same = isinstance(conv, Conv2dSame)  # padding depends on the image's size
        self._conv2d = conv2d_same if self.is_same else F.conv2d
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
        # Before an activation in place torch copies what its gradient needs, but not for a ReLU,
        # whose gradient needs the result alone.
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
