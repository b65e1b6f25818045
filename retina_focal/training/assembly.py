"""What a training is made of, put together in one place: YAML, LazyConfig and ablation runs."""

import logging
import os
import weakref
from collections.abc import Iterable, Mapping
from contextlib import suppress

from detectron2.config import CfgNode, instantiate
from detectron2.engine import DefaultTrainer, HookBase, TrainerBase, hooks
from detectron2.evaluation import DatasetEvaluator
from detectron2.modeling import build_model
from detectron2.solver import LRMultiplier
from detectron2.utils import comm
from detectron2.utils.events import CommonMetricPrinter, EventWriter
from detectron2.utils.logger import setup_logger
from fvcore.nn.precise_bn import get_bn_modules
from omegaconf import DictConfig
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from retina_focal.assigner import IgnoreRegions
from retina_focal.config import retina_focal_node
from retina_focal.data.augmentation import mosaic
from retina_focal.data.classes import class_names
from retina_focal.data.existence import expect_test_pictures
from retina_focal.data.loading import build_train_loader
from retina_focal.errors import UserError
from retina_focal.evaluation.evaluators import explain_missing
from retina_focal.evaluation.expected import unexpected_results
from retina_focal.evaluation.tested import as_tested
from retina_focal.training.average import averaged_weights, weight_average
from retina_focal.training.best import EarlyStop, best_checkpoint, has_ended
from retina_focal.training.checkpoint_files import own_checkpoints
from retina_focal.training.checkpoints import RunCheckpointer
from retina_focal.training.first_step import FirstStepCheck
from retina_focal.training.freezing import freeze
from retina_focal.training.measure import (
    load_trained,
    measure_lazy,
    yaml_evaluator,
    yaml_test_loader,
)
from retina_focal.training.metrics import EventsWriter, MetricsHook, MetricsWriter
from retina_focal.training.processes import (
    allow_open_files,
    distribute,
    keep_freed_memory,
    raised_in_all,
)
from retina_focal.training.resume import ExactResume, options_of_the_config
from retina_focal.training.run_files import SETTINGS, SavedConfig
from retina_focal.training.same_run import AnotherRun
from retina_focal.training.seeds import with_seed
from retina_focal.training.signals import Stop, StopOnSignal, StoppableLoader, handled_signals
from retina_focal.training.steps import training_steps
from retina_focal.training.trouble import Trouble
from retina_focal.training.validation import validation_loss
from retina_focal.training.values import plain_values
from retina_focal.training.words import faults_of_the_config, words_only


class Trainer(DefaultTrainer):
    """`DefaultTrainer` for both kinds of config, on GPUs or in gloo processes on a CPU.

    The class methods `build_...` and `test` are DefaultTrainer's and can be overridden as there;
    here they take a LazyConfig too. `cfg` is the config as `plain_values` has it.
    """

    @faults_of_the_config()
    def __init__(self, cfg: CfgNode | DictConfig):
        """
        Args:
            cfg: its datasets are registered (`register_datasets`).
        Raises:
            UserError: what the config asks for can't be built.
        """
        # Not DefaultTrainer.__init__: it gives DDP a device number, which a CPU model refuses.
        TrainerBase.__init__(self)
        for name in ("detectron2", "retina_focal"):
            if not logging.getLogger(name).isEnabledFor(logging.INFO):
                setup_logger(name=name)
        keep_freed_memory()
        self._draws_seed = plain_values(cfg).SEED < 0
        cfg = with_seed(cfg)
        self._saved_config = SavedConfig(cfg, plain_values(cfg).OUTPUT_DIR)
        self.cfg = self.auto_scale_workers(plain_values(cfg), comm.get_world_size())
        allow_open_files(self.cfg)
        self.parts = cfg if isinstance(cfg, DictConfig) else self.cfg
        model = self.build_model(self.parts)
        self._frozen = freeze(model, retina_focal_node(self.cfg).TRAIN.FREEZE)
        steps = training_steps(self.cfg, model)
        optimizer = self.build_optimizer(self.parts, model)
        data_loader = self.build_train_loader(self.parts)
        self._val_loss = validation_loss(self.parts, model)
        self.average = weight_average(retina_focal_node(self.cfg).TRAIN, model)
        expect_test_pictures(self.cfg.DATASETS.TEST)
        model = distribute(model, **self.lazy_options.get("ddp", {}))
        self._trainer = steps(model, data_loader, optimizer)
        self.scheduler = self.build_lr_scheduler(self.parts, optimizer)
        self.checkpointer = RunCheckpointer(
            model,
            self.cfg.OUTPUT_DIR,
            keep=retina_focal_node(self.cfg).TRAIN.KEEP_CHECKPOINTS,
            classes=class_names(self.cfg.DATASETS.TRAIN),
            average=self.average,
            trainer=weakref.proxy(self),
        )
        self.start_iter, self.max_iter = 0, self.cfg.SOLVER.MAX_ITER
        self._stop = StopOnSignal()
        self.evaluated = -1  # the iteration after which the last evaluation was made
        self.register_hooks(self.build_hooks())

    @property
    def lazy_options(self) -> Mapping:
        """The `train` of a LazyConfig, for what a YAML has no name for; else empty."""
        return self.parts.train if isinstance(self.parts, DictConfig) else {}

    def build_hooks(self) -> list[HookBase | None]:
        """In the order in which they act; the last writes what the others measured."""
        cfg, options, saver, writer = self.cfg, self.lazy_options, None, None
        period = cfg.SOLVER.CHECKPOINT_PERIOD
        if comm.is_main_process():
            saver = hooks.PeriodicCheckpointer(self.checkpointer, period)
            writer = MetricsHook(self.build_writers(), options.get("log_period", 20))
        periods = (period, cfg.TEST.EVAL_PERIOD)
        self._resume = ExactResume(cfg.SEED, periods, self._draws_seed, cfg.DATASETS.TRAIN)
        return [
            hooks.IterationTimer(),
            hooks.LRScheduler(),
            self._frozen,
            FirstStepCheck(cfg.DATASETS.TRAIN),
            Trouble(cfg.OUTPUT_DIR, retina_focal_node(cfg).DATA.MAX_BAD_IMAGES),
            self.average,
            self._saved_config,
            self._precise_bn(),
            self._resume,
            saver,  # before the evaluation: should that fail, the weights are kept
            self._stop,  # before it too: it can take long
            hooks.EvalHook(cfg.TEST.EVAL_PERIOD, self._evaluate),
            self._val_loss,
            best_checkpoint(self.parts),
            writer,
        ]

    def build_writers(self) -> list[EventWriter]:
        folder = self.cfg.OUTPUT_DIR
        os.makedirs(folder, exist_ok=True)
        metrics = MetricsWriter(os.path.join(folder, "metrics.json"))
        return [CommonMetricPrinter(self.max_iter), metrics, EventsWriter(folder)]

    @classmethod
    def build_model(cls, cfg: CfgNode | DictConfig) -> nn.Module:
        if isinstance(cfg, DictConfig):
            model = instantiate(cfg.model).to(cfg.train.device)
            if retina_focal_node(plain_values(cfg)).DATA.IGNORE_REGIONS:
                model.assigner = IgnoreRegions(model.assigner)
            return model
        model = build_model(cfg)
        SETTINGS.info("model:\n%s", model)
        return model

    @classmethod
    def build_optimizer(cls, cfg: CfgNode | DictConfig, model: nn.Module) -> Optimizer:
        if isinstance(cfg, DictConfig):
            cfg.optimizer.params.model = model  # where detectron2's optimizers look for it
            return instantiate(cfg.optimizer)
        return super().build_optimizer(cfg, model)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode | DictConfig) -> Iterable[list[dict]]:
        """See `data.loading.build_train_loader`; of another kind it starts anew on resuming."""
        values = plain_values(cfg)
        node = retina_focal_node(values)
        options = {"timeout": node.TRAIN.TIMEOUT, "max_pixels": node.DATA.MAX_PIXELS}
        num_samples = values.SOLVER.MAX_ITER * values.SOLVER.IMS_PER_BATCH
        options["mosaic"] = mosaic(node.TRAIN.AUGMENT, num_samples)
        return build_train_loader(cfg, values.SEED, node, **options)

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> Iterable[list[dict]]:
        timeout = retina_focal_node(cfg).TRAIN.TIMEOUT
        return StoppableLoader(yaml_test_loader(cfg, dataset_name), timeout)

    @classmethod
    def build_lr_scheduler(cls, cfg: CfgNode | DictConfig, optimizer: Optimizer) -> LRScheduler:
        if isinstance(cfg, DictConfig):
            return LRMultiplier(optimizer, instantiate(cfg.lr_multiplier), cfg.train.max_iter)
        return super().build_lr_scheduler(cfg, optimizer)

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
        return yaml_evaluator(cfg, dataset_name)

    @classmethod
    def test(cls, cfg: CfgNode | DictConfig, model: nn.Module, evaluators=None) -> dict:
        """As DefaultTrainer's; nothing where a LazyConfig has no evaluator."""
        if not isinstance(cfg, DictConfig):
            results = super().test(cfg, as_tested(cfg, model), evaluators)
        else:
            results = measure_lazy(cfg, model, evaluators, retina_focal_node(plain_values(cfg)))
        explain_missing(results)
        return results

    @property
    def results(self) -> dict:
        """Of the last evaluation: {"bbox": {"AP": ..., "AP50": ...}}; empty before the first."""
        return getattr(self, "_last_eval_results", {})

    def load_state_dict(self, state_dict: dict) -> None:
        """Of a checkpoint of ours, or of detectron2's lazyconfig_train_net.py: one trainer less."""
        with options_of_the_config(self.optimizer, self.scheduler, self.max_iter):
            super().load_state_dict({"_trainer": state_dict, **state_dict})
        self._resume.go_on()

    def resume_or_load(self, resume: bool = True) -> None:
        try:
            super().resume_or_load(resume)
        except AnotherRun as error:
            raise UserError(f"{error}{self._saved_config.changes()}") from error
        if resume and self.start_iter == 0:
            self._resume.begin()

    def before_train(self) -> None:
        super().before_train()
        self._resume.catch_up()

    def train(self) -> dict | None:
        """To the last iteration; a run that is there already makes no step, and says so.

        Returns:
            The results of the last evaluation, None without one.
        Raises:
            UserError: they are not as ``TEST.EXPECTED_RESULTS`` has them; all is saved.
        """
        last = self.checkpointer.get_checkpoint_file
        with words_only(self.cfg.OUTPUT_DIR, last), suppress(EarlyStop):
            if not has_ended(self):
                TrainerBase.train(self, self.start_iter, self.max_iter)
        _expect_results(self.cfg, self.results)
        return self.results or None

    def _evaluate(self) -> dict:
        if self.iter + 1 == self.max_iter:  # detectron2 asks for it when the last step failed, too
            return {}
        try:
            with averaged_weights(self.average):
                self._last_eval_results = self.test(self.parts, self.model)
        except Stop as stop:
            self._trainer.stop_signal = stop.signum
            self._resume.after_step()
            self._stop.save()
            raise stop
        self.evaluated = self.iter
        return self._last_eval_results

    def _precise_bn(self) -> HookBase | None:
        if not (self.cfg.TEST.PRECISE_BN.ENABLED and get_bn_modules(self.model)):
            return None
        cfg = self.cfg.clone()
        cfg.defrost()
        cfg.DATALOADER.NUM_WORKERS, retina_focal_node(cfg).TRAIN.CACHE_IMAGES = 0, False  # for few
        loader, num_iter = self.build_train_loader(cfg), cfg.TEST.PRECISE_BN.NUM_ITER
        return hooks.PreciseBN(cfg.TEST.EVAL_PERIOD, self.model, loader, num_iter)


def fit(cfg: CfgNode | DictConfig, resume: bool) -> Trainer:
    """Train to the last iteration; with `resume`, from the last checkpoint where there is one."""
    folder = plain_values(cfg).OUTPUT_DIR
    with handled_signals(), words_only(folder, lambda: next(map(str, own_checkpoints(folder)), "")):
        trainer = Trainer(cfg)
        trainer.resume_or_load(resume)
        trainer.train()
    return trainer


@faults_of_the_config()
def evaluate(cfg: CfgNode | DictConfig, resume: bool) -> dict:
    """Results of the weights that the config names; with `resume`, of the last checkpoint.

    Raises:
        UserError: there are no weights, some are missing, or they are of other classes; or the
            results are not as ``TEST.EXPECTED_RESULTS`` has them.
    """
    keep_freed_memory()
    values = plain_values(cfg)
    model = Trainer.build_model(cfg)
    checkpointer = RunCheckpointer(model, values.OUTPUT_DIR)
    expect_test_pictures(values.DATASETS.TEST)
    load_trained(checkpointer, values.MODEL.WEIGHTS, resume, values.DATASETS.TEST)
    results = Trainer.test(cfg, model)
    _expect_results(values, results)
    return results


def _expect_results(values: CfgNode, results: dict) -> None:
    if expected := values.TEST.EXPECTED_RESULTS:
        is_main = comm.is_main_process()  # no other has results
        raised_in_all(unexpected_results(expected, results) if is_main else None)
