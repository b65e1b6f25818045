"""Which images a step sees and which random numbers it draws: functions of seed and position."""

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from detectron2.utils import comm
from torch.utils.data import Sampler


def seed_everything(*numbers: int) -> None:
    """Seed the generators of `random`, numpy and torch, on all devices, by non-negative numbers."""
    python, legacy, cpu = np.random.SeedSequence(numbers).generate_state(3).tolist()
    random.seed(python)
    np.random.seed(legacy)
    torch.manual_seed(cpu)


@contextmanager
def seeded(*numbers: int) -> Iterator[None]:
    """In the block, draws on the CPU depend on `numbers` alone; after it, all is as if none were.

    A data loader's augmentations draw from the generators of `random`, numpy and torch.
    """
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    python, legacy, cpu = np.random.SeedSequence(numbers).generate_state(3).tolist()
    random.seed(python)
    np.random.seed(legacy)
    torch.default_generator.manual_seed(cpu)  # not torch.manual_seed, which seeds GPUs too
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


class BatchSampler(Sampler[list[tuple[int, int]]]):
    """Batches of this process from batch `start` on, without end.

    A batch is cut out of the batch of all processes, so that each step sees the same images
    whatever their number is. To start anywhere, the order is walked through from its beginning,
    which reads no image: a million images take under a second.
    """

    def __init__(
        self,
        indices: Callable[[], Iterator[int]],
        total_batch_size: int,
        groups: Sequence[bool] | None = None,
    ):
        """
        Args:
            indices: starts the endless order of the images anew, the same each time.
            total_batch_size: images of all processes; divisible by their number.
            groups: by image; the images of a batch are all of one group. None: one group.
        """
        self.indices, self.total_batch_size, self.groups = indices, total_batch_size, groups
        self.start = 0

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        """Yields [(position in the order of all processes, index of the image), ...]."""
        size = self.total_batch_size // comm.get_world_size()
        first = comm.get_rank() * size
        batches = itertools.islice(enumerate(self._batches()), self.start, None)
        for number, batch in batches:
            position = number * self.total_batch_size + first
            yield list(enumerate(batch[first : first + size], position))

    def _batches(self) -> Iterator[list[int]]:
        waiting: dict[bool, list[int]] = {False: [], True: []}
        for index in self.indices():
            group = waiting[self.groups[index] if self.groups else False]
            group.append(index)
            if len(group) == self.total_batch_size:
                yield group.copy()
                group.clear()
