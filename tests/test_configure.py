"""The config that `retina-focal configure` writes."""

import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from detectron2.data import DatasetCatalog
from PIL import Image
from test_anchor_search import table_of
from test_sources import write_voc

from retina_focal.config import config_path, flatten, get_cfg
from retina_focal.data.anchor_search import search
from retina_focal.data.coverage import Coverage, anchors_of
from retina_focal.data.decisions import STRICTER, THRESHOLDS, Setting
from retina_focal.data.fingerprint import Machine, Pace, fingerprint
from retina_focal.errors import UserError
from retina_focal.merging import merge_file
from retina_focal.tools.common import load_cfg
from retina_focal.tools.configure import command, pace
from retina_focal.tools.configure.command import main
from retina_focal.tools.configure.splits import find_splits


@pytest.fixture
def arguments(data, lite0_weights, tmp_path, monkeypatch) -> list[str]:
    """Of a command whose datasets are six pictures, and whose weights lie in the cache."""
    monkeypatch.setattr(command, "cache_folder", lambda: lite0_weights.parent)
    uri = f"coco:{data}/a.json?images={data}"
    yield [uri, "--val", uri, "--minutes", "8", "--output", str(tmp_path / "rectangles.yaml")]
    for name in ("rectangles_train", "rectangles_val"):
        if name in DatasetCatalog:
            DatasetCatalog.remove(name)


@pytest.fixture
def idle(monkeypatch) -> None:
    """A machine whose pace is known."""

    def paced(settings, val_records, shorter, batch, machine) -> Pace:
        return Pace(shorter, batch, 20.0, 0.57 * (shorter / 320) ** 2, 0.1)

    monkeypatch.setattr(command, "measured_pace", paced)


def test_every_line_that_sets_something_says_why(arguments, idle):
    main(arguments)
    path = Path(arguments[-1])
    lines = [x for x in path.read_text().splitlines() if not x.startswith("#")]
    loaded = flatten(yaml.safe_load(path.read_text()))
    valued = [x for x in lines if not x.split("  #")[0].rstrip().endswith(":")]
    assert len(valued) == len(loaded) > 40
    assert all(len(x.split("  # ", 1)[1].strip()) > 3 for x in valued)


def test_the_file_is_plain_and_stands_alone(arguments, idle, tmp_path, monkeypatch):
    main(arguments)
    path, cfg = arguments[-1], get_cfg()
    cfg.merge_from_file(path, allow_unsafe=False)
    assert "_BASE_" not in Path(path).read_text()
    assert Path(cfg.MODEL.WEIGHTS).is_file()
    assert cfg.MODEL.RETINANET.NUM_CLASSES == 2
    assert cfg.DATASETS.TRAIN == ("rectangles_train",)
    assert cfg.DATASETS.TEST == ("rectangles_val",)
    assert cfg.MODEL.RETINA_FOCAL.DATA.VAL == "rectangles_val"
    assert cfg.DATASETS.SOURCES[0] == ["rectangles_train", arguments[0]]
    assert cfg.OUTPUT_DIR == "output/rectangles"
    # 36 x 28 px are 32 px of 64: nothing is to be enlarged beyond the least size.
    assert cfg.INPUT.MIN_SIZE_TEST == 224
    assert load_cfg(path).SOLVER.MAX_ITER == cfg.SOLVER.MAX_ITER


def test_test_is_not_looked_at(tmp_path, monkeypatch):
    for name in ("train", "val", "test"):
        write_voc(tmp_path / "voc", split=name)
    found = find_splits(f"voc:{tmp_path}/voc", None, "mine")
    assert [name for name, _ in found] == ["mine_train", "mine_val"]
    assert not any("test" in uri.rpartition("split=")[2] for _, uri in found)


def test_where_val_is_missing_a_part_is_held_out(data):
    found = find_splits(f"coco:{data}/a.json?images={data}", None, "mine")
    assert [uri.rpartition("&split=")[2] for _, uri in found] == ["train&val=0.2", "val&val=0.2"]
    DatasetCatalog.register("a_registered_name", list)
    try:
        with pytest.raises(UserError, match="type its val too: --val NAME"):
            find_splits("a_registered_name", None, "mine")
        pair = find_splits("a_registered_name", f"coco:{data}/a.json", "mine")
        assert pair == [("a_registered_name",) * 2, ("mine_val", f"coco:{data}/a.json")]
        with pytest.raises(UserError, match="is one split; type the other too, --val DATA"):
            find_splits(f"coco:{data}/a.json?split=train", None, "mine")
    finally:
        DatasetCatalog.remove("a_registered_name")


def test_the_output_is_a_yaml_file(arguments, capsys):
    with pytest.raises(SystemExit) as error:
        main([*arguments[:-1], "config.json"])
    assert error.value.code == 2
    assert "ends in .yaml" in capsys.readouterr().err


def test_the_pace_is_read_from_what_the_training_wrote(tmp_path):
    lines = '{"iteration": 3}\n{"iteration": 7, "time": 0.5}\n'
    (tmp_path / "metrics.json").write_text(lines)
    (tmp_path / "inference").mkdir()
    (tmp_path / "val.json").write_text('{"images": [1, 2, 3, 4, 5]}')
    written = {
        pace.DETECTIONS: 10,
        "metrics.json": 10.5,
        "model_final.pth": 9,
        "model_0000007.pth": 8,
    }
    for name, seconds in written.items():
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (seconds, seconds))
    log = "d2: Total inference time: 0:00:01.500000 (0.300000 s / iter per device, on 1 devices)"
    (tmp_path / "log.txt").write_text(f"start\n{log}\n")
    found = pace._pace_of(tmp_path, wall=30.0, shorter=320, batch=4)
    # Half a second of computing the AP of five pictures, a second for a checkpoint.
    start = 30.0 - 0.5 * pace.MEASURED_STEPS - 1.5 - 0.5 - 1.0
    assert found == Pace(320, 4, start, 0.5, 0.4, 1.0)
    assert found.step_at(640) == 2.0


def test_what_others_wrote_is_not_written_over(arguments, idle, capsys):
    path = Path(arguments[-1])
    path.write_text("train: images\n")  # a dataset's data.yaml
    with pytest.raises(SystemExit, match="has not written it; name another file: --output FILE"):
        main(arguments)
    assert path.read_text() == "train: images\n" and "measuring" not in capsys.readouterr().out
    path.unlink()
    path.mkdir()
    with pytest.raises(SystemExit, match="is a folder"):
        main(arguments)
    path.rmdir()
    main(arguments)
    again = [x.replace("8", "9") if x == "8" else x for x in arguments]
    main(again)
    assert "--minutes 9" in path.read_text()
    with pytest.raises(SystemExit):  # a line of its header would be a key of the config
        main([*arguments[:-1], str(path.with_name("a\nSEED.yaml"))])
    assert "has a line break" in capsys.readouterr().err


def test_the_command_to_type_can_be_pasted(arguments, idle, tmp_path, capsys):
    path = tmp_path / "a folder" / "it's.yaml"
    main([*arguments[:-1], str(path)])
    typed = capsys.readouterr().out.splitlines()[-1].partition("type: ")[2]
    assert shlex.split(typed)[-2:] == ["--config-file", str(path)]


def coco(path: Path, boxes_of_image: list, classes=("red", "blue")) -> str:
    """The URI of a COCO file on pictures of 36 x 28 px, with a box per class index."""
    images, annotations = [], []
    for i, labels in enumerate(boxes_of_image, start=1):
        name = f"{path.stem}{i}.png"
        Image.new("RGB", (36, 28)).save(path.with_name(name))
        images.append({"id": i, "file_name": name, "width": 36, "height": 28})
        for label in labels:
            row = {"image_id": i, "category_id": label, "bbox": [2, 2, 20, 20], "area": 400}
            annotations.append({**row, "id": len(annotations) + 1, "iscrowd": 0})
    categories = [{"id": i, "name": x} for i, x in enumerate(classes)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    path.write_text(json.dumps(content))
    return f"coco:{path}?images={path.parent}"


def test_val_is_what_something_can_be_chosen_on(tmp_path, lite0_weights, idle, monkeypatch, capsys):
    monkeypatch.setattr(command, "cache_folder", lambda: lite0_weights.parent)
    train, empty, other = (
        coco(tmp_path / "train.json", [[0, 1]] * 4),
        coco(tmp_path / "empty.json", [[], []]),
        coco(tmp_path / "other.json", [[0], [2]], ("red", "blue", "green")),
    )

    def typed(name: str, train: str, val: str) -> list[str]:
        return [train, "--val", val, "--minutes", "8", "--output", f"{tmp_path}/{name}.yaml"]

    with pytest.raises(SystemExit, match="has 2 pictures and no box in them"):
        main(typed("first", train, empty))
    with pytest.raises(SystemExit, match="has the classes red, blue, green, and train, ") as error:
        main(typed("second", train, other))
    assert "measured_val" not in str(error.value)
    with pytest.raises(SystemExit, match=r"empty\.json.*: the training set has nothing"):
        main(typed("third", empty, train))
    capsys.readouterr()
    main(typed("fourth", train, train))
    assert "4 of the 4 pictures of val are in train too" in capsys.readouterr().out


def test_boxes_that_no_anchor_reaches_are_told_of(arguments, idle, monkeypatch, capsys):
    main(arguments)
    assert "hardly be learned" not in capsys.readouterr().out
    shares = Coverage.shares
    monkeypatch.setattr(Coverage, "shares", lambda *a: {**shares(*a), "below_lower": 0.5})
    main(arguments)
    assert "50.0% of the boxes reach an anchor at an IoU below 0.4 alone" in capsys.readouterr().out


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_with_a_line(number, arguments, monkeypatch, capsys):
    """Popen ends its process, and the temporary folder is removed, for any exception."""
    before = signal.getsignal(signal.SIGTERM)

    def ended(*_: object) -> None:
        if number == signal.SIGINT:  # which a shell's background jobs ignore
            raise KeyboardInterrupt
        signal.raise_signal(number)

    monkeypatch.setattr(command, "measured_pace", ended)
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 128 + number and signal.getsignal(signal.SIGTERM) == before
    assert capsys.readouterr().err.endswith(": interrupted\n")
    assert not Path(arguments[-1]).exists()


def test_anchors_are_those_that_reach_most_boxes_from_the_stricter_iou_on(arguments, idle):
    """Boxes between two sizes of anchors, of which the paper's IoU takes the smaller ones."""
    table, machine = table_of(17, 17, num_boxes=100), Machine(has_gpu=False, cores=2)
    settings = command.base_settings(machine)
    found = fingerprint(table, ("box",), num_val=10)
    decided = command.decide(settings, table, found, machine, minutes=8, val_records=[])
    _, layout = anchors_of(command.config_of({**settings, **decided}))
    sides, longer = (decided[f"INPUT.M{x}_SIZE_TRAIN"].value for x in ("IN", "AX"))
    stricter, paper = (
        search(table, layout, sides, longer, upper, layout.num_per_cell).settings()
        for _, upper in (STRICTER, THRESHOLDS)
    )
    written = {key: decided[key].value for key in stricter}
    assert written == stricter != paper


@pytest.mark.parametrize(("load", "is_said"), [(0.2, False), (9e9, True)])
def test_a_machine_that_is_busy_is_told_of(load, is_said, arguments, idle, monkeypatch, capsys):
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 0, 0))
    main(arguments)
    assert ("last minute 9000000000.0 processes ran" in capsys.readouterr().out) == is_said


def test_a_training_that_fails_is_told_of(arguments, monkeypatch):
    failed = subprocess.CompletedProcess([], 1, "", "some warning\nretina-focal train: no disk\n")
    monkeypatch.setattr(pace.subprocess, "run", lambda *args, **kwargs: failed)
    with pytest.raises(SystemExit, match="retina-focal train: no disk"):
        main(arguments)


def test_pictures_that_stand_for_val_have_boxes_and_about_the_mean_size():
    sizes = {"small": 10, "other": 60, "mean": 67, "large": 100, "empty": 67}
    records = [
        {"file_name": name, "height": side, "width": side, "annotations": [1] * (name != "empty")}
        for name, side in sizes.items()
    ]
    few = [x["file_name"] for x in pace._few(records, 5)]
    assert few == ["mean", "other", "small", "large", "empty"]
    assert pace._few(records, 2) == [records[2], records[1]]


def test_a_gpu_gets_what_its_memory_holds(arguments, monkeypatch):
    """The device is pretended: what is asked of it is the name, and a training of a few steps."""
    settings = {"MODEL.RETINA_FOCAL.DATA.VAL": Setting("toy_val", "")}
    monkeypatch.setattr(pace, "_short_run", lambda settings, val, batch, folder: settings)
    monkeypatch.setattr(pace, "_pace_of", lambda folder, wall, *of: Pace(*of, 10.0, 0.1, 0.01))
    failed = subprocess.CompletedProcess([], 1, "", "CUDA out of memory. Tried to allocate 9 GiB")
    results = [failed, failed, subprocess.CompletedProcess([], 0, "", "")]
    monkeypatch.setattr(pace.subprocess, "run", lambda *args, **kwargs: results.pop(0))
    found = pace.measured_pace(settings, [], 640, 16, Machine(has_gpu=True, cores=16))
    assert found.batch == 4 and not results
    results.append(failed)  # without a GPU the batch is not what fails
    with pytest.raises(UserError, match="out of memory"):
        pace.measured_pace(settings, [], 640, 16, Machine(has_gpu=False, cores=16))

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(command, "measured_pace", lambda *of: Pace(of[2], 8, 20.0, 0.2, 0.02))
    main(arguments)
    cfg, base = get_cfg(), get_cfg()
    merge_file(cfg, arguments[-1])
    merge_file(base, config_path(command.GPU_BASE))
    assert cfg.MODEL.DEVICE == "cuda" and cfg.MODEL.WEIGHTS == base.MODEL.WEIGHTS
    assert cfg.SOLVER.IMS_PER_BATCH == 8 and cfg.SOLVER.BASE_LR == 0.005  # 0.01 for 16
    assert cfg.MODEL.META_ARCHITECTURE == "FocalRetinaNet" and cfg.DATALOADER.NUM_WORKERS > 0
    assert "Times are of a GPU." in Path(arguments[-1]).read_text()


def test_settings_of_tiles_are_keys_of_the_config():
    from test_decisions import CELLS, CPU, PACE, input_settings, replace, schedule_settings

    slide = replace(CELLS, shorter=12_000.0, aspect=1.0, small=20.0)
    inputs, sides, _ = input_settings(slide, PACE, 30, 640)
    settings = {**inputs, **schedule_settings(slide, CPU, PACE, 30, sides)}
    assert settings.keys() <= flatten(get_cfg()).keys()
    assert pace.text_of({"A.B": Setting(1, "why")}) == "A:\n  B: 1  # why"


@pytest.mark.slow
def test_it_trains_with_nothing_touched(arguments, tmp_path):
    arguments[arguments.index("--minutes") + 1] = "1"
    main(arguments)
    command = [sys.executable, "-W", "ignore", "-m", "retina_focal.tools.cli", "train"]
    command += ["--config-file", arguments[-1], "OUTPUT_DIR", str(tmp_path / "run")]
    subprocess.run(command, check=True)
    assert (tmp_path / "run" / "model_final.pth").is_file()


def test_splits_that_are_there_are_taken_where_none_is_named(tmp_path):
    """Else the pictures of test, and of val, would be learned from."""
    for split in ("train", "val", "test"):
        for part in ("images", "labels"):
            (tmp_path / split / part).mkdir(parents=True)
        Image.new("RGB", (64, 48)).save(tmp_path / split / "images/a.png")
        (tmp_path / split / "labels/a.txt").write_text("0 0.5 0.5 0.2 0.2\n")
    lines = "".join(f"{x}: {x}/images\n" for x in ("train", "val", "test"))
    (tmp_path / "data.yaml").write_text(f"path: {tmp_path}\n{lines}names: [cell]\n")
    uri = f"yolo:{tmp_path / 'data.yaml'}"
    assert find_splits(uri, uri, "a") == [
        ("a_train", f"{uri}?split=train"),
        ("a_val", f"{uri}?split=val"),
    ]
    named = find_splits(f"{uri}?split=test", f"{uri}?split=train", "a")
    assert [x for _, x in named] == [f"{uri}?split=test", f"{uri}?split=train"]
