"""The latency table of exported files: what is measured, and what is left out and why."""

import json

import pytest
import torch
from conftest import table_rows
from test_benchmark_cases import SMALL, setting_of

from retina_focal.candidates import logit
from retina_focal.errors import UserError
from retina_focal.tools import cli
from retina_focal.tools.benchmark import exports, sparse
from retina_focal.tools.benchmark.exports import STOCK
from retina_focal.tools.benchmark.inputs import pictures


class Model:
    """Finds as many boxes as it is told, and notes its calls."""

    def __init__(self, name: str, calls: list[str]):
        self.name, self.calls = name, calls

    def __call__(self, batch: list[dict]) -> list[dict]:
        self.calls.append(self.name)
        return [{"instances": [0, 0]}]


def test_models_take_turns_each_warmed_up_and_timed_after_a_pause(monkeypatch):
    calls, saved = [], []
    models = {name: Model(name, calls) for name in (STOCK, "a", "b")}
    prepared = exports.Prepared([], models, {"c": "not here"})
    monkeypatch.setattr(exports, "sleep", lambda seconds: calls.append("pause"))

    class Any:
        image_size = (8, 8)

    row = exports.measure(
        "small", Any, lambda *_: prepared, 3, lambda row: saved.append(len(row["seconds"][STOCK]))
    )
    names = list(models)
    warm_up = names + [x for x in names for _ in range(exports.WARM_UP - 1)]
    assert calls == warm_up + [x for name in names for x in ("pause", name)] * 3
    assert saved == [1, 2, 3]
    assert {x: len(y) for x, y in row["seconds"].items()} == dict.fromkeys(models, 3)
    assert row["left_out"] == {"c": "not here"} and row["detections"] == dict.fromkeys(models, 2)


def test_the_table_has_the_20th_percentile_of_the_rounds():
    """Of 0.1, ..., 0.6 s it is 0.2 s; the quotients are those of percentiles, and the median of
    those within a round."""
    times = [0.1 * x for x in (6, 5, 4, 3, 2, 1)]
    row = {"config": "small.yaml", "image_size": [8, 9], "left_out": {"c": "not here"}}
    row["seconds"] = {STOCK: times, "a": [x / 4 for x in times[:-1]] + [0.1]}
    row["detections"] = {STOCK: 7, "a": 6}
    report = dict.fromkeys(["command", "processor", "threads", "date", "torch", "abilities"], "x")
    text = exports.markdown({**report, "rows": [row]})
    assert "c: left out: not here" in text
    heads, _, stock, a = table_rows(text)
    assert heads[0] == "small.yaml, 8x9, 6 rounds"
    assert stock[1:] == ["200.0", "1.00", "1.00", "7"]
    # 0.05, 0.075, 0.1, 0.1, 0.125, 0.15
    assert a[1:] == ["75.0", "2.67", "4.00", "6"]


def test_what_the_processor_lacks_is_said(monkeypatch, tmp_path):
    monkeypatch.setattr(exports, "has_bf16", lambda _: False)
    with pytest.raises(UserError, match="has no bf16"):
        exports._eager_bf16(torch.nn.Identity())
    with pytest.raises(UserError, match="has no bf16"):
        exports._openvino("bf16", None, tmp_path, [])
    with pytest.raises(UserError, match="made of the ONNX file, which is left out"):
        exports._openvino("fp32", None, tmp_path, [])


def test_export_is_measured_alone_and_on_a_cpu():
    with pytest.raises(SystemExit, match="measured alone"):
        cli.main(["benchmark", "--what", "export,loss", "--device", "cpu"])


@pytest.mark.slow
@torch.no_grad()
def test_candidates_of_sparse_boxes_lie_on_the_objects():
    setting = setting_of((128, 160), boxes=2)
    (record,) = pictures(setting)
    image = sparse._objects(record)
    on_object = torch.zeros(128, 160, dtype=torch.bool)
    for x0, y0, x1, y1 in record["instances"].gt_boxes.tensor.round().int().tolist():
        on_object[y0:y1, x0:x1] = True
    assert (image[:, ~on_object] == sparse.GREY).all()
    assert torch.equal(image[:, on_object], record["image"][:, on_object])

    model = sparse._detecting(setting, [{"image": image}])
    threshold = logit(setting.cfg.MODEL.RETINANET.SCORE_THRESH_TEST)
    grey = torch.full_like(image, sparse.GREY)
    for picture, expected in ((image, 2 * sparse.CANDIDATES_PER_OBJECT), (grey, 0)):
        logits = sparse._logits(model, [{"image": picture}])
        found = sum(int((x > threshold + 1e-4).sum()) for x in logits)
        assert abs(found - expected) <= 1  # the last one is at the threshold


@pytest.mark.slow
def test_exports_with_sparse_boxes_are_timed_beside_whole_maps(tmp_path):
    row = exports.measure("small", setting_of(), sparse.prepare_sparse, 1, lambda _: None)
    assert list(row["seconds"])[2:4] == [
        "onnxruntime, fp32, whole maps",
        "onnxruntime, fp32, sparse boxes",
    ]
    assert len(set(row["detections"].values())) == 1


@pytest.mark.slow
def test_every_format_is_timed(tmp_path):
    """Minutes: each format is written, and AOTInductor compiles."""
    argv = ["benchmark", "--what", "export", "--image-size", "160x192", "--rounds", "2"]
    cli.main([*argv, "--device", "cpu", "--output", str(tmp_path), *SMALL])
    report = json.loads((tmp_path / "results.json").read_text())
    (row,) = report["rows"]
    assert report["finished"] and len(row["seconds"]) + len(row["left_out"]) == 9
    stock = row["detections"].pop(STOCK)
    assert stock > 10
    for name in ("ours, eager, fp32", "jit", "onnxruntime, fp32"):
        assert row["detections"][name] == stock
    assert (tmp_path / "results.md").read_text().count("| ") > 20
