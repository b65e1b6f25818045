"""In somebody else's detectron2 program: registry names, attributes and tools go on working."""

import itertools
import json
import os
import subprocess
import sys

import cv2
import numpy as np
import pytest
import torch
from conftest import PLUGIN, STOCK, pictures, small_cfg
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.engine import DefaultPredictor
from detectron2.export import TracingAdapter
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.analysis import FlopCountAnalysis, parameter_count
from detectron2.utils.events import EventStorage
from test_train import PYTHONPATH

from retina_focal import box_tower, drawing

SUBSETS = [
    names for count in range(1, 4) for names in itertools.combinations(sorted(PLUGIN), count)
]


def plugin_model(**extra: object):
    torch.manual_seed(0)
    return build_model(small_cfg(**{**PLUGIN, **extra}))


@pytest.mark.parametrize("names", SUBSETS, ids=lambda names: "+".join(n[6:9] for n in names))
def test_any_of_the_names_can_be_swapped_in_alone(names):
    cfg = small_cfg(**{**STOCK, **{name: PLUGIN[name] for name in names}})
    torch.manual_seed(0)
    losses = build_model(cfg).train()
    with EventStorage():
        losses = losses(pictures([(64, 96)], num_boxes=[3]))
    assert set(losses) == {"loss_cls", "loss_box_reg"}
    assert all(loss.isfinite() for loss in losses.values())


def test_a_script_that_only_imports_the_package_trains_and_evaluates(tmp_path):
    images, annotations = [], []
    for i in range(4):
        picture = np.full((64, 96, 3), 128, np.uint8)
        picture[10:40, 20 : 50 + i] = (255, 0, 0)
        cv2.imwrite(str(tmp_path / f"{i}.png"), picture)
        images.append({"id": i + 1, "file_name": f"{i}.png", "height": 64, "width": 96})
        box = {"category_id": 1, "bbox": [20, 10, 30 + i, 30], "area": 900, "iscrowd": 0}
        annotations.append({"id": i + 1, "image_id": i + 1, **box})
    content = {"info": {}, "images": images, "annotations": annotations}
    content["categories"] = [{"id": 1, "name": "box"}]
    (tmp_path / "a.json").write_text(json.dumps(content))
    cfg = small_cfg(**PLUGIN)
    small = {
        "MODEL.RETINANET.NUM_CLASSES": 1, "DATALOADER.NUM_WORKERS": 0, "SOLVER.IMS_PER_BATCH": 2,
        "SOLVER.MAX_ITER": 2, "SOLVER.STEPS": (), "INPUT.MIN_SIZE_TRAIN": (64,),
        "INPUT.MIN_SIZE_TEST": 64, "DATASETS.TRAIN": ("boxes",), "DATASETS.TEST": ("boxes",),
        "OUTPUT_DIR": str(tmp_path / "output"),
    }  # fmt: skip
    cfg.merge_from_list([x for pair in small.items() for x in pair])
    (tmp_path / "cfg.yaml").write_text(cfg.dump())
    (tmp_path / "script.py").write_text(
        """
import retina_focal
from detectron2.config import get_cfg
from detectron2.data.datasets import register_coco_instances
from detectron2.engine import DefaultTrainer
from detectron2.evaluation import COCOEvaluator

class Trainer(DefaultTrainer):
    @classmethod
    def build_evaluator(cls, cfg, name):
        return COCOEvaluator(name, output_dir=cfg.OUTPUT_DIR)

register_coco_instances("boxes", {}, "a.json", ".")
cfg = get_cfg()
cfg.merge_from_file("cfg.yaml")
import os
os.makedirs(cfg.OUTPUT_DIR)
trainer = Trainer(cfg)
trainer.resume_or_load(resume=False)
trainer.train()
assert "bbox" in trainer._last_eval_results
"""
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": PYTHONPATH}
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "script.py"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-2000:]
    assert (tmp_path / "output" / "model_final.pth").is_file()


def test_what_scripts_set_on_the_model_changes_its_detections():
    model = plugin_model(**{"MODEL.RETINANET.SCORE_THRESH_TEST": 0.0}).eval()
    batch = [{"image": pictures([(96, 96)], num_boxes=[2])[0]["image"]}]
    with torch.no_grad():
        scores = model(batch)[0]["instances"].scores
        assert len(scores) == model.max_detections_per_image == 100
        model.test_score_thresh = float(scores[9])  # a score must be above it
        assert len(model(batch)[0]["instances"]) == 9
        model.test_score_thresh, model.max_detections_per_image = 0.0, 5
        assert len(model(batch)[0]["instances"]) == 5
        model.max_detections_per_image, model.test_topk_candidates = 100, 1
        assert len(model(batch)[0]["instances"]) <= 5  # one candidate a level
        model.test_topk_candidates, model.test_nms_thresh = 1000, 0.0
        few = len(model(batch)[0]["instances"])
        model.test_nms_thresh = 0.99
        assert len(model(batch)[0]["instances"]) > few
    with pytest.raises(AttributeError):
        model.num_classes = 4


def test_tracing_agrees_with_eager_at_another_size():
    model = plugin_model(**{"MODEL.RETINANET.SCORE_THRESH_TEST": 0.0}).eval()
    images = [pictures([size], num_boxes=[2])[0]["image"] for size in ((96, 128), (128, 96))]
    adapter = TracingAdapter(model, [{"image": images[0]}]).eval()
    with torch.no_grad():
        traced = torch.jit.trace(adapter, adapter.flattened_inputs, check_trace=False)
        for image in images:
            found = adapter.outputs_schema(traced(image))[0]["instances"]
            expected = model([{"image": image}])[0]["instances"]
            torch.testing.assert_close(found.pred_boxes.tensor, expected.pred_boxes.tensor)
            torch.testing.assert_close(found.scores, expected.scores)


def test_analysis_counts_flops_and_parameters():
    model = plugin_model().eval()
    batch = [{"image": torch.zeros(3, 64, 64)}]
    assert FlopCountAnalysis(model, batch).total() > 0
    assert parameter_count(model)[""] == sum(p.numel() for p in model.parameters())


def test_a_predictor_works_unmodified(tmp_path):
    cfg = small_cfg(**PLUGIN)
    model = build_model(cfg)
    DetectionCheckpointer(model, str(tmp_path)).save("model")
    cfg.MODEL.WEIGHTS = str(tmp_path / "model.pth")
    cfg.DATASETS.TEST = ()
    found = DefaultPredictor(cfg)(np.zeros((60, 90, 3), np.uint8))["instances"]
    assert found.image_size == (60, 90)


def test_a_checkpoint_without_a_normaliser_loads_strictly_and_leaves_its_start():
    model = plugin_model()
    state = model.state_dict()
    del state["criterion.loss_normalizer"]
    model.load_state_dict(state, strict=True)
    assert model.criterion.loss_normalizer == 100


def test_vis_period_puts_ground_truth_beside_predictions():
    model = plugin_model(**{"VIS_PERIOD": 1}).train()
    with EventStorage() as storage:
        model(pictures([(64, 96)], num_boxes=[3]))
    ((_, image, _),) = storage._vis_data
    assert image.shape[0] == 3 and image.shape[1] > image.shape[2] * 64 // 96
    assert (image[:, : image.shape[1] // 2] != image[:, image.shape[1] // 2 :]).any()


def test_the_training_picture_shows_ground_truth_above_predictions():
    """Each on a grey ground at a place of its own."""
    record = {"image": torch.full((3, 60, 100), 128, dtype=torch.uint8)}
    truth, prediction = [[10.0, 10, 30, 50]], [[60.0, 10, 90, 50]]
    record["instances"] = Instances((60, 100), gt_boxes=Boxes(torch.tensor(truth)))
    scores = torch.tensor([0.9])
    result = Instances((60, 100), pred_boxes=Boxes(torch.tensor(prediction)), scores=scores)
    _, picture = drawing.draw_training(record, result, "BGR")
    height, width = picture.shape[1] // 2, picture.shape[2]
    drawn = (picture != 128).any(0)
    top, bottom = drawn[:height], drawn[height:]
    left = slice(0, width // 2), slice(width // 2, width)
    assert top[:, left[0]].any() and not top[:, left[1]].any()
    assert bottom[:, left[1]].any() and not bottom[:, left[0]].any()


def test_the_training_picture_runs_the_box_tower_on_one_image(monkeypatch):
    model = plugin_model(**{"VIS_PERIOD": 1}).train()
    seen = []
    at = box_tower.PendingDeltas.at

    def note(self, places):
        seen.append(len(self.inputs[0]))
        return at(self, places)

    monkeypatch.setattr(box_tower.PendingDeltas, "at", note)
    with EventStorage():
        model(pictures([(64, 96)] * 3, num_boxes=[3, 1, 2]))
    assert seen == [3, 1]  # the loss of three images, the picture of one


def test_training_needs_no_event_storage():
    losses = plugin_model().train()(pictures([(64, 96)], num_boxes=[3]))
    assert all(loss.isfinite() for loss in losses.values())
