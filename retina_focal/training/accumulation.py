"""Gradient accumulation that equals the big batch: detectron2's training steps in micro-batches.

The losses are divided by the positives of all images of a step. Those are known before any of the
network runs, since labels need only boxes and image sizes.
"""

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from detectron2.config import CfgNode
from detectron2.engine import AMPTrainer, SimpleTrainer
from detectron2.utils import comm
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from retina_focal.config import retina_focal_node
from retina_focal.errors import UserError
from retina_focal.retinanet import FocalRetinaNet


def training_steps(cfg: CfgNode, model: nn.Module) -> Callable[..., SimpleTrainer]:
    """What makes the object that runs the steps, from model, data loader and optimizer.

    Args:
        cfg: of `assembly.plain_values`.
        model: not distributed yet.
    Raises:
        UserError: micro-batches would not give what the whole batch gives.
    """
    amp, num_micro_batches = cfg.SOLVER.AMP.ENABLED, retina_focal_node(cfg).ACCUMULATE_STEPS
    if num_micro_batches == 1:
        return AMPTrainer if amp else SimpleTrainer
    images, reason = cfg.SOLVER.IMS_PER_BATCH // comm.get_world_size(), None
    if num_micro_batches < 1 or images % num_micro_batches:
        reason = (
            f"a process has {images} images a step ({cfg.SOLVER.IMS_PER_BATCH} for "
            f"{comm.get_world_size()} processes); set it to a divisor of {images}"
        )
    elif not isinstance(model, FocalRetinaNet):
        reason = (
            f"{type(model).__name__} cannot count its positives beforehand; set it to 1, or "
            "MODEL.META_ARCHITECTURE to FocalRetinaNet"
        )
    elif model.criterion.sampler is not None or model.criterion.alpha_from_data:
        key = "ALPHA_FROM_DATA" if model.criterion.sampler is None else "OHEM.ENABLED"
        reason = (
            f"MODEL.RETINA_FOCAL.{key} weighs by numbers of the whole batch, which a micro-batch "
            f"lacks; set it to 1, or {key} to False"
        )
    if reason:
        raise UserError(
            f"MODEL.RETINA_FOCAL.ACCUMULATE_STEPS is {num_micro_batches}, but {reason} (in a "
            "LazyConfig: train.retina_focal.accumulate_steps)"
        )
    steps = AccumulatingAMPTrainer if amp else AccumulatingTrainer
    return partial(steps, num_micro_batches=num_micro_batches)


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
        batched_inputs: of this process; the last micro-batch is smaller where they do not divide.
        backward: takes a micro-batch's sum of losses.
        autocast: makes the context of each forward pass; backward runs outside it.
    Returns:
        The losses of the batch, without gradients.
    """
    detector = model.module if isinstance(model, DistributedDataParallel) else model
    size = math.ceil(len(batched_inputs) / num_micro_batches)
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
