"""A moving average of the weights, to be evaluated and deployed in place of the last ones."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from detectron2.config import CfgNode
from detectron2.engine import HookBase
from torch import Tensor, nn

from retina_focal.errors import UserError


class WeightAverage(HookBase):
    """W <- d_t W + (1 - d_t) w after step t = 0, 1, ..., with d_t = min(decay, (1 + t) / (10 + t)).

    w are the parameters that are trained; all else, buffers included, is the model's own. W begins
    as the weights that the run starts from. A step is one of the optimizer, whatever the number of
    micro-batches; one that fp16's loss scaling leaves out counts too. The hook stands before those
    that save and evaluate, in every process.
    """

    def __init__(self, model: nn.Module, decay: float):
        """
        Args:
            model: not distributed.
            decay: in (0, 1).
        """
        self.decay, self.num_updates = decay, 0
        self._parameters = {k: x for k, x in model.named_parameters() if x.requires_grad}
        self._averages: dict[str, Tensor] = {}

    def before_train(self) -> None:
        if not self._averages:
            self._averages = {k: x.detach().clone() for k, x in self._parameters.items()}

    @torch.no_grad()
    def after_step(self) -> None:
        t = self.num_updates
        weight = 1 - min(self.decay, (1 + t) / (10 + t))
        for name, average in self._averages.items():
            average.lerp_(self._parameters[name], weight)
        self.num_updates += 1

    def averaged(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A `state_dict` of the model, with the averages in their places."""
        return {**weights, **self._averages}

    def start_from(self, weights: Mapping[str, Tensor]) -> None:
        """Take the averages of `averaged`; what they lack begins as the model has it now."""
        self._averages = {
            name: weights.get(name, own).detach().to(own, copy=True)
            for name, own in self._parameters.items()
        }

    @contextmanager
    def in_the_model(self) -> Iterator[None]:
        """In the block the model has the averages; behind it, its own weights, to the last bit."""
        own = {name: x.detach().clone() for name, x in self._parameters.items()}
        self._copy(self._averages)
        try:
            yield
        finally:
            self._copy(own)

    @torch.no_grad()
    def _copy(self, values: Mapping[str, Tensor]) -> None:
        for name, value in values.items():
            self._parameters[name].copy_(value)

    def state_dict(self) -> dict:
        return {"num_updates": self.num_updates}  # the averages are the checkpoint's `model`

    def load_state_dict(self, state_dict: dict) -> None:
        self.num_updates = state_dict["num_updates"]


def averaged_weights(average: WeightAverage | None) -> AbstractContextManager:
    """`in_the_model` of an average, where there is one."""
    return nullcontext() if average is None else average.in_the_model()


def weight_average(train: CfgNode, model: nn.Module) -> WeightAverage | None:
    """What ``MODEL.RETINA_FOCAL.TRAIN.EMA`` asks for.

    Raises:
        UserError: a decay outside [0, 1).
    """
    if not 0 <= train.EMA < 1:
        raise UserError(
            f"MODEL.RETINA_FOCAL.TRAIN.EMA is {train.EMA}; expected a decay from 0 (no average) to "
            "below 1, such as 0.999"
        )
    return WeightAverage(model, train.EMA) if train.EMA else None
