"""A run's folder means its best weights, else its last, else its newest that are whole."""

from pathlib import Path

import pytest
import torch

from retina_focal.config import get_cfg
from retina_focal.errors import UserError
from retina_focal.tools.runs import open_run
from retina_focal.training.checkpoint_files import write_checkpoint

CLASSES = ["red", "blue"]
NAMES = ["model_best.pth", "model_final.pth", "model_0000009.pth", "model_0000004.pth"]


@pytest.fixture
def run(tmp_path):
    """A folder with a config and one checkpoint of each kind, none of which is tagged."""
    cfg = get_cfg()
    cfg.MODEL.RETINANET.NUM_CLASSES = len(CLASSES)
    cfg.MODEL.META_ARCHITECTURE = "FocalRetinaNet"
    cfg.MODEL.DEVICE = "cpu"
    cfg.OUTPUT_DIR = "where/it/was/trained"
    (tmp_path / "config.yaml").write_text(cfg.dump())
    for name in NAMES:
        write_checkpoint(tmp_path / name, {"model": {"x": torch.ones(2)}, "classes": CLASSES})
    return tmp_path


def test_the_best_then_the_last_then_the_newest_whole_checkpoint_is_meant(run, caplog):
    for name in NAMES:
        opened = open_run(run)
        assert [opened.weights, Path(opened.cfg.MODEL.WEIGHTS)] == [run / name] * 2
        if name == NAMES[0]:
            (run / name).unlink()
        else:  # skipped in words
            (run / name).write_bytes((run / name).read_bytes()[:-9])
    assert not [record for record in caplog.records if NAMES[0] in record.getMessage()]
    assert "not whole" in caplog.text
    with pytest.raises(UserError, match="holds no whole checkpoint"):
        open_run(run)


def test_a_run_knows_its_classes_and_where_it_lies_now(run):
    opened = open_run(str(run), opts=["MODEL.RETINANET.NMS_THRESH_TEST", "0.3"])
    assert opened.classes == tuple(CLASSES)
    assert Path(opened.cfg.OUTPUT_DIR) == run
    assert opened.cfg.MODEL.RETINANET.NMS_THRESH_TEST == 0.3


def test_a_config_with_weights_stands_in_place_of_a_folder(run):
    weights = ["MODEL.WEIGHTS", str(run / NAMES[3])]
    assert open_run(None, str(run / "config.yaml"), weights).weights == run / NAMES[3]
    assert open_run(run, None, weights).weights == run / NAMES[3]
    with pytest.raises(UserError, match="no weights are given"):
        open_run(None, str(run / "config.yaml"))


@pytest.mark.parametrize(
    ("break_it", "words"),
    [
        (lambda run: (run / "config.yaml").unlink(), r"holds no config\.yaml"),
        (lambda run: (run / "config.yaml").write_text("dataloader: {}\n"), "LazyConfig"),
        (
            lambda run: (run / "config.yaml").write_text("MODEL: {RETINANET: {NUM_CLASSES: 5}}\n"),
            "has 2 classes but MODEL.RETINANET.NUM_CLASSES is 5; add",
        ),
    ],
)
def test_what_is_no_run_is_refused_in_words(run, break_it, words):
    break_it(run)
    with pytest.raises(UserError, match=words):
        open_run(run)


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match=r"'.*nowhere' is no folder"):
        open_run(tmp_path / "nowhere")
    with pytest.raises(UserError, match="no run is given"):
        open_run()


def test_a_checkpoint_without_names_takes_those_of_the_datasets_or_numbers(run):
    write_checkpoint(run / NAMES[0], {"model": {"x": torch.ones(2)}})
    assert open_run(run).classes == ("0", "1")
    cfg = run / "config.yaml"
    with pytest.raises(UserError, match=r"names none, and .*coco_2017_val.* has 80 classes but"):
        open_run(run, opts=["DATASETS.TEST", "('coco_2017_val',)"])
    cfg.write_text(cfg.read_text().replace("NUM_CLASSES: 2", "NUM_CLASSES: 80"))
    opened = open_run(run, opts=["DATASETS.TEST", "('coco_2017_val',)"])
    assert opened.classes[:2] == ("person", "bicycle") and len(opened.classes) == 80
