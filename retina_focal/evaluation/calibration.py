"""Scores as probabilities: how far they are from them, and a map per class that corrects them.

The maps are made after training, on detections whose outcome is known (better than losses made for
it: arXiv:2405.20459). A detection is right where it has a box of its own at the IoU 0.5.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

NUM_BINS = 15
NUM_FOLDS = 5
LEAST = 20  # right, and wrong, detections of a class that a map is made of
CLIP = 1e-6  # scores nearer to 0 or 1 have no logit that means anything
STEPS = 50  # of Newton's method, which needs about 8


@dataclass(frozen=True)
class Map:
    """A rising map of scores to probabilities, straight between its knots."""

    method: str  # "isotonic", "platt" or "none"
    scores: np.ndarray  # (S,) rising, in [0, 1]
    values: np.ndarray  # (S,) not falling, in [0, 1]

    def __call__(self, scores: np.ndarray) -> np.ndarray:
        """(D,) probabilities of (D,) scores; below the first knot its value, as above the last."""
        return np.interp(scores, self.scores, self.values)


IDENTITY = Map("none", np.array([0.0, 1.0]), np.array([0.0, 1.0]))


def isotonic(scores: np.ndarray, right: np.ndarray) -> Map:
    """The rising map with the least squared error (pool adjacent violators).

    Args:
        scores: (D,), D at least 1.
        right: (D,) bool.
    """
    knots, which = np.unique(scores, return_inverse=True)
    weights = np.bincount(which)
    sums = np.bincount(which, right)
    blocks: list[list[float]] = []  # [sum, weight, first knot, last knot], means rising
    for i, (total, weight) in enumerate(zip(sums, weights, strict=True)):
        block = [total, weight, i, i]
        while blocks and blocks[-1][0] * block[1] >= block[0] * blocks[-1][1]:
            total, weight, first, _ = blocks.pop()
            block = [total + block[0], weight + block[1], first, i]
        blocks.append(block)
    edges = np.array([[knots[first], knots[last]] for _, _, first, last in blocks])
    means = np.array([total / weight for total, weight, *_ in blocks])
    is_edge = np.stack([np.ones(len(edges), bool), edges[:, 1] > edges[:, 0]], axis=1)
    return Map("isotonic", edges[is_edge], np.repeat(means, 2).reshape(-1, 2)[is_edge])


def platt(scores: np.ndarray, right: np.ndarray) -> Map:
    """sigmoid(a logit(score) + b), a not negative, by maximum likelihood with Platt's targets.

    Args:
        scores: (D,), D at least 1.
        right: (D,) bool.
    """
    x = _logit(scores)
    # (N+ + 1) / (N+ + 2) and 1 / (N- + 2), not 1 and 0: otherwise a would be infinite for scores
    # that separate right from wrong without a fault.
    wins, losses = right.sum(), (~right).sum()
    target = np.where(right, (wins + 1) / (wins + 2), 1 / (losses + 2))
    a, b = _newton(x, target, np.array([1.0, 0.0]))
    if a < 0:
        a, b = 0.0, _logit(target.mean())
    # As knots, so that one kind of map is written and read: an error below 2e-3 for a up to 2.
    knots = np.unique(np.concatenate([[CLIP, 1 - CLIP], _sigmoid(np.linspace(-13, 13, 105))]))
    return Map("platt", knots, _sigmoid(a * _logit(knots) + b))


def fit(scores: np.ndarray, right: np.ndarray, fold: np.ndarray) -> Map:
    """The map, or none, whose cross-fitted Brier score is the lowest.

    Args:
        scores: (D,) of one class.
        right: (D,) bool.
        fold: (D,) of `folds`, of the detection's image.
    """
    if min(right.sum(), (~right).sum()) < LEAST:
        return IDENTITY
    makers = (lambda *_: IDENTITY, platt, isotonic)
    briers = [brier(_cross_fitted(make, scores, right, fold), right) for make in makers]
    return makers[int(np.argmin(briers))](scores, right)


def cross_fitted(scores: np.ndarray, right: np.ndarray, fold: np.ndarray) -> np.ndarray:
    """(D,) probabilities, each by a map that was made of the other folds' images alone."""
    return _cross_fitted(lambda s, r, f: fit(s, r, f), scores, right, fold, with_folds=True)


def folds(num_images: int, seed: int = 0) -> np.ndarray:
    """(N,) the part of `NUM_FOLDS` that each image belongs to, at random."""
    return np.random.default_rng(seed).permutation(num_images) % NUM_FOLDS


def brier(probability: np.ndarray, right: np.ndarray) -> float:
    """Mean squared difference to the outcome; 0 where there is none."""
    return float(((probability - right) ** 2).mean()) if len(right) else 0.0


@dataclass(frozen=True)
class Reliability:
    """Detections in bins of equal width of their probability, the last one closed."""

    count: np.ndarray  # (B,)
    mean: np.ndarray  # (B,) of the probabilities; 0 in an empty bin
    right: np.ndarray  # (B,) share of right detections; 0 in an empty bin

    @property
    def ece(self) -> float | None:
        """Expected calibration error: mean of |right - mean| over detections; None without any."""
        if not self.count.any():
            return None
        gaps = self.count * np.abs(self.right - self.mean)
        return float(gaps.sum() / self.count.sum())


def reliability(probability: np.ndarray, right: np.ndarray, bins: int = NUM_BINS) -> Reliability:
    """Of (D,) probabilities in [0, 1] and (D,) outcomes."""
    which = np.minimum((probability * bins).astype(int), bins - 1)
    count = np.bincount(which, minlength=bins)
    some = np.maximum(count, 1)
    mean = np.bincount(which, probability, bins) / some
    return Reliability(count, mean, np.bincount(which, right, bins) / some)


def _cross_fitted(
    make: Callable[..., Map],
    scores: np.ndarray,
    right: np.ndarray,
    fold: np.ndarray,
    with_folds: bool = False,
) -> np.ndarray:
    probability = scores.copy()
    for part in np.unique(fold):
        inside, other = fold == part, fold != part
        if other.any():
            more = (fold[other],) if with_folds else ()
            probability[inside] = make(scores[other], right[other], *more)(scores[inside])
    return probability


def _newton(x: np.ndarray, target: np.ndarray, start: np.ndarray) -> np.ndarray:
    """(a, b) of the least cross entropy of sigmoid(a x + b), by damped steps."""
    inputs = np.stack([x, np.ones_like(x)], axis=1)

    def loss(point: np.ndarray) -> float:
        z = inputs @ point
        return float((np.logaddexp(0, z) - target * z).sum())

    point, now = start, loss(start)
    for _ in range(STEPS):
        p = _sigmoid(inputs @ point)
        gradient = inputs.T @ (p - target)
        hessian = (inputs * (p * (1 - p))[:, None]).T @ inputs + 1e-9 * np.eye(2)
        step = np.linalg.solve(hessian, gradient)
        while (then := loss(point - step)) > now and np.abs(step).max() > 1e-12:
            step = step / 2
        if then >= now:
            break
        point, now = point - step, then
    return point


def _logit(p: np.ndarray) -> np.ndarray:
    p = np.clip(p, CLIP, 1 - CLIP)
    return np.log(p) - np.log1p(-p)


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return np.exp(-np.logaddexp(0, -x))
