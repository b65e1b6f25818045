"""Which launcher started a process, and which contradictions are refused."""

import argparse
import os
import signal
from multiprocessing import resource_tracker

import pytest
from test_train import train_command

from retina_focal.errors import UserError
from retina_focal.tools import train
from retina_focal.training import spawning
from retina_focal.training.launchers import World, first_host, is_restarted, world_of
from retina_focal.training.signals import SIGNALS

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "node003",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
    "TORCHELASTIC_RESTART_COUNT": "0",
}
# Of `srun --ntasks 4 --ntasks-per-node 2` inside a batch script, for its third task.
SRUN = {
    "ENVIRONMENT": "BATCH",
    "SLURM_JOB_ID": "1001",
    "SLURM_STEP_ID": "0",
    "SLURM_NTASKS": "4",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0",
    "SLURM_NODELIST": "gpu[07-08]",
}
# What the batch script itself has: a number of its own, as a task would, but no step.
SBATCH = {name: value for name, value in SRUN.items() if "STEP" not in name}
SBATCH["SLURM_PROCID"] = "0"
SALLOC = {"SLURM_JOB_ID": "1001", "SLURM_NTASKS": "4", "SLURM_NODELIST": "gpu[07-08]"}
# salloc's shell where the cluster runs it on the first machine, in a step of its own kind.
INTERACTIVE = {**SALLOC, "SLURM_STEP_ID": str(0xFFFFFFFA), "SLURM_PROCID": "0"}


def world(environment: dict[str, str], **options: int | None) -> World | None:
    args = {"num_gpus": None, "num_machines": 1, **options}
    return world_of(argparse.Namespace(**args), environment)


def test_an_empty_environment_leaves_all_to_the_command_line():
    assert world({}) is None
    assert world({}, num_gpus=8, num_machines=2) is None


def test_torchruns_process_takes_its_place():
    assert world(TORCHRUN) == World(8, 5, 1, "node003", 29500, "torchrun", has_server=True)


def test_torchrun_inside_a_slurm_step_comes_first():
    assert world({**SRUN, **TORCHRUN}).launcher == "torchrun"


def test_one_process_of_torchrun_needs_no_address():
    assert world({"RANK": "0", "WORLD_SIZE": "1"}).size == 1


def test_sruns_process_takes_its_place():
    found = world(SRUN)
    assert (found.size, found.rank, found.local_rank) == (4, 2, 0)
    assert (found.host, found.has_server) == ("gpu07", False)
    assert found == world({**SRUN, "SLURM_PROCID": "2"})
    # Every task comes to the same port, and those of other jobs and steps to others.
    others = [{"SLURM_JOB_ID": "1002"}, {"SLURM_STEP_ID": "1"}]
    assert len({found.port, *(world({**SRUN, **other}).port for other in others)}) == 3
    assert 1024 <= found.port < 32768
    given = world({**SRUN, "MASTER_ADDR": "10.0.0.7", "MASTER_PORT": "4000"})
    assert (given.host, given.port) == ("10.0.0.7", 4000)


def test_a_step_is_known_by_its_task_alone():
    names = ("SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODELIST")
    assert world({name: SRUN[name] for name in names}).rank == 2


@pytest.mark.parametrize("environment", [SBATCH, SALLOC, INTERACTIVE])
def test_several_tasks_without_srun_are_refused_unless_one_process_is_meant(environment):
    with pytest.raises(UserError, match="put srun before the command"):
        world(environment)
    for num_gpus in (1, 8):  # on purpose
        assert world(environment, num_gpus=num_gpus) is None
    assert world({**environment, "SLURM_NTASKS": "1"}) is None


def test_a_step_of_one_task_inside_a_bigger_job_is_one_process():
    assert world({**SRUN, "SLURM_STEP_NUM_TASKS": "1"}, num_gpus=8) is None


def test_one_task_per_machine_may_start_the_processes_of_each():
    environment = {**SRUN, "SLURM_STEP_NUM_TASKS": "2"}
    assert world(environment, num_gpus=8, num_machines=2) is None


@pytest.mark.parametrize(
    ("environment", "options", "words"),
    [
        (TORCHRUN, {"num_gpus": 2}, "torchrun started 8 .* --num-gpus 2"),
        (TORCHRUN, {"num_machines": 2}, "--num-machines 2; type one of the two"),
        (SRUN, {"num_gpus": 2}, "srun started 4 tasks, and each asks for --num-gpus 2"),
        (SRUN, {"num_machines": 2}, "--num-machines 4 --machine-rank"),
        ({"WORLD_SIZE": "4"}, {}, "WORLD_SIZE is set.*RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT"),
        ({"RANK": "0"}, {}, "RANK is set.*but WORLD_SIZE is not"),
        ({**TORCHRUN, "RANK": "8"}, {}, "process 8 of 8.*expected 0 to 7"),
        ({**TORCHRUN, "RANK": "-1"}, {}, "process -1 of 8"),
        ({**TORCHRUN, "WORLD_SIZE": "two"}, {}, "WORLD_SIZE is 'two', which is no whole number"),
        ({**SRUN, "SLURM_NODELIST": ""}, {}, "SLURM_NODELIST is not set"),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, {}, "mpirun started 4 processes"),
    ],
)
def test_a_contradiction_is_refused(environment, options, words):
    with pytest.raises(UserError, match=words):
        world(environment, **options)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node1", "node1"),
        ("node003,node007", "node003"),
        ("node[003-007,12],gpu1", "node003"),
        ("rack[1-2]n[08,10]", "rack1n08"),
        ("gpu-a100-[2,4]", "gpu-a100-2"),
        ("", ""),
    ],
)
def test_the_first_host_of_slurms_list(nodes, first):
    assert first_host(nodes) == first


def test_a_process_that_torchrun_starts_again_resumes():
    assert is_restarted({**TORCHRUN, "TORCHELASTIC_RESTART_COUNT": "1"})
    assert not is_restarted(TORCHRUN) and not is_restarted({})


def test_a_run_that_may_be_restarted_does_not_begin_among_anothers_checkpoints(
    data, tmp_path, monkeypatch
):
    command, _ = train_command(data, tmp_path)
    (tmp_path / "model_0000001.pth").touch()
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    for restarts in ("0", "1"):  # the second time it has begun nothing that it could go on with
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", restarts)
        with pytest.raises(SystemExit, match="holds those of another run"):
            train.main(command[1:])


def test_a_contradiction_is_refused_before_anything_is_written(data, tmp_path, monkeypatch):
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    command, _ = train_command(data, tmp_path / "run", "--num-gpus", "2")
    with pytest.raises(SystemExit, match="torchrun started 8 processes"):
        train.main(command[1:])
    assert not (tmp_path / "run").exists()


def test_the_first_process_that_starts_does_not_unblock_the_signals(monkeypatch):
    """Python starts its tracker of resources before the first child, and then unblocks two."""
    seen = []

    def started(*_, **__):
        resource_tracker.ensure_running()
        seen.extend(signal.pthread_sigmask(signal.SIG_BLOCK, ()))
        raise InterruptedError

    handlers = {signum: signal.getsignal(signum) for signum in SIGNALS}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    monkeypatch.setattr(spawning, "start_processes", started)
    monkeypatch.setattr(resource_tracker, "ensure_running", lambda: tracker.ensure_running())
    tracker = resource_tracker.ResourceTracker()
    options = {"num_gpus": 2, "num_machines": 1, "machine_rank": 0, "dist_url": "auto"}
    try:
        with pytest.raises(InterruptedError):
            spawning.start(print, argparse.Namespace(**options), 9)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for signum, handler in handlers.items():
            signal.signal(signum, handler)
        os.close(tracker._fd)  # which ends its process
        os.waitpid(tracker._pid, 0)
    assert set(SIGNALS) <= set(seen)
