"""The picture of detections beside ground truth."""

import json

import cv2
import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes, Instances

from retina_focal import get_cfg
from retina_focal.data.registration import register_coco_json
from retina_focal.errors import UserError
from retina_focal.evaluation import drawing as draw
from retina_focal.tools.draw import main


class Detector(torch.nn.Module):
    """Finds one box of a high score and one of a low score in every image of 100x120 px."""

    def forward(self, batched_inputs: list[dict]) -> list[dict]:
        boxes = Boxes(torch.tensor([[10.0, 10, 40, 40], [60, 60, 90, 90]]))
        scores, classes = torch.tensor([0.9, 0.1]), torch.tensor([0, 0])
        instances = Instances((100, 120), pred_boxes=boxes, scores=scores, pred_classes=classes)
        return [{"instances": instances} for _ in batched_inputs]


@pytest.fixture
def cfg(tmp_path):
    """A config whose test set is three black pictures with one box each."""
    images = [{"id": i, "file_name": f"{i}.png", "height": 100, "width": 120} for i in range(3)]
    box = {"category_id": 1, "bbox": [50, 20, 30, 30], "area": 900, "iscrowd": 0}
    annotations = [{"id": i, "image_id": i, **box} for i in range(3)]
    for image in images:
        cv2.imwrite(str(tmp_path / image["file_name"]), np.zeros((100, 120, 3), np.uint8))
    content = {"images": images, "annotations": annotations}
    content["categories"] = [{"id": 1, "name": "cell"}]
    (tmp_path / "a.json").write_text(json.dumps(content))
    register_coco_json("to_draw", str(tmp_path / "a.json"), str(tmp_path))
    cfg = get_cfg()
    cfg.DATASETS.TEST = ("to_draw",)
    cfg.INPUT.MIN_SIZE_TEST = 100
    yield cfg
    DatasetCatalog.remove("to_draw")
    MetadataCatalog.remove("to_draw")


def edges(panel: np.ndarray) -> tuple[int, ...]:
    """x0, y0, x1, y1 of what is drawn on black, in pixels of the picture."""
    ys, xs = np.nonzero(panel.max(2) > 128)
    return xs.min(), ys.min(), xs.max(), ys.max()


def test_left_is_ground_truth_and_right_what_scores_above_the_threshold(cfg, tmp_path):
    draw.draw_detections(cfg, Detector(), str(tmp_path / "p.png"), num_images=2, score_thresh=0.5)
    picture = cv2.imread(str(tmp_path / "p.png"))
    height = draw.PANEL_WIDTH * 100 // 120
    assert picture.shape == (
        draw.HEADER_HEIGHT + 2 * height, 2 * draw.PANEL_WIDTH + draw.GAP, 3
    )  # fmt: skip
    row = picture[draw.HEADER_HEIGHT : draw.HEADER_HEIGHT + height]
    scale = draw.PANEL_WIDTH / 120
    truth, found = row[:, : draw.PANEL_WIDTH], row[:, draw.PANEL_WIDTH + draw.GAP :]
    # Lines are a few pixels wide.
    assert edges(truth) == pytest.approx([50 * scale, 20 * scale, 80 * scale, 50 * scale], abs=4)
    assert edges(found) == pytest.approx([10 * scale, 10 * scale, 40 * scale, 40 * scale], abs=4)


def test_a_picture_that_cannot_be_written_leaves_the_old_one(cfg, tmp_path):
    (tmp_path / "p.png").write_bytes(b"old")

    class Failing(torch.nn.Module):
        def forward(self, batched_inputs: list[dict]) -> list[dict]:
            raise RuntimeError("no detections")

    with pytest.raises(RuntimeError, match="no detections"):
        draw.draw_detections(cfg, Failing(), str(tmp_path / "p.png"))
    assert (tmp_path / "p.png").read_bytes() == b"old"
    with pytest.raises(UserError, match="expected a folder that exists"):
        draw.draw_detections(cfg, Detector(), str(tmp_path / "nowhere" / "p.png"))
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json"] + [".png"] * 4


@pytest.mark.parametrize("name", ["p.xyz", "p", "nowhere/p.png"])
def test_a_name_that_no_picture_can_have_is_refused_before_any_detection(cfg, tmp_path, name):
    with pytest.raises(UserError, match="can't write"):
        draw.draw_detections(cfg, None, str(tmp_path / name))


def test_a_missing_image_is_named(cfg, tmp_path):
    (tmp_path / "2.png").unlink()
    with pytest.raises(UserError, match=r"image '.*2\.png' can't be used"):
        draw.draw_detections(cfg, Detector(), str(tmp_path / "p.png"))


def test_more_rows_than_a_format_holds_are_refused_with_what_to_type(tmp_path):
    image = np.zeros((65501, 2, 3), np.uint8)  # one row more than JPEG has
    with pytest.raises(UserError, match=r"2 x 65501 pixels as '.*p\.jpg'; .*ends in \.png"):
        draw.write_picture(tmp_path / "p.jpg", image)
    draw.write_picture(tmp_path / "p.png", image)


def test_a_test_set_whose_classes_have_no_names_is_drawn(cfg, tmp_path):
    DatasetCatalog.register("nameless", lambda: DatasetCatalog.get("to_draw"))
    cfg.DATASETS.TEST = ("nameless",)
    draw.draw_detections(cfg, Detector(), str(tmp_path / "p.png"))
    DatasetCatalog.remove("nameless")


@pytest.mark.parametrize("argument", [["--num-images", "0"], ["--score-thresh", "high"]])
def test_numbers_that_cannot_be_are_refused(argument, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--config-file", "c.yaml", *argument])
    assert stop.value.code == 2 and "is not a" in capsys.readouterr().err


def test_a_record_without_annotations_has_no_ground_truth():
    boxes, classes = draw._ground_truth({"file_name": "test-dev.jpg"})
    assert len(boxes) == len(classes) == 0


def test_pictures_alone_are_drawn(cfg, tmp_path):
    content = json.loads((tmp_path / "a.json").read_text())
    (tmp_path / "b.json").write_text(json.dumps({"images": content["images"]}))
    register_coco_json("pictures_alone", str(tmp_path / "b.json"), str(tmp_path))
    cfg.DATASETS.TEST = ("pictures_alone",)
    draw.draw_detections(cfg, Detector(), str(tmp_path / "p.png"))
    assert (tmp_path / "p.png").stat().st_size


def test_drawing_without_weights_is_refused(cfg, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yaml").write_text(cfg.dump())
    with pytest.raises(SystemExit, match=r"add: MODEL\.WEIGHTS output/model_final\.pth"):
        main(["--config-file", "c.yaml"])
