"""The bootstrap by weights is the one that copies images and measures anew."""

import numpy as np
import pytest
from made_detections import made, of_pycocotools

from retina_focal.evaluation import bootstrap
from retina_focal.evaluation.bootstrap import drawn_ap, draws, interval, metrics
from retina_focal.evaluation.detections import collect
from retina_focal.evaluation.matches import match
from retina_focal.evaluation.precision_recall import average_precision

EXACT = 1e-12


def copied(dataset: dict, results: list[dict], weights: np.ndarray) -> tuple[dict, list[dict]]:
    """The dataset and results in which each image stands as often as it is drawn."""
    images, annotations, found = [], [], []
    for image, times in zip(dataset["images"], weights, strict=True):
        for _ in range(times):
            new = len(images) + 1
            images.append({**image, "id": new})
            for source, copies in ((dataset["annotations"], annotations), (results, found)):
                for x in source:
                    if x["image_id"] == image["id"]:
                        copies.append({**x, "image_id": new, "id": len(copies) + 1})
    return {**dataset, "images": images, "annotations": annotations}, found


@pytest.mark.parametrize("seed", range(3))
def test_a_draw_by_weights_is_the_measurement_of_copied_images(seed, monkeypatch):
    monkeypatch.setattr(bootstrap, "BLOCK", 700)  # several draws at once, and several blocks
    dataset, results = made(seed, 7, 40)
    evaluated = collect(dataset, results)
    weights = draws(7, 12, seed)
    found = drawn_ap(evaluated, match(evaluated), weights)
    for b, row in enumerate(weights):
        expected = of_pycocotools(*copied(dataset, results, row), [1, 10, 10**6])
        precision = expected.eval["precision"][:, :, :, 0, 2]
        ap = np.where((precision > -1).all(axis=1), precision.mean(axis=1), np.nan)
        np.testing.assert_allclose(found[b], ap, rtol=0, atol=EXACT)
    if seed == 0:
        assert np.isnan(found).any() or (weights == 0).any()


def test_each_image_once_is_the_measurement_itself():
    evaluated = collect(*made(4))
    matches = match(evaluated)
    once = np.ones((1, len(evaluated.images)), dtype=np.int32)
    expected = average_precision(evaluated, matches)
    np.testing.assert_allclose(drawn_ap(evaluated, matches, once)[0], expected, rtol=0, atol=EXACT)
    for found, of_all in zip(
        metrics(expected, evaluated.classes).values(),
        metrics(expected[None], evaluated.classes).values(),
        strict=True,
    ):
        assert found == of_all[0]


def test_the_means_are_cocos():
    dataset, results = made(5)
    evaluated = collect(dataset, results)
    named = metrics(average_precision(evaluated, match(evaluated)), evaluated.classes)
    stats = of_pycocotools(dataset, results, [1, 10, 100]).stats
    found = [named[name] for name in ("AP", "AP50", "AP75")]
    np.testing.assert_allclose(found, 100 * stats[:3], rtol=0, atol=100 * EXACT)


def test_draws_are_of_as_many_images_and_told_by_the_seed():
    drawn = draws(9, 2000, seed=1)
    assert drawn.shape == (2000, 9) and (drawn.sum(axis=1) == 9).all()
    assert (drawn == draws(9, 2000, seed=1)).all() and (drawn != draws(9, 2000, seed=2)).any()
    # An image is left out with the chance (8/9)^9 = 0.346.
    assert (drawn == 0).mean() == pytest.approx((8 / 9) ** 9, abs=0.01)


def test_an_interval_of_the_mean_covers_it_as_often_as_it_says():
    """Of the mean of 40 normal numbers; the bootstrap's own error makes 95% a little less."""
    draw = np.random.default_rng(0)
    inside = 0
    for seed in range(300):
        x = draw.normal(size=40)
        low, high = interval(draws(40, 400, seed) @ x / 40)
        inside += low <= 0 <= high
    assert 0.89 < inside / 300 < 0.98
    assert interval(np.full(3, np.nan)) is None
    assert interval(np.array([1.0, np.nan, 1.0])) == (1, 1)
