"""Laws of several processes: exact gradients, and what they agree on at each step."""

from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from conftest import pictures
from detectron2.engine import SimpleTrainer, launch
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from test_processes import needs_cpu_processes, tiny_model
from torch import nn

from retina_focal import NORMALIZER_REGISTRY
from retina_focal.training.accumulation import accumulate_gradients
from retina_focal.training.processes import closed_process_group, distribute
from retina_focal.training.steps import StepTrainer
from retina_focal.training.trouble import BadLoss

# Sizes that pad differently. Of two processes the second has no box.
SIZES, NUM_BOXES = [(64, 96), (96, 64), (50, 130), (128, 90)], [5, 2, 0, 0]
CASES = [
    (torch.float64, {}, ("global", "image", "batch")),
    # A random backbone with group norm turns rounding into 4e-6, by the order of the images alone.
    (torch.float32, {"MODEL.RESNETS.NORM": "FrozenBN"}, ("global",)),
]


def model_of(dtype: torch.dtype, normalizer: str, **keys: object) -> nn.Module:
    """Group norm in the head, and with several channels a group, or its biases had no gradient."""
    keys = {"MODEL.FPN.OUT_CHANNELS": 64, "MODEL.RETINANET.NORM": "GN", **keys}
    return tiny_model(normalizer=normalizer, **keys).to(dtype).train()


def gradients_of(model: nn.Module, batch: list[dict], num_micro_batches: int = 1) -> dict:
    model.zero_grad()
    accumulate_gradients(model, batch, num_micro_batches)
    return {name.removeprefix("module."): p.grad for name, p in model.named_parameters()}


def errors(expected: dict, found: dict) -> tuple[float, float]:
    """Of the worst tensor, relative to its norm, and of all of them together."""
    assert expected.keys() == found.keys()
    worst = max(float((found[k] - x).norm() / x.norm()) for k, x in expected.items())
    one, other = (torch.cat([x[k].flatten() for k in expected]) for x in (expected, found))
    return worst, float((other - one).norm() / one.norm())


def mine(batch: list) -> list:
    """This process's part."""
    size = len(batch) // comm.get_world_size()
    return batch[comm.get_rank() * size :][:size]


@pytest.mark.parametrize("dtype, keys", [case[:2] for case in CASES], ids=["fp64", "fp32"])
def test_four_micro_batches_give_what_the_whole_batch_gives(dtype, keys):
    whole, parts = (
        gradients_of(model_of(dtype, "global", **keys), pictures(SIZES, NUM_BOXES), number)
        for number in (1, 4)
    )
    worst, together = errors(whole, parts)
    print(f"1 process, 4 micro-batches, global, {dtype}: worst {worst:.1e}, all {together:.1e}")
    assert worst < 1e-12 if dtype == torch.float64 else together < 1e-6


def test_the_losses_of_an_fp64_model_are_divided_in_fp64():
    model, batch = model_of(torch.float64, "batch"), pictures(SIZES, NUM_BOXES)
    num_positives = int(model.count_positives(batch).sum())
    assert num_positives & (num_positives - 1)  # else its reciprocal is the same in fp32
    losses, sums = model(batch), model(batch, torch.ones(len(batch)))
    for name, loss in losses.items():
        assert loss.item() == pytest.approx(sums[name].item() / num_positives, rel=1e-14)


def test_three_processes_divide_by_a_third_of_the_positives_in_fp64(monkeypatch):
    monkeypatch.setattr(comm, "get_world_size", lambda: 3)
    monkeypatch.setattr(dist, "all_reduce", lambda total: None)
    (normalizer,) = NORMALIZER_REGISTRY.get("global")(torch.tensor([100]), None)
    assert normalizer.item() == 100 / 3


@contextmanager
def one_process():
    """The block runs as if there were no other."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comm, "get_world_size", lambda: 1)
        yield


def errors_of_processes() -> dict:
    """By dtype, normaliser and number of micro-batches, against one process."""
    found, batch = {}, pictures(SIZES, NUM_BOXES)
    for dtype, keys, normalizers in CASES:
        for normalizer in normalizers:
            with one_process():
                expected = gradients_of(model_of(dtype, normalizer, **keys), batch)
            numbers = (1, 2) if normalizer == "global" and len(mine(batch)) > 1 else (1,)
            for number in numbers:
                model = distribute(model_of(dtype, normalizer, **keys))
                synchronised = []
                model.register_comm_hook(synchronised, average)
                case = errors(expected, gradients_of(model, mine(batch), number))
                found[dtype, normalizer, number] = *case, len(set(synchronised)), len(synchronised)
    return found


def average(synchronised: list, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """As DDP does it without a hook."""
    synchronised.append(bucket.index())
    future = dist.all_reduce(bucket.buffer(), async_op=True).get_future()
    return future.then(lambda done: done.value()[0] / comm.get_world_size())


class Losses(nn.Module):
    """A weight per loss."""

    def __init__(self):
        super().__init__()
        self.a, self.b = (nn.Parameter(torch.tensor(x)) for x in (1.0, 2.0))

    def forward(self, batch: list[dict]) -> dict[str, torch.Tensor]:
        x = batch[0]["image"]
        return {"loss_a": self.a * x, "loss_b": self.b / x}


def weights_of(model: nn.Module) -> list[float]:
    return [x.item() for x in model.parameters()]


def scalars_of(trainer: SimpleTrainer) -> dict[str, float]:
    with EventStorage(trainer.iter) as trainer.storage:
        trainer.run_step()
        return {name: x for name, (x, _) in trainer.storage.latest().items()}


def steps_of_processes(seen: dict) -> None:
    """What a step writes, agrees on and refuses; every process has data of its own."""
    rank = comm.get_rank()
    data = [[{"image": torch.tensor(x)}] for x in (1.0 + rank, 3.0 + rank, 1.0 if rank else 0.0)]
    for kind in (SimpleTrainer, StepTrainer):
        model = distribute(Losses())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        trainer = kind(model, data, optimizer)
        with pytest.MonkeyPatch.context() as patch:
            all_reduce = mock.Mock(wraps=dist.all_reduce)
            patch.setattr(dist, "all_reduce", all_reduce)
            seen[kind.__name__, "scalars"] = scalars_of(trainer)
        seen[kind.__name__, "weights"] = weights_of(model)
    seen["collectives"], seen["no signal"] = all_reduce.call_count, trainer.stop_signal
    trainer.requested_stop = 10 + rank
    scalars_of(trainer)
    seen["signal"] = trainer.stop_signal
    before = weights_of(model)
    with pytest.raises((BadLoss, SystemExit)):
        scalars_of(trainer)  # 2 / 0 in the first process
    seen["unchanged"] = before == weights_of(model)


@closed_process_group()
def in_one_of_the_processes(folder: str) -> None:
    torch.set_num_threads(1)
    seen = {"errors": errors_of_processes()}
    steps_of_processes(seen)
    torch.save(seen, Path(folder, f"{comm.get_rank()}.pth"))


@pytest.fixture(
    scope="module",
    params=[2, pytest.param(4, marks=pytest.mark.slow)],
    ids=lambda n: f"{n} processes",
)
def seen(request, tmp_path_factory) -> list[dict]:
    """What each process saw."""
    folder = tmp_path_factory.mktemp("parallel")
    launch(in_one_of_the_processes, request.param, dist_url="auto", args=(str(folder),))
    return [torch.load(folder / f"{rank}.pth") for rank in range(request.param)]


@needs_cpu_processes
def test_processes_and_micro_batches_give_what_one_process_gives(seen):
    for (dtype, normalizer, number), (worst, together, *_) in seen[0]["errors"].items():
        print(f"{len(seen)} processes, {number} micro-batches, {normalizer}, {dtype}:", end=" ")
        print(f"worst tensor {worst:.1e}, all {together:.1e}")
        if normalizer in ("global", "image"):
            assert worst < 1e-12 if dtype == torch.float64 else together < 1e-6
        else:
            # Each process divides by its own positives, and pads to its own largest image.
            assert worst > 0.1 and together > 0.1


@needs_cpu_processes
def test_processes_synchronise_once_a_step(seen):
    for *_, num_buckets, num_synchronised in seen[0]["errors"].values():
        assert num_buckets == num_synchronised > 0


@needs_cpu_processes
def test_a_step_writes_and_does_what_detectron2s_does(seen):
    for process in seen:
        expected, found = (process[x, "scalars"] for x in ("SimpleTrainer", "StepTrainer"))
        assert expected.keys() == found.keys()
        for name in expected:
            if not name.endswith("data_time"):
                assert found[name] == pytest.approx(expected[name], rel=1e-6)
        assert process["StepTrainer", "weights"] == process["SimpleTrainer", "weights"]


@needs_cpu_processes
def test_processes_agree_on_a_stop_in_one_collective(seen):
    for process in seen:
        assert process["collectives"] == 1
        assert process["no signal"] == 0
        assert process["signal"] == 10 + len(seen) - 1


@needs_cpu_processes
def test_a_loss_that_is_not_finite_stops_every_process_before_the_weights_change(seen):
    for process in seen:
        assert process["unchanged"]
