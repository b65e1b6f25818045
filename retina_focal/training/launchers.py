"""Who started this process, and which others train the same model with it.

Recognised are the command line (``--num-gpus``, ``--num-machines``), ``torchrun`` (or whatever sets
its variables) and a SLURM job's ``srun``. Where they contradict each other, N processes would train
N models into one folder: that is refused before anything is written.
"""

import argparse
import re
from collections.abc import Mapping
from dataclasses import dataclass

from retina_focal.errors import UserError

# SLURM numbers a job's own steps from 0; these and above are its batch script and its shell.
FIRST_SPECIAL_STEP = 0xFFFFFFF0
# What launchers set that are not recognised: each of their processes would train its own model.
OTHER_LAUNCHERS = {"OMPI_COMM_WORLD_SIZE": "mpirun", "PMI_SIZE": "mpiexec"}


@dataclass(frozen=True)
class World:
    """This process among all that train one model."""

    size: int = 1
    rank: int = 0
    local_rank: int = 0  # among the processes of this machine
    host: str = ""  # where process 0 listens; "" where there is no other process
    port: int = 0
    launcher: str = "command line"
    has_server: bool = False  # the launcher itself listens there


def world_of(args: argparse.Namespace, environment: Mapping[str, str]) -> World | None:
    """Where the environment puts this process; None where the command line decides alone.

    Args:
        args: `num_gpus` (None: not given), `num_machines`, as of detectron2's launcher.
        environment: of this process.
    Raises:
        UserError: two launchers contradict each other, or one of them is half there.
    """
    num_gpus, num_machines = args.num_gpus or 1, args.num_machines
    if "RANK" in environment or "WORLD_SIZE" in environment:
        world = _torchrun_world(environment)
        if num_gpus > 1 or num_machines > 1:
            raise UserError(
                f"torchrun started {world.size} processes (WORLD_SIZE), and the command line asks "
                f"for --num-gpus {num_gpus} --num-machines {num_machines}; type one of the two "
                "(or: unset RANK WORLD_SIZE)"
            )
        return world
    num_tasks = _slurm_tasks(environment)
    if num_tasks == 1:
        _refuse_other_launchers(num_machines, environment)
    elif num_machines == num_tasks:
        return None  # a launcher per machine: detectron2's way
    elif _is_slurm_step(environment):
        if num_gpus > 1 or num_machines > 1:
            raise UserError(
                f"srun started {num_tasks} tasks, and each asks for --num-gpus {num_gpus} "
                f"--num-machines {num_machines}; leave those out, or for one task per machine add: "
                f"--num-machines {num_tasks} --machine-rank $SLURM_PROCID --dist-url "
                "tcp://ADDRESS:PORT"
            )
        return _slurm_world(environment, num_tasks)
    elif args.num_gpus is None and num_machines == 1:
        raise UserError(
            f"this SLURM job has {num_tasks} tasks, but srun did not start this process, so it "
            "would train alone; put srun before the command, or add --num-gpus (1: one process, on "
            "purpose)"
        )
    return None


def is_restarted(environment: Mapping[str, str]) -> bool:
    """Whether torchrun starts this process again, to go on with what it began."""
    return _number(environment, "TORCHELASTIC_RESTART_COUNT", 0) > 0


def is_requeued(environment: Mapping[str, str]) -> bool:
    """Whether SLURM starts this job again, after a preemption or the loss of a machine."""
    return _number(environment, "SLURM_RESTART_COUNT", 0) > 0


def may_restart(environment: Mapping[str, str]) -> bool:
    """Whether torchrun would start this process again (--max-restarts)."""
    return _number(environment, "TORCHELASTIC_MAX_RESTARTS", 0) > 0


def _refuse_other_launchers(num_machines: int, environment: Mapping[str, str]) -> None:
    for name, launcher in OTHER_LAUNCHERS.items():
        size = _number(environment, name, 1)
        if size not in (1, num_machines):
            raise UserError(
                f"{launcher} started {size} processes ({name}), which would train {size} models "
                "into one folder; start them with torchrun or srun, or set RANK, WORLD_SIZE, "
                "LOCAL_RANK, MASTER_ADDR and MASTER_PORT"
            )


def _torchrun_world(environment: Mapping[str, str]) -> World:
    """Of the variables that torchrun sets; a hand-made launcher may set them too."""
    missing = [name for name in ("RANK", "WORLD_SIZE") if name not in environment]
    size = _number(environment, "WORLD_SIZE", 1)
    if size > 1:
        names = ("LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
        missing += [name for name in names if name not in environment]
    if missing:
        there = [name for name in ("RANK", "WORLD_SIZE") if name in environment]
        raise UserError(
            f"{' and '.join(there)} is set, as torchrun does, but {', '.join(missing)} is not; set "
            f"all, or type: unset {' '.join(there)}"
        )
    return _checked(
        World(
            size,
            _number(environment, "RANK"),
            _number(environment, "LOCAL_RANK", 0),
            environment.get("MASTER_ADDR", ""),
            _number(environment, "MASTER_PORT", 0),
            "torchrun",
            environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        )
    )


def _is_slurm_step(environment: Mapping[str, str]) -> bool:
    """Whether srun started this process: not a batch script, and not the shell of salloc.

    A batch script has SLURM_PROCID 0 and the job's SLURM_NTASKS too, but no step; salloc's shell
    has no SLURM_PROCID, or runs in a special step.
    """
    step = environment.get("SLURM_STEP_ID", environment.get("SLURM_STEPID"))
    if step is not None:
        return _number({"SLURM_STEP_ID": step}, "SLURM_STEP_ID") < FIRST_SPECIAL_STEP
    return "SLURM_PROCID" in environment and environment.get("ENVIRONMENT") != "BATCH"


def _slurm_tasks(environment: Mapping[str, str]) -> int:
    """Tasks of the step, or of the job outside a step; 1 outside SLURM."""
    tasks = _number(environment, "SLURM_NTASKS", _number(environment, "SLURM_NPROCS", 1))
    if _is_slurm_step(environment):
        return _number(environment, "SLURM_STEP_NUM_TASKS", tasks)
    return tasks


def _slurm_world(environment: Mapping[str, str], size: int) -> World:
    nodes = next(
        (
            environment[name]
            for name in ("SLURM_STEP_NODELIST", "SLURM_NODELIST", "SLURM_JOB_NODELIST")
            if name in environment
        ),
        "",
    )
    host = environment.get("MASTER_ADDR") or first_host(nodes)
    missing = [x for x in ("SLURM_PROCID", "SLURM_LOCALID") if x not in environment]
    missing += [] if host else ["SLURM_NODELIST"]
    if missing:
        raise UserError(
            f"SLURM_NTASKS is {size}, but {', '.join(missing)} is not set; start the command with "
            "srun, or add --num-gpus (1: one process, on purpose)"
        )
    # Jobs that share a machine differ in their numbers; below Linux's ports of outgoing calls.
    port = 15000 + (_number(environment, "SLURM_JOB_ID", 0) * 16) % 16384
    port += _number({"STEP": environment.get("SLURM_STEP_ID", "0")}, "STEP") % 16
    return _checked(
        World(
            size,
            _number(environment, "SLURM_PROCID"),
            _number(environment, "SLURM_LOCALID"),
            host,
            _number(environment, "MASTER_PORT", port),
            "srun",
        )
    )


def first_host(nodes: str) -> str:
    """The first name of SLURM's list: ``node[003-007,12],gpu1`` begins with ``node003``."""
    first = re.match(r"(?:\[[^\]]*\]|[^,\[])*", nodes.strip())[0]
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", first)


def _checked(world: World) -> World:
    if not 0 <= world.rank < world.size or not world.local_rank >= 0:
        raise UserError(
            f"{world.launcher} says that this is process {world.rank} of {world.size}, local rank "
            f"{world.local_rank}; expected 0 to {world.size - 1}"
        )
    return world


def _number(environment: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environment.get(name, default)
    try:
        return int(text)
    except (TypeError, ValueError) as error:
        raise UserError(f"{name} is {text!r}, which is no whole number") from error
