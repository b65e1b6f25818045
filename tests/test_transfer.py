"""Tensors of the host cross to a device together, complete and without a wait."""

import torch
from pretend import DEVICE, Counting, PretendTensor

from retina_focal.transfer import to_device

TENSORS = [
    torch.arange(3, dtype=torch.uint8),
    torch.randn(2, 5, generator=torch.Generator().manual_seed(0)),
    torch.tensor([[7, -3]]),
    torch.empty(0, 4),
    torch.arange(12.0).view(3, 4).t(),
    torch.tensor(True),
]


def test_all_cross_in_one_copy_without_a_wait():
    with Counting() as counted:
        moved = to_device(TENSORS, DEVICE)
    assert not counted.waits and len(counted.copies) == 1
    assert sum(counted.operations.values()) == 1
    for x, y in zip(TENSORS, moved, strict=True):
        assert isinstance(y, PretendTensor) and torch.equal(y.held, x) and y.dtype == x.dtype


def test_bytes_cross_without_any_between_them():
    images = [torch.zeros(3, 5, 7, dtype=torch.uint8), torch.zeros(3, 4, 3, dtype=torch.uint8)]
    with Counting() as counted:
        to_device(images, DEVICE)
    assert [copy.num_bytes for copy in counted.copies] == [3 * 5 * 7 + 3 * 4 * 3]


def test_what_is_there_already_stays():
    here = PretendTensor(torch.ones(2))
    with Counting() as counted:
        first, second = to_device([here, torch.zeros(3)], DEVICE)
        assert first is here and second.tolist() == [0.0] * 3
        assert to_device([here], DEVICE)[0] is here
    assert len(counted.copies) == 1
    assert all(
        x is y for x, y in zip(TENSORS, to_device(TENSORS, torch.device("cpu")), strict=True)
    )
