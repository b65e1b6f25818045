"""Gradient accumulation that equals the big batch: detectron2's training steps in micro-batches.

The losses are divided by the positives of all images of a step. Those are known before any of the
network runs, since labels need only boxes and image sizes.
"""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from detectron2.engine import AMPTrainer, SimpleTrainer
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


class AccumulatingTrainer(SimpleTrainer):
    """`SimpleTrainer` that splits the loader's batch into micro-batches, for their memory alone."""

    def __init__(self, model: nn.Module, data_loader, optimizer, *, num_micro_batches: int):
        """
        Args:
            model: a `FocalRetinaNet`, distributed or not.
            data_loader, optimizer: as of `SimpleTrainer`.
            num_micro_batches: divides the batch of this process.
        """
        super().__init__(model, data_loader, optimizer)
        self.num_micro_batches = num_micro_batches

    def run_step(self) -> None:
        _run_micro_batches(self, Tensor.backward)
        self.optimizer.step()


class AccumulatingAMPTrainer(AMPTrainer):
    """`AMPTrainer` that does the same."""

    def __init__(self, model: nn.Module, data_loader, optimizer, *, num_micro_batches: int):
        super().__init__(model, data_loader, optimizer)
        self.num_micro_batches = num_micro_batches

    def run_step(self) -> None:
        _run_micro_batches(
            self,
            lambda loss: self.grad_scaler.scale(loss).backward(),
            partial(torch.autocast, "cuda", self.precision),
        )
        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()


def _run_micro_batches(
    trainer: SimpleTrainer,
    backward: Callable[[Tensor], None],
    autocast: Callable[[], AbstractContextManager] = nullcontext,
) -> None:
    """A step up to the optimizer's: gradients and metrics of the whole batch."""
    start = time.perf_counter()
    data = next(trainer._data_loader_iter)
    data_time = time.perf_counter() - start
    trainer.optimizer.zero_grad()
    losses = accumulate_gradients(
        trainer.model, data, trainer.num_micro_batches, backward, autocast
    )
    trainer.after_backward()
    trainer._write_metrics(losses, data_time)


def accumulate_gradients(
    model: nn.Module,
    batched_inputs: list[dict],
    num_micro_batches: int,
    backward: Callable[[Tensor], None],
    autocast: Callable[[], AbstractContextManager] = nullcontext,
) -> dict[str, Tensor]:
    """Add the gradients of a batch, a micro-batch at a time; processes synchronise at the last.

    Args:
        model: a `FocalRetinaNet` in training mode, distributed or not.
        batched_inputs: of this process; `num_micro_batches` divides their number.
        backward: takes a micro-batch's sum of losses.
        autocast: makes the context of each forward pass; backward runs outside it.
    Returns:
        The losses of the batch, without gradients.
    """
    detector = model.module if isinstance(model, DistributedDataParallel) else model
    size = len(batched_inputs) // num_micro_batches
    micro_batches = [batched_inputs[i : i + size] for i in range(0, len(batched_inputs), size)]
    positives = [detector.count_positives(micro_batch) for micro_batch in micro_batches]
    normalizers = detector.criterion.normalizers(torch.cat(positives)).split(size)
    total: dict[str, Tensor] = {}
    for i, micro_batch in enumerate(micro_batches):
        last = i == len(micro_batches) - 1
        with nullcontext() if last or model is detector else model.no_sync():
            with autocast():
                losses = model(micro_batch, normalizers[i])
            backward(sum(losses.values()))
        for name, loss in losses.items():
            total[name] = total.get(name, 0) + loss.detach()
    return total
