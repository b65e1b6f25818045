"""The size that the images of a training step are padded to.

Padding is background for the loss and a part of the maps for group norm. So where several
micro-batches or processes make one step, all of their images are padded to one size: detectron2's,
of one process with all of the images.
"""

from collections.abc import Sequence

import torch
from detectron2.structures import ImageList
from detectron2.utils import comm


def size_of_step(
    image_sizes: Sequence[tuple[int, int]], of_all_processes: bool, **padding: object
) -> tuple[int, int]:
    """Padded height and width.

    Args:
        image_sizes: (height, width) of each image of this process's step.
        of_all_processes: their hosts exchange their sizes, for which no device waits; every process
            must call this.
        padding: options of `ImageList.from_tensors`.
    """
    images = [torch.empty(0, *size) for size in image_sizes]  # no channel, no cost
    size = tuple(ImageList.from_tensors(images, **padding).tensor.shape[-2:])
    # PreciseBN runs forwards in training mode without gradients: those are no steps.
    if of_all_processes and torch.is_grad_enabled():
        size = tuple(max(x) for x in zip(*comm.all_gather(size), strict=True))
    return size
