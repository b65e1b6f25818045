"""How a run on a GPU is timed: several steps between two synchronisations, and its memory."""

import time

import torch

from retina_focal.tools.benchmark.instruments import Run, Stopwatch, Unwatched

# Untimed runs: cuDNN and Triton choose and compile in the first, torch.jit in its second.
WARM_UP = 3
MAX_STEPS = 100  # between two synchronisations
COPIED = 1 << 30  # bytes, far more than a cache holds


def on_gpu(device: str) -> bool:
    return torch.device(device).type == "cuda"


def synchronize(device: str) -> None:
    if on_gpu(device):
        torch.cuda.synchronize()


def bytes_per_second_copied(device: str) -> float:
    """Read and written by a large copy on the device: the bandwidth that a floor is made of."""
    size = COPIED if on_gpu(device) else COPIED >> 6
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    stopwatch, fastest = Stopwatch(device), float("inf")
    for _ in range(10):
        stopwatch.start()
        target.copy_(source)
        stopwatch.mark("copy")
        fastest = min(fastest, stopwatch.seconds()["copy"])
    return 2 * size / fastest


def warm_up(run: Run, device: str) -> None:
    for _ in range(WARM_UP if on_gpu(device) else 1):
        run(Unwatched(device))


def steps_in(seconds: float, run: Run, device: str) -> int:
    """Steps between two synchronisations; on a CPU, which only tries the rows, two."""
    if not on_gpu(device):
        return 2
    step, _ = time_of(run, device, 1)
    return max(1, min(MAX_STEPS, int(seconds / step)))


def time_of(run: Run, device: str, steps: int) -> tuple[float, float]:
    """Seconds of a step, and until the host has launched it, by the host's clock."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(steps):
        run(Unwatched(device))
    launched = time.perf_counter()
    synchronize(device)
    return (time.perf_counter() - start) / steps, (launched - start) / steps


def memory_of(run: Run, device: str) -> int | None:
    """Bytes that a run allocates at its peak; None on a CPU."""
    if not on_gpu(device):
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run(Unwatched(device))
    return torch.cuda.max_memory_allocated() - before
