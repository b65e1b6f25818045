"""The order of images and their random numbers depend on seed and position alone."""

import itertools
import random

import numpy as np
import pytest
import torch
from detectron2.data.samplers import RepeatFactorTrainingSampler, TrainingSampler
from detectron2.utils import comm

from retina_focal.data.sampler import BatchSampler, seed_everything, seeded


def draws() -> list[float]:
    return [random.random(), float(np.random.rand()), float(torch.rand(()))]


def batches(start: int, stop: int, size: int = 4, **options: object) -> list[list[tuple[int, int]]]:
    sampler = BatchSampler(TrainingSampler(10, seed=3)._infinite_indices, size, **options)
    sampler.start = start
    return list(itertools.islice(sampler, stop - start))


def test_draws_in_the_block_depend_on_its_numbers_and_leave_no_trace():
    seed_everything(7)
    undisturbed = draws()
    seed_everything(7)
    with seeded(1, 2):
        one = draws()
    assert draws() == undisturbed
    with seeded(1, 2):
        assert draws() == one
    for other in ((2, 1), (1, 3)):
        with seeded(*other):
            assert not set(draws()) & set(one)
    with pytest.raises(KeyError), seeded(1, 2):
        raise KeyError
    assert not set(draws()) & set(one)


@pytest.mark.parametrize("groups", [None, [True, False, False] * 4])
def test_any_batch_can_be_the_first(groups):
    whole = batches(0, 20, groups=groups)
    for start in (1, 7, 13):
        assert batches(start, 20, groups=groups) == whole[start:]
    # Positions are counted through all batches.
    assert [position for batch in whole for position, _ in batch] == list(range(80))


def test_every_image_comes_once_per_epoch():
    indices = [index for batch in batches(0, 5) for _, index in batch]
    assert sorted(indices[:10]) == sorted(indices[10:]) == list(range(10))
    assert indices[:10] != indices[10:]


def test_a_batch_has_images_of_one_group_and_none_is_left_out():
    groups = [index < 3 for index in range(10)]
    found = batches(0, 50, groups=groups)
    for batch in found:
        assert len({groups[index] for _, index in batch}) == 1
    counts = np.bincount([index for batch in found for _, index in batch])
    assert counts.min() >= 18 and counts.max() <= 22  # 20 epochs


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_share_the_batch_of_one_process(processes, monkeypatch):
    whole = batches(2, 6)
    monkeypatch.setattr(comm, "get_world_size", lambda: processes)
    parts = []
    for rank in range(processes):
        monkeypatch.setattr(comm, "get_rank", lambda rank=rank: rank)
        parts.append(batches(2, 6))
    assert [list(itertools.chain(*parts)) for parts in zip(*parts, strict=True)] == whole


def test_detectron2s_repeated_images_stay_repeated():
    factors = torch.tensor([1.0, 3.0, 1.5])
    sampler = BatchSampler(RepeatFactorTrainingSampler(factors, seed=1)._infinite_indices, 2)
    indices = [index for batch in itertools.islice(sampler, 550) for _, index in batch]
    shares = np.bincount(indices) / len(indices)
    np.testing.assert_allclose(shares, factors / factors.sum(), atol=0.02)
