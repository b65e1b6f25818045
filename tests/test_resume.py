"""An interrupted run ends with the weights and the metrics of one that never stopped."""

import hashlib
import json
import logging
import shutil
import signal
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from conftest import PLUGIN
from detectron2.config import CfgNode
from detectron2.config import LazyCall as L
from detectron2.data import transforms as T
from detectron2.engine import HookBase, hooks
from detectron2.utils.env import seed_all_rng
from omegaconf import DictConfig, OmegaConf
from test_assembly import lazy_cfg
from torch import nn

from retina_focal.config import get_cfg
from retina_focal.data.registration import register_coco_json
from retina_focal.errors import UserError
from retina_focal.training.assembly import Trainer
from retina_focal.training.checkpoint_files import write_checkpoint
from retina_focal.training.metrics import cut_metrics, results_in_metrics
from retina_focal.training.resume import CLOCK
from retina_focal.training.seeds import saved_seed
from retina_focal.training.signals import Stop

SMALL = {
    **PLUGIN,
    "MODEL.BACKBONE.NAME": "build_retina_focal_timm_fpn_backbone",
    "MODEL.RETINA_FOCAL.TIMM.NAME": "mobilenetv3_small_050",
    "MODEL.RETINA_FOCAL.TIMM.NORM": "BN",
    "MODEL.BACKBONE.FREEZE_AT": 0,
    "MODEL.DEVICE": "cpu",
    "MODEL.WEIGHTS": "",
    "MODEL.FPN.IN_FEATURES": ["res3", "res4", "res5"],
    "MODEL.FPN.OUT_CHANNELS": 32,
    "MODEL.RETINANET.NUM_CONVS": 1,
    "MODEL.RETINANET.NUM_CLASSES": 2,
    "MODEL.RETINANET.SCORE_THRESH_TEST": 0.0,
    "DATALOADER.NUM_WORKERS": 0,
    "INPUT.MIN_SIZE_TRAIN": (56, 64, 72),
    "INPUT.MIN_SIZE_TEST": 64,
    "SOLVER.IMS_PER_BATCH": 2,
    "SOLVER.BASE_LR": 1e-3,
    "SOLVER.STEPS": (4,),
    "SOLVER.WARMUP_ITERS": 3,
    "SOLVER.CHECKPOINT_PERIOD": 2,
    "SOLVER.MAX_ITER": 6,
    "TEST.EVAL_PERIOD": 2,
    "SEED": 3,
}


@pytest.fixture
def toy(data) -> str:
    register_coco_json("toy", str(data / "a.json"), str(data))
    return "toy"


def small(output: Path, dataset: str = "toy", **keys: object) -> CfgNode:
    cfg = get_cfg()
    values = {"DATASETS.TRAIN": (dataset,), "DATASETS.TEST": (dataset,), "OUTPUT_DIR": str(output)}
    cfg.merge_from_list([x for pair in {**SMALL, **values, **keys}.items() for x in pair])
    output.mkdir(exist_ok=True)
    return cfg


def small_lazy(output: Path) -> DictConfig:
    cfg = lazy_cfg(output, "toy", "train.max_iter=6", "train.log_period=3", "+train.seed=3")
    cfg.dataloader.train.mapper.augmentations = [
        L(T.ResizeShortestEdge)(short_edge_length=[56, 64, 72], sample_style="choice"),
        L(T.RandomFlip)(),
    ]
    output.mkdir(exist_ok=True)
    return cfg


class Killed(BaseException):
    """Stands for the end of the process."""


class Kill(HookBase):
    def __init__(self, iteration: int):
        self.iteration = iteration

    def after_step(self) -> None:
        if self.trainer.iter == self.iteration:
            raise Killed


class Interrupt(HookBase):
    """At an iteration a signal comes, or the loss becomes NaN between backward and optimizer."""

    def __init__(self, iteration: int, kind: str):
        self.iteration, self.kind = iteration, kind

    def before_step(self) -> None:
        if self.trainer.iter == self.iteration and self.kind == "signal":
            self.trainer._trainer.requested_stop = signal.SIGTERM

    def after_backward(self) -> None:
        if self.trainer.iter == self.iteration and self.kind == "nan":
            raise FloatingPointError


class DroppingTrainer(Trainer):
    """Its model draws random numbers."""

    evaluations = 99  # left before it is killed in one

    @classmethod
    def build_model(cls, cfg):
        model = super().build_model(cfg)
        model.head.cls_subnet.append(nn.Dropout(0.2))
        return model

    @classmethod
    def test(cls, cfg, model, evaluators=None):
        cls.evaluations -= 1
        if cls.evaluations < 0:
            raise Killed
        return super().test(cfg, model, evaluators)


def train(
    cfg, resume: bool = False, kill: int = -1, seed: int = 1, kind=DroppingTrainer
) -> Trainer:
    """A run; `seed` makes the first weights, and disturbs a resumed run."""
    seed_all_rng(seed)
    trainer = kind(cfg)
    trainer.register_hooks([Kill(kill)])
    trainer.resume_or_load(resume)
    with suppress(Killed):
        trainer.train()
    return trainer


def expect_equal(one: Path, other: Path) -> None:
    """Weights, momenta and metrics, bit by bit."""
    found = [torch.load(path / "model_final.pth") for path in (one, other)]
    for name, tensor in found[0]["model"].items():
        assert torch.equal(tensor, found[1]["model"][name]), name
    momenta = [x["trainer"]["_trainer"]["optimizer"]["state"] for x in found]
    for key, state in momenta[0].items():
        assert torch.equal(state["momentum_buffer"], momenta[1][key]["momentum_buffer"])
    assert metrics(one) == metrics(other)


def metrics(output: Path) -> list[str]:
    """The lines without what a clock gives; NaN equals itself in text."""
    lines = map(json.loads, (output / "metrics.json").read_text().splitlines())
    return [json.dumps({k: x for k, x in line.items() if k not in CLOCK}) for line in lines]


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory) -> Path:
    """An uninterrupted run."""
    register_coco_json("toy", str(data / "a.json"), str(data))
    output = tmp_path_factory.mktemp("resume") / "whole"
    train(small(output))
    return output


@pytest.mark.parametrize("iteration", [0, 2, 5])
def test_a_run_that_is_killed_after_any_step_is_resumed_exactly(iteration, whole, toy, tmp_path):
    train(small(tmp_path), kill=iteration)
    # Before the first checkpoint the weights are made again.
    trainer = train(small(tmp_path), resume=True, seed=1 if iteration < 1 else 9)
    assert trainer.start_iter == {0: 0, 2: 2, 5: 6}[iteration]
    expect_equal(whole, tmp_path)


@pytest.mark.parametrize("before", [1, 2])
def test_an_evaluation_that_is_killed_is_made_before_the_next_step(
    before, whole, toy, tmp_path, monkeypatch
):
    monkeypatch.setattr(DroppingTrainer, "evaluations", before)
    train(small(tmp_path))
    assert len(metrics(tmp_path)) < len(metrics(whole))
    monkeypatch.setattr(DroppingTrainer, "evaluations", 99)
    trainer = train(small(tmp_path), resume=True, seed=9)
    assert trainer.start_iter == 2 + 2 * before
    expect_equal(whole, tmp_path)


def test_a_lazy_config_and_what_lies_between_checkpoints_are_resumed_exactly(toy, tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    train(small_lazy(one))
    train(small_lazy(other), kill=4)  # a line of metrics.json is beyond the checkpoint
    assert '"iteration": 2' in (other / "metrics.json").read_text()
    with (other / "metrics.json").open("a") as file:
        file.write('{"iteration": 4, "lo')
    assert train(small_lazy(other), resume=True, seed=9).start_iter == 4
    expect_equal(one, other)


def test_a_seed_that_is_drawn_is_saved(toy, tmp_path, caplog):
    one, other = tmp_path / "one", tmp_path / "other"
    train(small(one, SEED=-1))
    other.mkdir()
    shutil.copy(one / "model_0000001.pth", other)
    train(small(other, SEED=-1), resume=True, seed=9)
    assert saved_seed(str(other)) == saved_seed(str(one)) > 0
    found = [torch.load(x / "model_final.pth")["model"] for x in (one, other)]
    assert all(torch.equal(x, found[1][name]) for name, x in found[0].items())
    train(small(other, SEED=5), resume=True)
    assert "SEED was" in caplog.text


@pytest.mark.parametrize("kinds", [("signal", "nan"), ("nan", "signal")])
def test_metrics_have_each_iteration_once_and_in_order_whatever_interrupts(kinds, toy, tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    changes = {"max_iter": 12, "log_period": 5, "eval_period": 3}

    def run(output: Path, *interrupts: Interrupt) -> None:
        cfg = small_lazy(output)
        OmegaConf.update(cfg, "train", changes)
        seed_all_rng(1)
        trainer = ScriptedTrainer(cfg)
        trainer._trainer.register_hooks(interrupts)
        trainer.register_hooks(interrupts)
        trainer.resume_or_load()
        with suppress(Stop, FloatingPointError):
            trainer.train()
        iterations = [json.loads(line)["iteration"] for line in metrics(output)]
        assert iterations == sorted(set(iterations))

    run(one)
    for iteration, kind in zip((6, 8), kinds, strict=True):
        run(other, Interrupt(iteration, kind))
    run(other)
    assert metrics(one) == metrics(other)
    iterations = [json.loads(line)["iteration"] for line in metrics(one)]
    assert iterations == [0, 2, 4, 5, 8, 9, 11, 12]


def interrupted(whole: Path, output: Path) -> Path:
    """What the run `whole` had after its fourth step, without the tag."""
    output.mkdir()
    for name in ("model_0000001.pth", "model_0000003.pth"):
        shutil.copy(whole / name, output)
    return output


def rates(trainer: Trainer) -> list[float]:
    return [x for x, _ in trainer.storage.history("lr").values()][-2:]


def test_what_the_config_changes_is_obeyed_from_the_resumed_iteration_on(
    whole, toy, tmp_path, caplog
):
    caplog.set_level(logging.INFO)
    changes = {"SOLVER.BASE_LR": 2e-3, "SOLVER.WEIGHT_DECAY": 0.1, "SOLVER.STEPS": (5,)}
    changes |= {"SOLVER.MOMENTUM": 0.5, "TEST.EVAL_PERIOD": 0}
    trainer = train(small(interrupted(whole, tmp_path / "a"), **changes), resume=True)
    assert rates(trainer) == pytest.approx([2e-3, 2e-4])
    assert {group["momentum"] for group in trainer.optimizer.param_groups} == {0.5}
    assert "weight_decay 0.0001; from here on it is 0.1" in caplog.text
    longer = small(interrupted(whole, tmp_path / "b"), **{"SOLVER.MAX_ITER": 5})
    trainer = train(longer, resume=True)
    assert trainer.start_iter == 4 and trainer.iter == 5
    trainer = train(small(interrupted(whole, tmp_path / "c")), resume=True)
    assert rates(trainer) == pytest.approx([1e-4, 1e-4])


def test_a_finished_run_says_so_and_makes_no_step(whole, toy, tmp_path, caplog):
    shutil.copytree(whole, tmp_path / "run")
    before = torch.load(tmp_path / "run/model_final.pth")["model"]
    lines = metrics(tmp_path / "run")
    trainer = train(small(tmp_path / "run"), resume=True, seed=9)
    assert "has ended, after iteration 6; to train on, type for example --resume" in caplog.text
    assert "AP50" in trainer.results["bbox"]
    # Nor does one that is beyond a smaller number of iterations, where the schedule has no rate.
    assert train(small(tmp_path / "run", **{"SOLVER.MAX_ITER": 3}), resume=True).start_iter == 6
    after = torch.load(tmp_path / "run/model_final.pth")["model"]
    assert all(torch.equal(x, after[name]) for name, x in before.items())
    assert metrics(tmp_path / "run") == lines
    more = train(small(tmp_path / "run", **{"SOLVER.MAX_ITER": 8}), resume=True)
    assert more.start_iter == 6 and torch.load(tmp_path / "run/model_final.pth")["iteration"] == 7


@pytest.mark.parametrize("fault", ["none", "torn"])
def test_a_run_that_lacks_only_its_final_checkpoint_writes_it(fault, whole, toy, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    final = tmp_path / "run/model_final.pth"
    final.unlink() if fault == "none" else final.write_bytes(final.read_bytes()[:1000])
    train(small(tmp_path / "run"), resume=True, seed=9)
    expect_equal(whole, tmp_path / "run")


def test_a_loader_of_another_kind_starts_anew_and_says_so(whole, toy, tmp_path, caplog):
    class Mine(DroppingTrainer):
        @classmethod
        def build_train_loader(cls, cfg):
            return iter(super().build_train_loader(cfg))

    cfg = small(interrupted(whole, tmp_path / "run"), **{"TEST.EVAL_PERIOD": 0})
    trainer = train(cfg, resume=True, kind=Mine)
    assert trainer.start_iter == 4
    assert "the data loader is a _SingleProcess" in caplog.text and "starts anew" in caplog.text


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {x.name: x.read_bytes() for x in folder.glob("model_*.pth")}


def test_a_new_run_in_the_folder_of_another_is_resumed_without_it(whole, toy, tmp_path, caplog):
    """It is killed before its first checkpoint, which is made again."""
    folder, alone = tmp_path / "run", tmp_path / "alone"
    shutil.copytree(whole, folder)
    before, keys = bytes_of(folder), {"SEED": 7, "SOLVER.CHECKPOINT_PERIOD": 4}
    train(small(folder, **keys), kill=2)
    assert bytes_of(folder) == before
    assert (folder / "metrics-1.json").read_bytes() == (whole / "metrics.json").read_bytes()
    assert train(small(folder, **keys), kill=4, resume=True).start_iter == 0
    assert "4 checkpoints of an earlier run (model_final.pth, model_0000005.pth, " in caplog.text
    assert train(small(folder, **keys), resume=True, seed=9).start_iter == 4
    train(small(alone, **keys))
    expect_equal(alone, folder)
    assert bytes_of(folder)["model_0000005.pth"] == before["model_0000005.pth"]


def test_a_torn_checkpoint_of_a_run_does_not_lead_to_those_of_another(whole, toy, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    seed_all_rng(1)
    trainer = DroppingTrainer(small(folder))
    trainer._trainer.register_hooks([interrupt := Interrupt(0, "signal")])
    trainer.register_hooks([interrupt])
    with pytest.raises(Stop):
        trainer.train()
    path = folder / "model_0000000.pth"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"can be used \(there: model_0000000.pth; .*not whole"):
        train(small(folder), resume=True)
    (folder / "run_id").unlink()  # as the warning says
    assert train(small(folder), resume=True).start_iter == 6


def test_a_run_of_an_earlier_version_has_no_id_and_is_resumed(whole, toy, tmp_path):
    folder = interrupted(whole, tmp_path / "run")
    for path in folder.glob("*.pth"):
        content = torch.load(path)
        for name in ("run", "data"):
            del content["trainer"]["hooks"]["ExactResume"][name]
        write_checkpoint(path, content)
    assert train(small(folder), resume=True, seed=9, kill=4).start_iter == 4
    assert not (folder / "run_id").exists()
    assert train(small(folder), resume=True, seed=9).start_iter == 4
    found = [torch.load(x / "model_final.pth")["model"] for x in (whole, folder)]
    assert all(torch.equal(x, found[1][name]) for name, x in found[0].items())
    train(small(folder, SEED=7), kill=0)
    assert train(small(folder), resume=True, kill=0).start_iter == 0


@pytest.mark.parametrize("is_changed", [False, True])
def test_annotations_that_changed_since_are_told(is_changed, whole, toy, data, tmp_path, caplog):
    folder = interrupted(whole, tmp_path / "run")
    path = folder / "model_0000003.pth"
    content = torch.load(path)
    saved = content["trainer"]["hooks"]["ExactResume"]["data"]
    assert saved == {toy: hashlib.sha256((data / "a.json").read_bytes()).hexdigest()}
    if is_changed:
        saved[toy] = hashlib.sha256(b"another").hexdigest()
        write_checkpoint(path, content)
    train(small(folder, **{"TEST.EVAL_PERIOD": 0}), resume=True, kill=4)
    assert is_changed == ("of dataset 'toy' is not the one that the run began" in caplog.text)
    assert "the run was trained on" not in caplog.text


class ScriptedTrainer(DroppingTrainer):
    """Its evaluations give what the test says."""

    scores: tuple[float, ...] = ()

    @classmethod
    def test(cls, cfg, model, evaluators=None):
        cls.scores, score = cls.scores[1:], (*cls.scores, 1.0)[0]
        return {"bbox": {"AP": score}}


def test_the_best_checkpoint_and_the_early_stop_survive_a_resume(
    toy, tmp_path, monkeypatch, caplog
):
    caplog.set_level(logging.INFO)
    keys = {"MODEL.RETINA_FOCAL.TRAIN.BEST": "bbox/AP", "MODEL.RETINA_FOCAL.TRAIN.PATIENCE": 2}
    keys |= {"MODEL.RETINA_FOCAL.DATA.VAL": "toy"}
    keys |= {"SOLVER.MAX_ITER": 20, "SOLVER.CHECKPOINT_PERIOD": 1, "TEST.EVAL_PERIOD": 1}
    cfg = small(tmp_path, **keys)
    nan = float("nan")
    monkeypatch.setattr(ScriptedTrainer, "scores", (10.0, 30.0, 20.0))
    train(cfg, kill=2, kind=ScriptedTrainer)
    assert torch.load(tmp_path / "model_best.pth")["iteration"] == 1
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000002.pth"
    # The third evaluation is made again; it counts once.
    monkeypatch.setattr(ScriptedTrainer, "scores", (20.0, 31.0, nan, 31.0))
    trainer = train(cfg, resume=True, kind=ScriptedTrainer)
    assert torch.load(tmp_path / "model_best.pth")["iteration"] == 3
    assert trainer.iter == 5 and torch.load(tmp_path / "model_final.pth")["iteration"] == 5
    assert "ends early: no bbox/AP above 31, of iteration 3, in 2 evaluations" in caplog.text
    train(cfg, resume=True, kind=ScriptedTrainer)
    assert "has ended, after iteration 6; to train on, type for example --resume TR" in caplog.text
    cfg.MODEL.RETINA_FOCAL.TRAIN.PATIENCE = 3
    monkeypatch.setattr(ScriptedTrainer, "scores", (1.0,))
    assert train(cfg, resume=True, kind=ScriptedTrainer).iter == 6


def test_a_run_without_any_score_says_so_when_it_ends_early(toy, tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    keys = {"MODEL.RETINA_FOCAL.TRAIN.BEST": "bbox/AP", "MODEL.RETINA_FOCAL.TRAIN.PATIENCE": 1}
    keys |= {"MODEL.RETINA_FOCAL.DATA.VAL": "toy", "TEST.EVAL_PERIOD": 1}
    monkeypatch.setattr(ScriptedTrainer, "scores", (float("nan"),))
    train(small(tmp_path, **keys), kind=ScriptedTrainer)
    assert "ends early: no bbox/AP that is a number in 1 evaluations" in caplog.text


LINES = [{"iteration": i, "x": i} for i in (0, 19, 9, 39, 29)]


@pytest.mark.parametrize(
    ("iteration", "kept", "last"), [(40, 5, 39), (39, 3, 19), (34, 3, 19), (19, 1, 0), (0, 0, -1)]
)
@pytest.mark.parametrize("earlier", ["", '{"iteration": 99}\n'])
def test_metrics_end_before_the_resumed_iteration(iteration, kept, last, earlier, tmp_path):
    path = tmp_path / "metrics.json"
    text = [json.dumps(line) + "\n" for line in LINES]
    for torn in ("", '{"iteration": 5', "\0\0", '{"x": 1}\n', '{"iteration": "7"}\n', "[" * 10**5):
        path.write_text(earlier + "".join(text) + torn)
        assert cut_metrics(path, iteration, len(earlier)) == last
        assert path.read_text() == earlier + "".join(text[:kept])
    assert cut_metrics(tmp_path / "none.json", 4) == -1


def test_results_are_read_back_as_they_were(tmp_path):
    path = tmp_path / "metrics.json"
    assert results_in_metrics(path, 6) is None
    path.write_text('{"iteration": 5}\n{"bbox/AP": 1.5, "a/bbox/AP-x": NaN, "iteration": 6}\n')
    assert results_in_metrics(path, 5) is None
    assert str(results_in_metrics(path, 6)) == "{'bbox': {'AP': 1.5}, 'a': {'bbox': {'AP-x': nan}}}"


@pytest.mark.parametrize(
    "line", ['{"a": 1, "a/b": 2, "iteration": 6}', '{"a": "x", "iteration": 6}', "[" * 10**5]
)
def test_results_that_are_altered_are_none(line, tmp_path):
    (tmp_path / "metrics.json").write_text(f"{line}\n")
    assert results_in_metrics(tmp_path / "metrics.json", 6) is None


def test_precise_statistics_are_those_of_the_uninterrupted_run(toy, tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    keys = {"TEST.PRECISE_BN.ENABLED": True, "TEST.PRECISE_BN.NUM_ITER": 2}
    trainer = train(small(one, **keys))
    assert hooks.PreciseBN in map(type, trainer._hooks)
    train(small(other, **keys), kill=4)
    train(small(other, **keys), resume=True, seed=9)
    expect_equal(one, other)
