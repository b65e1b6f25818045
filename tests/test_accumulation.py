"""Laws of gradient accumulation: micro-batches give what the whole batch gives."""

from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from conftest import pictures
from detectron2.config import CfgNode
from detectron2.engine import HookBase, launch
from detectron2.modeling import build_model
from detectron2.utils import comm
from test_processes import distance, needs_cpu_processes, step, tiny_cfg, tiny_model

from retina_focal import NORMALIZER_REGISTRY
from retina_focal.errors import UserError
from retina_focal.training.accumulation import (
    AccumulatingAMPTrainer,
    AccumulatingTrainer,
    accumulate_gradients,
    training_steps,
)
from retina_focal.training.processes import closed_process_group, distribute

# One size, as different sizes pad differently; one image without a box.
SIZES, NUM_BOXES = [(64, 96)] * 4, [5, 0, 2, 9]


def accumulated(model, batch, num_micro_batches):
    """The loss and, by name, the gradients."""
    losses = accumulate_gradients(model, batch, num_micro_batches, lambda loss: loss.backward())
    gradients = {name.removeprefix("module."): p.grad for name, p in model.named_parameters()}
    assert not any(loss.requires_grad for loss in losses.values())
    return float(sum(losses.values())), gradients


@pytest.mark.parametrize("num_micro_batches", [2, 4])
@pytest.mark.parametrize("normalizer", [name for name, _ in NORMALIZER_REGISTRY])
def test_loss_and_gradient_are_the_whole_batchs(normalizer, num_micro_batches):
    batch = pictures(SIZES, NUM_BOXES)
    whole, split = (tiny_model(normalizer=normalizer).train() for _ in range(2))
    loss, gradients = step(whole, batch)
    split_loss, split_gradients = accumulated(split, batch, num_micro_batches)
    assert split_loss == pytest.approx(loss, rel=1e-6)
    # fp32 sums over the images in another order.
    assert distance(gradients, split_gradients) < 5e-6


def test_the_moving_average_moves_once_a_step():
    batch = pictures(SIZES, NUM_BOXES)
    whole, split = (tiny_model(normalizer="ema").train() for _ in range(2))
    step(whole, batch)
    accumulated(split, batch, 4)
    assert whole.criterion.loss_normalizer != 100
    assert torch.equal(whole.criterion.loss_normalizer, split.criterion.loss_normalizer)


def test_positives_are_counted_as_the_training_step_finds_them():
    model = tiny_model().train()
    seen = []
    model.criterion.register_forward_pre_hook(lambda module, args: seen.append(args[3]))
    # 72x90 is padded to 96x96.
    for sizes in (SIZES, [(72, 90), (64, 64), (50, 96), (32, 33)]):
        batch = pictures(sizes, NUM_BOXES)
        counts = model.count_positives(batch)
        model(batch)
        labels = seen.pop()
        assert counts.tolist() == ((labels >= 0) & (labels < model.num_classes)).sum(1).tolist()
        assert counts.sum() > 0


@closed_process_group()
def in_one_of_two_processes(folder: str) -> None:
    """Two micro-batches of one image in each process."""
    rank = comm.get_rank()
    model = distribute(tiny_model(normalizer="global").train())
    mine = pictures(SIZES, NUM_BOXES)[2 * rank : 2 * rank + 2]
    synchronised = []
    model.register_comm_hook(None, lambda _, bucket: _average(bucket, synchronised))
    torch.save((accumulated(model, mine, 2), len(synchronised)), Path(folder, f"{rank}.pth"))


def _average(bucket, synchronised):
    synchronised.append(bucket.index())
    future = torch.distributed.all_reduce(bucket.buffer(), async_op=True).get_future()
    return future.then(lambda done: done.value()[0] / 2)


@needs_cpu_processes
def test_processes_synchronise_once_and_give_what_one_process_gives(tmp_path):
    launch(in_one_of_two_processes, 2, dist_url="auto", args=(str(tmp_path),))
    loss, gradients = step(tiny_model(normalizer="global").train(), pictures(SIZES, NUM_BOXES))
    results = [torch.load(tmp_path / f"{rank}.pth") for rank in (0, 1)]
    assert sum(split_loss for (split_loss, _), _ in results) / 2 == pytest.approx(loss, rel=1e-6)
    for (_, split_gradients), num_synchronised in results:
        # 1e-5: fp32 in another order.
        assert distance(gradients, split_gradients) < 1e-5
        assert num_synchronised == 1  # one bucket, in the last micro-batch


def trained(batch, num_micro_batches):
    """Weights after two steps of the optimizer through the trainer's steps."""
    model = tiny_model(normalizer="image")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    trainer = AccumulatingTrainer(
        model, [batch] * 2, optimizer, num_micro_batches=num_micro_batches
    )
    trainer.train(0, 2)
    return model.state_dict()


def test_the_trainer_steps_once_for_all_micro_batches():
    batch = pictures(SIZES, NUM_BOXES)
    whole, split = trained(batch, 1), trained(batch, 4)
    for name, weight in whole.items():
        torch.testing.assert_close(split[name], weight, rtol=1e-4, atol=1e-6)


class Recorder(HookBase):
    """What a hook sees of each step."""

    def __init__(self):
        self.seen = []

    def after_backward(self):
        parameters = list(self.trainer.model.parameters())
        self.seen.append(("after_backward", all(p.grad is not None for p in parameters)))

    def after_step(self):
        losses = {name: x for name, (x, _) in self.trainer.storage.latest().items()}
        self.seen.append(("after_step", losses))


def test_hooks_and_metrics_see_one_step_with_the_losses_of_the_whole_batch():
    batch = pictures(SIZES, NUM_BOXES)
    seen = []
    for num_micro_batches in (1, 4):
        model = tiny_model(normalizer="image")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        trainer = AccumulatingTrainer(
            model, [batch], optimizer, num_micro_batches=num_micro_batches
        )
        recorder = Recorder()
        trainer.register_hooks([recorder])
        trainer.train(0, 1)
        (name, complete), (_, losses) = recorder.seen
        assert name == "after_backward" and complete
        seen.append(losses)
    for name in ("loss_cls", "loss_box_reg", "total_loss"):
        assert seen[1][name] == pytest.approx(seen[0][name], rel=1e-6)
    assert seen[1]["data_time"] >= 0


def test_mixed_precision_scales_outside_autocast_and_updates_the_scale_after_each_step(monkeypatch):
    calls, inside, real = [], [], torch.autocast

    @contextmanager
    def cuda_autocast(dtype):
        inside.append(dtype)
        yield
        inside.pop()

    def autocast(device, dtype, *options):
        return cuda_autocast(dtype) if device == "cuda" else real(device, dtype, *options)

    class Scaled:
        def __init__(self, loss):
            self.loss = loss

        def backward(self):
            calls.append(f"backward {'inside' if inside else 'outside'} autocast")
            (8 * self.loss).backward()

    class Scaler:
        scale = staticmethod(Scaled)

        def step(self, optimizer):
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad /= 8
            calls.append("step")
            optimizer.step()

        def update(self):
            calls.append("update")

    batch = pictures(SIZES, NUM_BOXES)
    model = tiny_model(normalizer="image")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    trainer = AccumulatingAMPTrainer(model, [batch] * 2, optimizer, num_micro_batches=2)
    trainer.grad_scaler = Scaler()
    forward = model.forward
    model.forward = lambda *args: calls.append(f"forward in {inside}") or forward(*args)
    monkeypatch.setattr(torch, "autocast", autocast)
    trainer.train(0, 2)
    micro_batch = ["forward in [torch.float16]", "backward outside autocast"]
    assert calls == 2 * [*micro_batch, *micro_batch, "step", "update"]
    for name, weight in trained(batch, 1).items():
        torch.testing.assert_close(model.state_dict()[name], weight, rtol=1e-4, atol=1e-6)


def step_cfg(**keys: object) -> CfgNode:
    return tiny_cfg(**{"SOLVER.IMS_PER_BATCH": 4, "MODEL.RETINA_FOCAL.ACCUMULATE_STEPS": 2, **keys})


@pytest.mark.parametrize(
    "keys, message",
    [
        (
            {"MODEL.RETINA_FOCAL.ACCUMULATE_STEPS": 3},
            r"ACCUMULATE_STEPS is 3, but a process has 4 images a step.*to a divisor of 4",
        ),
        ({"MODEL.RETINA_FOCAL.ACCUMULATE_STEPS": 0}, "ACCUMULATE_STEPS is 0"),
        ({"MODEL.META_ARCHITECTURE": "RetinaNet"}, "RetinaNet cannot count its positives"),
        ({"MODEL.RETINA_FOCAL.OHEM.ENABLED": True}, r"OHEM\.ENABLED weighs.*whole batch"),
        ({"MODEL.RETINA_FOCAL.ALPHA_FROM_DATA": True}, r"ALPHA_FROM_DATA weighs.*whole batch"),
    ],
)
def test_what_does_not_fit_is_refused_in_words(keys, message):
    cfg = step_cfg(**keys)
    with pytest.raises(UserError, match=message):
        training_steps(cfg, build_model(cfg))


def test_a_process_splits_its_own_part_of_the_batch(monkeypatch):
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    assert training_steps(step_cfg(), tiny_model()).keywords == {"num_micro_batches": 2}
    cfg = step_cfg(**{"MODEL.RETINA_FOCAL.ACCUMULATE_STEPS": 4})
    with pytest.raises(UserError, match=r"a process has 2 images a step \(4 for 2 processes\)"):
        training_steps(cfg, tiny_model())


def test_a_loaders_last_batch_may_be_smaller():
    batch = pictures(SIZES, NUM_BOXES)[:3]
    loss, gradients = step(tiny_model(normalizer="image").train(), batch)
    for num_micro_batches in (2, 4):
        split = accumulated(tiny_model(normalizer="image").train(), batch, num_micro_batches)
        assert split[0] == pytest.approx(loss, rel=1e-6)
        assert distance(gradients, split[1]) < 5e-6
