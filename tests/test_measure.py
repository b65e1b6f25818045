"""What is measured is what was trained, on pictures and classes that fit."""

from pathlib import Path

import pytest
import torch
from conftest import PLUGIN, small_cfg
from detectron2.config import CfgNode, LazyCall, instantiate
from detectron2.data import (
    DatasetCatalog,
    DatasetMapper,
    MetadataCatalog,
    build_detection_test_loader,
)
from detectron2.evaluation import COCOEvaluator
from detectron2.modeling import build_model
from omegaconf import OmegaConf

from retina_focal import get_cfg
from retina_focal.data.images import BadPicture
from retina_focal.data.registration import register_coco_json
from retina_focal.errors import UserError
from retina_focal.evaluation.hotcoco_evaluator import HotcocoEvaluator
from retina_focal.training.measure import (
    _lazy_evaluator,
    load_trained,
    measure_lazy,
    yaml_test_loader,
)
from retina_focal.weights.load import Checkpointer, load_model


@pytest.fixture
def cfg(data) -> CfgNode:
    cfg = get_cfg()
    cfg.merge_from_other_cfg(small_cfg(**PLUGIN))
    cfg.MODEL.RETINANET.NUM_CLASSES = 2
    cfg.DATASETS.TEST = ("rectangles_to_measure",)
    cfg.DATALOADER.NUM_WORKERS = 0
    register_coco_json(cfg.DATASETS.TEST[0], str(data / "a.json"), str(data))
    yield cfg
    DatasetCatalog.remove(cfg.DATASETS.TEST[0])
    MetadataCatalog.remove(cfg.DATASETS.TEST[0])


def saved(cfg: CfgNode, folder: Path, edit, **extra: object) -> str:
    """A file of the weights of a new model, changed by `edit`."""
    weights = edit(build_model(cfg).state_dict())
    torch.save({"model": weights, **extra}, folder / "a.pth")
    return str(folder / "a.pth")


def only_backbone(weights: dict) -> dict:
    return {k: x for k, x in weights.items() if k.startswith("backbone.")}


def other_classes(weights: dict) -> dict:
    bias = "head.cls_score.bias"
    return {**weights, bias: weights[bias][:9], "head.cls_score.weight": torch.zeros(9, 64, 3, 3)}


def without_lateral(weights: dict) -> dict:
    return {k: x for k, x in weights.items() if "fpn_lateral3" not in k}


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (only_backbone, "holds no weights of the head, so that all scores are the prior"),
        (other_classes, r"lacks 2 of .*another shape \(head.cls_score.weight, head.cls_score.bias"),
        (without_lateral, r"lacks 2 of .*\(backbone.fpn_lateral3.weight, backbone.fpn_lateral3"),
    ],
)
def test_what_is_not_trained_is_not_measured(cfg, tmp_path, edit, words):
    path = saved(cfg, tmp_path, edit)
    with pytest.raises(UserError, match=words):
        load_trained(Checkpointer(build_model(cfg)), path, False, cfg.DATASETS.TEST)
    cfg.MODEL.WEIGHTS = path
    with pytest.raises(UserError, match=words):
        load_model(cfg)


def test_an_evaluation_without_weights_says_what_to_type(cfg, tmp_path):
    checkpointer = Checkpointer(build_model(cfg), str(tmp_path))
    for resume in (False, True):
        with pytest.raises(UserError, match=r"no weights are given; add: MODEL.WEIGHTS output"):
            load_trained(checkpointer, "", resume, cfg.DATASETS.TEST)


def test_the_classes_of_the_weights_number_those_of_the_test_set(cfg, tmp_path):
    name = cfg.DATASETS.TEST[0]
    before = [a["category_id"] for x in DatasetCatalog.get(name) for a in x["annotations"]]
    path = saved(cfg, tmp_path, dict, classes=["blue", "red"])
    load_trained(Checkpointer(build_model(cfg)), path, False, cfg.DATASETS.TEST)
    after = [a["category_id"] for x in DatasetCatalog.get(name) for a in x["annotations"]]
    assert after == [1 - x for x in before] and set(before) == {0, 1}
    path = saved(cfg, tmp_path, dict, classes=["blue", "green"])
    with pytest.raises(UserError, match="missing: green; only there: red"):
        load_trained(Checkpointer(build_model(cfg)), path, False, cfg.DATASETS.TEST)


def test_the_loader_of_an_evaluation_names_a_picture_that_is_too_large(cfg):
    assert len(next(iter(yaml_test_loader(cfg, cfg.DATASETS.TEST[0])))) == 1
    cfg.MODEL.RETINA_FOCAL.DATA.MAX_PIXELS = 64 * 96 - 1
    with pytest.raises(BadPicture, match=r"\.png' can't be used: it has 96 x 64 pixels"):
        next(iter(yaml_test_loader(cfg, cfg.DATASETS.TEST[0])))


def lazy(cfg: CfgNode, made: int = 100, **options: object):
    mapper = LazyCall(DatasetMapper)(is_train=False, augmentations=[], image_format="BGR")
    records = DatasetCatalog.get(cfg.DATASETS.TEST[0])
    return OmegaConf.create(
        {
            "model": {"postprocessor": {"max_detections_per_image": made}},
            "dataloader": {
                "test": LazyCall(build_detection_test_loader)(dataset=records, mapper=mapper),
                "evaluator": LazyCall(COCOEvaluator)(
                    dataset_name=cfg.DATASETS.TEST[0], distributed=False, **options
                ),
            },
        },
        flags={"allow_objects": True},
    )


def test_a_lazy_configs_detections_all_count(cfg):
    assert _lazy_evaluator(lazy(cfg))._max_dets_per_image == [1, 10, 100]
    assert type(_lazy_evaluator(lazy(cfg), "hotcoco")) is HotcocoEvaluator
    assert _lazy_evaluator(lazy(cfg, 300))._max_dets_per_image == [1, 10, 300]
    own = lazy(cfg, 300, max_dets_per_image=200)
    assert _lazy_evaluator(own)._max_dets_per_image == [1, 10, 200]


def test_a_lazy_configs_loader_names_a_picture_that_is_too_large(cfg, caplog):
    config, node = lazy(cfg), cfg.MODEL.RETINA_FOCAL
    assert instantiate(config.dataloader.test.mapper)
    model = build_model(cfg)
    assert "bbox" in measure_lazy(config, model, None, node)
    node.DATA.MAX_PIXELS = 100
    with pytest.raises(BadPicture, match="can't be used: it has 96 x 64 pixels"):
        measure_lazy(config, model, None, node)
    assert "sees pictures whole" not in caplog.text
    node.DATA.MAX_PIXELS, node.TEST.TILE = 10**6, 64
    measure_lazy(config, model, None, node)
    assert "TEST.TILE 64: the evaluation of a LazyConfig sees pictures whole" in caplog.text
    del config.dataloader["evaluator"]
    assert measure_lazy(config, model, None, node) == {}
