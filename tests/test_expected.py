"""TEST.EXPECTED_RESULTS: another result than the expected one ends the command with status 1."""

import pytest
from detectron2.config import CfgNode
from detectron2.evaluation import verify_results
from test_run_files import run_here

from retina_focal.evaluation.expected import unexpected_results
from retina_focal.training.assembly import Trainer

RESULTS = {"bbox": {"AP": 38.0, "AP50": float("nan"), "AP75": float("inf")}}
ROWS = [
    ["bbox", "AP", 38.5, 0.5],
    ["bbox", "AP", 38.5, 0.4],
    ["bbox", "AP", 37.0, 0.9],
    ["bbox", "AP50", 38.0, 99.0],
    ["bbox", "AP75", 38.0, 99.0],
    ["bbox", "AP", 38.0, float("nan")],
    ["bbox", "AR", 38.0, 99.0],
]


@pytest.mark.parametrize("row", ROWS)
def test_a_result_is_as_expected_where_detectron2_says_so(row):
    expected = None
    try:
        verify_results(CfgNode({"TEST": {"EXPECTED_RESULTS": [row]}}), RESULTS)
    except SystemExit as end:
        expected = end.code
    if row[3] != row[3]:  # detectron2 takes a tolerance that is no number for any
        expected = 1
    assert bool(unexpected_results([row], RESULTS)) == bool(expected)


def test_all_that_is_unexpected_is_said_and_of_several_datasets():
    found = unexpected_results([*ROWS[:2], ROWS[3], ["mask", "AP", 1.0, 1.0]], RESULTS)
    assert str(found) == (
        "TEST.EXPECTED_RESULTS: bbox/AP is 38, expected 38.5 within 0.4; bbox/AP50 is nan, "
        "expected 38 within 99; mask/AP was not measured (measured: bbox/AP, bbox/AP50, bbox/AP75)"
    )
    several = {"a": RESULTS, "b": {"bbox": {"AP": 1.0}}}
    assert not unexpected_results([["a/bbox", "AP", 38.0, 0.0], ["b/bbox", "AP", 1, 0]], several)
    assert "(measured: none)" in str(unexpected_results(ROWS[:1], {}))


def test_a_training_and_an_evaluation_end_in_words_where_the_results_are_others(
    data, tmp_path, monkeypatch
):
    monkeypatch.setattr(Trainer, "test", classmethod(lambda *_: RESULTS))
    opts = ["SOLVER.STEPS", "()", "SOLVER.MAX_ITER", "1", "TEST.EXPECTED_RESULTS"]
    others, right = ([*opts, f"[['bbox', 'AP', 39.0, {x}]]"] for x in (0.5, 1.0))
    words = "EXPECTED_RESULTS: bbox/AP is 38, expected 39 within 0[.]5"
    with pytest.raises(SystemExit, match=words):
        run_here(data, tmp_path, opts=others)
    assert (tmp_path / "model_final.pth").is_file()
    with pytest.raises(SystemExit, match=words):
        run_here(data, tmp_path, "--eval-only", "--resume", opts=others)
    assert run_here(data, tmp_path, "--eval-only", "--resume", opts=right) == RESULTS
