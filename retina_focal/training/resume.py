"""What makes an interrupted run end with the weights of one that never stopped."""

import logging
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from detectron2.engine import HookBase, hooks
from detectron2.solver import LRMultiplier
from detectron2.utils import comm
from detectron2.utils.events import EventStorage, JSONWriter, TensorboardXWriter
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from retina_focal.data.classes import listed
from retina_focal.data.coco import coco_file
from retina_focal.data.loading import TrainLoader
from retina_focal.data.sampler import seed_everything
from retina_focal.training.checkpoint_files import RUN, durable_file, run_of
from retina_focal.training.metrics import cut_metrics, set_aside
from retina_focal.training.same_run import training_of
from retina_focal.training.seeds import with_seed

# What is drawn, beside the seed and the iteration; the loader has 0 and 1.
STEP = 2
# Iterations that the writers' medians look back.
WINDOW = 20
# Scalars that belong to the process that took them; the first steps of the next have none.
CLOCK = ("time", "data_time", "rank_data_time", "eta_seconds")

logger = logging.getLogger(__name__)


class ExactResume(HookBase):
    """Keeps in each checkpoint what a run needs beyond weights, optimizer and schedule.

    A checkpoint is made within an iteration: `catch_up` does again what came after it. The random
    numbers of a step depend on the seed, the iteration and the process alone. It stands before the
    hook that saves, in every process.

    A run has an id, which its first step writes into the folder: from then on the folder is this
    run's, and what an earlier one left there is not gone on with. A run that was begun by an
    earlier version has none.
    """

    def __init__(
        self,
        seed: int,
        periods: Sequence[int],
        draws_seed: bool = False,
        datasets: Sequence[str] = (),
    ):
        """
        Args:
            seed: not negative.
            periods: iterations between checkpoints, and between evaluations, in which a signal may
                ask for one; 0: none.
            draws_seed: the seed of a checkpoint takes the place of this one.
            datasets: names of those that are trained on.
        """
        self.run: str | None = secrets.token_hex(8)
        self.hashes = {name: x.digest for name in datasets if (x := coco_file(name))}
        self.seed, self.draws_seed = seed, draws_seed
        self.periods = [period for period in periods if period > 0]
        self._buffers: tuple[int, list[dict]] = (-1, [])  # of which iteration, by process
        self._metrics_begin = 0  # bytes of earlier runs, which earlier versions kept in it
        self._loaded: dict | None = None

    @property
    def _metrics(self) -> Path:
        return Path(self.trainer.cfg.OUTPUT_DIR, "metrics.json")

    def before_step(self) -> None:
        seed_everything(STEP, self.seed, self.trainer.iter, comm.get_rank())

    def after_step(self) -> None:
        # Moving averages, of positives and of batch norms, are each process's own.
        trainer, done = self.trainer, self.trainer.iter + 1
        if trainer.iter == trainer.start_iter and comm.is_main_process():
            self._take_folder()
        is_last = done == trainer.max_iter or trainer._trainer.stop_signal
        if is_last or any(done % period == 0 for period in self.periods):
            self._buffers = (trainer.iter, _differing(comm.gather(_saved_buffers(trainer.model))))

    def _take_folder(self) -> None:
        folder = self.trainer.cfg.OUTPUT_DIR
        if self.run not in (None, run_of(folder)):
            with durable_file(Path(folder, RUN)) as file:
                file.write(f"{self.run}\n".encode())
        if self.trainer.start_iter == 0:
            periodic = [x for x in self.trainer._hooks if isinstance(x, hooks.PeriodicWriter)]
            set_aside(self._metrics, [writer for hook in periodic for writer in hook._writers])

    def state_dict(self) -> dict:
        trainer, loader = self.trainer, self.trainer.data_loader
        iteration, buffers = self._buffers
        state = {
            "seed": self.seed,
            "processes": comm.get_world_size(),
            "buffers": buffers if iteration == trainer.iter else [],
            "evaluated": trainer.evaluated,
            "metrics_begin": self._metrics_begin,
            "scalars": _recent_scalars(trainer.storage),
            **training_of(_undistributed(trainer.model), trainer.optimizer),
            "data": self.hashes,
        }
        if self.run is not None:
            state["run"] = self.run
        if isinstance(loader, TrainLoader):
            batches = loader.first_batch + trainer.iter + 1 - trainer.start_iter
            state |= {"seen": batches * loader.total_batch_size, "images": loader.num_images}
        return state

    def load_state_dict(self, state_dict: dict) -> None:
        self._loaded = state_dict

    def begin(self) -> None:
        """Without a checkpoint to go on from: delete the metrics of the interrupted run."""
        if comm.is_main_process():
            cut_metrics(self._metrics, 0)

    def go_on(self) -> None:
        """Set loaders and criterion to where the loaded checkpoint was made."""
        trainer, state = self.trainer, self._loaded
        self.run = state and state.get("run")
        if state is None:
            logger.warning("the checkpoint is not of this package: the order of images starts anew")
            return
        if self.draws_seed:
            self.seed = state["seed"]
            parts = with_seed(trainer.parts, self.seed)
            trainer._trainer.reset_data_loader(lambda: trainer.build_train_loader(parts))
        elif state["seed"] != self.seed:
            logger.warning("SEED was %d and is %d from here on", state["seed"], self.seed)
        was = state.get("data", self.hashes)
        if was.keys() != self.hashes.keys():
            names = (listed(sorted(x)) or "others" for x in (was, self.hashes))
            logger.warning("the run was trained on %s, and is on %s from here on", *names)
        for name in [x for x in self.hashes if was.get(x, self.hashes[x]) != self.hashes[x]]:
            logger.warning(
                "the annotation file of dataset '%s' is not the one that the run began with (its "
                "bytes differ)",
                name,
            )
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
        for hook in trainer._hooks:
            if isinstance(hook, hooks.PreciseBN) and isinstance(hook._data_loader, TrainLoader):
                updates = (trainer.iter + 1) // hook._period if hook._period else 0
                hook._data_loader.first_batch = updates * hook._num_iter
        processes = comm.get_world_size()
        if state["processes"] != processes:
            logger.warning(
                "the checkpoint is of %d processes, and these are %d: sums are rounded in another "
                "order, and moving averages of positives are those of the first process",
                state["processes"],
                processes,
            )
        elif len(state["buffers"]) == processes:
            buffers = dict(_undistributed(trainer.model).named_buffers())
            for name, value in state["buffers"][comm.get_rank()].items():
                if name in buffers:  # not after a change of the normaliser
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
        trainer.evaluated, self._metrics_begin = state["evaluated"], state["metrics_begin"]
        for name, (is_smoothed, values) in state["scalars"].items():
            for value, iteration in values:
                storage.put_scalar(name, value, is_smoothed, iteration)
        self._buffers = (start - 1, state["buffers"])
        if start == trainer.max_iter:
            trainer.checkpointer.save("model_final", iteration=start - 1)
        for hook in trainer._hooks:
            is_evaluation = isinstance(hook, hooks.EvalHook) and trainer.evaluated < start - 1
            if is_evaluation or isinstance(hook, FollowsEvaluation):
                hook.after_step()
            elif isinstance(hook, hooks.PeriodicWriter):
                last = cut_metrics(self._metrics, start - 1, state["metrics_begin"])
                for writer in hook._writers:
                    if isinstance(writer, (JSONWriter, TensorboardXWriter)):
                        writer._last_write = last
                hook.after_step()
        trainer.iter = storage.iter = start


class FollowsEvaluation(HookBase):
    """A hook whose `after_step` is repeated with an evaluation that is."""


def _undistributed(model: nn.Module) -> nn.Module:
    return model.module if isinstance(model, DistributedDataParallel) else model


def _saved_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Buffers in the `state_dict`; none where there is one process, as the checkpoint has them."""
    if comm.get_world_size() == 1:
        return {}
    model = _undistributed(model)
    saved = model.state_dict().keys()
    return {name: x.cpu() for name, x in model.named_buffers() if name in saved}


def _differing(buffers: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """The buffers of each process that differ from those of the main one."""
    return [{k: x for k, x in own.items() if not x.equal(buffers[0][k])} for own in buffers]


def _recent_scalars(storage: EventStorage) -> dict[str, tuple[bool, list[tuple[float, int]]]]:
    """What the medians of the storage look back to."""
    smoothed = storage.smoothing_hints()
    return {
        name: (smoothed[name], [(float(x), int(i)) for x, i in history.values()[-WINDOW:]])
        for name, history in storage.histories().items()
        if name not in CLOCK
    }


@contextmanager
def options_of_the_config(
    optimizer: Optimizer, scheduler: LRScheduler, max_iter: int
) -> Iterator[None]:
    """In the block, loading a checkpoint leaves rates, decays and schedule as the config has them.

    torch would take those of the checkpoint.
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
    if is_ours and scheduler.last_epoch > max_iter:
        return  # beyond the end, where a schedule has no rate and no step is made
    if is_ours:
        scheduler.base_lrs = bases
        for group, rate in zip(optimizer.param_groups, scheduler.get_lr(), strict=True):
            group["lr"] = rate
    elif any("initial_lr" in was for was in changed):
        logger.warning(
            "the schedule is a %s, which keeps the checkpoint's learning rates",
            type(scheduler).__name__,
        )
