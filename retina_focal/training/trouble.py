"""What stops a run, in words: a loss that is not finite, and too many bad pictures."""

import logging
import random
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
from detectron2.engine import HookBase, SimpleTrainer
from detectron2.structures import Boxes, Instances
from detectron2.utils import comm
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from retina_focal.data.findings import RECORD, shortened
from retina_focal.errors import UserError
from retina_focal.files import whole_file

DUMP = "bad_loss.pth"  # one per folder: a later one takes its place
REFERENCE_LR = (0.01, 16)  # detectron2's learning rate for RetinaNet, and its images per step
SHOWN = 5  # files that a message names

logger = logging.getLogger(__name__)


class BadLoss(UserError, FloatingPointError):
    """A loss that is not finite, which detectron2 raises as a FloatingPointError."""


class Trouble(HookBase):
    """Keeps what a dump of a bad loss needs, and counts the pictures that could not be used.

    Each picture is counted once over all processes, and named the first time. Beyond
    `max_bad_images` the run ends, in all processes after the same step. The counts are saved with a
    checkpoint.
    """

    def __init__(self, output_dir: str, max_bad_images: int):
        self.output_dir, self.max_bad_images = output_dir, max_bad_images
        self.bad: dict[str, str] = {}  # file name to reason, of all processes

    def before_train(self) -> None:
        self._stop_beyond_limit()  # which may be lower now
        buffers = _single(self.trainer.model).named_buffers()
        # What a forward pass changes and the losses depend on.
        self._normalizers = {k: x for k, x in buffers if k.endswith("loss_normalizer")}

    def before_step(self) -> None:
        # As `stop_for_bad_loss` finds them: the forward pass that fails changes them.
        step = self.trainer._trainer
        step.output_dir, step.random_state = self.output_dir, random_state()
        step.normalizers = {k: x.detach().clone() for k, x in self._normalizers.items()}

    def after_step(self) -> None:
        step = self.trainer._trainer
        if not step.num_skipped:  # in no process, by the step's one look at all of them
            return
        own = dict(pair for sample in step.batch for pair in sample.get("skipped", ()))
        for bad in comm.all_gather(own):
            for name, reason in bad.items():
                if name not in self.bad:
                    logger.warning("skipped: %s", reason)
                    self.bad[name] = reason
        self._stop_beyond_limit()

    def after_train(self) -> None:
        if self.bad and self.trainer.iter + 1 >= self.trainer.max_iter:
            names = _listed(list(self.bad))
            logger.warning("%d pictures were skipped: %s", len(self.bad), names)

    def state_dict(self) -> dict:
        return {"bad": self.bad}

    def load_state_dict(self, state: dict) -> None:
        self.bad = dict(state["bad"])

    def _stop_beyond_limit(self) -> None:
        if len(self.bad) > self.max_bad_images:
            raise UserError(
                f"pictures that can't be used: {len(self.bad)}; "
                f"MODEL.RETINA_FOCAL.DATA.MAX_BAD_IMAGES is {self.max_bad_images}: "
                f"{_listed(list(self.bad.values()))}. To go on without them raise that key (in a "
                "LazyConfig: train.retina_focal.data.max_bad_images)"
            )


def stop_for_bad_loss(
    step: SimpleTrainer, losses: Mapping[str, float], iteration: int, processes: Sequence[int]
) -> NoReturn:
    """End the training in every process, before the weights change, with one message.

    The first process whose losses are not finite writes what reproduces them; see `read_dump`.

    Args:
        step: what runs the steps, with its `batch`.
        losses: by name, the mean over processes.
        iteration: the first is 0.
        processes: whose losses are not finite, rising; every process calls this.
    Raises:
        BadLoss: in the first process of every machine.
        SystemExit: in the others.
    """
    model = _single(step.model)
    rate = step.optimizer.param_groups[0]["lr"]
    folder = getattr(step, "output_dir", None)
    path, said = None, ""
    if comm.get_rank() == processes[0]:
        said = _of_batch(step.batch)
        if folder is not None:
            path = Path(folder, DUMP)
            try:
                _write_dump(path, step, model, losses, iteration)
            except UserError as error:
                said += f"; nothing was written to reproduce it: {error}"
                path = None
    path, said = comm.all_gather((path, said))[processes[0]]
    if comm.get_local_rank() > 0:
        sys.exit(1)  # without words: the first of the machine says them
    numbers = ", ".join(f"{name} {value:.4g}" for name, value in losses.items())
    images = len(step.batch) * comm.get_world_size()
    where = f" in process {processes[0]}" if comm.get_world_size() > 1 else ""
    kept = f"; the batch, the weights and the random state are in '{path}'" if path else ""
    raise BadLoss(
        f"the loss became infinite or NaN (FloatingPointError) at iteration {iteration}{where} "
        f"({numbers}; learning rate "
        f"{rate:.4g}; {images} images per step). {said}{kept}. {_remedy(model, rate, images)}"
    )


def random_state() -> dict[str, object]:
    """Of every generator of this process that a step may draw from, in types that load safely."""
    numpy_state = np.random.get_state()
    state = {
        "python": random.getstate(),
        "numpy": (*numpy_state[:1], torch.from_numpy(numpy_state[1].copy()), *numpy_state[2:]),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def read_dump(path: str | Path) -> tuple[dict, list[dict]]:
    """What `stop_for_bad_loss` wrote, and its batch as the model takes it.

    ``model.load_state_dict(dump["model"])``, then ``model(batch)`` in training mode gives
    ``dump["losses"]`` where one process trained.
    """
    dump = torch.load(path, weights_only=True)
    batch = []
    for sample in dump["batch"]:
        if "gt_boxes" in sample:
            boxes, classes = sample.pop("gt_boxes"), sample.pop("gt_classes")
            size = tuple(sample["image"].shape[-2:])
            instances = Instances(size, gt_boxes=Boxes(boxes), gt_classes=classes)
            sample["instances"] = instances
        batch.append(sample)
    return dump, batch


def _write_dump(
    path: Path, step: SimpleTrainer, model: nn.Module, losses: Mapping[str, float], iteration: int
) -> None:
    """Write what makes the loss again; as large as the weights and the batch's pictures."""
    batch = []
    for sample in step.batch:
        kept = {k: v for k, v in sample.items() if isinstance(v, (int, float, str, torch.Tensor))}
        if "instances" in sample:
            instances = sample["instances"].to("cpu")
            kept["gt_boxes"] = instances.gt_boxes.tensor.clone()
            kept["gt_classes"] = instances.gt_classes.clone()
        batch.append(kept)
    content = {
        "iteration": iteration,
        "losses": {name: float(value) for name, value in losses.items()},
        "batch": batch,
        "model": {**model.state_dict(), **getattr(step, "normalizers", {})},
        "random_state": getattr(step, "random_state", None),
    }
    with whole_file(path) as temporary:
        torch.save(content, temporary)


def _single(model: nn.Module) -> nn.Module:
    return model.module if isinstance(model, DistributedDataParallel) else model


def _of_batch(batch: Sequence[Mapping]) -> str:
    """The files of a batch, and what is wrong with their pixels or boxes."""
    names = [shortened(x.get("file_name", x.get("image_id")), RECORD) for x in batch]
    wrong = [
        name
        for name, sample in zip(names, batch, strict=True)
        if not sample["image"].isfinite().all()
        or ("instances" in sample and not sample["instances"].gt_boxes.tensor.isfinite().all())
    ]
    text = f"The batch: {_listed(names)}"
    return f"{text}; not finite are pixels or boxes of: {_listed(wrong)}" if wrong else text


def _remedy(model: nn.Module, rate: float, images: int) -> str:
    """What to try, by the learning rate that detectron2 has for as many images."""
    if not all(x.isfinite().all() for x in model.parameters()):
        return (
            "The weights are not finite themselves: name others (MODEL.WEIGHTS FILE), or go on "
            "from an earlier checkpoint"
        )
    usual = REFERENCE_LR[0] * images / REFERENCE_LR[1]
    lower = usual if rate > 1.5 * usual else rate / 10
    return (
        f"Try SOLVER.BASE_LR {lower:.3g} (linear scaling: {REFERENCE_LR[0]} for "
        f"{REFERENCE_LR[1]} images is {usual:.3g} for {images}; in a LazyConfig: optimizer.lr), a "
        "longer SOLVER.WARMUP_ITERS, SOLVER.CLIP_GRADIENTS.ENABLED True, or, with AMP, "
        "MODEL.RETINA_FOCAL.PRECISION bf16 in its place"
    )


def _listed(names: Sequence[str]) -> str:
    more = len(names) - SHOWN
    return "; ".join(names[:SHOWN]) + (f"; and {more} more" if more > 0 else "")
