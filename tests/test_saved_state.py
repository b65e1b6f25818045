"""A checkpoint that loads but can't be gone on from is named, with the reason, and skipped."""

import copy
import shutil
from pathlib import Path

import pytest
import torch
from test_resume import small, train
from torch.amp import GradScaler

from retina_focal.data.registration import register_coco_json
from retina_focal.errors import UserError
from retina_focal.training.assembly import Trainer
from retina_focal.training.checkpoint_files import read_checkpoint, write_checkpoint
from retina_focal.training.checkpoints import RunCheckpointer, expect_classes_of_run
from retina_focal.training.seeds import saved_seed

KEYS = {"SOLVER.MAX_ITER": 4, "SOLVER.STEPS": (2,), "MODEL.RETINA_FOCAL.TRAIN.BEST": "bbox/AP"}
KEYS["MODEL.RETINA_FOCAL.DATA.VAL"] = "toy"
NAN = float("nan")


@pytest.fixture(scope="module")
def run(data, tmp_path_factory) -> Trainer:
    """It has saved after iterations 1 and 3; the last one has a GradScaler too."""
    register_coco_json("toy", str(data / "a.json"), str(data))
    return train(small(tmp_path_factory.mktemp("state"), **KEYS))


@pytest.fixture(scope="module")
def content(run) -> dict:
    whole = torch.load(Path(run.cfg.OUTPUT_DIR, "model_0000003.pth"))
    whole["trainer"]["_trainer"]["grad_scaler"] = GradScaler("cpu").state_dict()
    return whole


def momentum(value: torch.Tensor | float | str) -> dict:
    return {"trainer._trainer.optimizer.state.2.momentum_buffer": value}


def scaler(**fields: object) -> dict:
    return {f"trainer._trainer.grad_scaler.{name}": x for name, x in fields.items()}


def hook(name: str, **fields: object) -> dict:
    return {f"trainer.hooks.{name}.{field}": x for field, x in fields.items()}


ABSENT = object()
# What is altered, and words of the message.
ALTERED = [
    ({"trainer": 5}, "its trainer is 5, expected a trainer's state"),
    ({"trainer": ABSENT}, "it holds weights alone"),
    ({"trainer.hooks": "text"}, "its trainer.hooks is 'text'"),
    ({"trainer._trainer": [1]}, "its trainer._trainer is another list"),
    ({"trainer.iteration": -7}, "its trainer.iteration is -7, expected a number of iterations"),
    ({"trainer.iteration": 10**30}, "expected a number of iterations"),
    ({"trainer.iteration": 2.0}, "expected a number of iterations"),
    ({"trainer.iteration": True}, "expected a number of iterations"),
    ({"trainer.iteration": 9}, "last_epoch is 4, expected 10 after iteration 9"),
    ({"iteration": "3"}, "its iteration is '3'"),
    ({"classes": [5]}, "its classes is another list, expected a list of names"),
    ({"trainer._trainer.optimizer": ABSENT}, "has no trainer._trainer.optimizer"),
    ({"trainer._trainer.optimizer.state": 1}, "optimizer.state is 1"),
    ({"trainer._trainer.optimizer.state.2": 1}, "expected a dict of the parameters' states"),
    ({"trainer._trainer.optimizer.param_groups": []}, "0 parameters in 0 groups.*FREEZE_AT"),
    ({"trainer._trainer.optimizer.param_groups": [{}]}, "expected groups of parameters"),
    (
        momentum(torch.zeros(7)),
        r"of shape \(7,\), expected torch.float32 of shape",
    ),
    (momentum("text"), "state.2.momentum_buffer is a str"),
    (momentum(1.0), "momentum_buffer is a float"),
    (scaler(scale=0.0), "scale is 0.0, expected a finite number above 0"),
    (scaler(scale=NAN), "scale is nan"),
    (scaler(growth_factor=1.0), "above 1"),
    (scaler(_growth_tracker=ABSENT), "has no trainer._trainer.grad_scaler._growth_tracker"),
    (hook("LRScheduler", last_epoch="4"), "last_epoch is '4'"),
    (hook("ExactResume", scalars={"lr": (True, [(1.0, "a")])}), "the last values of each scalar"),
    (hook("ExactResume", buffers=[{"x": 1}]), "the buffers of each process"),
    (hook("ExactResume", buffers=[{"x": torch.tensor(NAN)}]), "hooks.ExactResume.buffers.0.x"),
    (hook("ExactResume", seed=-1), "seed is -1"),
    (hook("ExactResume", seen="1"), "seen is '1', expected a number of images"),
    (hook("Trouble", bad=["a"]), "file names and reasons"),
    ({"raw_model": 5}, "its raw_model is 5, expected names and tensors"),
    ({"trainer.hooks.WeightAverage": {"num_updates": -1}}, "num_updates is -1"),
    (hook("BestCheckpoint", best="1"), "best is '1'"),
]


def altered(content: dict, changes: dict) -> dict:
    content = copy.deepcopy(content)
    for place, value in changes.items():
        holder, (*path, key) = content, place.split(".")
        for part in path:
            holder = holder[int(part) if part.isdigit() else part]
        key = int(key) if key.isdigit() else key
        if value is ABSENT:
            del holder[key]
        else:
            holder[key] = value
    return content


@pytest.mark.parametrize(("changes", "words"), ALTERED, ids=range(len(ALTERED)))
def test_what_is_altered_is_named(changes, words, content, run, tmp_path):
    path = tmp_path / "model_0000003.pth"
    write_checkpoint(path, altered(content, changes))
    with pytest.raises(UserError, match=f"model_0000003.pth.*{words}"):
        read_checkpoint(path, run.optimizer)


def test_buffers_of_another_dtype_and_values_that_are_not_finite_are_named(content, run, tmp_path):
    shape = content["trainer"]["_trainer"]["optimizer"]["state"][2]["momentum_buffer"].shape
    weights = {**content["model"], "criterion.loss_normalizer": torch.tensor(NAN)}
    for changes, words in (
        (momentum(torch.zeros(shape, dtype=torch.int64)), "is torch.int64"),
        (momentum(torch.full(shape, NAN)), "not finite: .*state.2.momentum_buffer"),
        ({"model": weights}, "not finite: model.criterion.loss_normalizer"),
    ):
        test_what_is_altered_is_named(changes, words, content, run, tmp_path)


def test_what_a_run_saves_is_accepted(content, run, tmp_path):
    path = tmp_path / "model_0000003.pth"
    write_checkpoint(path, content)
    assert read_checkpoint(path, run.optimizer)["iteration"] == 3
    for saved in Path(run.cfg.OUTPUT_DIR).glob("model_*.pth"):
        read_checkpoint(saved, run.optimizer)


@pytest.mark.parametrize("changes", [{"trainer": ABSENT}, hook("ExactResume", buffers=ABSENT)])
def test_weights_that_no_run_can_go_on_from_can_be_evaluated(changes, content, run, tmp_path):
    path = tmp_path / "model_final.pth"
    write_checkpoint(path, altered(content, changes))
    assert read_checkpoint(path)["model"].keys() == content["model"].keys()
    checkpointer = RunCheckpointer(run.model, str(tmp_path))
    assert checkpointer.resume_or_load("")["classes"] == ["red", "blue"]
    with pytest.raises(UserError, match="a run can't go on from"):
        read_checkpoint(path, run.optimizer)
    write_checkpoint(path, altered(content, {"classes": 5}))
    with pytest.raises(UserError, match="can't be used: its classes is 5"):
        read_checkpoint(path)


@pytest.mark.parametrize("changes", [{"trainer": 5}, {"classes": 5}, momentum(torch.zeros(7))])
def test_a_run_goes_on_from_the_newest_that_is_not_altered(changes, content, run, tmp_path, caplog):
    for name in ("model_0000001.pth", "model_0000003.pth", "last_checkpoint"):
        shutil.copy(Path(run.cfg.OUTPUT_DIR, name), tmp_path)
    write_checkpoint(tmp_path / "model_0000003.pth", altered(content, changes))
    (tmp_path / "last_checkpoint").write_text("model_0000003.pth")
    expect_classes_of_run(str(tmp_path), ["red", "blue"])
    assert saved_seed(str(tmp_path)) == 3
    trainer = Trainer(small(tmp_path, **KEYS))
    trainer.resume_or_load()
    assert trainer.start_iter == 2 and "model_0000003.pth" in caplog.text


def test_a_momentum_that_is_not_finite_is_not_saved(run, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        state = next(iter(run.optimizer.state.values()))
        patch.setitem(state, "momentum_buffer", state["momentum_buffer"] / 0)
        patch.setattr(run.checkpointer, "save_dir", str(tmp_path))
        with pytest.raises(UserError, match="momentum_buffer is not finite, so that"):
            run.checkpointer.save("model_0000009")
    assert not list(tmp_path.iterdir())
