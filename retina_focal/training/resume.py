"""What makes an interrupted run end with the weights of one that never stopped."""

import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from detectron2.config import CfgNode
from detectron2.engine import HookBase, hooks
from detectron2.solver import LRMultiplier
from detectron2.utils import comm
from detectron2.utils.events import EventStorage, JSONWriter, TensorboardXWriter
from omegaconf import DictConfig, OmegaConf
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from retina_focal.data.loading import TrainLoader
from retina_focal.data.sampler import seed_everything
from retina_focal.training.checkpoint_files import checkpoints_of, peek

# What is drawn, beside the seed and the iteration; the loader has 0 and 1.
STEP = 2
# Iterations that the writers' medians look back.
WINDOW = 20

logger = logging.getLogger(__name__)


class ExactResume(HookBase):
    """Keeps in each checkpoint what a run needs beyond weights, optimizer and schedule.

    A checkpoint is made within an iteration: `catch_up` does again what came after it. The random
    numbers of a step depend on the seed, the iteration and the process alone. It stands before the
    hook that saves, in every process.
    """

    def __init__(self, seed: int, save_period: int):
        """
        Args:
            seed: not negative.
            save_period: iterations between checkpoints.
        """
        self.seed, self.save_period = seed, save_period
        self.draws_seed = False  # True: the checkpoint's seed takes the place of this one
        self._criteria: list[dict] = []
        self._loaded: dict | None = None

    def before_step(self) -> None:
        seed_everything(STEP, self.seed, self.trainer.iter, comm.get_rank())

    def after_step(self) -> None:
        # A moving average of positives is each process's own.
        done = self.trainer.iter + 1
        stops = getattr(self.trainer._trainer, "stop_signal", 0)
        if done % self.save_period == 0 or done == self.trainer.max_iter or stops:
            self._criteria = comm.gather(dict(_criterion_buffers(self.trainer.model)))

    def state_dict(self) -> dict:
        trainer, loader = self.trainer, self.trainer.data_loader
        state = {
            "seed": self.seed,
            "processes": comm.get_world_size(),
            "criteria": self._criteria,
            "evaluated": trainer.evaluated,
            "scalars": _recent_scalars(trainer.storage),
        }
        if isinstance(loader, TrainLoader):
            batches = loader.first_batch + trainer.iter + 1 - trainer.start_iter
            state |= {"seen": batches * loader.total_batch_size, "images": loader.num_images}
        return state

    def load_state_dict(self, state_dict: dict) -> None:
        self._loaded = state_dict

    def go_on(self) -> None:
        """Set loader and criterion to where the loaded checkpoint was made."""
        trainer, state = self.trainer, self._loaded
        if state is None:
            logger.warning("the checkpoint is not of this package: the order of images starts anew")
            return
        if self.draws_seed:
            self.seed = state["seed"]
            parts = with_seed(trainer.parts, self.seed)
            trainer._trainer.reset_data_loader(lambda: trainer.build_train_loader(parts))
        elif state["seed"] != self.seed:
            logger.warning("SEED was %d and is %d from here on", state["seed"], self.seed)
        loader = trainer.data_loader
        if not isinstance(loader, TrainLoader):
            logger.warning(
                "the data loader is a %s, which can't be set to a position: the order of images "
                "starts anew",
                type(loader).__name__,
            )
        else:
            loader.first_batch = state.get("seen", 0) // loader.total_batch_size
            if state.get("images") != loader.num_images:
                logger.warning(
                    "the training data had %s images and now have %d: their order is another one",
                    state.get("images"),
                    loader.num_images,
                )
        processes = comm.get_world_size()
        if state["processes"] != processes:
            logger.warning(
                "the checkpoint is of %d processes, and these are %d: sums are rounded in another "
                "order, and moving averages of positives are those of the first process",
                state["processes"],
                processes,
            )
        elif len(state["criteria"]) == processes:
            buffers = dict(_criterion_buffers(self.trainer.model))
            for name, value in state["criteria"][comm.get_rank()].items():
                if name in buffers:
                    buffers[name].copy_(value)

    def catch_up(self) -> None:
        """In `before_train`: repeat what followed the save within the checkpoint's iteration.

        An evaluation that was due is made again, unless the checkpoint comes after it, and
        `metrics.json` loses what an interrupted run wrote beyond.
        """
        if self._loaded is None:
            return
        trainer, state, self._loaded = self.trainer, self._loaded, None
        storage, start = trainer.storage, trainer.iter
        trainer.iter = storage.iter = start - 1
        trainer.evaluated = state["evaluated"]
        for name, (is_smoothed, values) in state["scalars"].items():
            for value, iteration in values:
                storage.put_scalar(name, value, is_smoothed, iteration)
        for hook in trainer._hooks:
            is_evaluation = isinstance(hook, hooks.EvalHook) and trainer.evaluated < start - 1
            if is_evaluation or isinstance(hook, FollowsEvaluation):
                hook.after_step()
            elif isinstance(hook, hooks.PeriodicWriter):
                last = cut_metrics(Path(trainer.cfg.OUTPUT_DIR, "metrics.json"), start - 1)
                for writer in hook._writers:
                    if isinstance(writer, (JSONWriter, TensorboardXWriter)):
                        writer._last_write = last
                hook.after_step()
        trainer.iter = storage.iter = start


class FollowsEvaluation(HookBase):
    """A hook whose `after_step` is repeated with an evaluation that is."""


def _criterion_buffers(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    model = model.module if isinstance(model, DistributedDataParallel) else model
    criterion = getattr(model, "criterion", None)
    return criterion.named_buffers() if isinstance(criterion, nn.Module) else iter(())


def _recent_scalars(storage: EventStorage) -> dict[str, tuple[bool, list[tuple[float, int]]]]:
    """What the medians of the storage look back to."""
    smoothed = storage.smoothing_hints()
    return {
        name: (smoothed[name], [(float(x), int(i)) for x, i in history.values()[-WINDOW:]])
        for name, history in storage.histories().items()
    }


def cut_metrics(path: Path, iteration: int) -> int:
    """Cut `metrics.json` off before the first line, of the last run in it, from `iteration` on.

    Returns:
        The last iteration that stays; -1 where none does.
    """
    last, end, previous, is_cut, offset = -1, 0, -1, False, 0
    for line in path.read_bytes().splitlines(keepends=True) if path.is_file() else ():
        offset += len(line)
        try:
            current = json.loads(line)["iteration"] if line.endswith(b"\n") else None
        except (ValueError, KeyError, TypeError):
            current = None
        if current is None:  # torn by a kill
            continue
        if current <= previous:  # a run that started anew in the same folder
            last, end, is_cut = -1, offset - len(line), False
        previous, is_cut = current, is_cut or current >= iteration
        if not is_cut:
            last, end = current, offset
    if offset > end:
        os.truncate(path, end)
    return last


def results_in_metrics(path: Path, iteration: int) -> dict | None:
    """The results, {"bbox": {"AP": ...}}, that were written at an iteration; None: none were."""
    try:
        line = json.loads(path.read_text().splitlines()[-1])
    except (OSError, ValueError, IndexError):
        return None
    if not isinstance(line, dict) or line.pop("iteration", None) != iteration:
        return None
    results: dict = {}
    for name, value in line.items():
        *groups, metric = name.split("/")
        node = results
        for group in groups:
            node = node.setdefault(group, {})
        node[metric] = value
    return results


def with_seed(cfg: CfgNode | DictConfig, seed: int | None = None) -> CfgNode | DictConfig:
    """The config with this seed; by default with its own, or one that is drawn where it has none.

    The seed is the same in all processes. A LazyConfig is changed in place.
    """
    is_lazy = isinstance(cfg, DictConfig)
    if seed is None:
        seed = OmegaConf.select(cfg, "train.seed", default=-1) if is_lazy else cfg.SEED
        if seed >= 0:
            return cfg
        seed = comm.shared_random_seed()
    if is_lazy:
        OmegaConf.update(cfg, "train.seed", seed, force_add=True)
        return cfg
    cfg = cfg.clone()
    cfg.defrost()
    cfg.SEED = seed
    cfg.freeze()
    return cfg


def saved_seed(folder: str) -> int | None:
    """Of the folder's newest checkpoint, in all processes; None without one of this package."""
    seed = None
    if comm.is_main_process():
        content = next(filter(None, map(peek, checkpoints_of(folder))), {})
        hooks_state = content.get("trainer", {}).get("hooks", {})
        seed = hooks_state.get(ExactResume.__qualname__, {}).get("seed")
    return comm.all_gather(seed)[0]


@contextmanager
def options_of_the_config(optimizer: Optimizer, scheduler: LRScheduler) -> Iterator[None]:
    """What is loaded in the block leaves rates, decays and schedule as the config has them.

    torch puts those of the checkpoint in their place.
    """
    options = [{k: x for k, x in g.items() if k != "params"} for g in optimizer.param_groups]
    bases = getattr(scheduler, "base_lrs", None)
    yield
    is_ours = isinstance(scheduler, LRMultiplier)  # a function of the iteration
    changed: Mapping = {}
    for group, wanted in zip(optimizer.param_groups, options, strict=True):
        for key in [key for key in wanted if key != "lr"]:
            if key in group and group[key] != wanted[key]:
                changed |= {f"{key} {group[key]}": wanted[key]}
        keeps = () if is_ours else ("lr", "initial_lr")
        group.update({key: x for key, x in wanted.items() if key not in keeps})
    for was, is_now in changed.items():
        logger.info("the checkpoint has %s; from here on it is %s", was, is_now)
    if is_ours:
        scheduler.base_lrs = bases
        for group, rate in zip(optimizer.param_groups, scheduler.get_lr(), strict=True):
            group["lr"] = rate
    elif any("initial_lr" in was for was in changed):
        logger.warning(
            "the schedule is a %s, which keeps the checkpoint's learning rates",
            type(scheduler).__name__,
        )
