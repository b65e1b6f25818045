"""A copy of a trained model whose norms are folded into plain convolutions, once."""

from copy import deepcopy

import torch
import torch.nn.functional as F
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from torch import Tensor, nn

from retina_focal.backbone import TimmBackbone
from retina_focal.folding import FoldedConv2d, FoldedWeight, arguments_of, fold_frozen_norms
from retina_focal.folding_timm import FoldedTimmConv2d, fold_timm_norms


class PaddedConv2d(nn.Conv2d):
    """A convolution whose borders differ: (left, right, top, bottom) zeros."""

    borders: tuple[int, int, int, int] = (0, 0, 0, 0)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, self.borders))


@torch.no_grad()
def folded_copy(model: nn.Module) -> nn.Module:
    """A copy for inference on the CPU in fp32, without gradients; batch norms of the backbone are
    folded, frozen or not.

    timm's convolutions with TensorFlow's "same" padding compute it from the size of the image; for
    the multiples of the stride that a padded image has it is constant.
    """
    model = deepcopy(model).cpu().float().eval().requires_grad_(False)
    for part in model.backbone.modules():
        if isinstance(part, TimmBackbone) and _has_batch_norm(part.body):
            part.body = _frozen_timm(part.body)
    model.backbone = FrozenBatchNorm2d.convert_frozen_batchnorm(model.backbone)
    fold_frozen_norms(model.backbone)
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, (FoldedConv2d, FoldedTimmConv2d)) or _is_same_conv(child):
                setattr(parent, name, _plain(child))
    return model.eval().requires_grad_(False)


def _has_batch_norm(body: nn.Module) -> bool:
    return any(isinstance(x, (nn.BatchNorm2d, nn.SyncBatchNorm)) for x in body.modules())


def _frozen_timm(body: nn.Module) -> nn.Module:
    from timm.layers import freeze_batch_norm_2d

    body = freeze_batch_norm_2d(body)
    fold_timm_norms(body.model)
    return body


def _is_same_conv(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv2dSame"


def _plain(conv: nn.Conv2d) -> nn.Module:
    """The convolution with its norm inside."""
    folded: FoldedWeight | None = getattr(conv, "folded", None)
    weight, bias = (conv.weight, conv.bias) if folded is None else folded()
    is_same = _is_same_conv(conv) or getattr(conv, "is_same", False)
    arguments = {**arguments_of(conv), "bias": bias is not None}
    plain = (PaddedConv2d if is_same else nn.Conv2d)(**arguments)
    plain.weight = nn.Parameter(weight.clone(), requires_grad=False)
    if bias is not None:
        plain.bias = nn.Parameter(bias.clone(), requires_grad=False)
    if is_same:
        plain.borders = _borders(conv)
    activation = getattr(conv, "activation", None) if isinstance(conv, Conv2d) else None
    if activation is None:
        return plain
    assert isinstance(activation, nn.Module) or callable(activation)
    return nn.Sequential(plain, _Activation(activation))


class _Activation(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def _borders(conv: nn.Conv2d) -> tuple[int, int, int, int]:
    """Of "same" padding, where the image is a multiple of the stride."""
    borders = []
    for kernel, stride, dilation in zip(
        reversed(conv.kernel_size), reversed(conv.stride), reversed(conv.dilation), strict=True
    ):
        total = max((kernel - 1) * dilation + 1 - stride, 0)
        borders += [total // 2, total - total // 2]
    return tuple(borders)
