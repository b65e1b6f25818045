"""Laws of a training, whichever kind of config it comes from, and what an interrupted run keeps."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from detectron2 import model_zoo
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode, LazyConfig, instantiate
from detectron2.config import LazyCall as L
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data import transforms as T
from detectron2.engine import (
    AMPTrainer,
    HookBase,
    SimpleTrainer,
    create_ddp_model,
    default_writers,
    hooks,
)
from detectron2.evaluation import inference_on_dataset
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone import BasicStem, ResNet
from detectron2.modeling.backbone.resnet import BasicBlock
from detectron2.utils.env import seed_all_rng
from omegaconf import DictConfig
from test_processes import distance, tiny_cfg

import retina_focal
from retina_focal.config import config_path
from retina_focal.data.registration import register_coco_json
from retina_focal.errors import UserError
from retina_focal.tools.ablate import runs
from retina_focal.training import assembly
from retina_focal.training.assembly import Trainer, evaluate, fit
from retina_focal.training.steps import StepTrainer

KINDS = ("yaml", "lazy")


@pytest.fixture
def one_picture(tmp_path):
    """A dataset of one picture: every iteration sees the same."""
    picture = np.full((64, 96, 3), 128, np.uint8)
    picture[10:40, 20:60] = (0, 0, 255)
    cv2.imwrite(str(tmp_path / "0.png"), picture)
    box = {"category_id": 1, "bbox": [20, 10, 40, 30], "area": 1200, "iscrowd": 0}
    content = {
        "images": [{"id": 1, "file_name": "0.png", "height": 64, "width": 96}],
        "annotations": [{"id": 1, "image_id": 1, **box}],
        "categories": [{"id": 1, "name": "red"}],
    }
    (tmp_path / "one.json").write_text(json.dumps(content))
    register_coco_json("one_picture", str(tmp_path / "one.json"), str(tmp_path))
    yield
    DatasetCatalog.remove("one_picture")
    MetadataCatalog.remove("one_picture")


@pytest.fixture
def toy(data) -> str:
    """Name of a registered dataset of six pictures and two classes."""
    register_coco_json("toy", str(data / "a.json"), str(data))
    return "toy"


def yaml_cfg(output: Path, dataset: str, **keys: object) -> CfgNode:
    cfg = {
        "MODEL.RETINANET.NUM_CLASSES": len(MetadataCatalog.get(dataset).thing_classes),
        "MODEL.RETINANET.SCORE_THRESH_TEST": 0.0,
        "DATASETS.TRAIN": (dataset,),
        "DATASETS.TEST": (dataset,),
        "DATALOADER.NUM_WORKERS": 0,
        "INPUT.MIN_SIZE_TRAIN": (64,),
        "INPUT.MIN_SIZE_TEST": 64,
        "INPUT.RANDOM_FLIP": "none",
        "SOLVER.IMS_PER_BATCH": 2,
        "SOLVER.BASE_LR": 1e-3,
        "SOLVER.STEPS": (3,),
        "SOLVER.CHECKPOINT_PERIOD": 2,
        "SOLVER.MAX_ITER": 4,
        "TEST.EVAL_PERIOD": 2,
        "OUTPUT_DIR": str(output),
    }
    return tiny_cfg(normalizer="ema", **{**cfg, **keys})


def lazy_cfg(output: Path, dataset: str, *overrides: str) -> DictConfig:
    """A shipped LazyConfig made small; it has no key that detectron2's own script lacks."""
    cfg = LazyConfig.load(config_path("lazy/retinanet_R_50_FPN_1x.py"))
    bottom_up = cfg.model.backbone.bottom_up
    bottom_up.freeze_at = 0
    bottom_up.stem = L(BasicStem)(in_channels=3, out_channels=32, norm="GN")
    bottom_up.stages = [  # a block with a stride needs another number of channels
        L(ResNet.make_stage)(
            block_class=BasicBlock,
            num_blocks=1,
            stride_per_block=[stride],
            in_channels=channels,
            out_channels=out_channels,
            norm="GN",
        )
        for stride, channels, out_channels in [(1, 32, 32), (2, 32, 64), (2, 64, 32), (2, 32, 64)]
    ]
    cfg.model.backbone.top_block.in_channels = 64
    cfg.model.backbone.out_channels = 32
    cfg.model.head.input_shape = [ShapeSpec(channels=32)] * 5
    cfg.model.head.conv_dims = [32]
    cfg.model.postprocessor.score_thresh = 0.0
    cfg.model.num_classes = len(MetadataCatalog.get(dataset).thing_classes)
    for split in ("train", "test"):
        loader = cfg.dataloader[split]
        loader.dataset.names, loader.num_workers = dataset, 0
        loader.mapper.augmentations = [L(T.Resize)(shape=(64, 96))]
    cfg.dataloader.train.total_batch_size = 2
    cfg.dataloader.evaluator.output_dir = cfg.train.output_dir = str(output)
    cfg.train.update(max_iter=4, init_checkpoint="", device="cpu", eval_period=2)
    cfg.train.checkpointer.period = 2
    cfg.optimizer.lr = 1e-3
    return LazyConfig.apply_overrides(cfg, list(overrides))


# Options by the name that each kind of config has for them.
NAMES = {
    "ACCUMULATE_STEPS": (
        "MODEL.RETINA_FOCAL.ACCUMULATE_STEPS",
        "train.retina_focal.accumulate_steps",
    ),
    "AMP": ("SOLVER.AMP.ENABLED", "train.amp.enabled"),
    "IMAGES": ("SOLVER.IMS_PER_BATCH", "dataloader.train.total_batch_size"),
    "NORMALIZER": ("MODEL.RETINA_FOCAL.NORMALIZER", "model.criterion.normalizer"),
    "ALPHA_FROM_DATA": ("MODEL.RETINA_FOCAL.ALPHA_FROM_DATA", "model.criterion.alpha_from_data"),
    "WEIGHTS": ("MODEL.WEIGHTS", "train.init_checkpoint"),
}


def make_cfg(kind: str, output: Path, dataset: str, **options: object) -> CfgNode | DictConfig:
    """Both kinds of config of the same small training."""
    output.mkdir(exist_ok=True)
    if kind == "yaml":
        return yaml_cfg(output, dataset, **{NAMES[key][0]: x for key, x in options.items()})
    return lazy_cfg(output, dataset, *(f"{NAMES[key][1]}={x}" for key, x in options.items()))


def train(cfg: CfgNode | DictConfig, resume: bool = False) -> Trainer:
    seed_all_rng(1)
    return fit(cfg, resume)


def metrics(output: Path, name: str) -> dict[int, float]:
    """What was logged under a name, by iteration."""
    lines = [json.loads(line) for line in (output / "metrics.json").read_text().splitlines()]
    return {line["iteration"]: line[name] for line in lines if name in line}


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_evaluates_and_saves_at_its_periods_and_writes_what_it_measured(kind, toy, tmp_path):
    trainer = train(make_cfg(kind, tmp_path, toy))
    assert set(metrics(tmp_path, "bbox/AP")) == {1, 4}  # the last is after the training
    # After an evaluation, every 20 iterations, and the last.
    assert set(metrics(tmp_path, "total_loss")) == {1, 3}
    assert set(trainer.results["bbox"]) >= {"AP", "AP50"}
    saved = sorted(path.name for path in tmp_path.glob("model_*.pth"))
    assert saved == ["model_0000001.pth", "model_0000003.pth", "model_final.pth"]
    ratio = metrics(tmp_path, "retina_focal/first_step/per_positive")[0]
    ratio /= metrics(tmp_path, "retina_focal/first_step/per_positive_closed_form")[0]
    assert ratio == pytest.approx(1, rel=0.1)  # a head of 32 channels


@pytest.mark.parametrize("kind", KINDS)
def test_an_evaluation_that_fails_leaves_the_checkpoint(kind, toy, tmp_path, monkeypatch):
    def fail(*args):
        raise MemoryError

    monkeypatch.setattr(Trainer, "test", fail)
    with pytest.raises(MemoryError):
        train(make_cfg(kind, tmp_path, toy))
    assert (tmp_path / "model_0000001.pth").is_file()


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_ends_with_the_weights_of_an_uninterrupted_one(kind, one_picture, tmp_path):
    # With more pictures the order differs: detectron2's sampler starts anew.
    train(make_cfg(kind, tmp_path / "whole", "one_picture"))
    # What a run leaves that stops before the third iteration; not a run of two iterations, since
    # detectron2's learning rates depend on how many are planned.
    cfg = make_cfg(kind, tmp_path / "parts", "one_picture")
    interrupted(tmp_path / "whole", tmp_path / "parts")
    assert train(cfg, resume=True).start_iter == 2
    whole, parts = (torch.load(tmp_path / x / "model_final.pth") for x in ("whole", "parts"))
    assert whole["iteration"] == parts["iteration"] == 3
    before = torch.load(tmp_path / "whole/model_0000001.pth")["model"]
    assert not torch.equal(before["head.cls_score.weight"], whole["model"]["head.cls_score.weight"])
    for name, tensor in whole["model"].items():
        assert torch.equal(tensor, parts["model"][name]), name  # same arithmetic, same bits
    one, other = (x["trainer"]["_trainer"]["optimizer"]["state"] for x in (whole, parts))
    for key in one:
        assert torch.equal(one[key]["momentum_buffer"], other[key]["momentum_buffer"])


def interrupted(whole: Path, parts: Path) -> None:
    """Leave in `parts` what the run `whole` had after its second iteration."""
    shutil.copy(whole / "model_0000001.pth", parts)
    (parts / "last_checkpoint").write_text("model_0000001.pth")


def detectron2_script(cfg: DictConfig) -> None:
    """The calls of detectron2's tools/lazyconfig_train_net.py, in their order."""
    model = instantiate(cfg.model)
    model.to(cfg.train.device)
    cfg.optimizer.params.model = model
    optimizer = instantiate(cfg.optimizer)
    loader = instantiate(cfg.dataloader.train)
    model = create_ddp_model(model, **cfg.train.ddp)
    trainer = (AMPTrainer if cfg.train.amp.enabled else SimpleTrainer)(model, loader, optimizer)
    checkpointer = DetectionCheckpointer(model, cfg.train.output_dir, trainer=trainer)

    def test() -> dict:
        test_loader = instantiate(cfg.dataloader.test)
        return inference_on_dataset(model, test_loader, instantiate(cfg.dataloader.evaluator))

    trainer.register_hooks(
        [
            hooks.IterationTimer(),
            hooks.LRScheduler(scheduler=instantiate(cfg.lr_multiplier)),
            hooks.PeriodicCheckpointer(checkpointer, **cfg.train.checkpointer),
            hooks.EvalHook(cfg.train.eval_period, test),
            hooks.PeriodicWriter(
                default_writers(cfg.train.output_dir, cfg.train.max_iter),
                period=cfg.train.log_period,
            ),
        ]
    )
    checkpointer.resume_or_load(cfg.train.init_checkpoint, resume=False)
    trainer.train(0, cfg.train.max_iter)


def test_detectron2s_own_script_trains_a_lazy_config_to_the_same_weights(one_picture, tmp_path):
    theirs, ours, parts = (tmp_path / name for name in ("theirs", "ours", "parts"))
    seed_all_rng(1)
    detectron2_script(make_cfg("lazy", theirs, "one_picture"))
    train(make_cfg("lazy", ours, "one_picture"))
    # And what it left half done is finished by ours.
    cfg = make_cfg("lazy", parts, "one_picture")
    interrupted(theirs, parts)
    train(cfg, resume=True)
    expected = torch.load(theirs / "model_final.pth")["model"]
    for found in (ours, parts):
        found = torch.load(found / "model_final.pth")["model"]
        assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())
    assert metrics(theirs, "bbox/AP") == metrics(ours, "bbox/AP")


@pytest.mark.parametrize("kind", KINDS)
def test_micro_batches_train_to_the_weights_of_the_whole_batch(kind, toy, tmp_path, monkeypatch):
    whole = train(make_cfg(kind, tmp_path / "whole", toy))
    split = train(make_cfg(kind, tmp_path / "split", toy, ACCUMULATE_STEPS=2))
    assert split._trainer.num_micro_batches == 2
    first, whole, split = (
        torch.load(tmp_path / path)["model"]
        for path in ("whole/model_0000001.pth", "whole/model_final.pth", "split/model_final.pth")
    )
    # fp32 in another order, over four steps.
    assert distance(whole, split) < 1e-5 < distance(whole, first)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_micro_batches", [1, 2])
def test_the_config_chooses_the_steps(kind, num_micro_batches, toy, tmp_path):
    cfg = make_cfg(kind, tmp_path, toy, ACCUMULATE_STEPS=num_micro_batches)
    steps = Trainer(cfg)._trainer
    assert type(steps) is StepTrainer
    assert steps.num_micro_batches == num_micro_batches
    assert steps.grad_scaler is None


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_micro_batches", [1, 2])
def test_amp_without_a_gpu_is_refused_with_what_to_type(kind, num_micro_batches, toy, tmp_path):
    cfg = make_cfg(kind, tmp_path, toy, ACCUMULATE_STEPS=num_micro_batches, AMP=True)
    with pytest.raises(UserError, match=r"AMP.*'cpu'.*PRECISION bf16.*model\.precision=bf16"):
        Trainer(cfg)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ACCUMULATE_STEPS": 3}, "S is 3, but a process has 4 images per step.*a divisor of 4"),
        ({"ALPHA_FROM_DATA": True}, "ALPHA_FROM_DATA weighs by numbers of the whole batch"),
    ],
)
def test_micro_batches_that_do_not_fit_are_refused_in_words(kind, options, message, toy, tmp_path):
    cfg = make_cfg(kind, tmp_path, toy, **{"IMAGES": 4, "ACCUMULATE_STEPS": 2, **options})
    with pytest.raises(UserError, match=message) as refused:
        Trainer(cfg)
    assert "train.retina_focal.accumulate_steps" in str(refused.value)


def test_what_does_not_fit_is_judged_from_the_model_that_a_lazy_config_builds(toy, tmp_path):
    cfg = make_cfg("lazy", tmp_path, toy, ACCUMULATE_STEPS=2)
    ours = cfg.model.copy()
    cfg.model.criterion.sampler = L(retina_focal.HardExampleSampler)()
    with pytest.raises(UserError, match=r"OHEM.ENABLED weighs by numbers of the whole batch"):
        Trainer(cfg)
    cfg.model = model_zoo.get_config("COCO-Detection/retinanet_R_50_FPN_1x.py").model
    with pytest.raises(UserError, match="RetinaNet cannot count its positives"):
        Trainer(cfg)
    cfg.model = ours
    Trainer(cfg)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("accumulate_step=2", "train.retina_focal: there is no key 'accumulate_step'; near it"),
        (
            "accumulate_steps=2.5",
            "train.retina_focal: accumulate_steps is of type int, which 2.5 is not",
        ),
        ("normalizer=image", "there is no key 'normalizer'"),  # an argument of the criterion
        ("train.nope=1", "there is no key 'train.nope'"),
    ],
)
def test_unknown_keys_of_ours_in_a_lazy_config_are_refused(override, message, toy, tmp_path):
    with pytest.raises(UserError, match=message):
        Trainer(lazy_cfg(tmp_path, toy, f"train.retina_focal.{override}"))


def test_a_lazy_configs_options_reach_ddp_checkpointer_and_writer(toy, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        assembly, "distribute", lambda model, **options: seen.append(options) or model
    )
    overrides = ("train.ddp.find_unused_parameters=True", "train.log_period=1")
    train(lazy_cfg(tmp_path, toy, *overrides, "train.checkpointer={period: 1, max_to_keep: 1}"))
    off = {"broadcast_buffers": False, "fp16_compression": False}
    assert seen == [{"find_unused_parameters": True, **off}]
    assert set(metrics(tmp_path, "total_loss")) == {0, 1, 2, 3}
    saved = sorted(path.name for path in tmp_path.glob("model_*.pth"))
    assert saved == ["model_0000003.pth", "model_final.pth"]


def test_a_lazy_config_without_an_evaluator_is_not_evaluated(toy, tmp_path):
    cfg = lazy_cfg(tmp_path, toy)
    del cfg.dataloader["evaluator"]
    assert train(cfg).results == {}
    assert not metrics(tmp_path, "bbox/AP")


def ablation(cfg: CfgNode) -> None:
    assert runs._train(cfg)["outcome"] in ("ok", "no detections")


@pytest.mark.parametrize("kind", [*KINDS, "ablation"])
def test_all_runs_have_micro_batches_the_first_step_check_and_kept_memory(
    kind, toy, tmp_path, monkeypatch
):
    calls = []
    monkeypatch.setattr(assembly, "keep_freed_memory", lambda: calls.append("memory"))
    count = retina_focal.FocalRetinaNet.count_positives
    monkeypatch.setattr(
        retina_focal.FocalRetinaNet,
        "count_positives",
        lambda *args: calls.append("micro-batch") or count(*args),
    )
    cfg = make_cfg("lazy" if kind == "lazy" else "yaml", tmp_path, toy, ACCUMULATE_STEPS=2)
    ablation(cfg) if kind == "ablation" else train(cfg)
    assert calls == ["memory"] + 4 * 2 * ["micro-batch"]
    assert metrics(tmp_path, "retina_focal/first_step/per_positive")


@pytest.mark.parametrize("kind", KINDS)
def test_a_users_subclass_replaces_any_part_and_adds_hooks(kind, toy, tmp_path):
    calls = []

    class Mine(Trainer):
        @classmethod
        def build_model(cls, cfg):
            calls.append("build_model")
            return super().build_model(cfg)

        @classmethod
        def build_optimizer(cls, cfg, model):
            calls.append("build_optimizer")
            return super().build_optimizer(cfg, model)

        @classmethod
        def build_train_loader(cls, cfg):
            calls.append("build_train_loader")
            return super().build_train_loader(cfg)

        @classmethod
        def build_lr_scheduler(cls, cfg, optimizer):
            calls.append("build_lr_scheduler")
            return super().build_lr_scheduler(cfg, optimizer)

        @classmethod
        def test(cls, cfg, model, evaluators=None):
            calls.append("test")
            return {"bbox": {"AP": 12.0}}

        def build_hooks(self):
            *others, writer = super().build_hooks()
            return [*others, Measure(), writer]

    class Measure(HookBase):
        def after_step(self):
            self.trainer.storage.put_scalar("measured", self.trainer.iter, smoothing_hint=False)

    trainer = Mine(make_cfg(kind, tmp_path, toy))
    trainer.resume_or_load(resume=False)
    trainer.train()
    parts = ["build_model", "build_optimizer", "build_train_loader", "build_lr_scheduler"]
    assert calls == [*parts, "test", "test"]
    assert metrics(tmp_path, "measured") == {1: 1, 3: 3}
    assert trainer.results == {"bbox": {"AP": 12.0}}


def test_a_config_for_other_processes_is_scaled_to_these(toy, tmp_path):
    keys = {"SOLVER.REFERENCE_WORLD_SIZE": 2, "SOLVER.WARMUP_FACTOR": 1.0}
    trainer = Trainer(yaml_cfg(tmp_path, toy, **keys))
    # Half the images and rate, twice the iterations.
    assert (trainer.cfg.SOLVER.IMS_PER_BATCH, trainer.max_iter) == (1, 8)
    assert trainer.optimizer.param_groups[0]["lr"] == 5e-4
    assert len(next(iter(trainer.data_loader))) == 1


@pytest.mark.parametrize("enabled", [False, True])
def test_precise_bn_runs_before_the_checkpoint_where_it_is_asked_for(enabled, toy, tmp_path):
    keys = {"MODEL.RESNETS.NORM": "BN", "TEST.PRECISE_BN.ENABLED": enabled}
    trainer = Trainer(yaml_cfg(tmp_path, toy, **keys))
    kinds = [type(hook) for hook in trainer._hooks]
    assert (hooks.PreciseBN in kinds) == enabled
    if enabled:
        assert kinds.index(hooks.PreciseBN) < kinds.index(hooks.PeriodicCheckpointer)


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_has_the_named_weights_or_the_last_checkpoint(kind, toy, tmp_path):
    trained = train(make_cfg(kind, tmp_path / "run", toy))
    final = str(tmp_path / "run/model_final.pth")
    named = make_cfg(kind, tmp_path / "other", toy, WEIGHTS=final)
    assert evaluate(named, resume=False)["bbox"]["AP"] == trained.results["bbox"]["AP"] > 0
    seen = []
    Trainer.test, test = classmethod(lambda cls, cfg, model: seen.append(model)), Trainer.test
    try:
        evaluate(make_cfg(kind, tmp_path / "run", toy), resume=True)
    finally:
        Trainer.test = test
    assert torch.equal(seen[0].head.cls_score.weight, trained.model.head.cls_score.weight)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("tag", "missing", "torn"),
    [
        (None, "model.pth' do not exist.*MODEL.WEIGHTS FILE", "not a whole file.*MODEL.WEIGHTS F"),
        ("model.pth", "there: only last_checkpoint", "there: model.pth.*leave out --resume"),
    ],
)
def test_weights_that_are_missing_or_torn_are_named(kind, tag, missing, torn, toy, tmp_path):
    output = tmp_path / "run"
    cfg = make_cfg(kind, output, toy, WEIGHTS=str(output / "model.pth"))
    if tag:
        (output / "last_checkpoint").write_text(tag)
    for content, said in ((None, missing), (b"PK torn", torn)):
        if content:
            (output / "model.pth").write_bytes(content)
        for run in (lambda: Trainer(cfg).resume_or_load(), lambda: evaluate(cfg, resume=True)):
            with pytest.raises(UserError, match=said):
                run()


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("yaml", {"NORMALIZER": "sum"}, "NORMALIZER is 'sum'; expected one of ema"),
        ("lazy", {"NORMALIZER": "sum"}, "NORMALIZER is 'sum'; expected one of ema"),
        ("yaml", "MODEL.META_ARCHITECTURE", "'nope' found in 'META_ARCH' registry"),
        ("yaml", "MODEL.BACKBONE.NAME", "'nope' found in 'BACKBONE' registry"),
        ("lazy", "model.criterion.nope", "Criterion.*unexpected keyword argument 'nope'"),
        ("lazy", "optimizer.nope", "SGD.*unexpected keyword argument 'nope'"),
    ],
)
def test_a_wrong_name_in_a_config_is_the_users_to_put_right(kind, change, message, toy, tmp_path):
    cfg = make_cfg(kind, tmp_path, toy, **(change if isinstance(change, dict) else {}))
    if isinstance(change, str) and kind == "yaml":
        cfg.merge_from_list([change, "nope"])
    elif isinstance(change, str):
        LazyConfig.apply_overrides(cfg, [f"{change}=1"])
    for run in (Trainer, lambda cfg: evaluate(cfg, resume=False)):
        if change == "optimizer.nope" and run is not Trainer:
            continue
        with pytest.raises(UserError, match=message):
            run(cfg)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"MODEL.RESNETS.NORM": "nope"}, "batch_norm can't build .*: nope"),
        ({"MODEL.RESNETS.DEPTH": 19}, "resnet can't build .*: 19"),
        ({"MODEL.FPN.OUT_CHANNELS": -1}, r"torch.* can't build .*-1"),
        ({"SOLVER.STEPS": (3, 1)}, "Milestone"),
    ],
    ids=str,
)
def test_what_a_library_refuses_is_the_users_to_put_right(keys, message, toy, tmp_path):
    with pytest.raises(UserError, match=message):
        Trainer(yaml_cfg(tmp_path, toy, **keys))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("error", [KeyError, TypeError])
def test_a_fault_of_ours_keeps_its_type_and_traceback(kind, error, toy, tmp_path, monkeypatch):
    def broken(*args, **kwargs):
        raise error("p3")

    for place in ("_check_num_classes", "forward"):
        with monkeypatch.context() as patch, pytest.raises(error, match="p3"):
            patch.setattr(retina_focal.FocalRetinaNet, place, broken)
            train(make_cfg(kind, tmp_path, toy))


def test_a_run_killed_while_it_saves_goes_on_from_the_last_whole_checkpoint(one_picture, tmp_path):
    output = tmp_path / "output"
    config = tmp_path / "one.yaml"
    keys = {"SOLVER.MAX_ITER": 100_000, "SOLVER.IMS_PER_BATCH": 1, "TEST.EVAL_PERIOD": 0}
    cfg = yaml_cfg(output, "one_picture", **keys)
    cfg.DATASETS.COCO_JSON = [["one_picture", str(tmp_path / "one.json"), str(tmp_path)]]
    config.write_text(cfg.dump())
    command = [sys.executable, "-W", "ignore", "-m", "retina_focal.tools.cli", "train"]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(sys.path),  # the detectron2 that this process has
    }
    with (tmp_path / "printed").open("w") as printed:
        process = subprocess.Popen(
            [*command, "--config-file", str(config)],
            env=environment,
            stdout=printed,
            stderr=printed,
        )
    deadline = time.monotonic() + 120
    while len(list(output.glob("model_*.pth"))) < 3:
        assert process.poll() is None and time.monotonic() < deadline, (
            tmp_path / "printed"
        ).read_text()[-2000:]
        time.sleep(0.05)
    process.kill()
    assert process.wait(60) == -signal.SIGKILL
    last = (output / "last_checkpoint").read_text()
    iteration = torch.load(output / last)["iteration"]
    assert last == f"model_{iteration:07d}.pth"

    cfg.SOLVER.MAX_ITER = iteration + 2
    assert train(cfg, resume=True).start_iter == iteration + 1
    assert torch.load(output / "model_final.pth")["iteration"] == iteration + 1
