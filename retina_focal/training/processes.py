"""Processes on one machine: devices, cores, memory, and the distributed model."""

import ctypes
import fcntl
import logging
import os
import platform
import resource
import signal
import socket
import struct
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch
import torch.distributed as dist
from detectron2.config import CfgNode
from detectron2.engine import create_ddp_model
from detectron2.utils import comm
from torch import nn

from retina_focal.errors import UserError

# Of glibc's malloc.h, and Linux's prctl.h and sockios.h.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
PR_SET_PDEATHSIG = 1
SIOCGIFADDR = 0x8915

logger = logging.getLogger(__name__)


def distribute(model: nn.Module, **ddp_options: bool) -> nn.Module:
    """`model` in DistributedDataParallel where there are several processes, on a GPU or a CPU.

    Raises:
        UserError: SyncBN on a CPU, which torch does not have.
    """
    if comm.get_world_size() == 1:
        return model
    # Without device_ids DDP leaves the inputs where they are: the model moves them faster.
    options = {
        "broadcast_buffers": False,
        "gradient_as_bucket_view": True,
        "device_ids": None,
        **ddp_options,
    }
    on_cpu = next(model.parameters()).device.type == "cpu"
    if on_cpu and any(isinstance(module, nn.SyncBatchNorm) for module in model.modules()):
        raise UserError(
            "the model has SyncBN, which torch has only for GPUs, and runs on the CPU in "
            f"{comm.get_world_size()} processes; use GN: MODEL.RETINANET.NORM GN"
        )
    return create_ddp_model(model, **options)


@contextmanager
def closed_process_group() -> Iterator[None]:
    """Close the process group, where there is one, when the block ends.

    gloo's threads abort a process that exits while they run (torch 2.14: one exit in seven of two
    processes that do little else).
    """
    try:
        yield
    finally:
        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()


def raised_in_all(error: UserError | None) -> None:
    """End all processes with what the main one found, where that is something; all come here.

    Raises:
        UserError: that one, in the first process of every machine.
        SystemExit: in the others, without words.
    """
    error = comm.all_gather(error)[0]
    if error and comm.get_local_rank() > 0:
        sys.exit(1)
    if error:
        raise error


def die_with_parent(parent: int) -> None:
    """Let this process be killed when its parent dies, also when that is killed itself.

    Args:
        parent: process id, from before this process began; it may be dead by now.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)


def interface_towards(host: str, port: int) -> str:
    """Name of the network interface that reaches a host; "" where it can't be told.

    Raises nothing: who needs the host will see that it can't be reached.
    """
    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, port))  # UDP: nothing is sent
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode())
            with suppress(OSError):  # an interface without an IPv4 address
                answer = fcntl.ioctl(probe, SIOCGIFADDR, request)
                if socket.inet_ntoa(answer[20:24]) == probe.getsockname()[0]:
                    return name
    return ""


def available_device(device: str) -> str:
    """`device`, or "cpu", said in a line, where that is a GPU and the machine has none."""
    if not device.startswith("cuda") or torch.cuda.is_available():
        return device
    if comm.is_main_process():
        logger.warning("no GPU was found; running on the CPU instead of '%s'", device)
    return "cpu"


def share_cores(num_local_processes: int) -> None:
    """Give each of this machine's processes its part of the cores for CPU arithmetic.

    torch takes all cores in every process, and they get into each other's way. OMP_NUM_THREADS,
    where it is set, is the user's own choice for each process and stays.
    """
    if num_local_processes > 1 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, torch.get_num_threads() // num_local_processes))


def allow_open_files(cfg: CfgNode) -> None:
    """Raise this process's limit of open files to what its data loader may need.

    Args:
        cfg: as `plain_values` has it.
    Raises:
        UserError: the system allows fewer.
    """
    num_workers = cfg.DATALOADER.NUM_WORKERS
    if not num_workers:
        return
    num_images = cfg.SOLVER.IMS_PER_BATCH // comm.get_world_size()
    # torch passes each tensor as an open file: two batches a worker, three tensors an image.
    needed = 64 + num_workers * (8 + 6 * num_images)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = resource.RLIM_INFINITY
    if soft != unlimited and soft < needed:
        if hard != unlimited and hard < needed:
            raise UserError(
                f"the system allows a process {hard} open files; {num_workers} workers "
                f"(DATALOADER.NUM_WORKERS) may need {needed} for {num_images} images per step and "
                f"process: raise the limit (ulimit -n {needed}), or use fewer workers"
            )
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def keep_freed_memory() -> None:
    """Let this process keep the memory of one training step on the CPU for the next.

    glibc gives freed maps above 32 MB, and the end of its heap, back to the system after each
    step; fresh pages then take up to a tenth of the next. Settings of the environment (MALLOC_...,
    GLIBC_TUNABLES) are the user's own choice and stay.
    """
    chosen = [name for name in os.environ if name.startswith(("MALLOC_", "GLIBC_TUNABLES"))]
    if torch.cuda.is_available() or platform.libc_ver()[0] != "glibc" or chosen:
        return
    libc = ctypes.CDLL(None)
    for parameter in (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD):
        libc.mallopt(parameter, 2**31 - 1)
