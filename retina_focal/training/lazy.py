"""The LazyConfig side of `train`: what detectron2's tools/lazyconfig_train_net.py does.

On a GPU that script serves as well; this one also runs gloo processes on a CPU.
"""

import argparse

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import LazyConfig, instantiate
from detectron2.engine import (
    AMPTrainer,
    SimpleTrainer,
    default_setup,
    default_writers,
    hooks,
)
from detectron2.evaluation import inference_on_dataset, print_csv_format
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from omegaconf import DictConfig, OmegaConf
from torch import nn

from retina_focal.data.registration import check_datasets, check_num_classes, register_coco_json
from retina_focal.errors import UserError
from retina_focal.training.first_step import FirstStepCheck
from retina_focal.training.processes import available_device, distribute


def run(args: argparse.Namespace) -> dict:
    """Train, or with `--eval-only` evaluate, the LazyConfig file `args.config_file`."""
    cfg = LazyConfig.load(args.config_file)
    _override(cfg, args.opts)
    for row in args.dataset:
        register_coco_json(*row)
    _check(cfg, ["test"] if args.eval_only else ["train", "test"])
    cfg.train.device = available_device(cfg.train.device)
    default_setup(cfg, args)
    setup_logger(cfg.train.output_dir, comm.get_rank(), name="retina_focal")
    model = instantiate(cfg.model).to(cfg.train.device)
    if args.eval_only:
        DetectionCheckpointer(model).load(cfg.train.init_checkpoint)
        return evaluate(cfg, model)
    return train(cfg, model, resume=args.resume)


def train(cfg: DictConfig, model: nn.Module, resume: bool) -> dict:
    """Train to `cfg.train.max_iter`, evaluating every `cfg.train.eval_period` iterations."""
    cfg.optimizer.params.model = model
    optimizer = instantiate(cfg.optimizer)
    loader = instantiate(cfg.dataloader.train)
    model = distribute(model, **cfg.train.ddp)
    trainer = (AMPTrainer if cfg.train.amp.enabled else SimpleTrainer)(model, loader, optimizer)
    checkpointer = DetectionCheckpointer(model, cfg.train.output_dir, trainer=trainer)
    results = {}

    def evaluate_and_keep() -> dict:
        results.update(evaluate(cfg, model))
        return results

    saver = writer = None  # all but the main process
    if comm.is_main_process():
        saver = hooks.PeriodicCheckpointer(checkpointer, **cfg.train.checkpointer)
        writers = default_writers(cfg.train.output_dir, cfg.train.max_iter)
        writer = hooks.PeriodicWriter(writers, period=cfg.train.log_period)
    trainer.register_hooks(
        [
            hooks.IterationTimer(),
            hooks.LRScheduler(scheduler=instantiate(cfg.lr_multiplier)),
            saver,  # before the evaluation: should that fail, the weights are kept
            hooks.EvalHook(cfg.train.eval_period, evaluate_and_keep),
            writer,
            FirstStepCheck(OmegaConf.select(cfg, "dataloader.train.dataset.names", default=())),
        ]
    )
    checkpointer.resume_or_load(cfg.train.init_checkpoint, resume=resume)
    resumed = resume and checkpointer.has_checkpoint()
    trainer.train(trainer.iter + 1 if resumed else 0, cfg.train.max_iter)
    return results


def evaluate(cfg: DictConfig, model: nn.Module) -> dict:
    """Results of `cfg.dataloader.evaluator`; nothing where the config has none."""
    if "evaluator" not in cfg.dataloader:
        return {}
    loader, evaluator = instantiate(cfg.dataloader.test), instantiate(cfg.dataloader.evaluator)
    results = inference_on_dataset(model, loader, evaluator) or {}
    print_csv_format(results)
    return results


def _override(cfg: DictConfig, opts: list[str]) -> None:
    wrong = [option for option in opts if "=" not in option]
    if wrong:
        raise UserError(
            f"'{wrong[0]}' changes nothing in a LazyConfig; expected KEY=VALUE, for example: "
            "train.max_iter=1000"
        )
    try:
        LazyConfig.apply_overrides(cfg, opts)
    except (AssertionError, KeyError, ValueError) as error:
        raise UserError(f"{' '.join(opts)}: {error}") from error


def _check(cfg: DictConfig, loaders: list[str]) -> None:
    """Look for the datasets, and compare their classes with the model's."""
    names = []
    for loader in loaders:
        found = OmegaConf.select(cfg, f"dataloader.{loader}.dataset.names", default=[])
        names += [found] if isinstance(found, str) else found
    check_datasets(names)
    num_classes = OmegaConf.select(cfg, "model.num_classes")
    if num_classes is not None:
        check_num_classes(names, num_classes, setting="model.num_classes=")
