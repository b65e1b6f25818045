"""What backbone and head compute in, by ``MODEL.RETINA_FOCAL.PRECISION``."""

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import NamedTuple

import torch
from detectron2.config import CfgNode
from torch import Tensor

from retina_focal.config import retina_focal_node
from retina_focal.errors import UserError

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
PRECISIONS = ("fp32", *DTYPES, "auto")


class Computation(NamedTuple):
    """How backbone and head compute."""

    autocast: AbstractContextManager
    memory_format: torch.memory_format  # of the images


def computation(precision: str, device_type: str, training: bool) -> Computation:
    """What a precision means on a device.

    Args:
        precision: one of `PRECISIONS`. "fp32" opens no autocast and leaves an outer one alone;
            "auto" is "bf16" where `has_bf16`, else "fp32".
        device_type: "cpu", "cuda", ...
        training: whether gradients will be taken.
    Raises:
        UserError: "fp16" in training, or an outer autocast of another dtype.
    """
    if precision == "auto":
        precision = "bf16" if has_bf16(device_type) else "fp32"
    if precision == "fp32":
        # On a CPU an outer autocast was not measured to be faster in another layout.
        outer = device_type != "cpu" and is_autocast_enabled(device_type)
        return Computation(nullcontext(), layout(device_type, in_half_precision=outer))
    if precision == "fp16" and training:
        raise UserError(
            "MODEL.RETINA_FOCAL.PRECISION fp16 is for inference, as its gradients underflow unless "
            "the loss is scaled; to train in fp16 set PRECISION fp32 and SOLVER.AMP.ENABLED True"
        )
    outer = torch.get_autocast_dtype(device_type)
    if torch.is_autocast_enabled(device_type) and outer != DTYPES[precision]:
        raise UserError(
            f"MODEL.RETINA_FOCAL.PRECISION is {precision}, but the model is called inside an "
            f"autocast to {outer}; set PRECISION fp32, which leaves that one alone, or open none "
            "(SOLVER.AMP.ENABLED False)"
        )
    autocast = torch.autocast(device_type, DTYPES[precision])
    return Computation(autocast, layout(device_type, in_half_precision=True))


def layout(device_type: str, in_half_precision: bool) -> torch.memory_format:
    """channels_last on a GPU and in half precision; fp32 on a CPU is slow in it and stays as it is.

    On an H100 a step of 16 images took 0.84 (IEEE fp32) and 0.81 (TF32) of the time that it takes
    in the other layout, in which cuDNN transposes, or takes workspaces as large as the activations.
    """
    fastest = device_type == "cuda" or in_half_precision
    return torch.channels_last if fastest else torch.preserve_format


def weights_layout(cfg: CfgNode) -> torch.memory_format:
    """The layout to store the weights of convolutions in, before DDP and the optimizer see them.

    It is that of the images, or a device would transpose the weights at every step. On a CPU oneDNN
    has a layout of its own.
    """
    device_type, precision = torch.device(cfg.MODEL.DEVICE).type, retina_focal_node(cfg).PRECISION
    if device_type == "cpu":
        return torch.preserve_format
    in_half = precision in DTYPES or (precision == "auto" and has_bf16(device_type))
    return layout(device_type, in_half or cfg.SOLVER.AMP.ENABLED)


def is_autocast_enabled(device_type: str) -> bool:
    """Whether the code around opened an autocast; never on a device that has none."""
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)


def product_dtype(weight: Tensor) -> torch.dtype:
    """What a convolution with this weight multiplies in: that of an autocast around it, if any."""
    device_type = weight.device.type
    if weight.dtype == torch.float64 or not is_autocast_enabled(device_type):
        return weight.dtype
    return torch.get_autocast_dtype(device_type)


@cache
def has_bf16(device_type: str) -> bool:
    """Whether the device multiplies bf16 natively, not by way of fp32."""
    if device_type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device_type != "cpu":
        return False
    # Names that not every version of torch has.
    instructions = "_is_avx512_bf16_supported", "_is_amx_tile_supported"
    return any(getattr(torch.cpu, name, bool)() for name in instructions)
