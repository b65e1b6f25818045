"""What `retina-focal benchmark` measures with: time, memory, the products of a step, precision."""

import ctypes
import gc
import math
import multiprocessing
import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from tqdm import tqdm

from retina_focal.errors import UserError
from retina_focal.tools.benchmark.models import Setting
from retina_focal.tools.common import ignore_deprecations

# Untimed runs before the first round: torch.jit compiles stock's loss in its second.
WARM_UP = 2
# The products of a network, forward and backward; matrices are what our box tower runs on.
CONVOLUTIONS = (torch.ops.aten.convolution.default, torch.ops.aten.convolution_backward.default)
MATRIX_PRODUCTS = (torch.ops.aten.addmm.default, torch.ops.aten.mm.default)


class Stopwatch:
    """Seconds of each part of a run, by the host's clock or, on a GPU, by the GPU's."""

    def __init__(self, device: str):
        self.on_gpu = torch.device(device).type == "cuda"

    def start(self) -> None:
        self.times = []
        if self.on_gpu:
            torch.cuda.synchronize()
        self.resume()

    def resume(self) -> None:
        """What has passed since the mark before is not timed."""
        self.mark(None)

    def mark(self, part: str | None) -> None:
        """End of a part that began with the mark before."""
        if self.on_gpu:
            now = torch.cuda.Event(enable_timing=True)
            now.record()
        else:
            now = time.perf_counter()
        self.times.append((part, now))

    def seconds(self) -> dict[str, float]:
        """Of each part; a part marked several times is summed."""
        if self.on_gpu:
            torch.cuda.synchronize()
        parts = {}
        for (_, begin), (part, end) in zip(self.times, self.times[1:], strict=False):
            if part is not None:
                elapsed = begin.elapsed_time(end) / 1000 if self.on_gpu else end - begin
                parts[part] = parts.get(part, 0.0) + elapsed
        return parts


class Unwatched(Stopwatch):
    """Neither times nor synchronises, so that runs follow one another as steps of a training do."""

    def start(self) -> None:
        pass

    def mark(self, part: str | None) -> None:
        pass


Run = Callable[[Stopwatch], object]
Probe = Callable[[], dict[str, float]]  # part of a row to seconds or bytes


@contextmanager
def after_head(model: nn.Module, call: Callable[[object], object]) -> Iterator[None]:
    """Call on the head's outputs; what that returns, unless None, takes their place."""
    hook = model.head.register_forward_hook(lambda module, inputs, outputs: call(outputs))
    try:
        yield
    finally:
        hook.remove()


@dataclass(frozen=True)
class Likeness:
    """What a tensor's part in a convolution depends on, without its memory."""

    shape: torch.Size
    stride: tuple[int, ...]  # the memory format
    dtype: torch.dtype
    device: torch.device

    def make(self) -> Tensor:
        empty = torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=self.device)
        return empty.uniform_()

    def length(self) -> int:
        """Elements from the first to behind the last."""
        last = sum((n - 1) * step for n, step in zip(self.shape, self.stride, strict=True))
        return max(last, 0) + 1


class ConvolutionRecorder(TorchDispatchMode):
    """Notes the arguments of each convolution and matrix product, forward and backward, inside it.

    A frozen convolution has no call for its backward, one with frozen weights only that for its
    input: the calls are what the step needs.
    """

    def __init__(self):
        super().__init__()
        self.calls: list[tuple[Callable, tuple]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in CONVOLUTIONS + MATRIX_PRODUCTS:
            likenesses = tree_map_only(
                Tensor, lambda x: Likeness(x.shape, x.stride(), x.dtype, x.device), args
            )
            self.calls.append((func, likenesses))
        return func(*args, **(kwargs or {}))


def graph_of(part: str, compute: Callable[[], object]) -> Run:
    """A CUDA graph of what `compute` launches: the GPU's own time, without the host's."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # chooses algorithms, compiles
            compute()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = compute()

    def replay(stopwatch: Stopwatch) -> object:
        stopwatch.start()
        graph.replay()
        stopwatch.mark(part)
        assert compute  # kept: the graph reads at the addresses of its tensors
        return results

    return replay


def replay_of(calls: Sequence[tuple[Callable, tuple]]) -> Run:
    """The recorded products as one CUDA graph.

    What they read are parts of one buffer for each position and dtype, filled with noise: zeros
    would compute faster, since they cost less power.
    """
    buffers: dict[tuple, Tensor] = {}

    def buffer(position: int, like: Likeness, length: int) -> Tensor:
        found = buffers.get((position, like.dtype))
        if found is None or len(found) < length:
            found = torch.empty(length, dtype=like.dtype, device=like.device).uniform_()
            buffers[position, like.dtype] = found
        return found

    def arguments_of(likenesses: tuple) -> tuple:
        return tuple(
            buffer(i, x, x.length()).as_strided(x.shape, x.stride) if isinstance(x, Likeness) else x
            for i, x in enumerate(likenesses)
        )

    def compute() -> None:
        for function, likenesses in calls:
            function(*arguments_of(likenesses))

    return graph_of("convolutions", compute)


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Whether a GPU may compute fp32 products in TF32, inside; then what held before."""
    backends = torch.backends.cudnn, torch.backends.cuda.matmul
    before = [backend.allow_tf32 for backend in backends]
    try:
        for backend in backends:
            backend.allow_tf32 = allowed
        yield
    finally:
        for backend, value in zip(backends, before, strict=True):
            backend.allow_tf32 = value


def timing_probes(case: Callable, setting: Setting, names: Sequence[str]) -> dict[str, Probe]:
    """A probe for each model, which gives the seconds of each part of one run."""
    runs = case(setting, names)
    stopwatch = Stopwatch(setting.device)

    def probe(run: Run) -> dict[str, float]:
        run(stopwatch)
        return stopwatch.seconds()

    for run in runs.values():
        for _ in range(WARM_UP):
            run(stopwatch)
    return {name: partial(probe, run) for name, run in runs.items()}


def memory_probes(case: Callable, setting: Setting, names: Sequence[str]) -> dict[str, Probe]:
    """A probe for each model: bytes by which its first run raises the peak of a fresh process."""

    def probe(name: str) -> dict[str, float]:
        # Not "spawn": on Linux its processes start with the ru_maxrss of this one, so that little
        # would show. The server's children start with that of the server, which is small.
        context = multiprocessing.get_context("forkserver")
        with ProcessPoolExecutor(1, context, initializer=ignore_deprecations) as pool:
            growth = pool.submit(memory_growth, case, setting, name, torch.get_num_threads())
            try:
                return {"memory": growth.result()}
            except BrokenExecutor:
                tqdm.write(f"{name} was killed or found no memory; left out")
                return {}

    return {name: partial(probe, name) for name in names}


def memory_growth(case: Callable, setting: Setting, name: str, threads: int) -> int:
    """Bytes by which the first run raises the peak of this process."""
    import resource  # which Windows lacks

    torch.set_num_threads(threads)
    run = case(setting, [name])[name]

    def peak() -> int:
        unit = 1 if platform.system() == "Darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

    # What imports and building have freed again would hide as much of the growth, whether the
    # allocator has kept it or given it back.
    gc.collect()
    with suppress(OSError, AttributeError):  # not glibc
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    ballast = torch.ones(max(peak() - _resident(), 0), dtype=torch.uint8)
    before = peak()
    run(Stopwatch(setting.device))
    del ballast
    return peak() - before


def _resident() -> float:
    """Bytes of memory that this process holds; where it can't tell, infinity."""
    statm = Path("/proc/self/statm")  # of Linux
    if not statm.is_file():
        return math.inf
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def check_fp32(device: str) -> None:
    """That fp32 means what the rows say: IEEE fp32 for all models, or on a GPU `tf32`'s choice.

    Raises:
        UserError: something else decides.
    """
    found, remedy = {}, "unset the variable, or set torch's to 'ieee'"
    if torch.device(device).type == "cuda":
        found["NVIDIA_TF32_OVERRIDE"] = os.environ.get("NVIDIA_TF32_OVERRIDE")
    else:
        found["ONEDNN_DEFAULT_FPMATH_MODE"] = os.environ.get("ONEDNN_DEFAULT_FPMATH_MODE")
        for name in ("", "mkldnn.", "mkldnn.conv.", "mkldnn.matmul."):
            with suppress(AttributeError):  # older torch has no such
                value = attrgetter(f"{name}fp32_precision")(torch.backends)
                found[f"torch.backends.{name}fp32_precision"] = value
    ieee = (None, "", "none", "ieee", "STRICT")
    found = {name: value for name, value in found.items() if value not in ieee}
    if found:
        values = ", ".join(f"{name} is {value!r}" for name, value in found.items())
        raise UserError(f"fp32 would not be IEEE fp32 on {device}: {values}; {remedy}")
