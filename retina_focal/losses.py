"""The focal loss: the per-element definition, and the same loss summed over dense head outputs.

Nearly every anchor is background, so the dense sum takes the background term over the raw head
outputs, in whatever order they lie in memory, and corrects it at the few anchors that are not
background. It needs neither a permuted copy of the logits nor a one-hot target.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

# Elements per step of the dense sum: the temporaries of one step stay in the second-level cache.
CHUNK_SIZE = 1 << 16


def sigmoid_focal_loss(
    logits: Tensor, targets: Tensor, alpha: float = 0.25, gamma: float = 2.0
) -> Tensor:
    """FL(p_t) = -alpha_t (1 - p_t)^gamma log(p_t), per element (Eq. 5 of the paper).

    Not softmax: each class is its own binary problem, and p = sigmoid(logits).

    Args:
        logits: any shape.
        targets: same shape, 1 for the object's class and 0 elsewhere.
        alpha: weight of the positives in [0, 1], 1 - alpha of the negatives; < 0: no balancing.
        gamma: focusing parameter >= 0; 0 is (alpha-balanced) cross entropy.
    Returns:
        The loss, same shape as `logits`, not reduced.
    """
    s = logits * (2 * targets - 1)  # p_t = sigmoid(s), 1 - p_t = sigmoid(-s)
    # Not (1 - p_t) ** gamma: that has a NaN gradient at p_t = 1 for 0 < gamma < 1.
    loss = -(gamma * F.logsigmoid(-s)).exp() * F.logsigmoid(s)
    if alpha >= 0:
        loss = (alpha * targets + (1 - alpha) * (1 - targets)) * loss
    return loss


class DenseLoss(Protocol):
    """A binary loss that `dense_loss_sum` can sum: values, and derivatives by the logit."""

    def value(self, logits: Tensor, foreground: bool) -> Tensor: ...
    def derivative(self, logits: Tensor, foreground: bool) -> Tensor: ...


@dataclass(frozen=True)
class SigmoidFocalLoss:
    """`sigmoid_focal_loss` in closed form, with its derivative (appendix B of the paper).

    With p = sigmoid(x), the background term is (1 - alpha) p^gamma softplus(x) and its derivative
    (1 - alpha) p^gamma (gamma (1 - p) softplus(x) + p); the foreground term is its mirror image,
    alpha instead of 1 - alpha and -x instead of x.
    """

    alpha: float = 0.25
    gamma: float = 2.0

    def value(self, logits: Tensor, foreground: bool) -> Tensor:
        x, alpha_t = (-logits, self.alpha) if foreground else (logits, 1 - self.alpha)
        value = x.sigmoid().pow_(self.gamma).mul_(F.softplus(x))
        return value.mul_(alpha_t) if self.alpha >= 0 else value

    def derivative(self, logits: Tensor, foreground: bool) -> Tensor:
        x, alpha_t = (-logits, self.alpha) if foreground else (logits, 1 - self.alpha)
        p = x.sigmoid()
        slope = torch.rsub(p, 1).mul_(self.gamma).mul_(F.softplus(x)).add_(p)
        derivative = p.pow_(self.gamma).mul_(slope)
        if self.alpha >= 0:
            derivative.mul_(alpha_t)
        return derivative.neg_() if foreground else derivative


class LevelTargets(NamedTuple):
    """What is not background on one pyramid level, as indices into (N, A, K, Hi, Wi) logits.

    Each is a tuple of equally long index vectors.
    """

    foreground: tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # image, anchor, class, y, x
    ignored: tuple[Tensor, Tensor, Tensor, Tensor]  # image, anchor, y, x


def dense_loss_sum(
    loss: DenseLoss,
    logits: Sequence[Tensor],
    targets: Sequence[LevelTargets],
    num_classes: int,
) -> Tensor:
    """Sum of a binary classification loss over every class of every anchor that is not ignored.

    Args:
        logits: raw head outputs, (N, A x K, Hi, Wi) a level, contiguous or channels_last (anything
            else is copied), any floating dtype; the arithmetic is fp32.
        targets: what is not background, a `LevelTargets` a level.
    Returns:
        (N,) fp32 sums, one an image. Gradients cannot be differentiated again (RuntimeError).
    """
    dense = [
        x if x.is_contiguous(memory_format=torch.channels_last) else x.contiguous() for x in logits
    ]
    return _DenseLossSum.apply(loss, targets, num_classes, *dense)


class _DenseLossSum(torch.autograd.Function):
    """Background everywhere, corrected where `targets` says; the logits are all that is saved."""

    @staticmethod
    def forward(ctx, loss, targets, num_classes, *logits):
        ctx.loss, ctx.targets, ctx.num_classes = loss, targets, num_classes
        ctx.save_for_backward(*logits)
        # float64: the ignored anchors are subtracted again from sums of millions of terms.
        sums = torch.zeros(len(logits[0]), dtype=torch.float64, device=logits[0].device)
        for x, (foreground, ignored) in zip(logits, targets, strict=True):
            size = x.shape[1:].numel()
            # Rows in memory order, whichever of the two layouts that is.
            for image, row in enumerate(x.as_strided((len(x), size), (size, 1))):
                for chunk in row.split(CHUNK_SIZE):
                    sums[image] += loss.value(chunk.float(), foreground=False).sum()
            per_class = x.unflatten(1, (-1, num_classes))
            positive = per_class[foreground].float()
            correction = loss.value(positive, True) - loss.value(positive, False)
            sums.index_add_(0, foreground[0], correction.double())
            image, anchor, row, column = ignored
            excess = loss.value(per_class[image, anchor, :, row, column].float(), foreground=False)
            sums.index_add_(0, image, -excess.double().sum(1))
        return sums.float()

    @staticmethod
    def backward(ctx, grad_sums):
        # Not once_differentiable: that lets create_graph=True pass, with a gradient that is wrong.
        if torch.is_grad_enabled():
            raise RuntimeError(
                "the gradient of dense_loss_sum is a closed form that cannot be differentiated "
                "again (create_graph=True); sum sigmoid_focal_loss over the logits instead"
            )
        grads = []
        for x, (foreground, ignored) in zip(ctx.saved_tensors, ctx.targets, strict=True):
            grad = torch.empty_like(x)
            size = x.shape[1:].numel()
            rows, grad_rows = (t.as_strided((len(x), size), (size, 1)) for t in (x, grad))
            for row, grad_row, grad_sum in zip(rows, grad_rows, grad_sums, strict=True):
                chunks = zip(row.split(CHUNK_SIZE), grad_row.split(CHUNK_SIZE), strict=True)
                for chunk, grad_chunk in chunks:
                    derivative = ctx.loss.derivative(chunk.float(), foreground=False)
                    grad_chunk.copy_(derivative.mul_(grad_sum))
            per_class = grad.unflatten(1, (-1, ctx.num_classes))
            positive = x.unflatten(1, (-1, ctx.num_classes))[foreground].float()
            derivative = ctx.loss.derivative(positive, foreground=True)
            per_class[foreground] = (derivative * grad_sums[foreground[0]]).to(grad.dtype)
            image, anchor, row, column = ignored
            per_class[image, anchor, :, row, column] = 0
            grads.append(grad)
        return None, None, None, *grads
