"""One model, however it is launched; and what is left when processes, machines and links fail."""

import json
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from test_processes import needs_cpu_processes
from trainings import (
    LONG,
    PYTHON,
    STEPPING,
    WORKERS,
    Training,
    is_alive,
    no_training_outlives_its_test,  # noqa: F401
)

from retina_focal.training.spawning import free_port

pytestmark = needs_cpu_processes
NO_EVALUATION = ["DATASETS.TEST", "()"]
TIMEOUT = ["MODEL.RETINA_FOCAL.TRAIN.TIMEOUT", "20"]
slow = pytest.mark.slow


def torchrun(*options: str) -> list[str]:
    port = ["--master_port", str(free_port())]
    return [*PYTHON, "-m", "torch.distributed.run", "--nproc_per_node", "2", *port, *options]


def slurm(folder: Path, data: Path, *arguments: str, opts: list[str]) -> list[Training]:
    """The two tasks of a step on this machine, as `srun` would start them."""
    trainings = []
    for rank in ("0", "1"):
        environment = {
            "SLURM_JOB_ID": str(os.getpid()),
            "SLURM_STEP_ID": "0",
            "SLURM_NTASKS": "2",
            "SLURM_PROCID": rank,
            "SLURM_LOCALID": rank,
            "SLURM_NODELIST": "localhost",
        }
        task = {"opts": opts, "environment": environment, "log": f"task{rank}"}
        trainings.append(Training(folder, data, *arguments, **task))
    return trainings


def is_one_model(folder: Path) -> bool:
    """Whether two processes trained together: the second logs beside the first."""
    texts = [(folder / name).read_text() for name in ("log.txt", "log.txt.rank1")]
    return all("World size: 2" in text for text in texts)


def test_torchrun_trains_one_model(data, tmp_path):
    training = Training(tmp_path / "run", data, opts=NO_EVALUATION, launcher=torchrun())
    assert training.end(120) == 0, training.text[-3000:]
    assert is_one_model(training.output)
    assert torch.load(training.output / "model_final.pth", weights_only=True)["iteration"] == 1


def test_srun_trains_one_model(data, tmp_path):
    trainings = slurm(tmp_path / "run", data, opts=NO_EVALUATION)
    assert [training.end(120) for training in trainings] == [0, 0], trainings[0].text[-3000:]
    assert is_one_model(trainings[0].output)


@slow
@pytest.mark.parametrize("kind", ["torchrun", "srun", "two machines"])
def test_evaluation_alone_works_through_each_launcher(kind, data, tmp_path):
    trained = Training(tmp_path / "trained", data, opts=NO_EVALUATION)
    assert trained.end(120) == 0
    opts = ["MODEL.WEIGHTS", str(trained.output / "model_final.pth")]
    folder = tmp_path / "run"
    if kind == "torchrun":
        trainings = [Training(folder, data, "--eval-only", opts=opts, launcher=torchrun())]
    elif kind == "srun":
        trainings = slurm(folder, data, "--eval-only", opts=opts)
    else:
        trainings = two_machines(folder, data, "--eval-only", opts=opts)
    assert [training.end(120) for training in trainings] == [0] * len(trainings)
    assert (folder / "inference/coco_instances_results.json").is_file()


@slow
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
@pytest.mark.parametrize("to", ["launcher", "group", "one worker"])
def test_each_signal_to_anyone_saves_once(name, to, data, tmp_path):
    training = Training(tmp_path / "run", data, "--num-gpus", "2", opts=[*LONG, *WORKERS])
    training.wait_for(STEPPING)
    signum, pid = signal.Signals[name], training.process.pid
    target = {"launcher": pid, "group": -pid, "one worker": training.children()[1]}[to]
    os.kill(target, signum)
    assert training.end() == 128 + signum
    assert training.checkpoint.is_file() and "Traceback" not in training.text


@slow
def test_torchrun_passes_sigterm_on(data, tmp_path):
    training = Training(tmp_path / "run", data, opts=[*LONG, *WORKERS], launcher=torchrun())
    training.wait_for(STEPPING)
    training.process.send_signal(signal.SIGTERM)
    training.end()
    assert training.checkpoint.is_file()


@slow
@pytest.mark.parametrize("launched", ["itself", "torchrun"])
def test_nothing_is_left_of_a_killed_launcher(launched, data, tmp_path):
    options = {"launcher": torchrun()} if launched == "torchrun" else {}
    arguments = [] if launched == "torchrun" else ["--num-gpus", "2"]
    opts = [*LONG, *WORKERS]
    training = Training(tmp_path / "run", data, *arguments, opts=opts, **options)
    training.wait_for(STEPPING)
    assert len(training.processes()) > 4
    training.process.kill()
    assert training.end() == -signal.SIGKILL


@slow
@pytest.mark.parametrize("seconds", [0.0, 2.0, 4.0])
def test_a_signal_while_the_processes_start_ends_them_in_words(seconds, data, tmp_path):
    training = Training(tmp_path / "run", data, "--num-gpus", "2", opts=LONG)
    while len(training.children()) < 2:
        time.sleep(0.02)
    time.sleep(seconds)
    os.kill(-training.process.pid, signal.SIGINT)
    assert training.end() == 130
    assert "SIGINT" in training.text and "Traceback" not in training.text


@slow
def test_a_signal_during_an_evaluation_saves_and_the_evaluation_is_made_on_resuming(data, tmp_path):
    # Many pictures; the evaluations come after the second of four iterations and at the end.
    many = tmp_path / "many"
    shutil.copytree(data, many)
    content = json.loads((many / "a.json").read_text())
    content["images"] = [
        {**image, "id": 6 * i + image["id"]} for i in range(60) for image in content["images"]
    ]
    (many / "a.json").write_text(json.dumps(content))
    opts = ["SOLVER.MAX_ITER", "4", "SOLVER.CHECKPOINT_PERIOD", "100", "TEST.EVAL_PERIOD", "2"]
    training = Training(tmp_path / "run", many, "--num-gpus", "2", opts=opts)
    training.wait_for("Start inference on")
    os.kill(-training.process.pid, signal.SIGTERM)
    assert training.end() == 143
    assert training.checkpoint.name == "model_0000001.pth"
    again = Training(tmp_path / "run", many, "--num-gpus", "2", "--resume", opts=opts, log="again")
    assert again.end(300) == 0, again.text[-3000:]
    assert again.text.count("Start inference on") == 2
    lines = [json.loads(x) for x in (again.output / "metrics.json").read_text().splitlines()]
    assert [x["iteration"] for x in lines if "bbox/AP" in x] == [1, 4]


@slow
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGSTOP])
def test_a_lost_process_is_named_in_time(rank, signum, data, tmp_path):
    training = Training(tmp_path / "run", data, "--num-gpus", "2", opts=[*LONG, *TIMEOUT]).wait_for(
        STEPPING
    )
    start = time.monotonic()
    os.kill(training.children()[rank], signum)
    assert training.end() in (1, 128 + signal.SIGKILL)
    assert time.monotonic() - start < 40
    assert re.search(rf"process {rank} of 2 .*(does not answer|is gone)", training.text)
    assert "Traceback" not in training.text


@slow
@pytest.mark.parametrize("processes", ["1", "2"])
def test_a_killed_loader_worker_is_said_in_words(processes, data, tmp_path):
    training = Training(
        tmp_path / "run", data, "--num-gpus", processes, opts=[*LONG, *WORKERS, *TIMEOUT]
    ).wait_for(STEPPING)
    workers = training.children()
    os.kill(training.children(workers[0])[0] if processes == "2" else workers[0], signal.SIGKILL)
    assert training.end() == 1
    assert "DataLoader worker" in training.text and "Out of memory?" in training.text
    assert "Traceback" not in training.text


def weights(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)["model"]


@slow
def test_torchrun_restarts_a_killed_worker_and_ends_with_the_same_weights(data, tmp_path):
    opts = ["SOLVER.MAX_ITER", "40", "SOLVER.CHECKPOINT_PERIOD", "5", *WORKERS, *NO_EVALUATION]
    straight = Training(tmp_path / "straight", data, opts=opts, launcher=torchrun())
    assert straight.end(300) == 0
    killed = Training(
        tmp_path / "killed", data, opts=opts, launcher=torchrun("--max-restarts", "3")
    ).wait_for("Saving checkpoint to")
    for kills in (1, 2):
        workers = killed.children()
        os.kill(workers[kills - 1], signal.SIGKILL)
        while any(map(is_alive, workers)):
            time.sleep(0.1)
        while killed.text.count("Starting training from iteration") <= kills:
            assert killed.process.poll() is None, killed.text[-3000:]
            time.sleep(0.1)
        time.sleep(2)
    assert killed.end(300) == 0, killed.text[-3000:]
    one, other = (weights(x.output / "model_final.pth") for x in (straight, killed))
    assert all(torch.equal(one[name], other[name]) for name in one)


class Machines:
    """Two network namespaces, joined by one cable, which can be cut."""

    names = ("machine0", "machine1")
    addresses = ("10.77.0.1", "10.77.0.2")

    def __enter__(self) -> "Machines":
        ip = shutil.which("ip")
        if not ip or os.geteuid() or subprocess.run([ip, "netns", "add", self.names[0]]).returncode:
            pytest.skip("needs root and network namespaces")
        for command in (
            f"netns add {self.names[1]}",
            "link add cable0 netns {} type veth peer name cable1 netns {}".format(*self.names),
            *(f"-n {self.names[i]} addr add {self.addresses[i]}/24 dev cable{i}" for i in (0, 1)),
            *(f"-n {self.names[i]} link set cable{i} up" for i in (0, 1)),
            *(f"-n {self.names[i]} link set lo up" for i in (0, 1)),
        ):
            subprocess.run([ip, *command.split()], check=True)
        return self

    def cut(self) -> None:
        subprocess.run(["ip", "-n", self.names[0], "link", "set", "cable0", "down"], check=True)

    def __exit__(self, *_) -> None:
        for name in self.names:
            subprocess.run(["ip", "netns", "del", name], check=False)


def two_machines(
    folder: Path, data: Path, *arguments: str, opts: list[str], machines: Machines | None = None
) -> list[Training]:
    """The command on each of two machines; without `machines` on the loopback."""
    port = free_port()
    trainings = []
    for rank in (0, 1):
        inside = ["ip", "netns", "exec", machines.names[rank]] if machines else []
        address = machines.addresses[0] if machines else "127.0.0.1"
        options = ["--num-machines", "2", "--machine-rank", str(rank)]
        options += ["--dist-url", f"tcp://{address}:{port}", *arguments]
        launcher = [*inside, *PYTHON]
        log = {"opts": opts, "launcher": launcher, "log": f"machine{rank}"}
        trainings.append(Training(folder, data, *options, **log))
    return trainings


@slow
def test_two_machines_train_one_model(data, tmp_path):
    with Machines() as machines:
        trainings = two_machines(tmp_path / "run", data, opts=NO_EVALUATION, machines=machines)
        assert [training.end(120) for training in trainings] == [0, 0], trainings[1].text[-3000:]
    assert is_one_model(trainings[0].output)


@slow
@pytest.mark.parametrize("fault", ["cut link", "stopped", "killed", "powered off"])
def test_two_machines_of_which_one_is_lost_end_in_words_and_the_checkpoint_is_usable(
    fault, data, tmp_path
):
    opts = [*LONG, *TIMEOUT, *NO_EVALUATION, "SOLVER.CHECKPOINT_PERIOD", "5"]
    with Machines() as machines:
        trainings = two_machines(tmp_path / "run", data, opts=opts, machines=machines)
        trainings[0].wait_for("model_0000004.pth")
        start, lost = time.monotonic(), trainings[1].children()[0]
        if fault == "cut link":
            machines.cut()
        elif fault == "powered off":  # nothing is closed, nothing answers
            machines.cut()
            os.kill(lost, signal.SIGKILL)
        else:
            os.kill(lost, signal.SIGSTOP if fault == "stopped" else signal.SIGKILL)
        assert trainings[0].end() == 1, trainings[0].text[-3000:]
        assert time.monotonic() - start < 30
        assert re.search(r"process 1 of 2 .* does not answer", trainings[0].text)
        statuses = {"cut link": 1}  # the others were killed, a stopped one by its launcher
        assert trainings[1].end() == statuses.get(fault, 128 + signal.SIGKILL)
        assert time.monotonic() - start < 35
        if fault == "cut link":
            assert re.search(r"process 0 of 2 .* (does not answer|is gone)", trainings[1].text)
    done = str(torch.load(trainings[0].checkpoint, weights_only=True)["iteration"] + 2)
    opts = [*NO_EVALUATION, "SOLVER.MAX_ITER", done]
    again = Training(tmp_path / "run", data, "--resume", opts=opts, log="again")
    assert again.end(120) == 0, again.text[-3000:]


@slow
@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_machine_that_is_alone_ends_in_words_and_writes_nothing(rank, data, tmp_path):
    options = ["--num-machines", "2", "--machine-rank", rank]
    url = ["--dist-url", f"tcp://127.0.0.1:{free_port()}"]
    start = time.monotonic()
    training = Training(tmp_path / "run", data, *options, *url, opts=TIMEOUT)
    assert training.end(90) == 1
    assert 20 < time.monotonic() - start < 60
    assert re.search("did not come|found nobody", training.text)
    assert "Traceback" not in training.text and not training.output.exists()
