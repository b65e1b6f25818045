"""Speed against AP: the evaluator's AP, the model's time, published figures apart."""

import json
import time

import pytest
import torch
from made_exports import made_onnx
from test_train import SMALL

from retina_focal.config import config_path, get_cfg
from retina_focal.tools import speed
from retina_focal.tools.common import load_cfg
from retina_focal.training.assembly import Trainer


@pytest.fixture(scope="module")
def checkpoint(data, tmp_path_factory) -> tuple[str, str]:
    """Config and weights of a network that detects something, if by chance."""
    folder = tmp_path_factory.mktemp("speed") / "small"
    folder.mkdir()
    cfg = get_cfg()
    cfg.merge_from_file(config_path("COCO-Detection/retinanet_R_50_FPN_1x.yaml"))
    cfg.merge_from_list(SMALL)
    cfg.merge_from_list(["MODEL.RETINANET.SCORE_THRESH_TEST", 0.0, "MODEL.DEVICE", "cpu"])
    cfg.DATASETS.TEST = ["rectangles"]
    cfg.DATASETS.COCO_JSON = [["rectangles", str(data / "a.json"), str(data)]]
    (folder / "config.yaml").write_text(cfg.dump())
    torch.manual_seed(0)
    torch.save(Trainer.build_model(cfg).state_dict(), folder / "model.pth")
    return str(folder / "config.yaml"), str(folder / "model.pth")


def test_the_ap_at_each_scale_is_that_of_an_evaluation_at_that_scale(checkpoint, tmp_path):
    config, weights = checkpoint
    speed.main(["--checkpoint", config, weights, "--sizes", "32,64", "--output", str(tmp_path)])
    rows = json.loads((tmp_path / "speed.json").read_text())["rows"]
    assert [(row["checkpoint"], row["size"]) for row in rows] == [("small", 32), ("small", 64)]
    for row in rows:
        opts = ["MODEL.WEIGHTS", weights, "INPUT.MIN_SIZE_TEST", str(row["size"])]
        cfg = load_cfg(config, [*opts, "OUTPUT_DIR", str(tmp_path)])
        model = Trainer.build_model(cfg)
        model.load_state_dict(torch.load(weights, weights_only=True))
        assert row["AP"] == Trainer.test(cfg, model)["bbox"]["AP"]
        assert 0 < row["ms"][0] <= row["ms"][1] <= row["ms"][2]
    for name in ("speed.md", "speed.png"):
        assert (tmp_path / name).stat().st_size > 0


def get_cfg_of(path: str):
    cfg = get_cfg()
    cfg.merge_from_file(path)
    return cfg


class Sleeper(torch.nn.Module):
    """A model, a mapper and an evaluator that note who was called when."""

    def __init__(self, name: str, calls: list):
        super().__init__()
        self.name, self.calls = name, calls

    def forward(self, inputs):
        self.calls.append((self.name, inputs[0]))
        time.sleep(0.02)
        return [{}]

    def mapper(self, record):
        time.sleep(0.05)
        return record

    def reset(self):
        pass

    def process(self, inputs, outputs):
        pass

    def evaluate(self):
        return {"bbox": {"AP": 0, "AP50": 0}}


def test_points_take_turns_and_only_the_models_call_is_timed():
    calls = []
    models = [Sleeper(name, calls) for name in "ab"]
    points = [speed.Point(model.name, 64, model, model.mapper, model) for model in models]
    rows = speed.measure(points, [{"id": i} for i in range(6)])
    assert calls == [(name, {"id": i}) for i in range(6) for name in "ab"]
    # 20 ms asleep, not the 50 ms more of the mapper.
    assert all(20 <= row["ms"][1] < 50 for row in rows)


def test_published_figures_never_share_an_axis_with_measured_ones(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda self, file, **_: figures.append(self))
    row = {"checkpoint": "mine", "size": 64, "AP": 1.0, "AP50": 2.0, "ms": [1, 2, 3]}
    report = {"processor": "a processor", "dataset": "some set", "rows": [row]}
    speed.plot(report, tmp_path / "speed.png")
    here, published = ([line.get_label() for line in axes.lines] for axes in figures[0].axes)
    assert here == ["mine"] and published == list(speed.PUBLISHED)
    assert "a processor" in figures[0].axes[0].get_title()
    assert "Nvidia M40" in figures[0].axes[1].get_title()


def test_checkpoints_of_different_test_sets_are_not_compared(checkpoint, tmp_path):
    config, weights = checkpoint
    (row,) = get_cfg_of(config).DATASETS.COCO_JSON
    rows = [row, ["other_rectangles", *row[1:]]]
    other = tmp_path / "other.yaml"
    other.write_text(
        f"_BASE_: {config}\nDATASETS:\n  TEST: [other_rectangles]\n  COCO_JSON: {rows}\n"
    )
    with pytest.raises(SystemExit, match="can't be compared"):
        speed.main(["--checkpoint", config, weights, "--checkpoint", str(other), weights])


def test_a_config_without_a_test_set_is_refused_in_words(checkpoint):
    config, weights = checkpoint
    with pytest.raises(SystemExit, match=r"names no dataset; add: DATASETS\.TEST"):
        speed.main(["--checkpoint", config, weights, "DATASETS.TEST", "()"])


def test_a_checkpoint_is_named_by_what_tells_it_from_the_others():
    a, b = ("a.yaml", "one/model.pth"), ("a.yaml", "two/model.pth")
    assert speed._labels([a, b]) == ["one", "two"]
    assert speed._labels([a, ("a.yaml", "one/other.pth")]) == ["one/model.pth", "one/other.pth"]
    assert speed._labels([a, ("b.yaml", "one/model.pth")])[1] == "b.yaml, one/model.pth"
    with pytest.raises(ValueError, match="given twice"):
        speed._labels([a, a])


def test_exported_files_take_their_turns_beside_a_checkpoint(checkpoint, data, tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        made_onnx(tmp_path / name)
    argv = ["--checkpoint", *checkpoint, "--output", str(tmp_path / "out"), "--sizes", "64"]
    argv += ["--exported", str(tmp_path / "one/model.onnx"), "--exported", str(tmp_path / "two")]
    argv += ["DATASETS.TEST", "('rectangles',)"]
    argv += ["DATASETS.COCO_JSON", str([["rectangles", str(data / "a.json"), str(data)]])]
    speed.main(argv)
    rows = json.loads((tmp_path / "out/speed.json").read_text())["rows"]
    assert [row["detections"] for row in rows[1:]] == [18, 18]
    assert [row["checkpoint"] for row in rows] == ["small", "one", "two"]


def test_what_is_measured_has_to_be_named(capsys):
    with pytest.raises(SystemExit) as stop:
        speed.main([])
    assert stop.value.code == 2 and "--checkpoint CONFIG WEIGHTS" in capsys.readouterr().err
