"""A picture that can't be used is named; every other one reaches the network as it was meant."""

import os
import pickle

import cv2
import numpy as np
import pytest
from detectron2.data import DatasetMapper
from detectron2.structures import BoxMode
from hostile import COLOUR, PICTURES
from PIL import Image
from torch.utils.data import DataLoader

from retina_focal.data.images import BadPicture, check_head, map_record, naming
from retina_focal.data.readers.base import picture_size
from retina_focal.errors import UserError


@pytest.fixture
def record(tmp_path) -> dict:
    cv2.imwrite(str(tmp_path / "a.png"), np.zeros((20, 30, 3), np.uint8))
    return {"file_name": str(tmp_path / "a.png"), "height": 20, "width": 30}


MAPPER = DatasetMapper(is_train=False, augmentations=[], image_format="BGR")


def test_a_whole_image_is_what_the_mapper_makes_of_it(record):
    assert map_record(MAPPER, record)["image"].shape == (3, 20, 30)


@pytest.mark.parametrize("kind", PICTURES)
def test_a_picture_that_can_not_be_used_is_named_with_what_to_do(tmp_path, kind):
    make, words = PICTURES[kind]
    path = tmp_path / "a.png"
    make(path)
    record = {"file_name": str(path), "height": 20, "width": 30}
    with pytest.raises(BadPicture, match=rf"image '{path}' can't be used: .*{words}") as caught:
        map_record(MAPPER, record)
    assert caught.value.file_name == str(path)
    assert str(caught.value).endswith("take the image out of the dataset's annotations")


@pytest.mark.parametrize("head", [b"%!PS-Adobe-3.0 EPSF-3.0\n", b"\xc5\xd0\xd3\xc6\x1e\0\0\0"])
def test_postscript_is_known_by_its_first_bytes_alone(head, tmp_path, monkeypatch):
    """Pillow reads it byte by byte, for up to a minute."""
    (tmp_path / "a.png").write_bytes(head)
    monkeypatch.setattr(Image, "open", None)
    with pytest.raises(BadPicture, match="a program that would be run"):
        check_head(str(tmp_path / "a.png"), 100)
    with pytest.raises(UserError, match="is PostScript"):
        picture_size(tmp_path / "a.png")


def test_a_name_in_a_message_is_one_short_line(tmp_path):
    name = "\x1b[31mred\n" + "x" * 5000
    with pytest.raises(BadPicture) as caught:
        map_record(MAPPER, {"file_name": str(tmp_path / name), "height": 20, "width": 30})
    assert str(caught.value).isprintable() and len(str(caught.value)) < 1500


def test_the_largest_picture_is_a_number_of_pixels(record):
    assert naming(MAPPER, 600)(record)["image"].shape == (3, 20, 30)
    with pytest.raises(BadPicture, match=r"has 30 x 20 pixels, more than .*MAX_PIXELS 599"):
        naming(MAPPER, 599)(record)


def test_a_fault_of_the_mapper_stays_what_it_is_and_its_image_is_logged(record, caplog):
    with pytest.raises(ZeroDivisionError):
        map_record(lambda record: 1 / 0, record)
    assert "a.png" in caplog.text


def test_a_picture_that_a_worker_could_not_use_is_named_without_the_workers_traceback(record):
    os.truncate(record["file_name"], 0)
    loader = DataLoader(_Mapped([record]), batch_size=None, num_workers=1)
    with pytest.raises(UserError) as caught:
        next(iter(loader))
    assert str(caught.value).startswith(f"image '{record['file_name']}' can't be used: it is empty")


class _Mapped(list):
    def __getitem__(self, index: int) -> dict:
        return map_record(MAPPER, super().__getitem__(index))


def test_a_bad_picture_crosses_processes(record):
    copy = pickle.loads(pickle.dumps(BadPicture("words", "a.png")))
    assert (str(copy), copy.file_name) == ("words", "a.png")


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "CMYK", "1", "LA", "YCbCr"])
def test_other_kinds_of_8_bits_are_read_as_their_colours(record, tmp_path, mode):
    image = Image.fromarray(COLOUR).convert(mode)
    record["file_name"] = str(tmp_path / f"a.{'jpg' if mode == 'YCbCr' else 'tif'}")
    image.save(record["file_name"])
    found = map_record(MAPPER, record)["image"].numpy()[::-1].transpose(1, 2, 0)
    expected = np.asarray(Image.open(record["file_name"]).convert("RGB"))
    assert np.array_equal(found, expected) and found.std() > 10


def test_16_bit_colour_is_scaled(record, tmp_path):
    cv2.imwrite(record["file_name"], COLOUR.astype(np.uint16)[:, :, ::-1] * 257)
    found = map_record(MAPPER, record)["image"].numpy()[::-1].transpose(1, 2, 0)
    assert np.array_equal(found, COLOUR)


def test_the_first_frame_of_an_animation_is_used_with_a_line(record, tmp_path, caplog):
    frames = [Image.fromarray(COLOUR), Image.fromarray(255 - COLOUR)]
    record["file_name"] = str(tmp_path / "a.tif")
    frames[0].save(record["file_name"], save_all=True, append_images=frames[1:])
    found = map_record(MAPPER, record)["image"].numpy()[::-1].transpose(1, 2, 0)
    assert np.array_equal(found, COLOUR)
    assert "a.tif' has 2 frames; of such, the first is used" in caplog.text


def turned(path: str, orientation: int) -> str:
    exif = Image.Exif()
    exif[274] = orientation
    Image.fromarray(COLOUR).save(path, exif=exif)
    return path


def test_exif_turns_the_picture(record, tmp_path):
    record["file_name"] = turned(str(tmp_path / "a.jpg"), 6)
    record |= {"height": 30, "width": 20}
    assert map_record(MAPPER, record)["image"].shape == (3, 30, 20)


def test_links_to_regular_files_are_followed(record, tmp_path):
    (tmp_path / "link.png").symlink_to(record["file_name"])
    record["file_name"] = str(tmp_path / "link.png")
    assert map_record(MAPPER, record)["image"].shape == (3, 20, 30)


def test_boxes_of_a_record_are_untouched(record):
    box = {"bbox": [1, 2, 3, 4], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 0}
    record["annotations"] = [box]
    mapper = DatasetMapper(is_train=True, augmentations=[], image_format="BGR")
    instances = naming(mapper)(record)["instances"]
    assert instances.gt_boxes.tensor.tolist() == [[1, 2, 4, 6]]
