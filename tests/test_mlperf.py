"""MLPerf's RetinaNet: its config has the reference's numbers, and trains."""

import json
from pathlib import Path

import cv2
import numpy as np
import torch
from detectron2.modeling import build_model
from detectron2.modeling.backbone.fpn import LastLevelP6P7

from retina_focal.config import config_path, get_cfg
from retina_focal.tools.train import parse_args, run

CONFIG = "MLPerf/retinanet_X_50_32x4d_OpenImages_800.yaml"
NUM_CLASSES = 264


def made_data(folder: Path) -> None:
    """Four pictures with four of the 264 classes."""
    generator = np.random.default_rng(0)
    boxes = [
        {
            "id": i + 1,
            "image_id": i + 1,
            "category_id": (i % 4) * 87 + 1,
            "bbox": [*map(float, generator.integers(0, 30, 2)), 30.0, 25.0],
            "area": 750.0,
            "iscrowd": 0,
        }
        for i in range(4)
    ]
    for box in boxes:
        picture = np.full((64, 96, 3), 90, np.uint8)
        x, y, width, height = map(int, box["bbox"])
        picture[y : y + height, x : x + width] = box["category_id"] % 256
        cv2.imwrite(str(folder / f"{box['id']}.png"), picture)
    content = {
        "images": [
            {"id": i, "file_name": f"{i}.png", "height": 64, "width": 96} for i in range(1, 5)
        ],
        "annotations": boxes,
        "categories": [{"id": i + 1, "name": f"class {i}"} for i in range(NUM_CLASSES)],
    }
    (folder / "made.json").write_text(json.dumps(content))


def test_the_reference_configuration_trains_ten_iterations(tmp_path):
    made_data(tmp_path)
    options = {
        "DATASETS.TRAIN": "('made_openimages',)",
        "DATASETS.TEST": "('made_openimages',)",
        "DATALOADER.NUM_WORKERS": 0,
        "INPUT.MIN_SIZE_TRAIN": "(32,)",
        "INPUT.MAX_SIZE_TRAIN": 64,
        "INPUT.MIN_SIZE_TEST": 32,
        "SOLVER.IMS_PER_BATCH": 1,
        "MODEL.FPN.OUT_CHANNELS": 32,
        "SOLVER.MAX_ITER": 10,
        "MODEL.DEVICE": "cpu",
        "SEED": 1,
        "OUTPUT_DIR": str(tmp_path / "out"),
    }
    dataset = ["--dataset", "made_openimages", str(tmp_path / "made.json"), str(tmp_path)]
    pairs = [str(x) for pair in options.items() for x in pair]
    run(parse_args(["--config-file", CONFIG, *dataset, *pairs]))
    lines = (tmp_path / "out" / "metrics.json").read_text().splitlines()
    losses = [json.loads(line)["total_loss"] for line in lines if "total_loss" in line]
    assert losses and np.isfinite(losses).all()
    assert (tmp_path / "out" / "model_final.pth").is_file()


def test_the_model_is_the_references():
    cfg = get_cfg()
    cfg.merge_from_file(config_path(CONFIG), allow_unsafe=False)
    cfg.MODEL.DEVICE = "meta"
    with torch.device("meta"):
        model = build_model(cfg)
    top_block = model.backbone.top_block
    assert isinstance(top_block, LastLevelP6P7) and top_block.in_feature == "p5"
    assert model.head.cls_score.out_channels == 9 * NUM_CLASSES
    grouped = {m.groups for m in model.backbone.bottom_up.modules() if hasattr(m, "groups")}
    assert grouped == {1, 32}
    # Without the classifier, torchvision's ResNeXt-50 32x4d has 22,979,904 parameters, of which
    # 68,224 belong to norms.
    convolutions = sum(p.numel() for p in model.backbone.bottom_up.parameters())
    assert convolutions == 22_979_904 - 68_224
