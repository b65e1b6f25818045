"""The steps of a training: gradients, one look at the losses of all processes, the optimizer."""

import time
from collections.abc import Callable, Iterable
from functools import partial

import torch
import torch.distributed as dist
from detectron2.config import CfgNode
from detectron2.engine import SimpleTrainer
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer

from retina_focal.config import retina_focal_node
from retina_focal.errors import UserError
from retina_focal.retinanet import FocalRetinaNet
from retina_focal.training.accumulation import accumulate_gradients
from retina_focal.training.trouble import stop_for_bad_loss


class StepTrainer(SimpleTrainer):
    """`SimpleTrainer` and `AMPTrainer` in one, for one or several micro-batches.

    Each step copies one tensor to the host, after backward and before the weights change: the
    losses of all processes, with what else the processes must agree on. Checkpoints and metrics are
    those of detectron2's classes.

    Attributes:
        batch: what the loader gave this process in the last step.
        requested_stop: a signal number; a signal handler sets it. 0: none.
        stop_signal: the largest `requested_stop` of all processes, as of the last step.
        num_skipped: pictures that could not be used in the last step, of all processes.
    """

    def __init__(
        self,
        model: nn.Module,
        data_loader: Iterable[list[dict]],
        optimizer: Optimizer,
        *,
        num_micro_batches: int = 1,
        grad_scaler: GradScaler | None = None,
    ):
        """
        Args:
            model: returns its losses; a `FocalRetinaNet` where there are several micro-batches;
                distributed or not.
            data_loader: gives this process's batch of each step.
            optimizer: of the model's parameters.
            num_micro_batches: parts that a batch is split into, to save memory.
            grad_scaler: makes the steps those of `AMPTrainer`, in fp16 on a GPU.
        """
        super().__init__(model, data_loader, optimizer)
        self.num_micro_batches = num_micro_batches
        self.grad_scaler = grad_scaler
        self.batch: list[dict] = []
        self.requested_stop = self.stop_signal = self.num_skipped = 0

    def run_step(self) -> None:
        assert self.model.training, "the model was changed to eval mode"
        start = time.perf_counter()
        self.batch = next(self._data_loader_iter)
        data_time = time.perf_counter() - start
        self.optimizer.zero_grad()
        losses = self._add_gradients()
        self.after_backward()
        self._share(losses, data_time)
        if self.grad_scaler is None:
            self.optimizer.step()
        else:  # which leaves out the step where a gradient is not finite
            self.grad_scaler.step(self.optimizer)
            self.grad_scaler.update()

    def _add_gradients(self) -> dict[str, Tensor]:
        run = partial(accumulate_gradients, self.model, self.batch, self.num_micro_batches)
        if self.grad_scaler is None:
            return run(Tensor.backward)
        return run(
            lambda loss: self.grad_scaler.scale(loss).backward(),
            partial(torch.autocast, "cuda", torch.float16),
        )

    def _share(self, losses: dict[str, Tensor], data_time: float) -> None:
        """Write the metrics of all processes; stop all where a loss of one is not finite."""
        own = torch.stack(list(losses.values())).double()
        num_skipped = sum(len(sample.get("skipped", ())) for sample in self.batch)
        rows = own.new_zeros(comm.get_world_size(), len(own) + 3)  # a row per process
        row = rows[comm.get_rank()]
        row[:-3] = own
        # Numbers of the host, without a copy to the device.
        for place, number in ((-3, data_time), (-2, num_skipped), (-1, self.requested_stop)):
            if number:
                row[place].fill_(number)
        if len(rows) > 1:
            dist.all_reduce(rows)
        rows = rows.cpu()
        values, (data_times, skipped, stops) = rows[:, :-3], rows[:, -3:].T
        means = dict(zip(losses, values.mean(0).tolist(), strict=True))
        bad = (~values.isfinite().all(1)).nonzero().flatten().tolist()
        if bad:
            stop_for_bad_loss(self, means, self.iter, bad)
        self.stop_signal, self.num_skipped = int(stops.max()), int(skipped.sum())
        storage = get_event_storage()
        storage.put_scalar("rank_data_time", data_time)
        if comm.is_main_process():
            scalars = {"data_time": data_times.max().item(), "total_loss": sum(means.values())}
            storage.put_scalars(**{**means, **scalars})

    def state_dict(self) -> dict:
        state = super().state_dict()
        if self.grad_scaler is not None:
            state["grad_scaler"] = self.grad_scaler.state_dict()
        return state

    def load_state_dict(self, state_dict: dict) -> None:
        super().load_state_dict(state_dict)
        # A run that was begun without AMP has no scale, and starts with a new one.
        if self.grad_scaler is not None and "grad_scaler" in state_dict:
            self.grad_scaler.load_state_dict(state_dict["grad_scaler"])


def training_steps(cfg: CfgNode, model: nn.Module) -> Callable[..., StepTrainer]:
    """What makes the object that runs the steps, from model, data loader and optimizer.

    Args:
        cfg: of `assembly.plain_values`.
        model: not distributed yet.
    Raises:
        UserError: AMP without a GPU, or micro-batches that would not give what the whole batch
            gives.
    """
    num_micro_batches = retina_focal_node(cfg).ACCUMULATE_STEPS
    if num_micro_batches != 1:
        _check_micro_batches(cfg, model, num_micro_batches)
    grad_scaler = None
    if cfg.SOLVER.AMP.ENABLED:
        device = next(model.parameters()).device.type
        if device != "cuda":
            raise UserError(
                f"SOLVER.AMP.ENABLED is True, which trains in fp16 on a GPU, but the model is on "
                f"'{device}'; type SOLVER.AMP.ENABLED False MODEL.RETINA_FOCAL.PRECISION bf16 (in "
                "a LazyConfig: train.amp.enabled=False model.precision=bf16)"
            )
        grad_scaler = GradScaler("cuda")
    return partial(StepTrainer, num_micro_batches=num_micro_batches, grad_scaler=grad_scaler)


def _check_micro_batches(cfg: CfgNode, model: nn.Module, num_micro_batches: int) -> None:
    images, reason = cfg.SOLVER.IMS_PER_BATCH // comm.get_world_size(), None
    if num_micro_batches < 1 or images % num_micro_batches:
        reason = (
            f"a process has {images} images per step ({cfg.SOLVER.IMS_PER_BATCH} for "
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
