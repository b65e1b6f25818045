"""The trainer: detectron2's, able to run several processes without a GPU."""

import logging
import os
import weakref
from collections.abc import Callable
from functools import partial

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from detectron2.engine import (
    AMPTrainer,
    DefaultTrainer,
    HookBase,
    SimpleTrainer,
    TrainerBase,
)
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

from retina_focal.config import retina_focal_node
from retina_focal.errors import UserError
from retina_focal.evaluation.evaluators import build_evaluator
from retina_focal.training.accumulation import AccumulatingAMPTrainer, AccumulatingTrainer
from retina_focal.training.first_step import FirstStepCheck
from retina_focal.training.processes import distribute


class Trainer(DefaultTrainer):
    """`DefaultTrainer` that evaluates by the dataset's type, with gloo processes on a CPU."""

    def __init__(self, cfg: CfgNode):
        """
        Args:
            cfg: a config that `register_datasets` has seen.
        Raises:
            UserError: SyncBN on a CPU with several processes, or micro-batches that do not fit.
        """
        # Not DefaultTrainer.__init__: it gives DDP a device number, which a CPU model refuses.
        TrainerBase.__init__(self)
        for name in ("detectron2", "retina_focal"):
            if not logging.getLogger(name).isEnabledFor(logging.INFO):
                setup_logger(name=name)
        cfg = self.auto_scale_workers(cfg, comm.get_world_size())
        training_steps = _training_steps(cfg)
        model = self.build_model(cfg)
        optimizer = self.build_optimizer(cfg, model)
        data_loader = self.build_train_loader(cfg)
        self._trainer = training_steps(distribute(model), data_loader, optimizer)
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.checkpointer = DetectionCheckpointer(
            self.model, cfg.OUTPUT_DIR, trainer=weakref.proxy(self)
        )
        self.start_iter = 0
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.cfg = cfg
        self.register_hooks(self.build_hooks())

    @property
    def results(self) -> dict:
        """Of the last evaluation: {"bbox": {"AP": ..., "AP50": ...}}; empty before the first."""
        return getattr(self, "_last_eval_results", {})

    def build_hooks(self) -> list[HookBase]:
        return [*super().build_hooks(), FirstStepCheck(self.cfg.DATASETS.TRAIN)]

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
        """See `evaluation.evaluators.build_evaluator`; writes to ``OUTPUT_DIR/inference``."""
        return build_evaluator(dataset_name, os.path.join(cfg.OUTPUT_DIR, "inference"))


def _training_steps(cfg: CfgNode) -> Callable[..., SimpleTrainer]:
    """What makes the object that runs the steps, from model, data loader and optimizer."""
    num_micro_batches = retina_focal_node(cfg).ACCUMULATE_STEPS
    if num_micro_batches == 1:
        return AMPTrainer if cfg.SOLVER.AMP.ENABLED else SimpleTrainer
    images = cfg.SOLVER.IMS_PER_BATCH // comm.get_world_size()
    if num_micro_batches < 1 or images % num_micro_batches:
        raise UserError(
            f"MODEL.RETINA_FOCAL.ACCUMULATE_STEPS is {num_micro_batches}, but a process has "
            f"{images} images a step (SOLVER.IMS_PER_BATCH {cfg.SOLVER.IMS_PER_BATCH}, processes "
            f"{comm.get_world_size()}); set ACCUMULATE_STEPS to a divisor of {images}"
        )
    if cfg.MODEL.META_ARCHITECTURE != "FocalRetinaNet":
        raise UserError(
            f"MODEL.RETINA_FOCAL.ACCUMULATE_STEPS is {num_micro_batches}, but "
            f"MODEL.META_ARCHITECTURE {cfg.MODEL.META_ARCHITECTURE} cannot count its positives "
            "beforehand; set ACCUMULATE_STEPS 1 or META_ARCHITECTURE FocalRetinaNet"
        )
    ours = retina_focal_node(cfg)
    if ours.OHEM.ENABLED or ours.ALPHA_FROM_DATA:
        raise UserError(
            f"MODEL.RETINA_FOCAL.ACCUMULATE_STEPS is {num_micro_batches}, but OHEM.ENABLED "
            f"({ours.OHEM.ENABLED}) and ALPHA_FROM_DATA ({ours.ALPHA_FROM_DATA}) weigh by numbers "
            "of the whole batch, which a micro-batch lacks; set ACCUMULATE_STEPS 1 or both False"
        )
    steps = AccumulatingAMPTrainer if cfg.SOLVER.AMP.ENABLED else AccumulatingTrainer
    return partial(steps, num_micro_batches=num_micro_batches)


def fit(cfg: CfgNode, resume: bool) -> Trainer:
    """Train to ``SOLVER.MAX_ITER``; with `resume`, from the last checkpoint where there is one."""
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=resume)
    trainer.train()
    return trainer
