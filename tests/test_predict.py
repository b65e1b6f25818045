"""`retina-focal predict`: its files, its exit status and what counts as a detection."""

import csv
import json
import resource
import subprocess
import sys
from contextlib import redirect_stdout
from io import StringIO
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from conftest import PLUGIN, small_cfg
from detectron2.modeling import build_model
from PIL import Image
from pycocotools.coco import COCO
from test_train import ROOT
from torch import nn

from retina_focal import get_cfg
from retina_focal.data.sources import load
from retina_focal.evaluation import operating_points
from retina_focal.evaluation.inputs import find_inputs
from retina_focal.evaluation.prediction import Predictor
from retina_focal.tools.predict import command
from retina_focal.tools.predict.command import main
from retina_focal.weights.load import load_model

CLASSES = ["red", "<b>&", "été"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of a small random network, which finds many boxes."""
    folder = tmp_path_factory.mktemp("run")
    cfg = get_cfg()
    cfg.merge_from_other_cfg(small_cfg(**PLUGIN))
    cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = 64, 107
    torch.manual_seed(0)
    model = build_model(cfg)
    nn.init.normal_(model.head.cls_score.weight, std=0.3)
    nn.init.constant_(model.head.cls_score.bias, -1)
    (folder / "config.yaml").write_text(cfg.dump())
    content = {"model": model.state_dict(), "classes": CLASSES}
    torch.save(content, folder / "model_final.pth")
    return folder


@pytest.fixture
def photos(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("a.png", "day/b.png"):
        (tmp_path / "photos" / name).parent.mkdir(exist_ok=True)
        image = Image.fromarray(rng.integers(0, 256, (90, 120, 3), np.uint8))
        image.save(tmp_path / "photos" / name)
    return tmp_path / "photos"


def predict(*arguments: object) -> str:
    with redirect_stdout(StringIO()) as text:
        main([str(x) for x in arguments])
    return text.getvalue()


def rows(folder) -> list[dict]:
    return list(csv.DictReader((folder / "detections.csv").open(newline="", encoding="utf-8")))


def test_all_formats_have_the_same_boxes(run, photos, tmp_path):
    out = tmp_path / "out"
    text = predict(
        run, photos, "--output", out, "--threshold", 0.4, "--format", "csv,coco,yolo,voc,drawings"
    )
    cfg = get_cfg()
    cfg.merge_from_file(str(run / "config.yaml"))
    cfg.MODEL.WEIGHTS, cfg.DATASETS.TEST = str(run / "model_final.pth"), ()
    expected = list(Predictor(cfg, load_model(cfg))(find_inputs([str(photos)])))
    expected = [x.instances[x.instances.scores >= 0.4] for x in expected]
    boxes = np.concatenate([x.pred_boxes.tensor.numpy() for x in expected])
    names = [CLASSES[i] for x in expected for i in x.pred_classes]
    assert len(boxes) > 40 and f"2 pictures, {len(boxes)} boxes" in text

    table = rows(out)
    found = [[float(x[key]) for key in ("xmin", "ymin", "xmax", "ymax")] for x in table]
    np.testing.assert_allclose(found, boxes, atol=0.0051)
    assert [x["label"] for x in table] == names
    assert table[-1]["image_path"] == str(photos / "day/b.png") and table[0]["probability"] == ""

    coco = COCO(str(out / "images.json")).loadRes(str(out / "results.json"))
    corners = [x["bbox"] for x in coco.dataset["annotations"]]
    corners = [[x, y, x + width, y + height] for x, y, width, height in corners]
    np.testing.assert_allclose(corners, boxes, atol=0.0011)
    categories = {x["id"]: x["name"] for x in coco.dataset["categories"]}
    assert [categories[x["category_id"]] for x in coco.dataset["annotations"]] == names

    found = []
    for name in ("a", "day/b"):
        lines = [x.split() for x in (out / "labels" / f"{name}.txt").read_text().splitlines()]
        for label, x, y, width, height, _ in lines:
            center = np.array([float(x) * 120, float(y) * 90])
            half = np.array([float(width) * 120, float(height) * 90]) / 2
            found.append([*(center - half), *(center + half)])
            assert CLASSES[int(label)] == names[len(found) - 1]
    np.testing.assert_allclose(found, boxes, atol=0.001)

    found = []
    for name in ("a", "day/b"):
        for item in ElementTree.parse(out / "annotations" / f"{name}.xml").iter("object"):
            found.append([float(item.findtext(f"bndbox/{x}")) for x in ("xmin", "ymin")])
            assert item.findtext("name") == names[len(found) - 1]
    np.testing.assert_allclose(found, boxes[:, :2], atol=0.0051)
    assert Image.open(out / "drawings" / "day/b.jpg").size == (120, 90)


def test_a_file_that_can_not_be_used_gives_status_1_and_the_others_are_written(
    run, photos, tmp_path, capsys
):
    (photos / "a.png").write_bytes(b"no picture")
    Image.new("RGB", (20_000, 1)).save(photos / "thread.png")
    with pytest.raises(SystemExit) as stop:
        main([str(x) for x in (run, photos, "--output", tmp_path / "out")])
    assert "2 of the files could not be used" in stop.value.code and "a.png" in stop.value.code
    assert "its 20000 x 1 pixels are 107 x 0 to the model" in capsys.readouterr().err
    assert {x["image_path"] for x in rows(tmp_path / "out")} == {str(photos / "day/b.png")}


def test_thresholds_are_those_of_the_operating_points(run, photos, tmp_path):
    entry = {"calibration": {"method": "platt", "scores": [0, 1], "values": [0, 0.5]}}
    content = {
        "format": operating_points.FORMAT,
        "weights": "model_final.pth",
        "classes": {
            "red": {"threshold": 0.45, **entry},
            "<b>&": {"threshold": None, **entry},
        },
    }
    path = run / operating_points.FILE
    try:
        path.write_text(json.dumps(content))
        text = predict(run, photos, "--output", tmp_path / "out", "--format", "csv")
        table = rows(tmp_path / "out")
        assert "red 0.45, <b>& never, été 0.30 (not in it)" in text
        lowest = {name: 1.0 for name in CLASSES}
        for row in table:
            score = float(row["score"])
            lowest[row["label"]] = min(lowest[row["label"]], score)
            expected = score if row["label"] == "été" else score / 2
            assert float(row["probability"]) == pytest.approx(expected, abs=1e-4)
        assert lowest["red"] >= 0.45 and lowest["<b>&"] == 1 and 0.3 <= lowest["été"] < 0.45
        content["weights"] = "model_best.pth"
        path.write_text(json.dumps(content))
        text = predict(run, photos, "--output", tmp_path / "other", "--format", "csv")
        assert "a score of 0.3 on" in text
    finally:
        path.unlink()


def test_a_threshold_below_the_config_s_is_kept(run, photos, tmp_path):
    pairs = ("--opts", "MODEL.RETINANET.SCORE_THRESH_TEST", 0.5)
    arguments = (run, photos / "a.png", "--output", tmp_path, "--format", "csv")
    predict(*arguments, "--threshold", 0.4, *pairs)
    lower = rows(tmp_path)
    predict(*arguments, "--threshold", 0.4)
    assert len(rows(tmp_path)) == len(lower) > 0
    assert min(float(x["score"]) for x in lower) < 0.5


def test_a_config_file_in_place_of_a_run(run, photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = ("--output", "out", "--format", "csv", "--opts", "MODEL.WEIGHTS")
    predict("--config-file", run / "config.yaml", "photos", *options, run / "model_final.pth")
    found = rows(tmp_path / "out")
    predict(run, "photos", *options[:-2])
    assert rows(tmp_path / "out") == found
    # What is written can be corrected and read as a dataset.
    content = json.loads(load("csv:out/detections.csv?images=.").json_file.read_text())
    assert [x["file_name"] for x in content["images"]] == ["photos/a.png", "photos/day/b.png"]
    assert len(content["annotations"]) == len(found)


def test_an_interruption_leaves_whole_files_of_what_is_done(run, photos, tmp_path, monkeypatch):
    class Interrupted(Predictor):
        def __call__(self, inputs):
            yield next(iter(super().__call__(inputs)))
            raise KeyboardInterrupt

    monkeypatch.setattr(command, "Predictor", Interrupted)
    with pytest.raises(SystemExit, match="interrupted after 1 pictures"):
        main([str(x) for x in (run, photos, "--output", tmp_path, "--format", "csv,coco")])
    images = json.loads((tmp_path / "images.json").read_text())["images"]
    assert [x["file_name"] for x in images] == [str(photos / "a.png")] and rows(tmp_path)
    assert len(json.loads((tmp_path / "results.json").read_text())) == len(rows(tmp_path))


@pytest.mark.parametrize(
    "arguments, text",
    [
        (["run"], "no INPUT is given"),
        (["run", "photos", "--format", "csv,nope"], "there is no format 'nope'"),
        (["run", "photos", "--threshold", "50"], "'50' is not a number from 0 to 1"),
        (["run", "photos", "--batch-size", "0"], "is not a whole number"),
    ],
)
def test_wrong_usage_gives_status_2(arguments, text, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2 and text in capsys.readouterr().err


@pytest.mark.slow
def test_a_picture_of_12000_px_takes_less_than_2_gib(run, tmp_path):
    rng = np.random.default_rng(0)
    tile = Image.fromarray(rng.integers(0, 256, (500, 500, 3), np.uint8)).resize((3000, 3000))
    image = Image.new("RGB", (12000, 12000))
    for x in range(0, 12000, 3000):
        for y in range(0, 12000, 3000):
            image.paste(tile, (x, y))
    exif = Image.Exif()
    exif[274] = 6  # the worst: it is turned
    image.save(tmp_path / "large.jpg", exif=exif)
    del image
    script = "import sys; from retina_focal.tools.predict import main; main(sys.argv[1:])"
    arguments = [run, tmp_path / "large.jpg", "--tile", 1024, "--output", tmp_path / "out"]
    code = [sys.executable, "-W", "ignore", "-c", script, *map(str, arguments)]
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    subprocess.run(code, check=True, env=environment)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    print(f"peak {peak:.2f} GiB")
    assert peak < 2 and len(rows(tmp_path / "out")) > 1000
