"""Laws of predicting files: the boxes of DefaultPredictor, whatever stands beside a picture."""

import threading
import time

import cv2
import numpy as np
import pytest
import torch
from detectron2.data.detection_utils import read_image
from detectron2.engine import DefaultPredictor
from photographs import Corners, config, noise, random_model, write_photos
from PIL import Image

from retina_focal.data.images import BadPicture
from retina_focal.errors import UserError
from retina_focal.evaluation.ahead import ahead
from retina_focal.evaluation.inputs import Input, find_inputs, read_picture
from retina_focal.evaluation.prediction import Predictor


@pytest.fixture(scope="module")
def model():
    return random_model()


@pytest.fixture
def photos(tmp_path):
    return write_photos(tmp_path / "photos")


@pytest.mark.parametrize("format, batch_size", [("BGR", 3), ("RGB", 1)])
def test_boxes_equal_those_of_the_default_predictor(model, photos, format, batch_size):
    cfg = config(**{"INPUT.FORMAT": format})
    stock = DefaultPredictor.__new__(DefaultPredictor)  # without a file of weights
    DefaultPredictor.__init__(stock, cfg)
    stock.model = model
    results = list(Predictor(cfg, model, batch_size)(find_inputs([str(photos)])))
    assert [x.name for x in results] == ["a", "b", "c", "d", "e"]
    for result in results:
        image = read_image(str(result.source.path), "BGR")
        expected = stock(image)["instances"]
        assert (result.height, result.width) == image.shape[:2] == expected.image_size
        assert len(result.instances) == len(expected) > 20
        # 1e-3 px: convolutions of a batch may add in another order than those of an image.
        torch.testing.assert_close(
            result.instances.pred_boxes.tensor, expected.pred_boxes.tensor, rtol=0, atol=1e-3
        )
        torch.testing.assert_close(result.instances.scores, expected.scores, rtol=1e-4, atol=1e-6)
        assert torch.equal(result.instances.pred_classes, expected.pred_classes)


@pytest.mark.parametrize("orientation", range(9))
def test_pictures_are_turned_as_detectron2_turns_them(tmp_path, orientation):
    exif = Image.Exif()
    exif[274] = orientation
    for name in ("a.jpg", "a.png"):
        noise(tmp_path / name, size=(40, 30), exif=exif)
        expected = read_image(str(tmp_path / name), "RGB")
        assert np.array_equal(np.asarray(read_picture(tmp_path / name, 10**6)), expected)


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "CMYK", "1"])
def test_every_mode_becomes_rgb_as_in_detectron2(tmp_path, mode):
    path = tmp_path / "a.tif"
    noise(path)
    Image.open(path).convert(mode).save(path)
    expected = read_image(str(path), "RGB")
    assert np.array_equal(np.asarray(read_picture(path, 10**6)), expected)


def test_what_can_not_be_used_is_named_in_its_place_and_the_rest_goes_on(model, photos):
    (photos / "b.jpg").write_bytes((photos / "b.jpg").read_bytes()[:900])
    (photos / "c.png").write_bytes(b"")
    noise(photos / "d.png", size=(2000, 1000))
    cfg = config(**{"MODEL.RETINA_FOCAL.DATA.MAX_PIXELS": 10**6})
    results = list(Predictor(cfg, model, 2)(find_inputs([str(photos)])))
    assert [type(x).__name__ for x in results] == ["Prediction", *["BadPicture"] * 3, "Prediction"]
    for text, bad in zip(["truncated", "empty", "MAX_PIXELS"], results[1:4], strict=True):
        assert text in str(bad) and "the others are predicted" in str(bad)


@pytest.mark.parametrize("min_size", [0, 256])
def test_a_large_picture_is_cut_and_its_objects_are_where_they_were(tmp_path, min_size):
    image = np.zeros((300, 500, 3), np.uint8)
    corners = [(0, 0), (490, 290), (95, 95), (200, 40), (333, 250), (64, 200)]
    for x, y in corners:
        image[y : y + 10, x : x + 10] = 255
    Image.fromarray(image).save(tmp_path / "a.png")
    opts = {"MODEL.RETINA_FOCAL.TEST.TILE": 128, "INPUT.MIN_SIZE_TEST": min_size}
    opts["INPUT.MAX_SIZE_TEST"] = 1000
    predictor = Predictor(config(**opts), Corners(), batch_size=4)
    (result,) = predictor(find_inputs([str(tmp_path)]))
    found = result.instances.pred_boxes.tensor
    found = found[found[:, :2].sum(1).argsort()]
    expected = torch.tensor([[x, y, x + 10, y + 10] for x, y in sorted(corners, key=sum)])
    # A tile that is resized blurs the edges of the squares.
    torch.testing.assert_close(found, expected.float(), rtol=0, atol=1.5 if min_size else 1e-3)
    assert result.instances.image_size == (300, 500)


def test_frames_of_a_video(tmp_path):
    path = tmp_path / "film.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 10, (64, 48))
    for i in range(5):
        frame = np.zeros((48, 64, 3), np.uint8)
        frame[20:30, 8 * i : 8 * i + 10] = 255
        writer.write(frame)
    writer.release()
    predictor = Predictor(config(**{"INPUT.MIN_SIZE_TEST": 0}), Corners(), every=2)
    results = list(predictor(find_inputs([str(path)])))
    assert [(x.name, x.frame) for x in results] == [(f"film/{i:06d}", i) for i in (0, 2, 4)]
    for i, result in zip((0, 2, 4), results, strict=True):
        expected = torch.tensor([[8.0 * i, 20, 8 * i + 10, 30]])
        torch.testing.assert_close(
            result.instances.pred_boxes.tensor, expected, rtol=0, atol=1.5
        )  # JPEG blurs
    path.write_bytes(b"no video")
    (bad,) = predictor(find_inputs([str(path)]))
    assert isinstance(bad, BadPicture) and "no frame" in str(bad)


def test_inputs_are_found_once_and_named_apart(tmp_path):
    for name in ("a.jpg", "a.png", "b/a.jpg", "b/.hidden.jpg", "b/notes.txt", "c.TIF", "out/a.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "empty").mkdir()
    found = find_inputs([str(tmp_path), str(tmp_path / "a.jpg")], leave_out=tmp_path / "out")
    assert [x.name for x in found] == ["a", "a_png", "c", "b/a"]
    (named,) = find_inputs([str(tmp_path / "b/notes.txt")])  # which says itself that it is none
    assert named == Input(tmp_path / "b/notes.txt", "notes")
    assert [x.name for x in find_inputs([str(tmp_path / "**/a.jpg")])] == ["a", "a_jpg", "a_2"]
    with pytest.raises(UserError, match="holds no picture and no video"):
        find_inputs([str(tmp_path / "empty")])
    with pytest.raises(UserError, match="does not exist"):
        find_inputs([str(tmp_path / "z.jpg")])
    with pytest.raises(UserError, match="holds no picture"):
        find_inputs([str(tmp_path / "*.gif")])


def test_items_are_made_ahead_but_no_more_than_asked_for():
    made = []

    def items():
        for i in range(100):
            made.append(i)
            yield i

    reading = ahead(items(), 3)
    assert next(reading) == 0
    time.sleep(0.3)
    assert 2 <= len(made) <= 5  # one is used, three wait, one can't be put
    count = threading.active_count()
    reading.close()
    time.sleep(0.5)
    assert threading.active_count() < count and len(made) <= 5
    assert list(ahead(items(), 3)) == list(range(100))


def test_what_is_raised_ahead_is_raised_here_after_what_came_before():
    def items():
        yield 1
        raise ZeroDivisionError

    reading = ahead(items(), 2)
    assert next(reading) == 1
    with pytest.raises(ZeroDivisionError):
        next(reading)
