"""From the host's memory to the device's, without a wait."""

from collections.abc import Sequence

import torch
from torch import Tensor


def to_device(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Tensors on a device, in the dtypes that they have.

    What lies on the host crosses in one copy, from pinned memory: one from ordinary memory would
    make the host wait. The device sees it complete, in the order of its stream.

    Args:
        tensors: of any shapes and dtypes.
        device: to copy to; what is there already is returned as it is.
    """
    to_copy = [i for i, x in enumerate(tensors) if x.device != device]
    if not to_copy:
        return list(tensors)
    moved = list(tensors)
    slices, begin = [], 0
    for i in to_copy:
        begin = -(-begin // tensors[i].itemsize) * tensors[i].itemsize  # as the dtype is aligned
        slices.append(slice(begin, begin + tensors[i].nbytes))
        begin = slices[-1].stop
    packed = torch.empty(begin, dtype=torch.uint8, pin_memory=device.type != "cpu")
    for i, own in zip(to_copy, slices, strict=True):
        packed[own].view(tensors[i].dtype).view(tensors[i].shape).copy_(tensors[i])
    packed = packed.to(device, non_blocking=True)
    for i, own in zip(to_copy, slices, strict=True):
        moved[i] = packed[own].view(tensors[i].dtype).view(tensors[i].shape)
    return moved
