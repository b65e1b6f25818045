"""Pictures are resized as the project does it whose weights run."""

import cv2
import numpy as np
import pytest
import torch
from detectron2.data.transforms import ResizeShortestEdge
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from retina_focal import get_cfg
from retina_focal.data.resizing import KINDS, ResizeAs, resizing_of_test
from retina_focal.limits import CHOICES

SIZES = [(97, 131), (131, 97), (480, 640), (30, 300)]


def picture(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def resized(kind: str, image: np.ndarray, shortest: int, longest: int) -> np.ndarray:
    return ResizeAs(kind, shortest, longest).get_transform(image).apply_image(image)


def test_the_config_takes_the_kinds_that_there_are():
    assert set(CHOICES["MODEL.RETINA_FOCAL.TEST.RESIZE"]) == {"detectron2", *KINDS}


@pytest.mark.parametrize("size", SIZES)
def test_torchvision(size):
    image = picture(*size)
    transform = GeneralizedRCNNTransform(100, 160, [0.0] * 3, [1.0] * 3, 1).eval()
    (expected,) = transform([torch.from_numpy(image).permute(2, 0, 1).double()])[0].tensors
    found = resized("torchvision", image, 100, 160)
    # For a network of fp64 too: fp32 would be off by 1e-5.
    torch.testing.assert_close(
        torch.from_numpy(found).permute(2, 0, 1), expected, rtol=0, atol=1e-9
    )


def test_mmdetection_and_detectron_by_opencv():
    image = picture(50, 70)
    expected = cv2.resize(image, (140, 100))
    assert np.array_equal(resized("mmdetection", image, 100, 160), expected)
    found = resized("detectron", image, 100, 160)
    # It rounds bytes once per direction.
    assert found.dtype == np.float32 and 0 < np.abs(found - expected).max() < 1
    assert resized("mmdetection", picture(30, 300), 100, 160).shape == (16, 160, 3)
    # 2.5 rows: mmdetection rounds a half up, Detectron to the even number.
    shapes = [resized(x, picture(5, 20), 10, 10).shape for x in ("mmdetection", "detectron")]
    assert shapes == [(3, 10, 3), (2, 10, 3)]


def test_boxes_follow_the_picture():
    transform = ResizeAs("torchvision", 100, 160).get_transform(picture(50, 70))
    box = transform.apply_box(np.array([[10.0, 20.0, 70.0, 50.0]]))[0]
    np.testing.assert_allclose(box, [20, 40, 140, 100])


def test_the_default_is_detectron2s_and_0_resizes_nothing():
    cfg = get_cfg()
    (resizing,) = resizing_of_test(cfg)
    assert isinstance(resizing, ResizeShortestEdge)
    assert resizing.short_edge_length == (800, 800) and resizing.max_size == 1333
    cfg.MODEL.RETINA_FOCAL.TEST.RESIZE = "torchvision"
    assert isinstance(resizing_of_test(cfg)[0], ResizeAs)
    cfg.INPUT.MIN_SIZE_TEST = 0
    assert resizing_of_test(cfg) == []
