"""What is measured is what `predict` shows: large pictures are cut, others seen as ever."""

import json

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.detection_utils import read_image
from photographs import Corners, config, random_model, write_photos
from PIL import Image

from retina_focal.data.registration import register_coco_json
from retina_focal.errors import UserError
from retina_focal.evaluation import tested
from retina_focal.evaluation.inputs import find_inputs
from retina_focal.evaluation.prediction import Predictor
from retina_focal.evaluation.tested import TiledModel, as_tested, build_test_mapper
from retina_focal.evaluation.tta import RetinaNetWithTTA
from retina_focal.tools.runs import Run, detections
from retina_focal.training.assembly import Trainer

TILE = "MODEL.RETINA_FOCAL.TEST.TILE"
SIDE, SQUARE = 128, 10  # pixels
FLIPPED = {"TEST.AUG.ENABLED": True, "TEST.AUG.MIN_SIZES": (64,)}


@pytest.fixture(scope="module")
def model():
    return random_model()


@pytest.fixture
def photos(tmp_path):
    return write_photos(tmp_path / "photos")


def records(folder) -> list[dict]:
    """Of the pictures of a folder, as detectron2 sees them."""
    found = []
    for path in sorted(folder.iterdir()):
        height, width = read_image(str(path), "RGB").shape[:2]
        found.append({"file_name": str(path), "height": height, "width": width})
    return found


def equal(one, other) -> None:
    assert one.image_size == other.image_size and len(one) == len(other)
    assert torch.equal(one.pred_boxes.tensor, other.pred_boxes.tensor)
    assert torch.equal(one.scores, other.scores)
    assert torch.equal(one.pred_classes, other.pred_classes)


@pytest.mark.parametrize(
    ("tile", "extra"),
    [
        (0, {}),
        (0, FLIPPED),
        (64, {}),
        (64, FLIPPED),
        (64, {"INPUT.FORMAT": "RGB"}),
        (64, {"MODEL.RETINA_FOCAL.TEST.RESIZE": "mmdetection"}),
        (200, {}),
    ],
)
def test_a_test_set_is_seen_as_predict_sees_files(model, photos, tile, extra):
    cfg = config(**{TILE: tile, **extra})
    seen, mapper = as_tested(cfg, model), build_test_mapper(cfg)
    expected = list(Predictor(cfg, model)(find_inputs([str(photos)])))
    number = 0
    for record, prediction in zip(records(photos), expected, strict=True):
        with torch.no_grad():
            (output,) = seen([mapper(record)])
        equal(output["instances"].to("cpu"), prediction.instances)
        number += len(prediction.instances)
    assert number > 40
    assert len(expected[0].tiles) == (7 if tile == 64 else 1)


def test_only_the_key_turns_it_on(model):
    assert as_tested(config(), model) is model
    assert len(build_test_mapper(config()).augmentations.augs) == 1
    both = config(**{TILE: SIDE, "TEST.AUG.ENABLED": True})
    wrapped = as_tested(both, model)
    assert isinstance(wrapped, TiledModel) and isinstance(wrapped.model, RetinaNetWithTTA)
    assert not wrapped.views.resizing and not build_test_mapper(both).augmentations.augs


def test_what_the_resizing_makes_nothing_of_is_named(model):
    cfg = config(**{TILE: 64, "INPUT.MIN_SIZE_TEST": 8, "INPUT.MAX_SIZE_TEST": 16})
    record = {"image": torch.zeros(3, 1, 50, dtype=torch.uint8), "file_name": "thin.png"}
    with pytest.raises(UserError, match=r"'thin\.png' can't be used: its 50 x 1 pixels are 16 x 0"):
        as_tested(cfg, model)([record])


@pytest.mark.parametrize("extra", [{}, FLIPPED | {"TEST.AUG.MAX_SIZE": 64}])
def test_a_thin_picture_is_named_and_the_others_are_predicted(model, photos, extra):
    Image.new("RGB", (5000, 1)).save(photos / "b.jpg")
    cfg = config(**extra)
    found = list(Predictor(cfg, model)(find_inputs([str(photos)])))
    assert [type(x).__name__ for x in found] == ["Prediction", "BadPicture", *["Prediction"] * 3]
    assert "its 5000 x 1 pixels are" in str(found[1])


def test_tiles_of_one_shape_are_seen_together_on_a_gpu(monkeypatch):
    sizes = []

    class Counting(Corners):
        def forward(self, batched_inputs):
            sizes.append(len(batched_inputs))
            assert len({x["image"].shape for x in batched_inputs}) == 1
            return super().forward(batched_inputs)

    monkeypatch.setattr(tested, "TILES_AT_ONCE", 4)
    record = {"image": torch.zeros(3, 300, 500, dtype=torch.uint8)}
    for device, expected in (("cuda", [4, 4, 4, 3, 1]), ("cpu", [1] * 16)):
        sizes.clear()
        cfg = config(**{TILE: SIDE, "INPUT.MIN_SIZE_TEST": 0, "MODEL.DEVICE": device})
        as_tested(cfg, Counting())([record])
        assert sizes == expected


@pytest.fixture
def scenes(tmp_path):
    """Two pictures of 700 x 900 pixels with white squares, 150 in the first; the dataset's name."""
    rng, images, annotations = np.random.default_rng(0), [], []
    for i, count in enumerate((150, 7)):
        places = rng.choice(17 * 22, count, replace=False)
        image = np.zeros((700, 900, 3), np.uint8)
        for place in places:
            x, y = 40 * int(place % 22) + 12, 40 * int(place // 22) + 11
            image[y : y + SQUARE, x : x + SQUARE] = 255
            box = {"bbox": [x, y, SQUARE, SQUARE], "area": SQUARE**2, "category_id": 1}
            annotations.append({"id": len(annotations) + 1, "image_id": i, "iscrowd": 0, **box})
        Image.fromarray(image).save(tmp_path / f"{i}.png")
        images.append({"id": i, "file_name": f"{i}.png", "height": 700, "width": 900})
    classes = [{"id": 1, "name": "square"}]
    content = {"images": images, "annotations": annotations, "categories": classes}
    (tmp_path / "scenes.json").write_text(json.dumps(content))
    register_coco_json("scenes", str(tmp_path / "scenes.json"), str(tmp_path))
    yield "scenes"
    DatasetCatalog.remove("scenes")
    MetadataCatalog.remove("scenes")


class Sure(Corners):
    """Is sure of the squares that it sees sharp, at their own scale."""

    def forward(self, batched_inputs: list[dict]) -> list[dict]:
        outputs = super().forward(batched_inputs)
        for output in outputs:
            is_sharp = (output["instances"].pred_boxes.area() - SQUARE**2).abs() < 1e-3
            output["instances"].scores = torch.where(is_sharp, 0.9, 0.1)
        return outputs


@pytest.mark.parametrize("library", ["pycocotools", "hotcoco"])
def test_a_training_measures_in_tiles_and_counts_all_boxes(scenes, tmp_path, library):
    """An AP of 100 takes the small squares, and more of them than COCO counts of a picture."""
    opts = {"DATASETS.TEST": (scenes,), "OUTPUT_DIR": str(tmp_path), "DATALOADER.NUM_WORKERS": 0}
    opts |= {"MODEL.RETINA_FOCAL.TEST.EVALUATOR": library, "INPUT.MIN_SIZE_TEST": SIDE}
    whole, cut = config(**opts), config(**{**opts, TILE: SIDE})
    assert Trainer.test(cut, Sure())["bbox"]["AP"] == pytest.approx(100)
    # In a picture of 128 px the squares are spots of 2.
    assert not Trainer.test(whole, Sure())["bbox"]["AP"] > 50
    run = Run(cut, tmp_path / "model_final.pth", ("square",))
    found = [x for x in detections(run, Sure(), scenes) if x["score"] > 0.5]
    assert len(found) == 157 and {x["category_id"] for x in found} == {1}
