"""The instrument that counts on a pretended device sees what a GPU's host would wait for."""

import pytest
import torch
from pretend import Counting, PretendTensor
from torchvision.ops import nms

VALUES = torch.tensor([[3.0, -1.0, 2.0], [0.0, 4.0, -2.0]])
INDEX = torch.tensor([1, 0])


def write(index, value):
    def act(x):
        x[index(x)] = value(x) if callable(value) else value

    return act


@pytest.mark.parametrize(
    ("act", "waits"),
    [
        (lambda x: x.sum().item(), 1),
        (lambda x: bool((x > 0).all()), 1),
        (lambda x: x.tolist(), 1),
        (lambda x: x.numpy(), 1),
        (lambda x: x.cpu(), 1),
        (lambda x: x.nonzero(), 1),
        (lambda x: x[x > 0], 1),
        (lambda x: x.masked_select(x > 0), 1),
        (lambda x: x.unique(), 1),
        (lambda x: torch.equal(x, x), 1),
        (lambda x: x.long().clamp(min=0)[0].bincount(), 2),
        (lambda x: x[0].repeat_interleave(x[1].clamp(min=0).long()), 1),
        (lambda x: nms(torch.cat([x, x], 1)[:, :4].abs(), x[:, 0], 0.5), 1),
        (lambda x: torch.unravel_index(x.abs().long(), (5, 5)), 2),  # it copies the shape twice
        (lambda x: torch.tensor([1.0], device=x.device), 1),
        (lambda x: x.new_tensor([1.0]), 1),
        (lambda x: VALUES.to(x.device), 1),
        (lambda x: VALUES.to(x.device, non_blocking=True), 1),  # from memory that isn't pinned
        (lambda x: x.copy_(VALUES), 1),
        (lambda x: x[INDEX], 1),
        (write(lambda x: x[:, 0].long().clamp(0, 1), 5.0), 1),  # the number is copied
        (write(lambda x: x > 0, lambda x: x[x > 0]), 2),
    ],
)
def test_what_waits_is_counted(act, waits):
    x = PretendTensor(VALUES.clone())
    with Counting() as counted:
        act(x)
    assert sum(counted.waits.values()) == waits, counted.waits


@pytest.mark.parametrize(
    "act",
    [
        lambda x: x.nonzero_static(size=4),
        lambda x: x.topk(2),
        lambda x: x[x[:, 0].long().clamp(0, 1)],
        lambda x: x.where(x > 0, 0.0).sort(),
        lambda x: x[0].repeat_interleave(x[1].abs().long(), output_size=6),
        lambda x: torch.full((3,), 2.0, device=x.device) + torch.arange(3, device=x.device),
        lambda x: x * torch.tensor(2.0),  # a number of the host is an argument of the kernel
        write(lambda x: x > 0, 5.0),
        write(lambda x: slice(1), 5.0),
        write(lambda x: x[:, 0].long().clamp(0, 1), lambda x: 2 * x),
        lambda x: VALUES.pin_memory().to(x.device, non_blocking=True),
        lambda x: torch.empty(3, pin_memory=True).to(x.device, non_blocking=True),
        lambda x: torch.zeros_like(x).copy_(VALUES.pin_memory(), non_blocking=True),
    ],
)
def test_what_does_not_wait_is_not_counted(act):
    x = PretendTensor(VALUES.clone())
    with Counting() as counted:
        act(x)
    assert not counted.waits


class Zeroed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, index):
        ctx.index = index
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone()
        grad[ctx.index] = 0.0
        return grad, None


def test_backward_is_seen():
    x = torch.nn.Parameter(PretendTensor(VALUES.clone()))
    with Counting() as counted:
        Zeroed.apply(x, PretendTensor(INDEX[:1])).sum().backward()
    assert sum(counted.waits.values()) == 1
    assert x.grad.tolist() == [[1.0] * 3, [0.0] * 3]


def test_views_and_allocations_are_no_operations():
    x = PretendTensor(VALUES.clone())
    with Counting() as counted:
        y = x.t().flatten(0).view(-1)[1:].unsqueeze(0).expand(2, -1)
        torch.empty_like(y)
    assert sum(counted.operations.values()) == 1  # flatten copies what is transposed
    with Counting() as counted:
        (2 * x + 1).relu_()
    assert sum(counted.operations.values()) == 3


def test_results_and_gradients_are_those_of_the_cpu():
    weight = VALUES.clone().requires_grad_()
    pretended = torch.nn.Parameter(PretendTensor(VALUES.clone()))
    index = PretendTensor(INDEX)
    (weight[INDEX].exp().cumsum(1) * VALUES).sum().backward()
    with Counting():
        (pretended[index].exp().cumsum(1) * PretendTensor(VALUES)).sum().backward()
    assert torch.equal(pretended.grad.held, weight.grad)


def test_the_bytes_and_the_place_of_a_copy_are_told():
    with Counting() as counted:
        torch.zeros(3, 5, dtype=torch.uint8).to("meta")
    (copy,) = counted.copies
    assert copy.place == "elsewhere"  # than in the packages that are watched
    assert (copy.dtype, copy.num_bytes) == (torch.uint8, 15)


def test_a_tensor_of_the_host_among_those_of_the_device_is_refused():
    with Counting(), pytest.raises(RuntimeError, match=r"add .*host and of the device"):
        PretendTensor(VALUES.clone()) + VALUES
