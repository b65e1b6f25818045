"""The rows of a GPU: a step among others and alone, in every precision, with memory and floors."""

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch
from detectron2.config import CfgNode
from torch.profiler import ProfilerActivity
from tqdm import tqdm

from retina_focal.config import retina_focal_node
from retina_focal.tools.benchmark.cases import DENSE_SUM, DENSE_SUM_GRAPHED, TIMED
from retina_focal.tools.benchmark.gpu_timing import (
    bytes_per_second_copied,
    memory_of,
    on_gpu,
    steps_in,
    synchronize,
    time_of,
    warm_up,
)
from retina_focal.tools.benchmark.inputs import anchors_per_level
from retina_focal.tools.benchmark.instruments import Run, Stopwatch, Unwatched, tf32
from retina_focal.tools.benchmark.models import MODELS, OURS_GRAPHED, Setting, torchvision_has

# Names of what the host asks of the GPU, as CUDA has them.
COUNTED = {
    "launches": ("LaunchKernel",),
    "copies": ("MemcpyAsync",),
    "waits": ("StreamSynchronize", "EventSynchronize"),
}


class Precision(NamedTuple):
    """What a row computes in."""

    tf32: bool  # whether fp32 products may be TF32
    half: torch.dtype | None  # of the head's outputs, where they are not fp32
    amp: bool  # by an autocast around every model, as SOLVER.AMP opens it
    ours: str  # our PRECISION


PRECISIONS = {
    "ieee-fp32": Precision(False, None, False, "fp32"),
    "tf32": Precision(True, None, False, "fp32"),
    "amp-bf16": Precision(True, torch.bfloat16, True, "fp32"),
    "amp-fp16": Precision(True, torch.float16, True, "fp32"),
    "ours-bf16": Precision(True, torch.bfloat16, False, "bf16"),
}
PROFILE = "profile"
WHAT = ("loss", "train", "inference", PROFILE, "convolutions", "matching")
# Batches that come before all others of any kind, in case time runs out.
FIRST = {"loss": (16,), "train": (2, 16), "inference": (1,), "convolutions": (2, 16)}
# Where not all precisions make a difference.
OF_WHAT = {
    "loss": ("ieee-fp32", "amp-bf16", "amp-fp16"),
    "matching": ("ieee-fp32",),
    PROFILE: ("amp-bf16", "ours-bf16"),
}


@dataclass(frozen=True)
class Job:
    """Rows that are measured together, one for each model."""

    title: str
    make_runs: Callable[[Setting, Sequence[str]], dict[str, Run]] | None  # None: a profile
    setting: Setting
    precision: str
    models: tuple[str, ...]

    def names(self, model: str) -> dict:
        """What tells a model's row from others."""
        names = {"what": self.title, "image_size": list(self.setting.image_size)}
        names |= {key: getattr(self.setting, key) for key in ("batch", "classes", "boxes")}
        return names | {"precision": self.precision, "model": model}

    def floor_bytes(self) -> int | None:
        """Bytes that a dense loss must move: the logits in both passes, and the gradient."""
        if DENSE_SUM not in self.models:
            return None
        anchors = sum(size.numel() for size in anchors_per_level(self.setting)[1])
        return 3 * (self.setting.half or torch.float32).itemsize * anchors * self.setting.classes


def jobs(
    cfg: CfgNode,
    what: Sequence[str],
    image_size: tuple[int, int],
    batches: Sequence[int],
    boxes: Sequence[int],
    precisions: Sequence[str],
) -> Iterator[Job]:
    """In the order of `what`, those of `FIRST` first; of `boxes`, all but matching takes one."""
    models = MODELS if torchvision_has(cfg) else ("stock", "ours")
    order = sorted(product(what, batches), key=lambda x: x[1] not in FIRST.get(x[0], ()))
    for name, batch in order:
        cases = {PROFILE: None} if name == PROFILE else TIMED[name]
        for precision in (x for x in precisions if x in OF_WHAT.get(name, PRECISIONS)):
            _, half, amp, ours = PRECISIONS[precision]
            own_cfg = cfg.clone()
            own_cfg.defrost()
            retina_focal_node(own_cfg).PRECISION = ours
            own_cfg.freeze()
            own_models = models if precision != "ours-bf16" else ("ours",)
            if name == "loss":
                own_models += (DENSE_SUM, DENSE_SUM_GRAPHED)
            elif name == "train" and on_gpu(cfg.MODEL.DEVICE):
                own_models += (OURS_GRAPHED,)
            elif name == "convolutions":
                own_models = ("convolutions",)
            elif name == PROFILE:
                own_models = tuple(x for x in own_models if x != "torchvision")
            for count in boxes if name == "matching" else boxes[:1]:
                setting = Setting(own_cfg, image_size, batch, count, half, amp)
                for title, case in cases.items():
                    yield Job(title, case, setting, precision, own_models)


def measure(
    todo: Sequence[Job],
    report: dict,
    rounds: int,
    seconds: float,
    deadline: float,
    profiles: Path,
    save: Callable[[], None],
) -> None:
    """Fill `report["rows"]`; a job whose rows are there already is not run.

    Args:
        report: `rows`, of which those that failed are measured anew; gets `copied`, the bytes per
            second of a copy on the device, and `left_out`, the number of jobs that there was no
            time for.
        rounds: in each, every model of a job is measured, in turn.
        seconds: of steps between two synchronisations.
        deadline: of `time.monotonic`; no job is begun after it.
        profiles: text file that profiles are added to.
        save: called when `report` is up to date.
    """
    device, rows = todo[0].setting.device, report["rows"]
    rows[:] = [row for row in rows if not has_failed(row)]
    if "copied" not in report:
        report["copied"] = bytes_per_second_copied(device)
    report["left_out"] = 0
    with tqdm(todo, unit="job", dynamic_ncols=True) as progress:
        for job in progress:
            if all(any(job.names(x).items() <= row.items() for row in rows) for x in job.models):
                continue
            if time.monotonic() > deadline:
                report["left_out"] += 1
                continue
            progress.set_description(f"{job.title}, batch {job.setting.batch}, {job.precision}")
            with tf32(PRECISIONS[job.precision].tf32):
                if job.make_runs is None:
                    rows += profiled(job, profiles)
                else:
                    rows += timed(job, rounds, seconds)
            save()
            gc.collect()
            if on_gpu(device):
                torch.cuda.empty_cache()


def timed(job: Job, rounds: int, seconds: float) -> list[dict]:
    """A row for each model; one that fails has an `error` in place of numbers.

    For each round a row has seconds: `step`, of one among others, with several between two
    synchronisations; `latency`, of one alone, by the GPU's clock, and `parts` of it; `host`, until
    the host has launched it. `memory` is what a run allocates at its peak, in bytes.
    """
    device, precision = job.setting.device, PRECISIONS[job.precision]
    rows, runs = {}, {}
    for model in job.models:
        row = rows[model] = job.names(model)
        row |= {"tf32": precision.tf32, "half": str(precision.half), "amp": precision.amp}
        row |= {"floor_bytes": job.floor_bytes(), "memory": None}
        row |= {"step": [], "latency": [], "parts": [], "host": []}
        with _may_fail(row):
            runs[model] = job.make_runs(job.setting, [model])[model]
            warm_up(runs[model], device)
            row["memory"] = memory_of(runs[model], device)
            row["steps"] = steps_in(seconds, runs[model], device)
    for _ in range(rounds):
        for model, run in runs.items():
            row, stopwatch = rows[model], Stopwatch(device)
            if "error" in row:
                continue
            with _may_fail(row):
                step, _ = time_of(run, device, row["steps"])
                _, host = time_of(run, device, 1)
                run(stopwatch)
                parts = stopwatch.seconds()
                row["step"].append(step)
                row["host"].append(host)
                row["latency"].append(sum(parts.values()))
                row["parts"].append(parts)
    return [*rows.values()]


def has_failed(row: dict) -> bool:
    """Whether a row has an error, other than lack of memory."""
    return "error" in row and not row["error"].startswith(torch.OutOfMemoryError.__name__)


@contextmanager
def _may_fail(row: dict) -> Iterator[None]:
    """What torch raises, for lack of memory above all, is told in the row; the others go on."""
    try:
        yield
    except RuntimeError as error:
        row["error"] = f"{type(error).__name__}: {str(error).splitlines()[0]}"


def profiled(job: Job, path: Path) -> list[dict]:
    """Where the time of a training step and of an inference goes; the row of a model has counts."""
    device, rows = job.setting.device, []
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu(device) else [])]
    for model in job.models:
        row = job.names(model)
        rows.append(row)
        for name, title in (("train", "training step"), ("inference", "inference, realistic")):
            with _may_fail(row):
                run = TIMED[name][title](job.setting, [model])[model]
                warm_up(run, device)
                synchronize(device)
                with torch.profiler.profile(activities=activities) as profiler:
                    run(Unwatched(device))
                    synchronize(device)
                events = profiler.key_averages()
                row[title] = {
                    count: sum(
                        event.count
                        for event in events
                        if event.key.startswith("cu") and any(x in event.key for x in keys)
                    )
                    for count, keys in COUNTED.items()
                }
                sort = f"self_{'cuda' if on_gpu(device) else 'cpu'}_time_total"
                lines = events.table(sort_by=sort, row_limit=40, max_name_column_width=80)
                with path.open("a") as file:
                    file.write(f"{model}, {title}, batch {job.setting.batch}, {job.precision}\n")
                    file.write(f"{lines}\n")
    return rows
