"""Several processes on a CPU: gradients, buffers, cores and memory."""

import logging
import os
import platform
import resource
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import PLUGIN, pictures, small_cfg
from detectron2.config import CfgNode
from detectron2.engine import launch
from detectron2.modeling import build_model
from detectron2.utils import comm
from torch import nn

from retina_focal import add_retina_focal_config
from retina_focal.errors import UserError
from retina_focal.training.processes import (
    allow_open_files,
    available_device,
    closed_process_group,
    distribute,
    share_cores,
)

needs_cpu_processes = pytest.mark.skipif(
    torch.cuda.is_available(), reason="detectron2's launcher gives each process a GPU"
)


def tiny_cfg(norm: str = "GN", normalizer: str = "global", **names: object):
    """R-18 with a thin pyramid, whose norms see one image each, so that a batch can be split."""
    cfg = small_cfg(norm=norm, **PLUGIN)
    add_retina_focal_config(cfg)
    tiny = {
        "MODEL.FPN.OUT_CHANNELS": 32,
        "MODEL.RETINANET.NUM_CONVS": 1,
        "MODEL.RETINA_FOCAL.NORMALIZER": normalizer,
        "SEED": 1,
    }
    cfg.merge_from_list([x for pair in {**tiny, **names}.items() for x in pair])
    return cfg


def tiny_model(**settings: str) -> nn.Module:
    torch.manual_seed(0)
    return build_model(tiny_cfg(**settings))


def batch_of_two() -> list[dict]:
    """The first image has five boxes, the second none."""
    return pictures([(64, 96), (64, 96)], [5, 0])


def step(model: nn.Module, batch: list[dict]) -> tuple[float, dict[str, torch.Tensor]]:
    """The loss and, by name, the gradients."""
    loss = sum(model(batch).values())
    loss.backward()
    gradients = {name.removeprefix("module."): p.grad for name, p in model.named_parameters()}
    return float(loss), gradients


@closed_process_group()
def in_one_of_two_processes(folder: str) -> None:
    """Saves what this process sees, the second image of the batch on the second process."""
    rank = comm.get_rank()
    seen = {}
    for normalizer in ("global", "batch"):
        model = distribute(tiny_model(normalizer=normalizer))
        seen[normalizer] = step(model, batch_of_two()[rank : rank + 1])
    # The moving average of this process's positives, after two steps.
    model = distribute(tiny_model(normalizer="ema"))
    for _ in range(2):
        step(model, batch_of_two()[rank : rank + 1])
    seen["moving average"] = float(model.module.criterion.loss_normalizer)
    try:
        distribute(nn.Sequential(nn.Conv2d(3, 4, 1), nn.SyncBatchNorm(4)))
    except ValueError as error:
        seen["SyncBN"] = str(error)
    os.environ.pop("OMP_NUM_THREADS", None)
    torch.set_num_threads(4)
    share_cores(2)
    seen["threads"] = torch.get_num_threads()
    torch.save(seen, Path(folder, f"{rank}.pth"))


@pytest.fixture(scope="module")
def seen(tmp_path_factory) -> list[dict]:
    """What each of two gloo processes saw."""
    folder = tmp_path_factory.mktemp("processes")
    launch(in_one_of_two_processes, 2, dist_url="auto", args=(str(folder),))
    return [torch.load(folder / f"{rank}.pth") for rank in (0, 1)]


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Norm of the difference, relative to the norm of `one`."""
    one, other = (torch.cat([x[name].flatten() for name in one]).double() for x in (one, other))
    return float((one - other).norm() / one.norm())


NEW_PAGES_OF_A_BIG_TENSOR = """
import resource, torch
from retina_focal.training.processes import keep_freed_memory
keep_freed_memory()
pages = []
for _ in range(4):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(16 * 2**20)  # 64 MB
    pages.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(pages[-1])
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has these settings")
@needs_cpu_processes
@pytest.mark.parametrize(
    ("chosen", "kept"), [({}, True), ({"MALLOC_MMAP_THRESHOLD_": "1000000"}, False)]
)
def test_freed_memory_serves_the_next_step_unless_the_user_chose(chosen, kept):
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_"))}
    script = [sys.executable, "-c", NEW_PAGES_OF_A_BIG_TENSOR]
    run = subprocess.run(
        script, env={**environment, **chosen}, capture_output=True, text=True, check=True
    )
    # Pages are of 4 kB, or some of them of 2 MB.
    assert (int(run.stdout) == 0) == kept


def test_a_process_group_is_closed_when_its_block_ends_or_fails(tmp_path):
    for failure in (None, RuntimeError()):
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{tmp_path}/{bool(failure)}", rank=0, world_size=1
        )
        with suppress(RuntimeError), closed_process_group():
            assert torch.distributed.is_initialized()
            if failure:
                raise failure
        assert not torch.distributed.is_initialized()
    with closed_process_group():  # where there is none
        pass


@needs_cpu_processes
def test_both_processes_have_every_gradient_and_the_same(seen):
    # One of them has no box: its box branch gets zeros, or DDP would wait for them in the next
    # step, since it doesn't look for unused parameters.
    for normalizer in ("global", "batch"):
        first, second = (x[normalizer][1] for x in seen)
        assert all(gradient is not None for gradient in first.values())
        assert all(torch.equal(first[name], second[name]) for name in first)


@needs_cpu_processes
def test_global_normalizer_gives_in_two_processes_what_one_gives(seen):
    loss, gradients = step(tiny_model(normalizer="global"), batch_of_two())
    assert np.mean([x["global"][0] for x in seen]) == pytest.approx(loss, rel=1e-6)
    # fp32 through 20 layers: exchanging the two images alone moves the gradients by 7e-7.
    assert distance(gradients, seen[0]["global"][1]) < 1e-5
    # With "batch" the process without boxes divides by 1: the law is no matter of course.
    assert distance(gradients, seen[0]["batch"][1]) > 1e-2


@needs_cpu_processes
def test_each_process_keeps_its_own_moving_average(seen):
    # 100 -> 0.9 N + 0.1 max(P, 1), twice. Broadcasting the first process's buffers would undo it.
    assert seen[1]["moving average"] == pytest.approx(0.81 * 100 + 0.19 * 1)
    assert seen[0]["moving average"] > seen[1]["moving average"]


@needs_cpu_processes
def test_sync_bn_on_a_cpu_is_refused_naming_gn(seen):
    assert all("MODEL.RETINANET.NORM GN" in x["SyncBN"] for x in seen)


@needs_cpu_processes
def test_processes_share_the_cores(seen):
    assert [x["threads"] for x in seen] == [2, 2]


def test_threads_that_the_user_chose_stay(monkeypatch):
    threads = torch.get_num_threads()
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    share_cores(2)
    assert torch.get_num_threads() == threads


def test_a_missing_gpu_is_said_and_a_cpu_is_not(monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with caplog.at_level(logging.INFO):
        assert available_device("cpu") == "cpu"
        assert not caplog.records
        assert available_device("cuda:1") == "cpu"
    assert "running on the CPU instead of 'cuda:1'" in caplog.text


def loader_cfg(num_workers: int) -> CfgNode:
    loader, solver = {"NUM_WORKERS": num_workers}, {"IMS_PER_BATCH": 2}
    return CfgNode({"DATALOADER": loader, "SOLVER": solver})


@pytest.mark.parametrize(
    ("soft", "hard", "num_workers", "set_to"),
    [
        (1024, 4096, 4, None),
        (32, 32, 0, None),
        (100, 4096, 4, 64 + 4 * (8 + 6 * 2)),
        (100, resource.RLIM_INFINITY, 4, 144),
        (resource.RLIM_INFINITY, resource.RLIM_INFINITY, 99, None),
        (143, 144, 4, 144),
    ],
)
def test_as_many_files_may_be_open_as_a_loader_needs(soft, hard, num_workers, set_to, monkeypatch):
    limits = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: (soft, hard))
    monkeypatch.setattr(resource, "setrlimit", lambda _, pair: limits.append(pair))
    allow_open_files(loader_cfg(num_workers))
    assert limits == ([] if set_to is None else [(set_to, hard)])


def test_too_few_open_files_are_said_before_the_first_batch(monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda _: (32, 143))
    with pytest.raises(UserError, match=r"allows a process 143 open .* 4 workers .*ulimit -n 144"):
        allow_open_files(loader_cfg(4))
