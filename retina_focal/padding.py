"""The size that the images of a training step are padded to.

Padding is background for the loss and a part of the maps for group norm. So where several
micro-batches or processes make one step, all of their images are padded to one size: detectron2's,
of one process with all of the images.
"""

from collections.abc import Mapping, Sequence

import torch
from detectron2.utils import comm


def size_of_step(
    image_sizes: Sequence[tuple[int, int]],
    size_divisibility: int,
    padding_constraints: Mapping[str, int] | None,
    of_all_processes: bool,
) -> tuple[int, int]:
    """Padded height and width: what `ImageList.from_tensors` gives for all images of the step.

    Args:
        image_sizes: (height, width) of each image of this process's step.
        size_divisibility, padding_constraints: of detectron2's `Backbone`.
        of_all_processes: whether the processes exchange their sizes, host to host; then every
            process must call this.
    """
    constraints = padding_constraints or {}
    square = constraints.get("square_size", 0)
    stride = max(1, constraints.get("size_divisibility", size_divisibility))
    size = (square, square) if square > 0 else map(max, zip(*image_sizes, strict=True))
    size = tuple(-(-length // stride) * stride for length in size)
    # PreciseBN runs forwards in training mode without gradients: those are no steps.
    if of_all_processes and torch.is_grad_enabled():
        size = tuple(max(x) for x in zip(*comm.all_gather(size), strict=True))
    return size
