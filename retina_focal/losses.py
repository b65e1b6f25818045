"""Classification losses: their definitions per element, and the same with derivatives."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from fvcore.common.registry import Registry
from torch import Tensor

from retina_focal.config import registered, retina_focal_node
from retina_focal.errors import UserError

if TYPE_CHECKING:
    from retina_focal.kernels.focal_loss import BackgroundTerm

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


CLS_LOSS_REGISTRY = Registry("CLS_LOSS")
CLS_LOSS_REGISTRY.__doc__ = """
Class losses by ``MODEL.RETINA_FOCAL.CLS_LOSS``. Called with `(cfg)`; returns a `DenseLoss`.
"""


NO_ALPHA = (
    "MODEL.RETINA_FOCAL.ALPHA_FROM_DATA is True, but {} does not weigh by alpha; set "
    "MODEL.RETINA_FOCAL.CLS_LOSS focal, with MODEL.RETINANET.FOCAL_LOSS_ALPHA at least 0 (and "
    "FOCAL_LOSS_GAMMA 0 for alpha-balanced cross entropy), or ALPHA_FROM_DATA False"
)


class DenseLoss(Protocol):
    """A binary loss of each class of each anchor, with its derivative by the logit.

    Attributes that a loss may have besides:
        soft_targets: True: it is called with a third argument at the positive anchors, their
            (P,) fp32 targets q in [0, 1], the IoU of each decoded box with its ground truth; no
            gradient flows through them.
        with_alpha: method that returns the same loss with another alpha, for ALPHA_FROM_DATA.
        background_term: method that returns the `kernels.focal_loss.BackgroundTerm` that computes
            its background on a GPU; without one of its own class, an inherited one does not count,
            it is computed in PyTorch on every device.
    """

    def __call__(self, logits: Tensor, foreground: bool) -> tuple[Tensor, Tensor]:
        """
        Args:
            logits: any shape, fp32 or fp64; not to be changed in place.
            foreground: whether they are those of the object's class.
        Returns:
            The loss and its derivative by the logit, each of the shape of `logits`. Autograd does
            not see the call: a wrong derivative trains wrongly without a word.
        """


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

    def background_term(self) -> "BackgroundTerm":
        """What the fused kernels compute; imports Triton."""
        from retina_focal.kernels import focal_loss

        return focal_loss.focal(self.alpha, self.gamma)

    def with_alpha(self, alpha: float) -> "SigmoidFocalLoss":
        """The same with another alpha.

        Raises:
            UserError: this one does not weigh by alpha.
        """
        if self.alpha < 0:
            raise UserError(NO_ALPHA.format(self))
        return replace(self, alpha=alpha)

    def __call__(self, logits: Tensor, foreground: bool) -> tuple[Tensor, Tensor]:
        x, alpha_t = (-logits, self.alpha) if foreground else (logits, 1 - self.alpha)
        exp = x.clamp(max=MAX_EXPONENT).exp_()
        rounded = exp + 1
        complement = rounded.reciprocal()  # 1 - p
        # log1p(exp) without log1p, which torch does not vectorise on every CPU: the logarithm of
        # the rounded sum 1 + exp, plus the rounding error times the logarithm's derivative.
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

    def background_term(self) -> "BackgroundTerm":
        """What the fused kernels compute; imports Triton."""
        from retina_focal.kernels import focal_loss

        return focal_loss.focal_star(self.gamma, self.beta)

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


@CLS_LOSS_REGISTRY.register()
def focal(cfg: CfgNode) -> SigmoidFocalLoss:
    """Alpha-balanced focal loss (Eq. 5); with gamma 0 alpha-balanced cross entropy."""
    node = cfg.MODEL.RETINANET
    return SigmoidFocalLoss(node.FOCAL_LOSS_ALPHA, node.FOCAL_LOSS_GAMMA)


@CLS_LOSS_REGISTRY.register()
def cross_entropy(cfg: CfgNode) -> SigmoidFocalLoss:
    """-log(p_t), without alpha."""
    return SigmoidFocalLoss(alpha=-1, gamma=0)


@CLS_LOSS_REGISTRY.register()
def focal_star(cfg: CfgNode) -> FocalStarLoss:
    """FL* (appendix A)."""
    beta = retina_focal_node(cfg).FOCAL_STAR.BETA
    return FocalStarLoss(cfg.MODEL.RETINANET.FOCAL_LOSS_GAMMA, beta)


@CLS_LOSS_REGISTRY.register()
def hinge(cfg: CfgNode) -> HingeLoss:
    """Hinge loss on the probability (Sec. 5.1)."""
    return HingeLoss(retina_focal_node(cfg).HINGE.MARGIN)


def build_classification_loss(cfg: CfgNode) -> DenseLoss:
    """The loss that ``MODEL.RETINA_FOCAL.CLS_LOSS`` names.

    Raises:
        UserError: an unknown name, or a parameter out of its range.
    """
    name = retina_focal_node(cfg).CLS_LOSS
    return registered(CLS_LOSS_REGISTRY, "MODEL.RETINA_FOCAL.CLS_LOSS", name)(cfg)


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
