"""Missing pictures are named before a training or an evaluation begins."""

import json
import shutil

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from test_assembly import make_cfg

from retina_focal.data import existence
from retina_focal.data.existence import expect_pictures, missing_files
from retina_focal.data.registration import register_coco_json
from retina_focal.errors import UserError
from retina_focal.training.assembly import Trainer, evaluate


@pytest.mark.parametrize("few", [0, 100])
def test_each_missing_file_is_named_once(few, tmp_path, monkeypatch):
    monkeypatch.setattr(existence, "FEW", few)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").mkdir()
    for name in ("0.png", "a/1.png"):
        (tmp_path / name).touch()
    (tmp_path / "a/link.png").symlink_to(tmp_path / "a/1.png")
    paths = ["0.png", "a/1.png", "a/link.png", "a/2.png", f"{tmp_path}/a/1.png", "a/2.png"]
    paths += ["b/1.png", "0.png/1.png", "s3://x/1.png", "a/../0.png"]
    assert missing_files(paths) == ["a/2.png", "b/1.png", "0.png/1.png"]
    assert missing_files([]) == []


def test_as_many_as_may_be_skipped_are_warned_of(caplog):
    records = [{"file_name": f"nowhere/{i}.png"} for i in range(20)] + [{}]
    expect_pictures(records, "mine", 20)
    assert "mine: 20 pictures are not there: nowhere/0.png, " in caplog.text
    with pytest.raises(UserError, match=r"nowhere/0.png.*12 more.*add: .*MAX_BAD_IMAGES 20$"):
        expect_pictures(records, "mine", 19)


@pytest.fixture
def gap(data, tmp_path):
    """A dataset whose last picture is missing."""
    shutil.copytree(data, tmp_path / "data")
    name = json.loads((tmp_path / "data/a.json").read_text())["images"][-1]["file_name"]
    (tmp_path / "data" / name).unlink()
    register_coco_json("gap", str(tmp_path / "data/a.json"), str(tmp_path / "data"))
    yield "gap"
    DatasetCatalog.remove("gap")
    MetadataCatalog.remove("gap")


@pytest.mark.parametrize("kind", ["yaml", "lazy"])
def test_a_missing_picture_is_found_before_the_first_step(kind, gap, tmp_path):
    cfg = make_cfg(kind, tmp_path, gap)
    with pytest.raises(UserError, match=r"training data: 1 pictures are not there: .*5\.png"):
        Trainer(cfg)
    with pytest.raises(UserError, match=r"dataset 'gap': 1 pictures are not there: .*5\.png"):
        evaluate(cfg, resume=False)


def test_one_of_the_test_set_is_found_before_it_is_trained(gap, data, tmp_path):
    register_coco_json("toy", str(data / "a.json"), str(data))
    cfg = make_cfg("yaml", tmp_path, "toy")
    cfg.DATASETS.TEST = (gap,)
    with pytest.raises(UserError, match="dataset 'gap': 1 pictures"):
        Trainer(cfg)
