"""Gradient accumulation that gives the gradients of the whole batch.

The losses are divided by the positives of all images of a step, and all images are padded to one
size. Both are known before any of the network runs, since labels need only boxes and image sizes.
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


def accumulate_gradients(
    model: nn.Module,
    batched_inputs: list[dict],
    num_micro_batches: int,
    backward: Callable[[Tensor], None] = Tensor.backward,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
) -> dict[str, Tensor]:
    """Add the gradients of a batch, a micro-batch at a time; processes synchronise at the last.

    Args:
        model: in training mode, distributed or not; a `FocalRetinaNet`, or with one micro-batch any
            model that returns its losses.
        batched_inputs: of this process; the last micro-batch is smaller where they do not divide.
        num_micro_batches: at least 1.
        backward: takes a micro-batch's sum of losses.
        autocast: makes the context of each forward pass; backward runs outside it.
    Returns:
        The losses of the batch, without gradients.
    """
    size = math.ceil(len(batched_inputs) / num_micro_batches)
    micro_batches = [batched_inputs[i : i + size] for i in range(0, len(batched_inputs), size)]
    inputs = [(micro_batch,) for micro_batch in micro_batches]
    detector = model.module if isinstance(model, DistributedDataParallel) else model
    if len(inputs) > 1:
        padded_size = detector.padded_size(batched_inputs)
        positives = [detector.count_positives(x, padded_size) for x in micro_batches]
        normalizers = detector.criterion.normalizers(torch.cat(positives)).split(size)
        inputs = [(x, y, padded_size) for x, y in zip(micro_batches, normalizers, strict=True)]
    total: dict[str, Tensor] = {}
    for i, arguments in enumerate(inputs, 1):
        with nullcontext() if i == len(inputs) or model is detector else model.no_sync():
            with autocast():
                losses = model(*arguments)
                if isinstance(losses, Tensor):
                    losses = {"total_loss": losses}
            backward(sum(losses.values()))
        for name, loss in losses.items():
            total[name] = total[name] + loss.detach() if name in total else loss.detach()
    return total
