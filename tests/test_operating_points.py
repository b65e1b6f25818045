"""Operating points follow their rule, and are read as they were written."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_detections import made

from retina_focal.errors import UserError
from retina_focal.evaluation import operating_points as points
from retina_focal.evaluation.detections import collect
from retina_focal.evaluation.matches import match
from retina_focal.evaluation.precision_recall import Curve, curves

# F1 2/5, 4/6, 4/7, 6/8; precision 1, 1, 2/3, 3/4; one wrong in two images.
CURVE = Curve(np.array([0.9, 0.8, 0.7, 0.6]), np.array([1, 2, 2, 3]), np.array([0, 0, 1, 1]), 4, 2)


@pytest.mark.parametrize(
    ("rule", "score"),
    [
        ("f1", 0.6),
        ("precision=1", 0.8),
        ("precision=0.75", 0.6),  # lower than at 0.7, which doesn't reach it: the recall counts
        ("fppi=0.4", 0.8),
        ("fppi=0.5", 0.6),
    ],
)
def test_the_rule_chooses_a_known_point(rule, score):
    assert CURVE.score[points.choose(CURVE, rule)] == score


def test_where_no_score_reaches_the_rule_no_detection_counts():
    curve = Curve(np.array([0.9]), np.array([0]), np.array([3]), 4, 2)
    for rule in ("f1", "precision=0.5", "fppi=9"):
        assert points.choose(curve, rule) is None
    assert points.point_of(curve, None)["threshold"] is None
    assert points.choose(Curve(*(np.empty(0) for _ in range(3)), 4, 2), "f1") is None


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=11),
    st.sampled_from(["f1", "precision=0.5", "precision=0.8", "fppi=1", "fppi=0.3"]),
)
def test_no_other_point_is_better(steps, rule):
    right, wrong = np.cumsum([(0, 1), *steps], axis=0).T
    curve = Curve(np.linspace(0.9, 0.1, len(right)), right, wrong, max(1, right[-1]), 5)
    chosen = points.choose(curve, rule)
    value = float(rule.partition("=")[2] or 0)
    allowed = {
        "f1": lambda i: True,
        "precision": lambda i: right[i] >= value * (right[i] + wrong[i]),
        "fppi": lambda i: wrong[i] <= value * 5,
    }[rule.partition("=")[0]]
    worth = curve.f1 if rule == "f1" else curve.recall
    able = [i for i in range(len(right)) if right[i] and allowed(i)]
    if chosen is None:
        assert not able
    else:
        assert chosen in able and worth[chosen] == max(worth[i] for i in able)


@pytest.mark.parametrize("rule", ["f2", "f1=3", "precision", "precision=1.5", "fppi=0", "fppi=nan"])
def test_an_unknown_rule_is_refused_in_words(rule):
    with pytest.raises(UserError, match=r"expected f1, precision=0\.9 or fppi=0\.5"):
        points.check_rule(rule)
    assert points.check_rule("precision=1") == "precision=1"


@pytest.fixture
def content() -> dict:
    evaluated = collect(*made(0, 200, 30))
    return points.make(evaluated, match(evaluated), "f1", "made_val", "model_best.pth")


def test_what_is_written_is_read(content, tmp_path):
    assert points.read(tmp_path) is None
    assert points.write(tmp_path, content).name == "operating_points.json"
    read = points.read(tmp_path)
    assert read.content == content
    evaluated = collect(*made(0, 200, 30))
    drawn = curves(evaluated, match(evaluated))
    for name, curve in zip(evaluated.classes, drawn, strict=True):
        best = curve.f1.max()
        assert read.content["classes"][name]["f1"] == best
        assert points.at_threshold(curve, read.thresholds[name])["f1"] == best
    scores = np.linspace(0, 1, 6)
    names = ["ant", "bee", "nobody"] * 2
    calibrated = read.calibrate(scores, names)
    for i, name in enumerate(names):
        expected = read.maps[name](scores[i]) if name in read.maps else scores[i]
        assert calibrated[i] == expected
    assert {entry["calibration"]["method"] for entry in content["classes"].values()} > {"none"} or (
        calibrated != scores
    ).any()


def test_a_rule_out_of_reach_is_null_in_the_file_and_infinite_when_read(content, tmp_path):
    content["classes"]["ant"]["threshold"] = None
    points.write(tmp_path, content)
    assert points.read(tmp_path).thresholds["ant"] == math.inf


def test_a_threshold_keeps_the_score_itself():
    assert points.at_threshold(CURVE, 0.8)["recall"] == 0.5
    assert points.at_threshold(CURVE, 0.8000001)["recall"] == 0.25
    assert points.at_threshold(CURVE, 0.95)["recall"] == 0
    assert points.at_threshold(CURVE, 0.95)["precision"] is None
    assert points.at_threshold(CURVE, 0)["false_positives_per_image"] == 0.5


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda x: "{", "Expecting property name"),
        (lambda x: json.dumps([x]), "its format is None"),
        (lambda x: json.dumps({**x, "format": 2}), "its format is 2, expected 1"),
        (lambda x: json.dumps({"format": 1}), "classes is missing"),
        (lambda x: json.dumps(x).replace('"threshold": 0', '"threshold": NaN, "x": 0'), "no map"),
        (lambda x: json.dumps(x).replace('"values": [', '"values": [2, '), "no map"),
        (lambda x: json.dumps(x).replace('"scores": [', '"scores": [1, -1], "x": [')
                          .replace('"values": [', '"values": [0, 1], "x": ['), "does not rise"),
    ],
)  # fmt: skip
def test_a_file_that_is_none_is_refused_in_words(content, tmp_path, change, words):
    (tmp_path / "operating_points.json").write_text(change(content))
    with pytest.raises(UserError, match=f"can't be used: .*{words}.*retina-focal evaluate"):
        points.read(tmp_path)
