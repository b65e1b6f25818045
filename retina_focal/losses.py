"""Classification losses: their definitions per element, and their sum over dense head outputs.

Nearly every anchor is background, so the dense sum takes the background term over the raw head
outputs, in whatever order they lie in memory, and corrects it at the few anchors that are not
background. It needs neither a permuted copy of the logits nor a one-hot target. Value and gradient
come from one pass, so that the exponential and the logarithm, most of the cost, are taken once.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from torch import Tensor

from retina_focal.config import check_choice, retina_focal_node
from retina_focal.errors import UserError

# Elements per step of the dense sum. On a CPU the temporaries of one step stay in the cache;
# elsewhere a step should outlast its launches.
CPU_CHUNK_SIZE = 1 << 16
CHUNK_SIZE = 1 << 24
# exp(80) and its reciprocal are normal fp32 numbers.
MAX_EXPONENT = 80.0


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


def focal_star_loss(
    logits: Tensor, targets: Tensor, gamma: float = 2.0, beta: float = 1.0
) -> Tensor:
    """FL*(x_t) = -log(sigmoid(gamma x_t + beta)) / gamma, per element (appendix A of the paper).

    x_t is the logit for targets of 1 and its negative elsewhere; gamma, above 0, makes the curve
    steep and beta shifts it. gamma 1 with beta 0 is cross entropy. There is no alpha.

    Args:
        logits: any shape.
        targets: same shape, 1 for the object's class and 0 elsewhere.
    Returns:
        The loss, same shape as `logits`, not reduced.
    """
    x_t = logits * (2 * targets - 1)
    return -F.logsigmoid(gamma * x_t + beta) / gamma


def hinge_loss(logits: Tensor, targets: Tensor, margin: float = 0.5) -> Tensor:
    """max(0, m - p_t), per element (Sec. 5.1 of the paper, where it did not train stably).

    On the probability, not on the logit as in a support vector machine: what is classified with
    p_t >= m is not trained further, and what is hopelessly wrong has a vanishing gradient.

    Args:
        logits: any shape.
        targets: same shape, 1 for the object's class and 0 elsewhere.
        margin: m in (0, 1].
    Returns:
        The loss, same shape as `logits`, not reduced.
    """
    p_t = (logits * (2 * targets - 1)).sigmoid()
    return F.relu(margin - p_t)


class DenseLoss(Protocol):
    """A binary loss that `dense_loss_sum` can sum.

    Called with fp32 or fp64 logits of any shape and whether they are the object's class; returns
    the loss of each and its derivative by the logit, both of the same shape.
    """

    def __call__(self, logits: Tensor, foreground: bool) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True)
class SigmoidFocalLoss:
    """`sigmoid_focal_loss` in closed form, with its derivative (appendix B of the paper).

    With p = sigmoid(x), the background term is (1 - alpha) p^gamma softplus(x) and its derivative
    (1 - alpha) p^gamma (p + gamma (1 - p) softplus(x)); the foreground term is its mirror image,
    alpha instead of 1 - alpha and -x instead of x.

    Raises:
        UserError: gamma below 0.
    """

    alpha: float = 0.25
    gamma: float = 2.0

    def __post_init__(self):
        if not self.gamma >= 0:
            raise UserError(
                f"MODEL.RETINANET.FOCAL_LOSS_GAMMA is {self.gamma}; expected at least 0 "
                "(0 is cross entropy, the paper's value is 2)"
            )

    def __call__(self, logits: Tensor, foreground: bool) -> tuple[Tensor, Tensor]:
        x, alpha_t = (-logits, self.alpha) if foreground else (logits, 1 - self.alpha)
        exp = x.clamp(max=MAX_EXPONENT).exp_()
        rounded = exp + 1
        complement = rounded.reciprocal()  # 1 - p
        # log1p(exp), which torch does not vectorise on every CPU: the logarithm, and to first order
        # what the sum has lost.
        softplus = rounded.log()
        softplus.addcmul_(rounded.sub_(1).sub_(exp), complement, value=-1)
        softplus = torch.maximum(softplus, x)  # x is the larger one only beyond the clamp
        p = exp.mul_(complement)
        # log p = x - softplus(x).
        weight = p.square() if self.gamma == 2 else (x - softplus).mul_(self.gamma).exp_()
        if self.alpha >= 0:
            weight.mul_(alpha_t)
        value = softplus.mul_(weight)
        derivative = weight.mul_(p).addcmul_(complement, value, value=self.gamma)
        return value, derivative.neg_() if foreground else derivative


@dataclass(frozen=True)
class FocalStarLoss:
    """`focal_star_loss` with its derivative.

    The background term is softplus(gamma x - beta) / gamma and its derivative
    sigmoid(gamma x - beta); the foreground term is its mirror image, -x instead of x.

    Raises:
        UserError: gamma not above 0.
    """

    gamma: float = 2.0
    beta: float = 1.0

    def __post_init__(self):
        if not self.gamma > 0:
            raise UserError(
                f"MODEL.RETINANET.FOCAL_LOSS_GAMMA is {self.gamma}; MODEL.RETINA_FOCAL.CLS_LOSS "
                "'focal_star' divides by it and expects it above 0 (the paper's values are 2, with "
                "FOCAL_STAR.BETA 1, and 4, with BETA 0); for gamma 0 use 'focal'"
            )

    def __call__(self, logits: Tensor, foreground: bool) -> tuple[Tensor, Tensor]:
        wrong = logits * (-self.gamma if foreground else self.gamma) - self.beta
        cross_entropy = SigmoidFocalLoss(alpha=-1, gamma=0)
        value, derivative = cross_entropy(wrong, foreground=False)
        return value.div_(self.gamma), derivative.neg_() if foreground else derivative


@dataclass(frozen=True)
class HingeLoss:
    """`hinge_loss` with its derivative: p_t (1 - p_t) towards the wrong side where p_t < m, else 0.

    Raises:
        UserError: a margin outside (0, 1].
    """

    margin: float = 0.5

    def __post_init__(self):
        if not 0 < self.margin <= 1:
            raise UserError(
                f"MODEL.RETINA_FOCAL.HINGE.MARGIN is {self.margin}; expected above 0 and at most 1:"
                " p_t is a probability (the package's value is 0.5)"
            )

    def __call__(self, logits: Tensor, foreground: bool) -> tuple[Tensor, Tensor]:
        x_t = logits if foreground else -logits
        p_t, complement = x_t.sigmoid(), x_t.neg().sigmoid_()
        value = (self.margin - p_t).relu_()
        derivative = p_t.mul_(complement).mul_(value > 0)
        return value, derivative.neg_() if foreground else derivative


def build_classification_loss(cfg: CfgNode) -> DenseLoss:
    """The loss that ``MODEL.RETINA_FOCAL.CLS_LOSS`` names.

    Raises:
        UserError: an unknown name, or a parameter out of its range.
    """
    stock, ours = cfg.MODEL.RETINANET, retina_focal_node(cfg)
    losses = {
        "focal": lambda: SigmoidFocalLoss(stock.FOCAL_LOSS_ALPHA, stock.FOCAL_LOSS_GAMMA),
        "cross_entropy": lambda: SigmoidFocalLoss(alpha=-1, gamma=0),
        "focal_star": lambda: FocalStarLoss(stock.FOCAL_LOSS_GAMMA, ours.FOCAL_STAR.BETA),
        "hinge": lambda: HingeLoss(ours.HINGE.MARGIN),
    }
    check_choice("MODEL.RETINA_FOCAL.CLS_LOSS", ours.CLS_LOSS, tuple(losses))
    return losses[ours.CLS_LOSS]()


def inverse_frequency_alpha(labels: Tensor, num_classes: int) -> float:
    """alpha "set by inverse class frequency" (Sec. 3.1 of the paper), of these labels.

    Each class of each anchor that is not ignored is a binary problem; n+ of them are positive and
    n- are not. Weights proportional to 1 / n+ and 1 / n- that add up to 1 are alpha and 1 - alpha
    with alpha = n- / (n+ + n-). Without a positive, n+ counts as 1, as in the normaliser.

    Args:
        labels: any shape, in {-1, 0, ..., K}; K is background, -1 is ignored.
        num_classes: K.
    """
    is_positive = (labels >= 0) & (labels < num_classes)
    num_positives, num_anchors = torch.stack((is_positive.sum(), (labels >= 0).sum())).tolist()
    return 1 - max(num_positives, 1) / max(num_anchors * num_classes, 1)


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
    weights: Tensor,
) -> Tensor:
    """Weighted sum of a binary loss over every class of every anchor that is not ignored.

    Args:
        logits: raw head outputs, (N, A x K, Hi, Wi) a level, contiguous or channels_last (anything
            else is copied), any floating dtype; the arithmetic is fp32.
        targets: what is not background, a `LevelTargets` a level.
        weights: (N,) fp32, of each image's loss; gets no gradient.
    Returns:
        fp32 scalar. Its gradient, made with it, is all the memory that is kept; it cannot be
        differentiated again (RuntimeError).
    """
    dense = [
        x if x.is_contiguous(memory_format=torch.channels_last) else x.contiguous() for x in logits
    ]
    return _DenseLossSum.apply(loss, targets, num_classes, weights, *dense)


class _DenseLossSum(torch.autograd.Function):
    """Background everywhere, corrected where `targets` says."""

    @staticmethod
    def forward(ctx, loss, targets, num_classes, weights, *logits):
        # float64: the ignored anchors are subtracted again from sums of millions of terms.
        sums = torch.zeros(len(weights), dtype=torch.float64, device=weights.device)
        grads = []
        for x, needs_grad, (foreground, ignored) in zip(
            logits, ctx.needs_input_grad[4:], targets, strict=True
        ):
            grad = torch.empty_like(x) if needs_grad else None
            _add_background(loss, x, weights, sums, grad)

            # Both corrections: the true term instead of the background's, or nothing instead.
            per_class = x.unflatten(1, (-1, num_classes))
            positive = per_class[foreground].float()
            value, derivative = loss(positive, foreground=True)
            sums.index_add_(0, foreground[0], (value - loss(positive, False)[0]).double())
            image, anchor, row, column = ignored
            excess, _ = loss(per_class[image, anchor, :, row, column].float(), foreground=False)
            sums.index_add_(0, image, -excess.double().sum(1))
            if needs_grad:
                grad_per_class = grad.unflatten(1, (-1, num_classes))
                grad_per_class[foreground] = derivative.mul_(weights[foreground[0]]).to(grad.dtype)
                grad_per_class[image, anchor, :, row, column] = 0
                grads.append(grad)
        ctx.save_for_backward(*grads)
        return sums.mul_(weights).sum().float()

    @staticmethod
    def backward(ctx, grad_output):
        # Not once_differentiable: that lets create_graph=True pass, with a gradient that is wrong.
        if torch.is_grad_enabled():
            raise RuntimeError(
                "the gradient of dense_loss_sum is a closed form that cannot be differentiated "
                "again (create_graph=True); sum the loss's definition, such as sigmoid_focal_loss, "
                "over the logits instead"
            )
        saved = iter(ctx.saved_tensors)
        grads = [next(saved) if needed else None for needed in ctx.needs_input_grad[4:]]
        # Usually 1; looking costs nothing on a CPU, and elsewhere more than the product.
        if grad_output.device.type != "cpu" or grad_output != 1:
            grads = [None if grad is None else grad * grad_output for grad in grads]
        return None, None, None, None, *grads


def _add_background(
    loss: DenseLoss, logits: Tensor, weights: Tensor, sums: Tensor, grad: Tensor | None
) -> None:
    """Add each image's loss to `sums`, all as background, and write the weighted gradient.

    Args:
        logits: (N, ...), contiguous or channels_last.
        weights, sums: (N,).
        grad: as `logits`, in the same memory order.
    """
    chunk_size = CPU_CHUNK_SIZE if logits.device.type == "cpu" else CHUNK_SIZE
    # Rows in memory order, whichever of the two layouts that is.
    shape, strides = (len(logits), logits[0].numel()), (logits[0].numel(), 1)
    rows = logits.as_strided(shape, strides)
    grad_rows = repeat(None) if grad is None else grad.as_strided(shape, strides)
    for image, (row, grad_row) in enumerate(zip(rows, grad_rows, strict=False)):
        for begin in range(0, len(row), chunk_size):
            chunk = slice(begin, begin + chunk_size)
            value, derivative = loss(row[chunk].float(), foreground=False)
            sums[image] += value.sum()
            if grad_row is not None:
                grad_row[chunk] = derivative.mul_(weights[image])
