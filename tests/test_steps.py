"""Laws of a training's steps: what they write, save and refuse, and what the processes agree on."""

from contextlib import contextmanager

import pytest
import torch
from conftest import pictures
from detectron2.config import CfgNode
from detectron2.engine import HookBase, SimpleTrainer
from detectron2.modeling import build_model
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from pretend import Counting, to_device
from test_processes import tiny_cfg, tiny_model
from torch import nn

from retina_focal.errors import UserError
from retina_focal.training.steps import StepTrainer, training_steps

# One size, as different sizes pad differently; one image without a box.
SIZES, NUM_BOXES = [(64, 96)] * 4, [5, 0, 2, 9]


def trained(batch, num_micro_batches):
    """Weights after two steps of the optimizer through the trainer's steps."""
    model = tiny_model(normalizer="image")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    trainer = StepTrainer(model, [batch] * 2, optimizer, num_micro_batches=num_micro_batches)
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
        trainer = StepTrainer(model, [batch], optimizer, num_micro_batches=num_micro_batches)
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
    trainer = StepTrainer(model, [batch] * 2, optimizer, num_micro_batches=2, grad_scaler=Scaler())
    forward = model.forward
    model.forward = lambda *args: calls.append(f"forward in {inside}") or forward(*args)
    monkeypatch.setattr(torch, "autocast", autocast)
    recorder = Recorder()
    trainer.register_hooks([recorder])
    trainer.train(0, 2)
    micro_batch = ["forward in [torch.float16]", "backward outside autocast"]
    assert calls == 2 * [*micro_batch, *micro_batch, "step", "update"]
    assert recorder.seen[0::2] == 2 * [("after_backward", True)]
    assert all(losses["total_loss"] > 0 for _, losses in recorder.seen[1::2])
    for name, weight in trained(batch, 1).items():
        torch.testing.assert_close(model.state_dict()[name], weight, rtol=1e-4, atol=1e-6)


class FourLosses(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, batch: list[dict]) -> dict[str, torch.Tensor]:
        return {f"loss_{i}": x for i, x in enumerate(self.weight.unbind())}


def test_the_host_waits_once_for_the_metrics_of_a_step():
    waits = {}
    for kind in (SimpleTrainer, StepTrainer):
        model = to_device(FourLosses())
        trainer = kind(model, [[{}]], torch.optim.SGD(model.parameters(), lr=0.1, foreach=False))
        with EventStorage() as trainer.storage, Counting() as counting:
            trainer.run_step()
        waits[kind] = sum(counting.waits.values())
        assert not counting.copies
    assert waits == {SimpleTrainer: 4, StepTrainer: 1}


def step_cfg(**keys: object) -> CfgNode:
    return tiny_cfg(**{"SOLVER.IMS_PER_BATCH": 4, "MODEL.RETINA_FOCAL.ACCUMULATE_STEPS": 2, **keys})


@pytest.mark.parametrize(
    "keys, message",
    [
        (
            {"MODEL.RETINA_FOCAL.ACCUMULATE_STEPS": 3},
            r"ACCUMULATE_STEPS is 3, but a process has 4 images per step.*to a divisor of 4",
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
    assert training_steps(step_cfg(), tiny_model()).keywords["num_micro_batches"] == 2
    cfg = step_cfg(**{"MODEL.RETINA_FOCAL.ACCUMULATE_STEPS": 4})
    with pytest.raises(UserError, match=r"a process has 2 images per step \(4 for 2 processes\)"):
        training_steps(cfg, tiny_model())
