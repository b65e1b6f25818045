"""Maps of scores to probabilities rise, fit, and are judged on images that they have not seen."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retina_focal.evaluation import calibration
from retina_focal.evaluation.calibration import (
    IDENTITY,
    brier,
    cross_fitted,
    fit,
    folds,
    isotonic,
    platt,
    reliability,
)

ARITHMETIC = 1e-9


def drawn(seed: int, count: int, truth) -> tuple[np.ndarray, np.ndarray]:
    """Scores, and outcomes of the probability `truth(score)`."""
    draw = np.random.default_rng(seed)
    scores = draw.uniform(0.02, 0.98, count)
    return scores, draw.random(count) < truth(scores)


def test_the_calibration_error_of_four_detections_is_known():
    """Two bins: |1/2 - 0.2| of two detections and |1 - 0.85| of two."""
    scores = np.array([0.1, 0.3, 0.8, 0.9])
    found = reliability(scores, np.array([True, False, True, True]), bins=2)
    assert found.ece == pytest.approx((2 * 0.3 + 2 * 0.15) / 4, abs=ARITHMETIC)
    assert found.count.tolist() == [2, 2] and found.right.tolist() == [0.5, 1]
    assert brier(scores, np.array([True, False, True, True])) == pytest.approx(
        (0.81 + 0.09 + 0.04 + 0.01) / 4, abs=ARITHMETIC
    )
    edges = reliability(np.array([0.0, 0.5, 1.0]), np.ones(3, bool), bins=2)
    assert edges.count.tolist() == [1, 2]
    assert reliability(np.empty(0), np.empty(0, bool)).ece is None


def test_scores_that_are_probabilities_have_no_error():
    scores, right = drawn(0, 200_000, lambda s: s)
    assert reliability(scores, right).ece < 5e-3
    assert reliability(scores**2, right).ece > 0.1


@settings(max_examples=80)
@given(st.lists(st.tuples(st.integers(0, 6), st.booleans()), min_size=1, max_size=25))
def test_the_isotonic_map_is_the_best_of_those_that_rise(rows):
    """The min-max formula: max over a <= i of the min over b >= i of the mean of a to b."""
    scores = np.array([x / 6 for x, _ in rows])
    right = np.array([x for _, x in rows])
    mapped = isotonic(scores, right)
    knots = np.unique(scores)

    def mean(a: int, b: int) -> float:
        return right[(scores >= knots[a]) & (scores <= knots[b])].mean()

    n = len(knots)
    expected = [max(min(mean(a, b) for b in range(i, n)) for a in range(i + 1)) for i in range(n)]
    np.testing.assert_allclose(mapped(knots), expected, rtol=0, atol=ARITHMETIC)
    assert (np.diff(mapped.scores) > 0).all() and (np.diff(mapped.values) >= 0).all()
    assert len(mapped.scores) <= 2 * len(np.unique(mapped.values))  # a step has two knots


def test_platt_finds_the_line_that_the_outcomes_were_drawn_from():
    def truth(scores):
        return 1 / (1 + np.exp(-(2 * np.log(scores / (1 - scores)) - 1)))

    mapped = platt(*drawn(1, 100_000, truth))
    grid = np.linspace(0.02, 0.98, 97)
    np.testing.assert_allclose(mapped(grid), truth(grid), rtol=0, atol=0.01)


def test_platt_is_where_the_likelihood_is_flat():
    """The gradient of the cross entropy is 0, compared with a search on a fine grid."""
    scores, right = drawn(2, 300, lambda s: s**2)
    x = np.log(scores / (1 - scores))
    wins, losses = right.sum(), (~right).sum()
    target = np.where(right, (wins + 1) / (wins + 2), 1 / (losses + 2))

    def loss(a, b):
        z = a * x + b
        return (np.logaddexp(0, z) - target * z).sum()

    a, b = calibration._newton(x, target, np.array([1.0, 0.0]))
    around = [loss(a + i * 0.01, b + j * 0.01) for i in (-1, 0, 1) for j in (-1, 0, 1)]
    assert min(around) == around[4]


@pytest.mark.parametrize("make", [platt, isotonic])
def test_a_map_never_falls_and_stays_between_0_and_1(make):
    """Also where the scores tell the opposite, or part right from wrong without a fault."""
    scores = np.linspace(0, 1, 50)
    for right in (scores > 0.5, scores < 0.5, np.ones(50, bool), np.zeros(50, bool)):
        values = make(scores, right)(np.linspace(0, 1, 500))
        assert (np.diff(values) >= 0).all() and values[0] >= 0 and values[-1] <= 1
        assert np.isfinite(values).all()


@pytest.mark.parametrize(
    ("truth", "methods"),
    [
        (lambda s: s, ("none", "platt")),
        (lambda s: 1 / (1 + np.exp(-(3 * np.log(s / (1 - s)) + 2))), ("platt",)),
        (lambda s: np.where(s < 0.4, 0.05, np.where(s < 0.6, 0.5, 0.55)), ("isotonic",)),
    ],
)
def test_the_map_is_the_one_that_holds_on_images_not_seen(truth, methods):
    scores, right = drawn(3, 4000, truth)
    assert fit(scores, right, folds(4000)).method in methods


def test_few_outcomes_are_no_ground_for_a_map():
    scores = np.linspace(0, 1, 100)
    assert fit(scores, scores > 0.85, folds(100)) is IDENTITY
    assert fit(np.empty(0), np.empty(0, bool), np.empty(0, int)) is IDENTITY


def test_cross_fitting_uses_other_images_alone():
    """Other outcomes of a fold change nothing in it, and all else."""
    draw = np.random.default_rng(4)
    scores, right = draw.uniform(size=400), draw.random(400) < 0.2
    fold = folds(400)
    crossed = cross_fitted(scores, right, fold)
    assert brier(crossed, right) > brier(fit(scores, right, fold)(scores), right)
    changed = right.copy()
    changed[fold == 0] ^= True
    inside = fold == 0
    np.testing.assert_array_equal(cross_fitted(scores, changed, fold)[inside], crossed[inside])
    assert (cross_fitted(scores, changed, fold)[~inside] != crossed[~inside]).any()


def test_cross_fitting_lowers_the_error_of_scores_that_are_off():
    scores, right = drawn(5, 3000, lambda s: s**3)
    after = reliability(cross_fitted(scores, right, folds(3000)), right).ece
    assert after < 0.03 < 0.2 < reliability(scores, right).ece


def test_every_image_is_in_one_fold_and_folds_are_of_one_size():
    counts = np.bincount(folds(103))
    assert len(counts) == calibration.NUM_FOLDS and set(counts) == {20, 21}
    assert math.isclose(counts.sum(), 103)
