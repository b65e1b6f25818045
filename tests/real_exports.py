"""A small network as DefaultPredictor runs it and as `detector.py` does, and real pictures."""

import os
from pathlib import Path

import pytest
import torch
from detectron2.config import CfgNode
from test_export import CLASSES, tiny_cfg, tiny_model

from retina_focal.export.metadata import Metadata
from retina_focal.export.onnx_format import write_onnx


def photographs(count: int) -> list[Path]:
    """Of BCCD; without them the test is left out."""
    folder = Path(os.environ.get("DETECTRON2_DATASETS", "datasets"), "bccd", "JPEGImages")
    found = sorted(folder.glob("*.jpg"))[:count]
    if len(found) < count:
        pytest.skip(f"{folder} holds no pictures of BCCD; set DETECTRON2_DATASETS")
    return found


def exported_network(folder: Path, **flags) -> CfgNode:
    """Write `model.pth` and `model.onnx`; the config for DefaultPredictor."""
    cfg = tiny_cfg(INPUT__MIN_SIZE_TEST=160, INPUT__MAX_SIZE_TEST=250)
    model, weights = tiny_model(cfg), folder / "model.pth"
    torch.save({"model": model.state_dict()}, weights)
    cfg.MODEL.WEIGHTS = str(weights)
    metadata = Metadata.of_run(cfg, CLASSES, weights, **flags)
    write_onnx(model, metadata, folder / "model.onnx")
    return cfg
