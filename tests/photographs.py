"""Photographs, a random model and one that finds squares: what tests of pictures share."""

from pathlib import Path

import cv2
import numpy as np
import torch
from conftest import PLUGIN, small_cfg
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from PIL import Image
from torch import nn

from retina_focal import get_cfg


def config(**opts: object):
    cfg = get_cfg()
    cfg.merge_from_other_cfg(small_cfg(**PLUGIN))
    cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = 96, 160
    cfg.merge_from_list([x for pair in opts.items() for x in pair])
    return cfg


def random_model() -> nn.Module:
    """Whose scores are so spread that many boxes pass."""
    torch.manual_seed(0)
    model = build_model(config()).eval()
    nn.init.normal_(model.head.cls_score.weight, std=0.3)
    return model


def noise(path, size=(120, 90), seed=0, **options) -> None:
    rng = np.random.default_rng(seed)
    Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), np.uint8)).save(path, **options)


def write_photos(folder: Path) -> Path:
    """Four pictures of two sizes, one after the other: two are turned by EXIF, one is grey."""
    folder.mkdir()
    turned = Image.Exif()
    turned[274] = 6
    noise(folder / "a.jpg", seed=1)
    noise(folder / "b.jpg", seed=2, exif=turned)
    noise(folder / "c.png", size=(90, 120), seed=3)
    noise(folder / "d.png", seed=4)
    Image.open(folder / "d.png").convert("L").save(folder / "d.png")
    noise(folder / "e.jpg", seed=5)
    return folder


class Corners(nn.Module):
    """Finds each white square of 10 px, wherever it is, by its pixels."""

    device = torch.device("cpu")

    def forward(self, batched_inputs: list[dict]) -> list[dict]:
        outputs = []
        for x in batched_inputs:
            array = (x["image"].float().mean(0) > 200).numpy().astype(np.uint8)
            _, _, stats, _ = cv2.connectedComponentsWithStats(array)
            xywh = torch.tensor(stats[1:, :4].astype(np.float32)).reshape(-1, 4)
            boxes = torch.cat([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], 1)
            factor = torch.tensor([x["width"], x["height"]]) / torch.tensor(array.shape[::-1])
            boxes = Boxes(boxes * factor.repeat(2))
            classes = torch.zeros(len(boxes), dtype=torch.int64)
            found = Instances((x["height"], x["width"]), pred_boxes=boxes, pred_classes=classes)
            found.scores = 0.9 - 0.1 * torch.rand(len(boxes))
            outputs.append({"instances": found})
        return outputs
