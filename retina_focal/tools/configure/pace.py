"""The seconds of a training's steps and evaluations on this machine, measured by a short one."""

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from detectron2.data import MetadataCatalog

from retina_focal.data.decisions import Setting, Settings
from retina_focal.data.fingerprint import Machine, Pace
from retina_focal.errors import UserError
from retina_focal.tools.reports import yaml_lines

DETECTIONS = Path("inference", "coco_instances_results.json")
MEASURED_STEPS, MEASURED_PICTURES = 8, 10  # detectron2 leaves out 3 and 5 to warm up
MEASURED_TILED = 2  # pictures, of which the second counts, where each is many tiles


def text_of(settings: Mapping[str, Setting]) -> str:
    """Settings as YAML, each with its reason."""
    values = {key: setting.value for key, setting in settings.items()}
    return yaml_lines(values, {key: setting.reason for key, setting in settings.items()})


def measured_pace(
    settings: Settings, val_records: list[dict], shorter: int, batch: int, machine: Machine
) -> Pace:
    """Run a short training as `train` runs it, in a process of its own.

    Raises:
        UserError: it fails.
    """
    while True:
        with tempfile.TemporaryDirectory(prefix="retina_focal-") as name:
            folder = Path(name)
            config = folder / "measure.yaml"
            short = _short_run(settings, val_records, batch, folder)
            config.write_text(text_of(short))
            print(
                f"measuring {MEASURED_STEPS} steps of {batch} pictures at {shorter} px", flush=True
            )
            start = time.perf_counter()
            arguments = ["-m", "retina_focal.tools.cli", "train", "--config-file", str(config)]
            result = subprocess.run(
                [sys.executable, "-W", "ignore", *arguments],
                capture_output=True, text=True, check=False,
            )  # fmt: skip
            wall = time.perf_counter() - start
            if result.returncode == 0:
                return _pace_of(folder, wall, shorter, batch)
            output = (result.stderr or result.stdout).strip()
            if not (machine.has_gpu and "out of memory" in output and batch > 1):
                raise UserError(f"a training of a few steps failed: {output.splitlines()[-1]}")
            batch //= 2


def _short_run(settings: Settings, val_records: list[dict], batch: int, folder: Path) -> Settings:
    """A few steps, then an evaluation of a few pictures of val."""
    is_tiled = settings.get("MODEL.RETINA_FOCAL.TEST.TILE", Setting(0, "")).value > 0
    few = _few(val_records, MEASURED_TILED if is_tiled else MEASURED_PICTURES)
    name = settings["MODEL.RETINA_FOCAL.DATA.VAL"].value
    classes = MetadataCatalog.get(name).thing_classes
    root = MetadataCatalog.get(name).image_root
    path = folder / "val.json"
    path.write_text(json.dumps(_coco(few, classes, root)))
    values = {
        "DATASETS.COCO_JSON": [["measured_val", str(path), root]],
        "DATASETS.TEST": ["measured_val"],
        "MODEL.RETINA_FOCAL.DATA.VAL": "measured_val",
        "SOLVER.IMS_PER_BATCH": batch,
        "SOLVER.MAX_ITER": MEASURED_STEPS,
        "SOLVER.STEPS": [],
        "SOLVER.CHECKPOINT_PERIOD": MEASURED_STEPS,
        "TEST.EVAL_PERIOD": 0,
        "OUTPUT_DIR": str(folder),
    }
    return {**settings, **{key: Setting(value, "measured") for key, value in values.items()}}


def _few(records: list[dict], count: int) -> list[dict]:
    """Pictures with boxes where there are any, and of about the mean size: they take mean time."""
    pixels = [x["height"] * x["width"] for x in records]
    mean = sum(pixels) / max(len(pixels), 1)

    def order(record: dict) -> tuple[bool, float]:
        return not record["annotations"], abs(record["height"] * record["width"] - mean)

    return sorted(records, key=order)[:count]


def _coco(records: list[dict], classes: list[str], root: str) -> dict:
    """Records of a registered dataset as a COCO file; boxes are XYWH there."""
    images = [
        {
            "id": i,
            "file_name": os.path.relpath(x["file_name"], root),
            "height": x["height"],
            "width": x["width"],
        }
        for i, x in enumerate(records)
    ]
    boxes = [
        {
            "image_id": image,
            "category_id": annotation["category_id"],
            "bbox": annotation["bbox"],
            "area": annotation["bbox"][2] * annotation["bbox"][3],
            "iscrowd": annotation.get("iscrowd", 0),
        }
        for image, record in enumerate(records)
        for annotation in record["annotations"]
    ]
    return {
        "images": images,
        "annotations": [{"id": i, **box} for i, box in enumerate(boxes, start=1)],
        "categories": [{"id": i, "name": name} for i, name in enumerate(classes)],
    }


def _pace_of(folder: Path, wall: float, shorter: int, batch: int) -> Pace:
    """From what the training wrote, and when: a step, a picture's evaluation, a checkpoint.

    What else the run took is its start and its end, with one checkpoint.
    """
    lines = map(json.loads, (folder / "metrics.json").read_text().splitlines())
    step = [x["time"] for x in lines if "time" in x][-1]
    log = (folder / "log.txt").read_text()
    picture = re.findall(r"Total inference time: \S+ \((\S+) s / iter", log)[-1]
    # The AP is computed between the file of the detections and the last line of the metrics.
    computed = _written(folder / "metrics.json") - _written(folder / DETECTIONS)
    num_pictures = len(json.loads((folder / "val.json").read_text())["images"])
    # Two are written at the end, one after the other.
    last = folder / f"model_{MEASURED_STEPS - 1:07d}.pth"
    save = max(0.0, _written(folder / "model_final.pth") - _written(last))
    per_picture = float(picture) + max(0.0, computed) / max(num_pictures, 1)
    start = wall - MEASURED_STEPS * step - per_picture * num_pictures - save
    return Pace(shorter, batch, max(0.0, start), step, per_picture, save)


def _written(path: Path) -> float:
    """When a file was last written, in s."""
    return path.stat().st_mtime
