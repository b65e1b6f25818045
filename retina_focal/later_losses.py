"""Class losses that were published after the paper, by ``MODEL.RETINA_FOCAL.CLS_LOSS``.

x is the logit, p = sigmoid(x). q in [0, 1] is the IoU of the positive anchor's decoded box with its
ground truth; no gradient flows through it. Gains are those that were published for RetinaNet, in AP
on COCO val2017.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from torch import Tensor

from retina_focal.config import retina_focal_node
from retina_focal.errors import UserError
from retina_focal.losses import CLS_LOSS_REGISTRY, SigmoidFocalLoss

if TYPE_CHECKING:
    from retina_focal.kernels.focal_loss import BackgroundTerm


@dataclass(frozen=True)
class QualityFocalLoss:
    """QFL(p) = -|q - p|^beta (q log(p) + (1 - q) log(1 - p)) (arXiv:2006.04388, Eq. 2).

    For background q is 0, which leaves p^beta softplus(x): the focal loss without alpha.

    Published gain on RetinaNet: none found for this loss alone.

    Raises:
        UserError: beta below 1 and not 0: its gradient would be infinite at p = q.
    """

    beta: float = 2.0

    soft_targets = True

    def __post_init__(self):
        if not (self.beta == 0 or self.beta >= 1):
            raise UserError(
                f"MODEL.RETINANET.FOCAL_LOSS_GAMMA is {self.beta}; MODEL.RETINA_FOCAL.CLS_LOSS "
                "'quality_focal' takes it for its beta and expects 0 or at least 1 (the paper's "
                "value is 2)"
            )

    @property
    def _background(self) -> SigmoidFocalLoss:
        return SigmoidFocalLoss(alpha=-1, gamma=self.beta)

    def background_term(self) -> "BackgroundTerm":
        """What the fused kernels compute; imports Triton."""
        return self._background.background_term()

    def __call__(
        self, logits: Tensor, foreground: bool, quality: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        if not foreground:
            return self._background(logits, False)
        p, q = logits.sigmoid(), quality.to(logits)
        difference, cross_entropy = p - q, _cross_entropy(logits, q)
        distance = difference.abs()
        weight = distance**self.beta
        derivative = weight * difference
        if self.beta > 0:
            slope = self.beta * distance ** (self.beta - 1) * difference.sign() * p * (1 - p)
            derivative += slope * cross_entropy
        return weight * cross_entropy, derivative


@dataclass(frozen=True)
class VarifocalLoss:
    """VFL(p) = -q (q log(p) + (1 - q) log(1 - p)) where q > 0 (arXiv:2008.13367, Eq. 2).

    Otherwise, and for background, (1 - alpha) p^gamma softplus(x): the focal loss. 1 - alpha, 0.75
    by the default of ``MODEL.RETINANET.FOCAL_LOSS_ALPHA``, is the alpha of that paper; here alpha
    does not weigh the positives.

    Published gain on RetinaNet: 36.5 to 37.4 (R-50, 1x, single scale; the authors' mmdetection
    models, README of github.com/hyz-xmaster/VarifocalNet). They use the same assigner and box loss.

    Raises:
        UserError: gamma below 0.
    """

    alpha: float = 0.25
    gamma: float = 2.0

    soft_targets = True

    def __post_init__(self):
        SigmoidFocalLoss(self.alpha, self.gamma)  # checks gamma

    @property
    def _background(self) -> SigmoidFocalLoss:
        return SigmoidFocalLoss(self.alpha, self.gamma)

    def background_term(self) -> "BackgroundTerm":
        """What the fused kernels compute; imports Triton."""
        return self._background.background_term()

    def __call__(
        self, logits: Tensor, foreground: bool, quality: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        background = self._background(logits, False)
        if not foreground:
            return background
        q = quality.to(logits)
        own = q * _cross_entropy(logits, q), q * (logits.sigmoid() - q)
        value, derivative = (torch.where(q > 0, *x) for x in zip(own, background, strict=True))
        return value, derivative


@dataclass(frozen=True)
class Poly1FocalLoss:
    """FL(p_t) + epsilon alpha_t (1 - p_t)^(gamma + 1) (arXiv:2204.12511, Eq. 5).

    epsilon is added to the first coefficient of the focal loss as a polynomial of 1 - p_t, which is
    1; here alpha weighs both terms. The background term is (1 - alpha) p^gamma (softplus(x) +
    epsilon p).

    Published gain on RetinaNet: none found. (Version 2 of the paper announces an ablation on it.)

    Raises:
        UserError: gamma below 0.
    """

    epsilon: float = 1.0
    alpha: float = 0.25
    gamma: float = 2.0

    def __post_init__(self):
        SigmoidFocalLoss(self.alpha, self.gamma)  # checks gamma

    def __call__(self, logits: Tensor, foreground: bool) -> tuple[Tensor, Tensor]:
        value, derivative = SigmoidFocalLoss(self.alpha, self.gamma)(logits, foreground)
        sign, alpha_t = (-1, self.alpha) if foreground else (1, 1 - self.alpha)
        wrong, right = (sign * logits).sigmoid(), (-sign * logits).sigmoid()  # 1 - p_t, p_t
        term = wrong ** (self.gamma + 1) * (self.epsilon * (alpha_t if self.alpha >= 0 else 1))
        return value.add_(term), derivative.add_(term * right, alpha=sign * (self.gamma + 1))


class Poly1FocalLossOfGamma2(Poly1FocalLoss):
    """The same where gamma is 2: a `BackgroundTerm` has room for two more numbers."""

    def background_term(self) -> "BackgroundTerm":
        """What the fused kernels compute; imports Triton."""
        from retina_focal.kernels import focal_loss

        return focal_loss.poly1(self.alpha, self.epsilon)


@dataclass(frozen=True)
class AsymmetricLoss:
    """-(1 - p)^gamma_pos log(p) of the object's class (arXiv:2009.14119, Eq. 7).

    For background -p_m^gamma_neg log(1 - p_m) with p_m = max(p - margin, 0): what has a score below
    the margin is not trained further. The defaults are the paper's, for several labels per picture.
    With a margin above ``MODEL.RETINANET.PRIOR_PROB`` a new head gets no loss from background.

    Published gain on RetinaNet: none found.

    Raises:
        UserError: a gamma below 0, or a margin outside [0, 1).
    """

    gamma_pos: float = 0.0
    gamma_neg: float = 4.0
    margin: float = 0.05

    def __post_init__(self):
        if not (self.gamma_pos >= 0 and self.gamma_neg >= 0 and 0 <= self.margin < 1):
            raise UserError(
                f"MODEL.RETINA_FOCAL.ASYMMETRIC has GAMMA_POS {self.gamma_pos}, GAMMA_NEG "
                f"{self.gamma_neg}, MARGIN {self.margin}; expected both gammas at least 0 and "
                "MARGIN from 0 to below 1 (the paper's values are 0, 4 and 0.05)"
            )

    def background_term(self) -> "BackgroundTerm":
        """What the fused kernels compute; imports Triton."""
        from retina_focal.kernels import focal_loss

        if self.margin == 0:
            return focal_loss.focal(-1, self.gamma_neg)
        return focal_loss.asymmetric(self.gamma_neg, self.margin)

    def __call__(self, logits: Tensor, foreground: bool) -> tuple[Tensor, Tensor]:
        if foreground or self.margin == 0:
            gamma = self.gamma_pos if foreground else self.gamma_neg
            return SigmoidFocalLoss(alpha=-1, gamma=gamma)(logits, foreground)
        p, complement = logits.sigmoid(), logits.neg().sigmoid_()
        excess = p - self.margin
        counts, p_m = excess > 0, excess.clamp(min=torch.finfo(p.dtype).tiny)
        rest = complement + self.margin  # 1 - p_m
        cross_entropy, weight = rest.log().neg_(), p_m**self.gamma_neg
        slope = self.gamma_neg * cross_entropy / p_m + rest.reciprocal()
        derivative = (weight * slope).mul_(p).mul_(complement)
        return weight.mul_(cross_entropy).mul_(counts), derivative.mul_(counts)


def _cross_entropy(logits: Tensor, q: Tensor) -> Tensor:
    """-q log(p) - (1 - q) log(1 - p)."""
    return -(q * F.logsigmoid(logits) + (1 - q) * F.logsigmoid(-logits))


@CLS_LOSS_REGISTRY.register()
def quality_focal(cfg: CfgNode) -> QualityFocalLoss:
    """``MODEL.RETINANET.FOCAL_LOSS_GAMMA`` is beta."""
    return QualityFocalLoss(cfg.MODEL.RETINANET.FOCAL_LOSS_GAMMA)


@CLS_LOSS_REGISTRY.register()
def varifocal(cfg: CfgNode) -> VarifocalLoss:
    """With 1 - ``FOCAL_LOSS_ALPHA`` as weight of the background."""
    node = cfg.MODEL.RETINANET
    return VarifocalLoss(node.FOCAL_LOSS_ALPHA, node.FOCAL_LOSS_GAMMA)


@CLS_LOSS_REGISTRY.register()
def poly1(cfg: CfgNode) -> Poly1FocalLoss:
    """With ``MODEL.RETINA_FOCAL.POLY1.EPSILON``."""
    node, epsilon = cfg.MODEL.RETINANET, retina_focal_node(cfg).POLY1.EPSILON
    kind = Poly1FocalLossOfGamma2 if node.FOCAL_LOSS_GAMMA == 2 else Poly1FocalLoss
    return kind(epsilon, node.FOCAL_LOSS_ALPHA, node.FOCAL_LOSS_GAMMA)


@CLS_LOSS_REGISTRY.register()
def asymmetric(cfg: CfgNode) -> AsymmetricLoss:
    """With ``MODEL.RETINA_FOCAL.ASYMMETRIC``."""
    node = retina_focal_node(cfg).ASYMMETRIC
    return AsymmetricLoss(node.GAMMA_POS, node.GAMMA_NEG, node.MARGIN)
