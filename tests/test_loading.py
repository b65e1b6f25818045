"""What the loader gives at an iteration depends on the seed alone."""

import copy
import itertools
import logging
import random

import cv2
import numpy as np
import pytest
import torch
from conftest import small_cfg
from detectron2.config import LazyCall as L
from detectron2.data import DatasetMapper, build_detection_train_loader
from detectron2.data import transforms as T
from detectron2.utils.env import seed_all_rng
from omegaconf import OmegaConf

from retina_focal.data.loading import TrainLoader, build_train_loader
from retina_focal.data.registration import register_coco_json
from retina_focal.errors import UserError


@pytest.fixture
def cfg(data):
    register_coco_json("rectangles", str(data / "a.json"), str(data))
    names = {"DATASETS.TRAIN": ("rectangles",), "SOLVER.IMS_PER_BATCH": 2}
    names |= {"DATALOADER.NUM_WORKERS": 0, "INPUT.MIN_SIZE_TRAIN": (32, 40, 48, 56)}
    names |= {"INPUT.CROP.ENABLED": True}
    return small_cfg(**names)


def seen(loader, first: int = 0, count: int = 6) -> list[list[tuple]]:
    """What identifies the samples of some batches: file, random size and crop, flip."""
    if first:
        loader.first_batch = first
    return [
        [(x["file_name"], tuple(x["image"].shape), int(x["image"].sum())) for x in batch]
        for batch in itertools.islice(loader, count)
    ]


def test_a_batch_depends_on_seed_and_iteration_alone(cfg):
    whole = seen(build_train_loader(cfg, 1), count=12)
    assert len({shape for batch in whole for _, shape, _ in batch}) > 3
    seed_all_rng(5)  # whatever else draws
    assert seen(build_train_loader(cfg, 1), first=7, count=5) == whole[7:]
    assert seen(build_train_loader(cfg, 2), count=12) != whole


@pytest.mark.parametrize("workers", [1, 2])
def test_the_number_of_workers_changes_nothing(workers, cfg):
    whole = seen(build_train_loader(cfg, 1))
    cfg.DATALOADER.NUM_WORKERS = workers
    state = torch.get_rng_state()
    assert seen(build_train_loader(cfg, 1)) == whole
    assert torch.equal(torch.get_rng_state(), state)


def test_loading_leaves_the_main_processs_random_numbers_alone(cfg):
    seed_all_rng(3)
    expected = random.random(), np.random.rand(), torch.rand(2)
    seed_all_rng(3)
    seen(build_train_loader(cfg, 1))
    found = random.random(), np.random.rand(), torch.rand(2)
    assert found[:2] == expected[:2] and torch.equal(found[2], expected[2])


@pytest.mark.parametrize(
    "name", ["TrainingSampler", "RepeatFactorTrainingSampler", "RandomSubsetTrainingSampler"]
)
def test_detectron2s_samplers_are_seeded(name, cfg):
    cfg.DATALOADER.SAMPLER_TRAIN, cfg.DATALOADER.RANDOM_SUBSET_RATIO = name, 0.5
    loader = build_train_loader(cfg, 1)
    assert isinstance(loader, TrainLoader)
    whole = seen(loader)
    seed_all_rng(5)
    assert seen(build_train_loader(cfg, 1), first=2, count=4) == whole[2:]
    if name.startswith("RandomSubset"):
        assert len({name for batch in whole for name, *_ in batch}) == 3


def lazy(cfg, **changes: object):
    """A LazyConfig with detectron2's loader."""
    records = [{"file_name": "a", "height": 1, "width": 2}] * 3
    loader = L(build_detection_train_loader)(
        dataset=records, mapper=copy.copy, total_batch_size=2, num_workers=0
    )
    loader.update(changes)
    return OmegaConf.create({"dataloader": {"train": loader}}, flags={"allow_objects": True})


def test_detectron2s_loader_in_a_lazy_config_becomes_ours_and_another_stays(cfg):
    class Mine(list):
        pass

    config = lazy(cfg)
    config.dataloader.train.mapper = L(DatasetMapper)(
        is_train=True, augmentations=[L(T.RandomFlip)()], image_format="BGR"
    )
    loader = build_train_loader(config, 4)
    assert isinstance(loader, TrainLoader) and loader.seed == 4
    assert config.dataloader.train["_target_"] is build_detection_train_loader
    config.dataloader.train = L(Mine)()
    assert type(build_train_loader(config, 4)) is Mine


def broken(cfg, data, tmp_path, faulty: int) -> TrainLoader:
    """A loader of the six pictures, the first `faulty` of them without content."""
    loader = build_train_loader(cfg, 1)
    records = [dict(loader._samples.dataset[i]) for i in range(6)]
    for i, record in enumerate(records):
        name = tmp_path / f"{i}.png"
        cv2.imwrite(str(name), cv2.imread(record["file_name"]))
        record["file_name"] = str(name)
        if i < faulty:
            name.write_bytes(b"")
    loader._samples.dataset = records
    return loader


def test_a_picture_that_cannot_be_used_is_replaced_by_one_of_the_same_draw(cfg, data, tmp_path):
    loader = broken(cfg, data, tmp_path, faulty=2)
    batches = list(itertools.islice(loader, 6))
    skipped = [(x["file_name"], x["skipped"]) for b in batches for x in b if "skipped" in x]
    assert skipped
    for name, faults in skipped:
        assert name[-5] in "2345"
        for file_name, reason in faults:
            assert file_name[-5] in "01" and file_name in reason
    again = seen(broken(cfg, data, tmp_path, faulty=2), first=3, count=3)
    assert again == seen(broken(cfg, data, tmp_path, faulty=2))[3:]
    loader, asked = broken(cfg, data, tmp_path, faulty=6), []
    mapper = loader._samples.mapper
    loader._samples.mapper = lambda x: (asked.append(x["file_name"]), mapper(x))[1]
    with pytest.raises(UserError, match="none of 6 images"):
        next(iter(loader))
    assert sorted(asked) == sorted(set(asked))  # none is tried again


def test_the_largest_picture_is_that_of_the_config(cfg):
    with pytest.raises(UserError, match=r"6 images .* pixels, more than"):
        next(iter(build_train_loader(cfg, 0, max_pixels=10)))


def test_a_mapper_may_ask_for_another_image(cfg):
    loader = build_train_loader(cfg, 1)
    mapper = loader._samples.mapper
    loader._samples.mapper = lambda x: None if x["file_name"].endswith("0.png") else mapper(x)
    names = {x["file_name"][-5] for batch in itertools.islice(loader, 12) for x in batch}
    assert names == set("12345")


def test_images_that_processes_cannot_share_are_refused(cfg, monkeypatch, caplog):
    caplog.set_level(logging.WARNING)
    monkeypatch.setattr("detectron2.utils.comm.get_world_size", lambda: 3)
    monkeypatch.setattr("detectron2.utils.comm.all_gather", lambda x: [x])
    with pytest.raises(UserError, match="IMS_PER_BATCH is 2, for 3 processes"):
        build_train_loader(cfg, 1)
