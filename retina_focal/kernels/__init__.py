"""Kernels for a GPU, written in Triton and chosen by device. They import nothing of the package.

The modules of this folder import Triton, which takes time and is not installed everywhere. This
file does not: import one of them only where `available` says yes.
"""

from functools import cache
from importlib.util import find_spec

import torch

# What Triton asks of NVIDIA's GPUs. torch reports AMD's under the same name, and they are higher.
MIN_CAPABILITY = (8, 0)


@cache
def available(device: torch.device) -> bool:
    """Whether tensors on `device` can go through the kernels. The host does not wait for it."""
    return (
        device.type == "cuda"
        and find_spec("triton") is not None
        and torch.cuda.get_device_capability(device) >= MIN_CAPABILITY
    )
