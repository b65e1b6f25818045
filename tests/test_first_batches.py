"""What a training says of its data before the first step."""

import logging
from types import SimpleNamespace

import pytest
from conftest import PLUGIN, small_cfg
from detectron2.data import DatasetCatalog
from detectron2.modeling import build_model

from retina_focal.config import add_retina_focal_config
from retina_focal.data.coverage import anchors_of, box_table, cover
from retina_focal.data.registration import register_coco_json
from retina_focal.training import first_batches
from retina_focal.training.first_batches import MAX_UNREACHED, warn_unreached

NAME = "rectangles_of_first_batches"  # of 36 x 28 px, in pictures of 96 x 64


@pytest.fixture(scope="module")
def records(data) -> list[dict]:
    register_coco_json(NAME, str(data / "a.json"), str(data))
    yield DatasetCatalog.get(NAME)
    DatasetCatalog.remove(NAME)


@pytest.fixture
def cfg():
    cfg = small_cfg(**PLUGIN)
    add_retina_focal_config(cfg)
    cfg.DATASETS.TRAIN, cfg.OUTPUT_DIR = (NAME,), "out"
    cfg.INPUT.MIN_SIZE_TRAIN = (32,)  # 18 x 14 px, half of what the smallest anchors have
    return cfg


def warnings_of(cfg, records, caplog) -> list[str]:
    caplog.clear()
    trainer = SimpleNamespace(cfg=cfg, data_loader=SimpleNamespace(dataset=records))
    with caplog.at_level(logging.INFO):
        warn_unreached(build_model(cfg), trainer)
    found = [x for x in caplog.records if x.name.startswith("retina_focal")]
    assert all(x.levelno == logging.WARNING for x in found)
    return [x.getMessage() for x in found]


def test_boxes_that_no_anchor_reaches_are_told_of_before_the_first_step(cfg, records, caplog):
    found = cover(box_table(records), anchors_of(cfg)[1], [32], 1333).ious
    missed = int((found < 0.4).sum())
    assert missed / len(found) > MAX_UNREACHED
    (line,) = warnings_of(cfg, records, caplog)
    assert f"({missed} of 12, in 6 pictures at 1 size)" in line
    assert "so little is learned" in line
    assert f"retina-focal anchors {NAME} --config-file out/config.yaml" in line
    cfg.MODEL.RETINA_FOCAL.ASSIGNMENT = "paper"
    assert "so nothing is learned" in warnings_of(cfg, records, caplog)[0]


def test_where_few_are_missed_or_it_is_not_known_nothing_is_said(cfg, records, caplog, monkeypatch):
    cfg.MODEL.RETINA_FOCAL.ASSIGNMENT = "atss"
    assert not warnings_of(cfg, records, caplog)
    cfg.MODEL.RETINA_FOCAL.ASSIGNMENT = "detectron2"
    assert not warnings_of(cfg, [], caplog) and not warnings_of(cfg, None, caplog)
    cfg.INPUT.CROP.ENABLED = True
    assert not warnings_of(cfg, records, caplog)
    cfg.INPUT.CROP.ENABLED, cfg.INPUT.MIN_SIZE_TRAIN = False, (96,)
    assert not warnings_of(cfg, records, caplog)
    cfg.INPUT.MIN_SIZE_TRAIN = (32,)
    monkeypatch.setattr(first_batches, "MAX_PICTURES", 2)
    assert "of 4, in 2 pictures" in warnings_of(cfg, records, caplog)[0]
