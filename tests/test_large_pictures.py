"""Large pictures of small objects, from a folder to a detector, with nothing touched by hand."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from retina_focal.data.sources import load

BCCD = os.path.join(os.environ.get("DETECTRON2_DATASETS", "datasets"), "bccd")
SIDE = 8  # photographs in a row and in a column
WIDTH, HEIGHT = 320, 240  # px of each: half of its own
MINUTES = "8"


def put_together(split: str, folder: Path, turns: tuple[int, ...]) -> None:
    """Pictures of 2,560 x 1,920 px out of BCCD's photographs at half their size, once per turn."""
    source = load(f"voc:{BCCD}?split={split}")
    content = json.loads(source.json_file.read_bytes())
    boxes: dict[int, list[dict]] = {}
    for row in content["annotations"]:
        boxes.setdefault(row["image_id"], []).append(row)
    photographs = [(image, turn) for turn in turns for image in content["images"]]
    photographs *= -(-(SIDE**2) // len(photographs))
    random.Random(0).shuffle(photographs)
    images, annotations = [], []
    for number in range(len(photographs) // SIDE**2):
        picture = Image.new("RGB", (SIDE * WIDTH, SIDE * HEIGHT))
        for place, (image, turn) in enumerate(photographs[number * SIDE**2 :][: SIDE**2]):
            left, top = place % SIDE * WIDTH, place // SIDE * HEIGHT
            with Image.open(source.image_root / image["file_name"]) as photograph:
                small = photograph.convert("RGB").resize((WIDTH, HEIGHT)).rotate(turn)
            picture.paste(small, (left, top))
            x_scale, y_scale = WIDTH / image["width"], HEIGHT / image["height"]
            for row in boxes.get(image["id"], []):
                x, y, w, h = row["bbox"]
                x, y, w, h = x * x_scale, y * y_scale, w * x_scale, h * y_scale
                if turn == 180:
                    x, y = WIDTH - x - w, HEIGHT - y - h
                box = {"bbox": [left + x, top + y, w, h], "area": w * h, "iscrowd": 0}
                numbers = {"id": len(annotations) + 1, "image_id": number + 1}
                annotations.append({**numbers, "category_id": row["category_id"], **box})
        name = f"{split}_{number}.jpg"
        picture.save(folder / name, quality=92)
        size = {"width": picture.width, "height": picture.height}
        images.append({"id": number + 1, "file_name": name, **size})
    dataset = {"images": images, "annotations": annotations, "categories": content["categories"]}
    (folder / f"{split}.json").write_text(json.dumps(dataset))


def run(folder: Path, *arguments: str) -> str:
    command = [sys.executable, "-W", "ignore", "-m", "retina_focal.tools.cli", *arguments]
    path = os.pathsep.join([str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path}
    return subprocess.run(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True, check=True
    ).stdout


@pytest.mark.slow
@pytest.mark.skipif(not os.path.isdir(BCCD), reason="needs $DETECTRON2_DATASETS/bccd")
def test_large_pictures_are_learned_and_measured_in_tiles(tmp_path):
    """Run it with -s, on two idle cores without OMP_NUM_THREADS, to see the AP."""
    for split, turns in {"train": (0, 180), "val": (0,), "test": (0,)}.items():
        put_together(split, tmp_path, turns)
    named = ("train.json", "--val", "val.json", "--output", "large.yaml")
    run(tmp_path, "configure", *named, "--minutes", MINUTES)
    run(tmp_path, "train", "--config-file", "large.yaml")
    run(tmp_path, "report", "output/large")
    assert (tmp_path / "output/large/report.html").stat().st_size > 1e5
    ap = {}
    for tile in ("640", "0"):
        opts = ("--opts", "MODEL.RETINA_FOCAL.DATA.VAL", "", "MODEL.RETINA_FOCAL.TEST.TILE", tile)
        text = run(tmp_path, "evaluate", "output/large", "--data", "test.json", "--json", *opts)
        ap[tile] = json.loads(text)[0]["metrics"]["AP"]
    print(f"AP on test: {ap['640']:.1f} in tiles, {ap['0']:.1f} with whole pictures")
    assert ap["640"] > 30 and ap["640"] > ap["0"] + 20
    printed = run(tmp_path, "predict", "output/large", "test_0.jpg", "--output", "found")
    rows = (tmp_path / "found/detections.csv").read_text().splitlines()
    assert f"{len(rows) - 1} boxes" in printed and 400 < len(rows) < 1600
