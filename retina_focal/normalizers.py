"""What the loss sums are divided by, by ``MODEL.RETINA_FOCAL.NORMALIZER``."""

import torch
from detectron2.utils import comm
from fvcore.common.registry import Registry
from torch import Tensor, distributed

NORMALIZER_REGISTRY = Registry("NORMALIZER")
NORMALIZER_REGISTRY.__doc__ = """
Functions of two arguments: the number of positive anchors of each image of this process's step,
(N,) integers, and the criterion's state. They return what the loss sums of each image are divided
by, (N,) floats above 0. The state is None unless the function has an attribute `start`: then it is
the fp32 scalar buffer `loss_normalizer`, which starts there; the function changes it in place.

Where the function has a true attribute `one_step_of_all_processes`, the mean over processes is what
one process gives with all of their images: all are then padded to one size.
"""

# detectron2's moving average: N <- 0.9 N + 0.1 max(P, 1), from N = 100.
EMA_MOMENTUM = 0.9


@NORMALIZER_REGISTRY.register()
def ema(num_positives: Tensor, state: Tensor) -> Tensor:
    """Moving average of the positives of this process."""
    # PreciseBN runs forwards in training mode without gradients: those are no steps.
    if torch.is_grad_enabled():
        total = num_positives.sum().clamp(min=1)
        state.mul_(EMA_MOMENTUM).add_((1 - EMA_MOMENTUM) * total)
    return state.clone().expand(len(num_positives))


ema.start = 100.0


@NORMALIZER_REGISTRY.register()
def image(num_positives: Tensor, state: None) -> Tensor:
    """The positives of each image, then the mean over images (Sec. 4.1, "Focal Loss")."""
    return num_positives.clamp(min=1).float() * len(num_positives)


image.one_step_of_all_processes = True


@NORMALIZER_REGISTRY.register()
def batch(num_positives: Tensor, state: None) -> Tensor:
    """The positives of this process, at least 1."""
    return num_positives.sum().clamp(min=1).float().expand(len(num_positives))


def all_processes(num_positives: Tensor, state: None) -> Tensor:
    """The positives of all W processes, at least 1, over W: what one process would divide by."""
    total = num_positives.sum().double()  # a third of it is not the same in fp32
    if comm.get_world_size() > 1:
        distributed.all_reduce(total)
    return (total.clamp(min=1) / comm.get_world_size()).expand(len(num_positives))


all_processes.one_step_of_all_processes = True
all_processes.__name__ = "global"  # a keyword of Python
NORMALIZER_REGISTRY.register(all_processes)
