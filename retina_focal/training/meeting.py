"""How the processes of a training meet, and start their process group, or say who did not come."""

import os
import socket
import time
import uuid
from datetime import timedelta

import torch
import torch.distributed as dist
from detectron2.utils import comm

from retina_focal.errors import UserError
from retina_focal.training.launchers import World
from retina_focal.training.processes import interface_towards


class Meeting:
    """Of all processes of a world; `join` makes `store` and `names` of all."""

    def __init__(self, world: World, timeout: float):
        """
        Args:
            timeout: seconds that a process may let the others wait.
        """
        self.world, self.timeout = world, timeout
        self.period = min(1.0, timeout / 60)
        self.patience = timeout - 15 * self.period  # the rest is for the words
        self._welcomed = 0

    def join(self) -> None:
        """Meet all others and start the process group.

        Raises:
            UserError: somebody is missing after the timeout, or there twice.
        """
        try:
            self._join()
        except dist.DistError as error:
            raise UserError(
                f"process {self.world.rank} of {self.world.size} lost process 0 at "
                f"{self.world.host}:{self.world.port} before all had come; that one says why"
            ) from error

    def _join(self) -> None:
        world, deadline = self.world, time.monotonic() + self.timeout
        store = self._connect(deadline)
        attempt = self._attempt(store, deadline)
        self.store = dist.PrefixStore(f"retina_focal/{attempt}", store)
        keys = keys_of("name", world.size)
        own = f"process {world.rank} of {world.size} (on {socket.gethostname()}, pid {os.getpid()})"
        size = self.store.compare_set("size", "", str(world.size)).decode()
        if int(size) != world.size:
            raise UserError(
                f"{own} meets a process of {size} at {world.host}:{world.port}; give all machines "
                "the same --num-gpus and --num-machines"
            )
        if self.store.add(f"count/{world.rank}", 1) > 1:
            raise UserError(
                f"{own} is there twice; give each machine its own --machine-rank, and each run its "
                "own --dist-url"
            )
        self.store.set(f"local/{world.rank}", str(world.local_rank))
        self.store.set(f"beat/{world.rank}", "0 its start")
        self.store.set(keys[world.rank], own)
        while not self.store.check(keys):
            self._welcome(store, attempt)
            if time.monotonic() > deadline:
                missing = [str(r) for r, key in enumerate(keys) if not self.store.check([key])]
                raise UserError(
                    f"of {world.size} processes {', '.join(missing)} did not come to {world.host}:"
                    f"{world.port} within {self.timeout:g} s (MODEL.RETINA_FOCAL.TRAIN.TIMEOUT); "
                    "start the command on every machine"
                )
            time.sleep(min(0.1, self.period))
        self.names = [x.decode() for x in self.store.multi_get(keys)]
        self._start_process_group(self._local_size())

    def _connect(self, deadline: float) -> dist.Store:
        world, timeout = self.world, timedelta(seconds=self.timeout)
        options = {"timeout": timeout, "wait_for_workers": False}
        if world.rank == 0 and not world.has_server:
            try:  # by hand, since torch tries for twice the timeout, and prints its own stack
                both = {"family": socket.AF_INET6, "dualstack_ipv6": True}
                both = both if socket.has_dualstack_ipv6() else {}
                server = socket.create_server(("", world.port), **both)
            except OSError as error:
                raise UserError(
                    f"process 0 can't listen on port {world.port} ({error.strerror}); choose "
                    "another: --dist-url tcp://ADDRESS:PORT, or MASTER_PORT"
                ) from error
            options["master_listen_fd"] = server.detach()
            return dist.TCPStore(world.host, world.port, world.size, True, **options)
        while True:
            try:
                socket.create_connection((world.host, world.port), timeout=self.period).close()
                return dist.TCPStore(world.host, world.port, world.size, False, **options)
            except OSError as error:
                if time.monotonic() > deadline:
                    raise UserError(
                        f"process {world.rank} of {world.size} found nobody at {world.host}:"
                        f"{world.port} within {self.timeout:g} s ({error}); process 0 runs there: "
                        "was it started, and is the port open?"
                    ) from error
                time.sleep(self.period)

    def _attempt(self, store: dist.Store, deadline: float) -> str:
        """A name for this set of processes: torchrun's store outlives those that it replaces.

        Its TORCHELASTIC_RESTART_COUNT is no such name, since each machine counts its own.
        """
        own = uuid.uuid4().hex
        if self.world.rank == 0 or not self.world.has_server:
            return own if self.world.has_server else ""
        while time.monotonic() < deadline:
            number = store.add("retina_focal_arrivals", 1)
            store.set(f"retina_focal_arrival/{number}", own)
            for _ in range(10):
                if store.check([f"retina_focal_welcome/{own}"]):
                    return store.get(f"retina_focal_welcome/{own}").decode()
                time.sleep(min(0.1, self.period))
        raise UserError(
            f"process {self.world.rank} of {self.world.size} waited {self.timeout:g} s for process "
            "0, which did not come"
        )

    def _welcome(self, store: dist.Store, attempt: str) -> None:
        """Process 0 tells those who arrive the name of its attempt."""
        if not (self.world.rank == 0 and self.world.has_server):
            return
        last = store.add("retina_focal_arrivals", 0)
        for number in range(self._welcomed + 1, last + 1):
            key = f"retina_focal_arrival/{number}"
            if store.check([key]):  # who has not come that far comes again
                store.set(f"retina_focal_welcome/{store.get(key).decode()}", attempt)
        self._welcomed = last

    def _local_size(self) -> int:
        """Processes per machine, which detectron2 wants equal, and its ranks in one row."""
        local_ranks = [int(x) for x in self.store.multi_get(keys_of("local", self.world.size))]
        size = self.world.size // max(1, local_ranks.count(0))
        if local_ranks != [rank % size for rank in range(self.world.size)]:
            raise UserError(
                f"the processes' numbers on their machines are {local_ranks}; expected as many on "
                "each machine, numbered one machine after the other (srun --ntasks-per-node N "
                "--distribution block)"
            )
        return size

    def _start_process_group(self, local_size: int) -> None:
        world, has_gpu = self.world, torch.cuda.is_available()
        if local_size < world.size and "GLOO_SOCKET_IFNAME" not in os.environ:
            name = interface_towards(world.host, world.port)
            if name:  # else gloo takes the host name's address, which is often 127.0.1.1
                os.environ["GLOO_SOCKET_IFNAME"] = name
        if has_gpu:
            # srun --gpus-per-task shows each process its own GPU alone.
            visible = torch.cuda.device_count()
            if 1 < visible < local_size:
                raise UserError(f"{local_size} processes on a machine that has {visible} GPUs")
            torch.cuda.set_device(world.local_rank if visible > 1 else 0)
        try:
            dist.init_process_group(
                "nccl" if has_gpu else "gloo",
                store=dist.PrefixStore("group", self.store),
                rank=world.rank,
                world_size=world.size,
                # NCCL aborts the process without words, so it comes after the beats.
                timeout=timedelta(seconds=self.timeout if has_gpu else self.patience),
            )
            comm.create_local_process_group(local_size)
            comm.synchronize()
        except (dist.DistError, RuntimeError) as error:
            raise UserError(
                f"{self.names[world.rank]} met the others at {world.host}:{world.port}, but can't "
                f"talk to all of them ({str(error).splitlines()[0]}); if a machine has several "
                "networks, name the one to use: GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME"
            ) from error


def keys_of(kind: str, size: int) -> list[str]:
    """Of every process in the store."""
    return [f"{kind}/{rank}" for rank in range(size)]
