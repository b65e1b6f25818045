"""A device that only pretends: a CPU computes, and what a GPU would be asked for is counted.

A `PretendTensor` says that it lies on the device "meta", holds a tensor of the CPU, and computes
with that. So code takes its path for devices, and `Counting` sees every operation on the way:

- waits: whatever makes the host of a GPU wait until the device has come that far. That is a number
  or a size that the host must know (`item`, `tolist`, `nonzero`, a boolean index, NMS, ...), or a
  copy, unless it comes from pinned memory with `non_blocking=True`;
- copies to the device, with their bytes;
- device operations: what is dispatched to the device, but for views and allocations. PyTorch
  launches a kernel for most of them, and several for a few, such as a sort.

What waits is known from the source of torch 2.14 and torchvision 0.29 for CUDA. It isn't measured.
"""

import sys
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import detectron2
import fvcore
import numpy as np
import torch
import torchvision
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import retina_focal

DEVICE = torch.device("meta")
SOURCES = tuple(
    str(Path(package.__file__).parent)
    for package in (retina_focal, detectron2, fvcore, torchvision)
)
# The host must know a value or a size, and how often.
WAITS = {
    "_local_scalar_dense": 1,
    "nonzero": 1,
    "masked_select": 1,
    "_unique2": 1,
    "unique_dim": 1,
    "unique_consecutive": 1,
    "equal": 1,
    "nms": 1,
    "bincount": 2,  # the least and the highest number
}
# They return a tensor that nothing was written to, or nothing at all.
NO_OPERATION = {
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "detach",
    "lift_fresh",
    "_unsafe_view",
    "_reshape_alias",
    "is_pinned",
    "record_stream",
    "scalar_tensor",  # the number in x[...] = 1.0, which on a GPU stays on the host
}


class Copy(NamedTuple):
    """A copy to the device."""

    dtype: torch.dtype
    num_bytes: int
    place: str


class PretendTensor(Tensor):
    """Looks like a tensor on a device; `held` is the one of the CPU that it stands for."""

    held: Tensor
    is_number = False  # whether it was a number of Python just now

    @staticmethod
    def __new__(cls, held: Tensor) -> "PretendTensor":
        result = Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=DEVICE,
        )
        result.held = held
        return result

    def __repr__(self) -> str:
        return f"PretendTensor({self.held})"

    def tolist(self) -> list:
        return self._read("tolist").tolist()

    def numpy(self) -> np.ndarray:
        return self._read("numpy").numpy()

    __array__ = numpy

    def _read(self, name: str) -> Tensor:
        if Counting.active is not None:
            Counting.active.wait(name)
        return self.held

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return _run(None, function, args, kwargs or {})


class Counting:
    """Counts, while it is entered, what would happen between the host and the device.

    Attributes:
        waits: how often the host would wait, by operation and line of code.
        copies: to the device.
        operations: of the device, by operation and line of code.
    """

    active: "Counting | None" = None

    def __init__(self):
        self.waits: Counter[str] = Counter()
        self.copies: list[Copy] = []
        self.operations: Counter[str] = Counter()
        self.pinned: set[int] = set()  # addresses of pinned memory
        self.keep: list[Tensor] = []  # so that an address stays that of one tensor

    def __enter__(self) -> "Counting":
        with ExitStack() as stack:
            # Not through the mode below, which doesn't see what torch's own Python calls.
            stack.enter_context(mock.patch("torch.tensor", self.from_numbers(torch.tensor)))
            stack.enter_context(mock.patch("torch.as_tensor", self.from_numbers(torch.as_tensor)))
            stack.enter_context(_Functions(self))
            stack.enter_context(_Operations(self))
            self.leave = stack.pop_all().close
        Counting.active = self
        return self

    def __exit__(self, *_) -> None:
        Counting.active = None
        self.leave()

    def wait(self, name: str, times: int = 1) -> None:
        self.waits[f"{name} at {place()}"] += times

    def copy(self, name: str, source: Tensor, non_blocking: bool) -> None:
        self.copies.append(Copy(source.dtype, source.numel() * source.itemsize, place()))
        if not (non_blocking and source.untyped_storage().data_ptr() in self.pinned):
            self.wait(name)

    def from_numbers(self, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """`torch.tensor` or `torch.as_tensor`: numbers of the host, which are copied."""

        def tensor(data: Any, *, device: Any = None, **kwargs) -> Tensor:
            held = function(data, **kwargs)
            return held if device is None else held.to(device)

        return tensor

    def pin(self, tensor: Tensor) -> Tensor:
        self.pinned.add(tensor.untyped_storage().data_ptr())
        self.keep.append(tensor)
        return tensor


def to_device(module: nn.Module) -> nn.Module:
    """Move the parameters and buffers of a module, in place, to the device that pretends."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                held = PretendTensor(parameter.detach())
                part._parameters[name] = nn.Parameter(held, requires_grad=parameter.requires_grad)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = PretendTensor(buffer)
    return module


def place() -> str:
    """File and line of the innermost code of the packages that are watched."""
    frame = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(SOURCES):
            package = next(source for source in SOURCES if file.startswith(source))
            return f"{Path(file).relative_to(Path(package).parent)}:{frame.f_lineno}"
        frame = frame.f_back
    return "elsewhere"


class _Functions(TorchFunctionMode):
    """Python's functions, of which the operations below don't tell."""

    def __init__(self, counting: Counting):
        super().__init__()
        self.counting = counting

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs, counting = dict(kwargs or {}), self.counting
        on_device = bool(args) and isinstance(args[0], PretendTensor)
        if function is Tensor.new_tensor and on_device:
            kwargs = {"dtype": args[0].dtype, "device": DEVICE, **kwargs}
            return torch.tensor(args[1], **kwargs)
        if function is Tensor.pin_memory:
            return counting.pin(args[0].clone())
        if function is Tensor.is_pinned:
            return args[0].untyped_storage().data_ptr() in counting.pinned
        return function(*args, **kwargs)


class _Operations(TorchDispatchMode):
    """What reaches a device."""

    def __init__(self, counting: Counting):
        super().__init__()
        self.counting = counting

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return _run(self.counting, function, args, kwargs or {})


def _run(counting: Counting | None, function: Callable, args: tuple, kwargs: dict) -> Any:
    """Compute on the CPU what the operation holds, and wrap what would lie on the device."""
    leaves = tree_leaves((args, kwargs))
    on_device = any(isinstance(x, PretendTensor) for x in leaves)
    target = kwargs.get("device")
    makes_pinned = kwargs.get("pin_memory") and counting is not None
    if target is not None:
        kwargs["device"] = torch.device("cpu")
    to_host = target is not None and torch.device(target).type != DEVICE.type
    to_device = target is not None and not to_host
    if counting is not None and (on_device or to_device):
        _count(counting, function, args, kwargs, on_device, to_host)
    if "pin_memory" in kwargs:
        kwargs["pin_memory"] = False
    if torch.Tag.inplace_view in function.tags and on_device:
        with no_dispatch():  # only the shape that the wrapper shows
            function(*args, **kwargs)
    held = {id(x.held): x for x in leaves if isinstance(x, PretendTensor)}
    args, kwargs = tree_map(lambda x: getattr(x, "held", x), (args, kwargs))
    result = function(*args, **kwargs)
    if makes_pinned:
        counting.pin(result)
    if to_host or not (on_device or to_device):
        return result
    result = tree_map(lambda x: _wrapped(x, held), result)
    if function.overloadpacket is torch.ops.aten.scalar_tensor:
        result.is_number = True
    return result


def _wrapped(result: Any, held: dict[int, PretendTensor]) -> Any:
    """What was changed in place comes back as the very tensor that it was."""
    if not isinstance(result, Tensor):
        return result
    return held[id(result)] if id(result) in held else PretendTensor(result)


def _count(
    counting: Counting,
    function: Callable,
    args: tuple,
    kwargs: dict,
    on_device: bool,
    to_host: bool,
) -> None:
    name = function.overloadpacket.__name__
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    on_host = [x for x in tensors if not isinstance(x, PretendTensor)]
    by_index = name in ("index", "_unsafe_index", "index_put", "index_put_", "_index_put_impl_")
    indices = [x for x in args[1] if x is not None] if by_index else []
    if name == "_to_copy" and not on_device:
        counting.copy("copy to the device", args[0], kwargs.get("non_blocking", False))
    elif name == "_to_copy" and to_host:
        counting.wait("copy to the host")
    elif name == "copy_" and on_host:
        if isinstance(args[0], PretendTensor):
            counting.copy("copy to the device", args[1], len(args) > 2 and args[2])
        else:
            counting.wait("copy to the host")
    elif by_index:
        # A number that is written where a mask says is an argument of the kernel. Where indices
        # say, it is copied to the device first.
        masks = sum(x.dtype in (torch.bool, torch.uint8) for x in indices)
        is_fill = any(getattr(x, "is_number", False) for x in args[2:3])
        times = int(not masks) if is_fill else masks
        times += sum(x.dim() > 0 for x in on_host)
        if times:
            counting.wait(name, times)
        if is_fill and not masks:
            counting.operations[f"copy of a number at {place()}"] += 1
    elif any(x.dim() > 0 for x in on_host):
        raise RuntimeError(f"{name} at {place()} has tensors of the host and of the device")
    elif name == "repeat_interleave" and isinstance(args[-1], Tensor):
        if kwargs.get("output_size") is None:
            counting.wait(name)
    elif name in WAITS and tensors[0].numel():
        counting.wait(name, WAITS[name])
    returns = function._schema.returns
    is_view = any(x.alias_info is not None and not x.alias_info.is_write for x in returns)
    if not (is_view or name in NO_OPERATION):
        counting.operations[f"{name} at {place()}"] += 1
