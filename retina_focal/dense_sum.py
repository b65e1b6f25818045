"""The sum of a classification loss over dense head outputs.

Nearly every anchor is background, so the sum takes the background term over the raw head outputs,
in whatever order they lie in memory, and corrects it at the few anchors that are not background. It
needs neither a permuted copy of the logits nor a one-hot target.

On a CPU value and gradient come from one pass, since the exponential and the logarithm are most of
the cost. On another device most of the cost is memory, so backward reads the logits a second time.
With fp16 logits it does so on a CPU, too: their gradients would round to zero without the loss
scale, which is known in backward alone.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from retina_focal import kernels
from retina_focal.errors import UserError
from retina_focal.losses import DenseLoss
from retina_focal.places import Places

# Elements per step of the dense sum. On a CPU the temporaries of one step stay in the cache;
# elsewhere a step should outlast its launches.
CPU_CHUNK_SIZE = 1 << 16
CHUNK_SIZE = 1 << 24


class LevelTargets(NamedTuple):
    """What is not background on one pyramid level."""

    positive: Places  # P anchors
    classes: Tensor  # (P,) of the positive anchors
    ignored: Places
    quality: Tensor | None = None  # (P,) fp32 in [0, 1], for a loss with soft targets


def dense_loss_sum(
    loss: DenseLoss,
    logits: Sequence[Tensor],
    targets: Sequence[LevelTargets],
    num_classes: int,
    weights: Tensor,
) -> Tensor:
    """Weighted sum of a binary loss over every class of every anchor that is not ignored.

    Args:
        logits: raw head outputs, (N, A x K, Hi, Wi) per level, contiguous or channels_last
            (anything else is copied), any floating dtype; the arithmetic is at least fp32.
        targets: what is not background, per level.
        weights: (N,) fp32, of each image's loss; gets no gradient.
    Returns:
        Scalar, fp64 where the logits are, else fp32. It cannot be differentiated twice
        (RuntimeError).
    Raises:
        UserError: the loss changed its input in place.
    """
    dense = [
        x if x.is_contiguous(memory_format=torch.channels_last) else x.contiguous() for x in logits
    ]
    return _DenseLossSum.apply(loss, targets, num_classes, weights, *dense)


class _DenseLossSum(torch.autograd.Function):
    """Background everywhere, corrected where `targets` says."""

    @staticmethod
    def forward(ctx, loss, targets, num_classes, weights, *logits):
        ctx.arguments = loss, targets, num_classes
        ctx.one_pass = all(x.device.type == "cpu" and x.dtype != torch.float16 for x in logits)
        # fp64: the ignored anchors are subtracted again from sums of millions of terms.
        sums = torch.zeros(len(weights), dtype=torch.float64, device=weights.device)
        grads = [
            torch.empty_like(x) if needs_grad and ctx.one_pass else None
            for x, needs_grad in zip(logits, ctx.needs_input_grad[4:], strict=True)
        ]
        # A CPU has a level in its cache; a device launches as much for one as for all.
        parts = [slice(i, i + 1) for i in range(len(logits))] if ctx.one_pass else [slice(None)]
        for own in parts:
            _add_background(loss, logits[own], weights, sums, grads[own])
            correction = _correct_sums(loss, logits[own], targets[own], num_classes, sums)
            if ctx.one_pass:
                _correct_grads(grads[own], targets[own], correction, num_classes, weights)
        ctx.save_for_backward(*(grads if ctx.one_pass else (weights, *correction, *logits)))
        return sums.mul_(weights).sum().to(torch.promote_types(logits[0].dtype, torch.float32))

    @staticmethod
    def backward(ctx, grad_output):
        # Not once_differentiable: that lets create_graph=True pass, with a gradient that is wrong.
        if torch.is_grad_enabled():
            raise RuntimeError(
                "the gradient of dense_loss_sum is a closed form that cannot be differentiated "
                "again (create_graph=True); sum the loss's definition, such as sigmoid_focal_loss, "
                "over the logits instead"
            )
        if ctx.one_pass:
            grads = ctx.saved_tensors
            if grad_output != 1:  # usually it is 1, and looking costs nothing on a CPU
                grads = [None if grad is None else grad * grad_output for grad in grads]
            return None, None, None, None, *grads
        loss, targets, num_classes = ctx.arguments
        weights, *correction, logits = [*ctx.saved_tensors[:3], ctx.saved_tensors[3:]]
        grads = [
            torch.empty_like(x) if needs_grad else None
            for x, needs_grad in zip(logits, ctx.needs_input_grad[4:], strict=True)
        ]
        _add_background(loss, logits, weights, None, grads, grad_output)
        _correct_grads(grads, targets, correction, num_classes, weights * grad_output)
        return None, None, None, None, *grads


def _correct_sums(
    loss: DenseLoss,
    logits: Sequence[Tensor],
    targets: Sequence[LevelTargets],
    num_classes: int,
    sums: Tensor,
) -> tuple[Tensor, Tensor]:
    """The true term in place of the background's where `targets` says, or nothing in its place.

    Args:
        logits: (N, A x K, Hi, Wi) per level.
        sums: (N,) fp64 of each image's loss.
    Returns:
        (P,) derivatives of the positive terms by their logits, and their images, level by level.
    """
    positive, ignored = [], []
    for x, target in zip(logits, targets, strict=True):
        per_class = x.unflatten(1, (-1, num_classes))
        image, anchor, row, column = target.positive
        positive.append(per_class[image, anchor, target.classes, row, column])
        image, anchor, row, column = target.ignored
        ignored.append(per_class[image, anchor, :, row, column])
    dtype = torch.promote_types(logits[0].dtype, torch.float32)
    positive, ignored = torch.cat(positive).to(dtype), torch.cat(ignored).to(dtype)
    soft_target = [] if targets[0].quality is None else [torch.cat([y.quality for y in targets])]
    value, derivative = loss(positive, True, *soft_target)
    background, _ = loss(torch.cat([positive, ignored.flatten()]), False)
    background = background.double()
    missing = value - background[: len(positive)]
    excess = background[len(positive) :].view(len(ignored), num_classes).sum(1)
    image = torch.cat([target.positive.image for target in targets])
    images = torch.cat([image, *(target.ignored.image for target in targets)])
    sums.index_add_(0, images, torch.cat([missing, -excess]))
    return derivative, image


def _correct_grads(
    grads: Sequence[Tensor | None],
    targets: Sequence[LevelTargets],
    correction: tuple[Tensor, Tensor],
    num_classes: int,
    weights: Tensor,
) -> None:
    """The same for the gradients, in place; `correction` is from `_correct_sums`."""
    derivative, image = correction
    own = (derivative * weights[image]).split([len(target.classes) for target in targets])
    # A tensor: a number would be copied to a device, and the host would wait.
    zero = derivative.new_zeros(())
    for grad, target, values in zip(grads, targets, own, strict=True):
        if grad is not None:
            per_class = grad.unflatten(1, (-1, num_classes))
            image, anchor, row, column = target.positive
            per_class[image, anchor, target.classes, row, column] = values.to(grad.dtype)
            image, anchor, row, column = target.ignored
            per_class[image, anchor, :, row, column] = zero.to(grad.dtype)


def _add_background(
    loss: DenseLoss,
    logits: Sequence[Tensor],
    weights: Tensor,
    sums: Tensor | None,
    grads: Sequence[Tensor | None],
    grad_output: Tensor | None = None,
) -> None:
    """Add each image's loss, as if all were background, and write the gradient.

    Args:
        logits: (N, A x K, Hi, Wi) per level, contiguous or channels_last.
        weights: (N,), which the gradient is multiplied by.
        sums: (N,) fp64, or None.
        grads: as `logits`, in the same memory order; a level of None is left out.
        grad_output: what the gradient is multiplied by, too; default: 1.
    """
    versions = [x._version for x in logits]
    rows = [_rows(x) for x in logits]
    grad_rows = [None if grad is None else _rows(grad) for grad in grads]
    # Stated by its own class: one that inherits it may compute something else.
    states_term = "background_term" in vars(type(loss))
    if states_term and kernels.available(weights.device):
        from retina_focal.kernels import focal_loss

        term = loss.background_term()
        if sums is not None:
            sums += focal_loss.background_sums(term, rows)
        for x, grad in zip(rows, grad_rows, strict=True):
            if grad is not None:
                focal_loss.background_gradient(term, x, weights, grad_output, grad)
        return
    if grad_output is not None:
        weights = weights * grad_output
    for x, grad in zip(rows, grad_rows, strict=True):
        _add_in_chunks(loss, x, weights, sums, grad)
    if [x._version for x in logits] != versions:
        raise UserError(
            f"the class loss {loss} changed the logits in place; let it compute new tensors"
        )


def _rows(x: Tensor) -> Tensor:
    """(N, ...) as (N, M) in the order of memory, of a dense tensor."""
    return x.as_strided((len(x), x[0].numel()), (x[0].numel(), 1))


def _add_in_chunks(
    loss: DenseLoss, rows: Tensor, weights: Tensor, sums: Tensor | None, grad: Tensor | None
) -> None:
    """`_add_background` for the (N, M) logits of a level, by the loss's own operations."""
    on_cpu, dtype = rows.device.type == "cpu", torch.promote_types(rows.dtype, torch.float32)
    images = 1 if on_cpu else len(rows)
    chunk_size = CPU_CHUNK_SIZE if on_cpu else max(1, CHUNK_SIZE // max(1, images))
    for first in range(0, len(rows), images):
        own = slice(first, first + images)
        for begin in range(0, rows.shape[1], chunk_size):
            chunk = own, slice(begin, begin + chunk_size)
            value, derivative = loss(rows[chunk].to(dtype), False)
            if sums is not None:
                sums[own] += value.sum(1)
            if grad is not None:
                torch.mul(derivative, weights[own, None], out=grad[chunk])
