"""The processes that the command itself starts on this machine, as detectron2's `launch` does.

Unlike that it passes signals on, and ends with the status of the processes.
"""

import argparse
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from multiprocessing import resource_tracker
from urllib.parse import urlsplit

from torch.multiprocessing import (
    ProcessExitedException,
    ProcessRaisedException,
    start_processes,
)

from retina_focal.training.launchers import World
from retina_focal.training.processes import die_with_parent
from retina_focal.training.signals import SIGNALS, Stop, ended_at_once, handled_signals

KILLED = ": out of memory? less of it: SOLVER.IMS_PER_BATCH, DATALOADER.NUM_WORKERS"


def start(main: Callable, args: argparse.Namespace, timeout: float) -> None:
    """Run `main(args, world)` in each of this machine's processes that the command line asks for.

    Signals are passed on to them, and none outlives this process. Ends this one with the status of
    the first that failed.

    Args:
        args: `num_gpus`, `num_machines`, `machine_rank`, `dist_url`.
        timeout: seconds in which all have ended when one is lost.
    """
    num_processes = args.num_gpus or 1
    size = num_processes * args.num_machines
    first = num_processes * args.machine_rank
    url = urlsplit(f"tcp://127.0.0.1:{free_port()}" if args.dist_url == "auto" else args.dist_url)
    worlds = [World(size, first + i, i, url.hostname, url.port) for i in range(num_processes)]
    ready = multiprocessing.get_context("spawn").Array("b", num_processes, lock=False)
    received: list[int] = []
    children: list[multiprocessing.Process] = []

    def forward(signum: int, _) -> None:
        received.append(signum)
        for i, child in enumerate(children):
            if child.is_alive():  # what still starts has nothing to finish
                os.kill(child.pid, signum if ready[i] else signal.SIGKILL)

    # Python starts it with the first child otherwise, and then unblocks the signals.
    resource_tracker.ensure_running()
    # Blocked in the children until they can handle them, and here until there are children.
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    for signum in SIGNALS:
        if signal.getsignal(signum) != signal.SIG_IGN:
            signal.signal(signum, forward)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # its warnings repeat ours, with stacks
    arguments = (main, args, worlds, ready, os.getpid(), multiprocessing.get_start_method())
    context = start_processes(_start_worker, arguments, num_processes, join=False)
    children.extend(context.processes)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    try:
        stopped: dict[int, float] = {}
        while not context.join(timeout=1, grace_period=min(10.0, timeout / 10)):
            _kill_stopped(children, stopped, timeout)
    except ProcessRaisedException as error:
        sys.exit(str(error))
    except ProcessExitedException as error:
        if error.exit_code > 128 and received:
            raise Stop(error.exit_code - 128) from error
        if error.exit_code > 0:  # the process itself has said why
            sys.exit(error.exit_code)
        if received:
            name = signal.Signals(received[0]).name
            print(f"{name} before the training began: nothing is saved", file=sys.stderr)
            sys.exit(128 + received[0])
        print(
            f"process {first + error.error_index} of {size} (pid {error.error_pid}) was killed by "
            f"{error.signal_name}" + (KILLED if error.signal_name == "SIGKILL" else ""),
            file=sys.stderr,
        )
        sys.exit(128 - error.exit_code)


def _kill_stopped(
    children: list[multiprocessing.Process], since: dict[int, float], timeout: float
) -> None:
    """Kill those that SIGSTOP has held for longer than the others wait; they can't end by it."""
    for child in children:
        states = os.WSTOPPED | os.WNOHANG | os.WNOWAIT
        if not child.is_alive() or not os.waitid(os.P_PID, child.pid, states):
            since.pop(child.pid, None)
        elif time.monotonic() - since.setdefault(child.pid, time.monotonic()) > timeout:
            print(f"process {child.pid} was stopped for {timeout:g} s", file=sys.stderr)
            child.kill()


def _start_worker(
    local_rank: int,
    main: Callable,
    args: argparse.Namespace,
    worlds: list[World],
    ready: list[int],
    parent: int,
    start_method: str,
) -> None:
    die_with_parent(parent)
    # A spawned process would spawn the workers of its loaders too, which each import torch anew.
    multiprocessing.set_start_method(start_method, force=True)
    with ended_at_once(by_words=True), handled_signals(speaks=worlds[local_rank].rank == 0):
        ready[local_rank] = True
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        main(args, worlds[local_rank])


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as server:
        server.bind(("", 0))
        return server.getsockname()[1]
