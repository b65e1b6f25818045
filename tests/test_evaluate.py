"""`retina-focal evaluate`, from its arguments to what it prints and writes."""

import json
import logging
import math
import os
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from made_detections import CLASSES, made, of_pycocotools
from test_train import SMALL

from retina_focal.config import config_path, get_cfg
from retina_focal.data.sources import load
from retina_focal.evaluation import operating_points, summary
from retina_focal.evaluation.summary import Subject, measure
from retina_focal.tools import evaluate
from retina_focal.tools.common import load_cfg
from retina_focal.tools.points import points_of
from retina_focal.tools.runs import detections, open_run, run_model, use_data
from retina_focal.training.assembly import Trainer
from retina_focal.training.checkpoint_files import write_checkpoint

NUMBERS = 1e-9  # percent


@pytest.fixture
def files(tmp_path) -> tuple[str, str]:
    """Ground truth and results in COCO format."""
    dataset, results = made(0, 20)
    for image in dataset["images"]:
        (tmp_path / image["file_name"]).touch()
    (tmp_path / "truth.json").write_text(json.dumps(dataset))
    (tmp_path / "found.json").write_text(json.dumps(results))
    return str(tmp_path / "found.json"), str(tmp_path / "truth.json")


def printed(capsys, *argv: str) -> dict | list:
    evaluate.main(["--json", "--draws", "50", *argv])
    return json.loads(capsys.readouterr().out)


def test_the_numbers_of_a_file_are_pycocotools(files, capsys):
    (report,) = printed(capsys, files[0], "--data", files[1])
    stats = 100 * of_pycocotools(*made(0, 20), [1, 10, 100]).stats
    names = ("AP", "AP50", "AP75", "APs", "APm", "APl")
    assert [report["metrics"][x] for x in names] == pytest.approx(stats[:6], abs=NUMBERS)
    assert list(report["classes"]) == list(CLASSES)
    precision = of_pycocotools(*made(0, 20), [1, 10, 100]).eval["precision"][..., -1]
    for label, row in enumerate(report["classes"].values()):
        for area, size in enumerate(names[3:], start=1):
            of_size = precision[:, :, label, area]
            expected = 100 * of_size[of_size > -1].mean() if (of_size > -1).any() else None
            assert row[size] == pytest.approx(expected, abs=NUMBERS)
    mean = np.mean([row["AP"] for row in report["classes"].values()])
    assert mean == pytest.approx(report["metrics"]["AP"], abs=NUMBERS)
    for name in names[:3]:
        low, high = report["intervals"][name]
        assert low < report["metrics"][name] < high
    assert sum(row["boxes"] for row in report["classes"].values()) == report["boxes"]
    for name, line in report["precision_recall"]["classes"].items():
        ap50 = report["classes"][name]["AP50"]
        assert 100 * np.mean(line["0.5"]) == pytest.approx(ap50, abs=NUMBERS)


def test_a_checkpoint_is_no_file_of_results(run):
    with pytest.raises(SystemExit, match="is a checkpoint; name the folder of its run") as error:
        evaluate.main([str(run / "model_final.pth")])
    typed = shlex.split(str(error.value).partition("retina-focal evaluate ")[2])
    evaluate.main([typed[0], "--draws", "5", *typed[1:]])


def test_one_image_gives_no_intervals(tmp_path, capsys):
    dataset, results = made(0, 1)
    for name, content in (("truth", dataset), ("found", results)):
        (tmp_path / name).with_suffix(".json").write_text(json.dumps(content))
    (tmp_path / dataset["images"][0]["file_name"]).touch()
    found, truth = (str(tmp_path / f"{x}.json") for x in ("found", "truth"))
    (report,) = printed(capsys, found, "--data", truth)
    assert not any(report["intervals"].values()) and report["metrics"]["AP"] > 0
    evaluate.main([found, "--data", truth])
    assert "95% intervals" not in capsys.readouterr().out
    rows = printed(capsys, found, found, "--data", truth, "--compare")["metrics"].values()
    assert all(x["interval"] is None and x["better"] is None for x in rows)


def test_without_hotcoco_the_numbers_are_the_same_and_the_errors_are_left_out(files, monkeypatch):
    dataset, results = made(0, 20)
    expected = measure(Subject("a", "b", dataset, results), num_draws=3)

    def missing(*_):
        raise summary.UserError("not there")

    monkeypatch.setattr(summary, "box_ap", missing)
    monkeypatch.setattr(summary, "error_types", missing)
    found = measure(Subject("a", "b", dataset, results), num_draws=3)
    assert found["metrics"] == pytest.approx(expected["metrics"], abs=NUMBERS)
    assert found["errors"] is None and expected["errors"]


def test_tables_json_and_figures_are_written(files, tmp_path, capsys):
    evaluate.main([files[0], "--data", files[1], "--draws", "9", "--output", str(tmp_path / "out")])
    text = capsys.readouterr().out
    assert "no operating points" in text and "suspected labels" in text
    assert (tmp_path / "out/evaluation.md").read_text() in text
    assert json.loads((tmp_path / "out/evaluation.json").read_text())[0]["images"] == 20
    for name in ("precision_recall", "confusion", "calibration", "errors"):
        content = (tmp_path / f"out/{name}.svg").read_text()
        assert content.rstrip().endswith("</svg>") and "nan" not in content


def test_a_file_compared_with_itself_differs_in_nothing(files, capsys):
    report = printed(capsys, files[0], files[0], "--data", files[1], "--compare")
    for row in report["metrics"].values():
        assert (row["difference"], row["interval"], row["better"]) == (0, [0, 0], 0)


def test_boxes_that_fit_less_are_worse_in_every_draw(files, tmp_path, capsys):
    """The second file's boxes are the first's labels; a paired difference has a narrow interval."""
    truth = json.loads(Path(files[1]).read_text())["annotations"]
    for name, part in (("first", 0.72), ("second", 1.0)):
        results = [
            {**x, "bbox": [*x["bbox"][:2], part * x["bbox"][2], x["bbox"][3]], "score": 0.9}
            for x in truth
            if not x["iscrowd"]
        ]
        (tmp_path / name).write_text(json.dumps(results))
    paths = [str(tmp_path / name) for name in ("first", "second")]
    report = printed(capsys, *paths, "--data", files[1], "--compare")
    row = report["metrics"]["AP"]
    # An IoU of 0.72 is enough at five of the ten thresholds.
    assert row["second"] == pytest.approx(100) and row["first"] == pytest.approx(50, abs=3)
    assert row["difference"] == row["second"] - row["first"]
    assert row["better"] == 1 and 40 < row["interval"][0] <= row["interval"][1] < 60
    evaluate.main([*paths, "--data", files[1], "--compare", "--draws", "9"])
    assert "same for both" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"image_id": 99}, r"record \[2\]: image_id is 99, which the dataset lacks"),
        ({"image_id": True}, r"record \[2\]: image_id is True"),
        ({"category_id": 1}, r"record \[2\]: category_id is 1, which"),
        ({"bbox": [1, 2, 3]}, r"record \[2\]: bbox is \[1, 2, 3\]; expected"),
        ({"bbox": [1, 2, -3, 4]}, "of at least 0"),
        ({"bbox": [1, 2, 3, math.nan]}, "bbox is .*nan"),
        ({"bbox": [1, 2, 3, 10**400]}, "bbox is .*000"),
        ({"score": None}, "score is None"),
        ({"score": 1e300}, "score is 1e[+]300; expected a number from 0 to 1"),
        ({"score": -0.1}, "score is -0.1; expected"),
    ],
)
def test_a_record_that_is_wrong_is_named(files, record, words):
    results = json.loads(Path(files[0]).read_text())
    results[2] |= record
    Path(files[0]).write_text(json.dumps(results))
    with pytest.raises(SystemExit, match=words):
        evaluate.main([files[0], "--data", files[1]])


@pytest.mark.parametrize(("content", "words"), [("{}", "holds a dict"), ("[", "is not JSON")])
def test_a_file_that_holds_no_results_is_refused(files, content, words):
    Path(files[0]).write_text(content)
    with pytest.raises(SystemExit, match=words):
        evaluate.main([files[0], "--data", files[1]])


def test_what_is_missing_is_said(files, capsys):
    with pytest.raises(SystemExit, match="name the dataset of its results: --data"):
        evaluate.main([files[0]])
    with pytest.raises(SystemExit, match="'nowhere' is no folder"):
        evaluate.main(["nowhere"])
    for argv in ([files[0], "--compare"], [files[0], "--rule", "best"]):
        with pytest.raises(SystemExit) as stop:
            evaluate.main([*argv, "--data", files[1]])
        assert stop.value.code == 2


def test_no_detection_at_all_is_a_report_too(files, capsys):
    Path(files[0]).write_text("[]")
    (report,) = printed(capsys, files[0], "--data", files[1])
    assert report["metrics"]["AP"] == 0 and report["errors"] is None
    evaluate.main([files[0], "--data", files[1], "--draws", "5"])
    assert "0 detections" in capsys.readouterr().out


def test_more_than_100_detections_of_an_image_all_count(files, capsys):
    """As in training with a higher TEST.DETECTIONS_PER_IMAGE."""
    dataset, results = made(1, 4, 900)
    Path(files[0]).write_text(json.dumps(results))
    Path(files[1]).write_text(json.dumps(dataset))
    most = max(sum(x["image_id"] == y["id"] for x in results) for y in dataset["images"])
    (report,) = printed(capsys, files[0], "--data", files[1])
    expected = 100 * of_pycocotools(dataset, results, [1, 10, most]).stats[0]
    assert report["detections_counted"] == most > 100
    assert report["metrics"]["AP"] == pytest.approx(expected, abs=NUMBERS)


@pytest.fixture
def run(trained, tmp_path) -> Path:
    """A copy of the folder, for a test to write to."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory) -> Path:
    """A folder with a network that detects something, if by chance."""
    cfg = get_cfg()
    cfg.merge_from_file(config_path("COCO-Detection/retinanet_R_50_FPN_1x.yaml"))
    cfg.merge_from_list(SMALL)
    cfg.merge_from_list(["MODEL.RETINANET.SCORE_THRESH_TEST", 0.0, "MODEL.DEVICE", "cpu"])
    names = ["rectangles_val", "rectangles_test"]
    cfg.DATASETS.COCO_JSON = [[name, str(data / "a.json"), str(data)] for name in names]
    cfg.DATASETS.TEST = names[1:]
    cfg.MODEL.RETINA_FOCAL.DATA.VAL = names[0]
    folder = tmp_path_factory.mktemp("evaluate")
    (folder / "config.yaml").write_text(cfg.dump())
    torch.manual_seed(0)
    content = {"model": Trainer.build_model(cfg).state_dict(), "classes": ["red", "blue"]}
    write_checkpoint(folder / "model_final.pth", content)
    return folder


def test_the_numbers_of_a_run_are_those_of_its_training(run, capsys):
    (report,) = printed(capsys, str(run), "--opts", "MODEL.RETINA_FOCAL.DATA.VAL", "")
    weights = run / "model_final.pth"
    cfg = load_cfg(str(run / "config.yaml"), ["OUTPUT_DIR", str(run)])
    model = Trainer.build_model(cfg)
    model.load_state_dict(torch.load(weights, weights_only=True)["model"])
    expected = Trainer.test(cfg, model)["bbox"]
    for name in ("AP", "AP50", "AP-red", "AP-blue"):
        assert report["metrics"][name] == pytest.approx(expected[name], abs=NUMBERS)
    assert report["label"] == str(weights) and report["dataset"] == "rectangles_test"


def test_nothing_is_recorded_for_gradients(run):
    """What records takes more memory, and in bf16 other steps: scores would not be a training's."""
    opened = open_run(run)
    data = use_data(opened, opened.cfg.DATASETS.TEST[0])
    model, recorded = run_model(opened), []
    model.register_forward_pre_hook(lambda *_: recorded.append(torch.is_grad_enabled()))
    assert detections(opened, model, data) and recorded and not any(recorded)


def test_operating_points_are_chosen_on_val_and_lie_beside_the_weights(run, capsys):
    (report,) = printed(capsys, str(run), "--rule", "fppi=2")
    points = operating_points.read(run)
    assert points.content["dataset"] == "rectangles_val" and points.content["rule"] == "fppi=2"
    assert points.content["weights"] == "model_final.pth"
    assert report["operating_points"] == {"rule": "fppi=2", "dataset": "rectangles_val"}
    for name, row in report["classes"].items():  # the test set has the same pictures
        expected = points.content["classes"][name]
        assert row["point"]["recall"] == expected["recall"]
        assert row["point"]["false_positives_per_image"] <= 2
    # Measured on the dataset that they were chosen on, a calibration must not know it.
    (row,) = (x for x in load_cfg(str(run / "config.yaml")).DATASETS.COCO_JSON if "val" in x[0])
    for name in ("rectangles_val", f"coco:{row[1]}?images={row[2]}"):
        (report,) = printed(capsys, str(run), "--data", name)
        assert report["calibration"]["by"] == "cross-fitted"


def test_operating_points_of_other_settings_are_told_of(run, caplog):
    """As of test-time augmentation: scores differ, so do the thresholds that suit them."""
    caplog.set_level(logging.WARNING)
    augmented = ["TEST.AUG.ENABLED", "True", "TEST.AUG.MIN_SIZES", "(64,)"]
    for chosen, used in ((augmented, []), ([], augmented)):
        evaluate.main([str(run), "--draws", "5", "--opts", *chosen])
        assert points_of(open_run(run, None, chosen)) and not caplog.messages
        assert points_of(open_run(run, None, used))
        (line,) = caplog.messages
        is_on = chosen == augmented
        assert f"was chosen with TEST.AUG.ENABLED {is_on} (here {not is_on})" in line
        # The command that it names chooses them with the settings that are used.
        typed = shlex.split(line.partition("retina-focal evaluate ")[2])
        evaluate.main([typed[0], "--draws", "5", *typed[1:]])
        caplog.clear()
        assert points_of(open_run(run, None, used)) and not caplog.messages


@pytest.mark.parametrize(
    "changed",
    [
        ("MODEL.RETINA_FOCAL.TEST.TILE", "64"),
        ("MODEL.RETINANET.SCORE_THRESH_TEST", "0.2"),
        ("TEST.DETECTIONS_PER_IMAGE", "7"),
        ("MODEL.RETINANET.TOPK_CANDIDATES_TEST", "9"),
    ],
)
def test_what_chooses_among_boxes_is_a_setting_of_the_points(run, caplog, changed):
    caplog.set_level(logging.WARNING)
    evaluate.main([str(run), "--draws", "5"])
    caplog.clear()
    assert points_of(open_run(run, None, changed))
    assert f"was chosen with {changed[0]}" in caplog.text and f"(here {changed[1]})" in caplog.text


def test_points_that_do_not_tell_of_tiles_were_chosen_without(run, caplog):
    caplog.set_level(logging.WARNING)
    evaluate.main([str(run), "--draws", "5"])
    content = dict(operating_points.read(run).content)
    key = "MODEL.RETINA_FOCAL.TEST.TILE"
    content["settings"] = {k: v for k, v in content["settings"].items() if k != key}
    operating_points.write(run, content)
    caplog.clear()
    assert points_of(open_run(run)) and not caplog.messages
    assert points_of(open_run(run, None, [key, "64"]))
    assert f"was chosen with {key} 0 (here 64)" in caplog.text


def test_operating_points_of_earlier_weights_are_not_used(run, caplog):
    """A second training in a folder has the same file names."""
    evaluate.main([str(run), "--draws", "5"])
    assert points_of(open_run(run))
    weights = run / "model_final.pth"
    content = torch.load(weights, weights_only=True)
    content["model"]["head.cls_score.bias"] += 1
    write_checkpoint(weights, content)
    assert points_of(open_run(run)) is None
    assert "is of an earlier model_final.pth, so it is not used; again: " in caplog.text


def test_points_of_other_weights_are_chosen_by_the_command_that_is_named(run, caplog):
    evaluate.main([str(run), "--draws", "5"])
    other = run / "model_other.pth"
    shutil.copy(run / "model_final.pth", other)
    opts = ["MODEL.WEIGHTS", str(other)]
    assert points_of(open_run(run, None, opts)) is None
    typed = shlex.split(caplog.messages[-1].partition("retina-focal evaluate ")[2])
    evaluate.main([typed[0], "--draws", "5", *typed[1:]])
    assert points_of(open_run(run, None, opts))


def test_without_val_none_are_chosen_and_those_there_are_used(run, capsys):
    opts = ["--opts", "MODEL.RETINA_FOCAL.DATA.VAL", ""]
    evaluate.main([str(run), "--draws", "5", *opts])
    assert "no operating points" in capsys.readouterr().out
    assert not (run / "operating_points.json").exists()
    about = {"format": 1, "rule": "f1", "dataset": "another", "classes": {}}
    about["weights"] = "model_final.pth"
    operating_points.write(run, about)
    evaluate.main([str(run), "--draws", "5", "--rule", "fppi=1", *opts])
    assert "the highest F1 on another" in capsys.readouterr().out
    assert operating_points.read(run).content == about


def test_bccd_is_measured_straight_from_its_folder(tmp_path, capsys):
    """Its labels as detections give 100; shrunk to an IoU of 0.72 they count at five of ten."""
    folder = Path(os.environ.get("DETECTRON2_DATASETS", "datasets")) / "bccd"
    if not (folder / "Annotations").is_dir():
        pytest.skip("no pictures of BCCD; put them under $DETECTRON2_DATASETS/bccd")
    uri = f"voc:{folder}?split=test"
    truth = json.loads(load(uri).json_file.read_bytes())["annotations"]
    path = tmp_path / "found.json"
    for part, expected in ((1.0, 100), (0.72, 50)):
        results = [
            {**x, "bbox": [*x["bbox"][:2], part * x["bbox"][2], x["bbox"][3]], "score": 0.9}
            for x in truth
        ]
        path.write_text(json.dumps(results))
        (report,) = printed(capsys, str(path), "--data", uri)
        assert list(report["classes"]) == ["Platelets", "RBC", "WBC"]
        assert report["metrics"]["AP"] == pytest.approx(expected, abs=0.5)
        assert report["detections"] == len(truth)
