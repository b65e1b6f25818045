"""Pictures that are kept in memory give the same samples, bit by bit, and are read once."""

import itertools
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import small_cfg
from detectron2.config import CfgNode
from detectron2.config import LazyCall as L
from detectron2.data import DatasetMapper
from detectron2.data import transforms as T
from detectron2.structures import Instances
from PIL import Image
from test_assembly import lazy_cfg

from retina_focal.config import get_cfg
from retina_focal.data import image_cache
from retina_focal.data.image_cache import HEADER, CachedMapper, ImageCache, free_memory, plan_cache
from retina_focal.data.images import BadPicture, naming
from retina_focal.data.loading import build_train_loader
from retina_focal.data.registration import register_coco_json
from retina_focal.errors import UserError

WIDTH, HEIGHT = 40, 24
MODES = {
    "RGB": "jpg",
    "L": "jpg",
    "CMYK": "jpg",
    "P": "png",
    "RGBA": "png",
    "1": "png",
    "LA": "png",
}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> list[dict]:
    """One of each mode, and one that is turned by its EXIF orientation."""
    folder, random = tmp_path_factory.mktemp("modes"), np.random.default_rng(0)
    pixels = Image.fromarray(random.integers(0, 256, (4, 6, 3), dtype=np.uint8))
    pixels = pixels.resize((WIDTH, HEIGHT), Image.Resampling.BILINEAR)  # as noise a PNG grows
    for mode, ending in MODES.items():
        pixels.convert(mode).save(folder / f"{mode}.{ending}")
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels.transpose(Image.Transpose.ROTATE_90).save(folder / "turned.jpg", exif=exif)
    return [
        {
            "file_name": str(path),
            "image_id": i,
            "width": WIDTH,
            "height": HEIGHT,
            "annotations": [{"bbox": [3, 4, 20, 12], "bbox_mode": 1, "category_id": 0}],
        }
        for i, path in enumerate(sorted(folder.iterdir()))
    ]


def caching() -> CfgNode:
    node = get_cfg().MODEL.RETINA_FOCAL
    node.TRAIN.CACHE_IMAGES = True
    return node


def mapper(image_format: str = "BGR") -> DatasetMapper:
    augmentations = [T.RandomFlip(), T.RandomBrightness(0.5, 1.5), T.Resize((30, 50))]
    return DatasetMapper(True, augmentations=augmentations, image_format=image_format)


def expect_equal(one: dict, other: dict) -> None:
    assert list(one) == list(other)  # also in their order
    for key, value in one.items():
        if isinstance(value, Instances):
            assert torch.equal(value.gt_boxes.tensor, other[key].gt_boxes.tensor)
            assert torch.equal(value.gt_classes, other[key].gt_classes)
        elif isinstance(value, torch.Tensor):
            assert value.dtype == other[key].dtype and torch.equal(value, other[key])
        else:
            assert value == other[key]


@pytest.mark.parametrize("is_decoded", [True, False])
@pytest.mark.parametrize("image_format", ["BGR", "RGB", "L"])
def test_samples_are_those_of_the_files(image_format, is_decoded, pictures):
    size = 3 * WIDTH * HEIGHT + HEADER if is_decoded else 10**5
    cache = ImageCache([size] * len(pictures), 10**9, is_decoded)
    names = [x["file_name"] for x in pictures]
    cached, plain = CachedMapper(mapper(image_format), cache, names), mapper(image_format)
    for seed, record in enumerate(pictures * 2):
        np.random.seed(seed)
        expected = plain(record)
        np.random.seed(seed)
        expect_equal(cached(record), expected)
    kept = dict(zip(names, cache.lengths[: cache.num_kept], strict=True))
    assert all(length > 0 for length in kept.values())
    if is_decoded:
        by_name = {Path(name).stem: length - WIDTH * HEIGHT for name, length in kept.items()}
        assert 0 < by_name["L"] < HEADER < by_name["RGB"] and by_name["turned"] > HEADER


@pytest.mark.parametrize(("workers", "share"), [(0, 1e-1), (0, 1e-9), (2, 1e-1)])
def test_a_training_reads_each_picture_once(workers, share, data, tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(image_cache, "free_memory", lambda: share * 1e9)
    json_file, folder = tmp_path / "a.json", tmp_path / "images"
    folder.mkdir()
    json_file.write_bytes((data / "a.json").read_bytes())
    for path in data.glob("*.*g"):
        (folder / path.name).write_bytes(path.read_bytes())
    register_coco_json(tmp_path.name, str(json_file), str(folder))
    keys = {"DATASETS.TRAIN": (tmp_path.name,), "SOLVER.IMS_PER_BATCH": 2}
    keys |= {"DATALOADER.NUM_WORKERS": 0, "INPUT.MIN_SIZE_TRAIN": (32, 40, 48)}
    cfg = small_cfg(**keys)
    expected = [*itertools.islice(build_train_loader(cfg, 1), 8)]
    cfg.DATALOADER.NUM_WORKERS = workers
    loader = build_train_loader(cfg, 1, caching())
    found = [*itertools.islice(loader, 8)]
    if share > 1e-3:
        assert "pictures are kept in memory as pixels" in caplog.text
        for path in folder.iterdir():
            path.write_text("nothing of this is read")
        loader.first_batch = 0  # what workers have read, others have too
        found += itertools.islice(loader, 8)
        expected *= 2
    else:
        assert "0 of" in caplog.text and "as files" in caplog.text
    for one, other in zip(found, expected, strict=True):
        for sample, wanted in zip(one, other, strict=True):
            expect_equal(sample, wanted)


def test_what_does_not_fit_as_pixels_is_kept_as_files(pictures, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    sizes = [Path(x["file_name"]).stat().st_size for x in pictures]
    cases = (
        (10**8, len(sizes), True),
        (2 * sum(sizes), len(sizes), False),
        (2 * sizes[0], 1, False),
    )
    for free, kept, is_decoded in [*cases, (2 * sizes[0], 1, False)]:
        monkeypatch.setattr(image_cache, "free_memory", lambda free=free: free)
        cache = plan_cache(pictures)
        assert (cache.num_kept, cache.is_decoded) == (kept, is_decoded)
        assert cache.num_bytes <= free / 2
        assert f"{kept} of {len(sizes)} pictures are kept" in caplog.messages[-1]


def test_a_picture_that_is_bad_is_named_as_ever(pictures, tmp_path):
    whole = Path(pictures[0]["file_name"]).read_bytes()
    (tmp_path / "cut.jpg").write_bytes(Path(pictures[-1]["file_name"]).read_bytes()[:-300])
    (tmp_path / "other.png").write_bytes(whole)
    records = [{**pictures[0], "file_name": str(tmp_path / name)} for name in ("cut.jpg", "no.jpg")]
    records += [{**pictures[0], "file_name": str(tmp_path / "other.png"), "width": 3}]
    for is_decoded in (True, False):
        cache = ImageCache([10**5] * 3, 10**6, is_decoded)
        cached = CachedMapper(mapper(), cache, [x["file_name"] for x in records])
        for record in records * 2:
            with pytest.raises(BadPicture) as expected:
                naming(mapper())(record)
            with pytest.raises(BadPicture) as found:
                cached(record)
            assert str(found.value) == str(expected.value)


def test_a_mapper_that_reads_elsewhere_is_refused(data, tmp_path):
    register_coco_json("rectangles", str(data / "a.json"), str(data))
    cfg = lazy_cfg(tmp_path, "rectangles")
    cfg.dataloader.train.mapper = L(str)()
    with pytest.raises(UserError, match="expected detectron2's DatasetMapper"):
        build_train_loader(cfg, 1, caching())


def test_free_memory_is_that_of_a_container_too(tmp_path, monkeypatch):
    machine = free_memory()
    most, used = tmp_path / "max", tmp_path / "current"
    monkeypatch.setattr(image_cache, "CGROUPS", [(str(most), str(used))])
    used.write_text("3000\n")
    most.write_text("max\n")
    assert free_memory() >= machine * 0.5 > 10000
    most.write_text("10000\n")
    assert free_memory() == 7000
