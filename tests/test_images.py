"""An image that can't be used is named."""

import cv2
import numpy as np
import pytest
from detectron2.data import DatasetMapper

from retina_focal.data.images import map_record
from retina_focal.errors import UserError


@pytest.fixture
def record(tmp_path) -> dict:
    cv2.imwrite(str(tmp_path / "a.png"), np.zeros((20, 30, 3), np.uint8))
    return {"file_name": str(tmp_path / "a.png"), "height": 20, "width": 30}


MAPPER = DatasetMapper(is_train=False, augmentations=[], image_format="BGR")


def test_a_whole_image_is_what_the_mapper_makes_of_it(record):
    assert map_record(MAPPER, record)["image"].shape == (3, 20, 30)


@pytest.mark.parametrize("fault", ["missing", "text", "half", "size"])
def test_an_image_that_cannot_be_used_is_named_with_what_to_do(record, tmp_path, fault):
    path = tmp_path / "a.png"
    if fault == "missing":
        path.unlink()
    elif fault == "text":
        path.write_text("no image")
    elif fault == "half":
        path.write_bytes(path.read_bytes()[:-30])
    else:
        record["width"] = 31
    with pytest.raises(UserError, match=r"image '.*a\.png' can't be used .*annotations"):
        map_record(MAPPER, record)


def test_a_fault_of_the_mapper_stays_what_it_is(record):
    with pytest.raises(ZeroDivisionError):
        map_record(lambda record: 1 / 0, record)
