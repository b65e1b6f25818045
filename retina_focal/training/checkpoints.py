"""Checkpoints of a run: which are kept, which one it goes on from, and with which model."""

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from detectron2.utils import comm
from torch import nn
from torch.optim import Optimizer

from retina_focal.data.classes import listed
from retina_focal.errors import UserError
from retina_focal.training.average import WeightAverage
from retina_focal.training.checkpoint_files import (
    RUN,
    TAG,
    checkpoints_of,
    durable_file,
    hash_file,
    is_of_another_run,
    keep_earlier,
    not_finite,
    number_of,
    own_checkpoints,
    peek,
    read_checkpoint,
    run_of,
    tagged_checkpoint,
    write_checkpoint,
)
from retina_focal.training.processes import raised_in_all
from retina_focal.training.same_run import (
    AnotherRun,
    expect_same_classes,
    expect_same_training,
    expect_same_weights,
    training_of,
)
from retina_focal.training.saved_state import RESUME_HOOK, check_state
from retina_focal.weights.class_rows import match_class_rows
from retina_focal.weights.load import Checkpointer

BEST = "model_best"


class RunCheckpointer(Checkpointer):
    """`Checkpointer` of a run's folder, whose files detectron2's own reads as well."""

    def __init__(
        self,
        model: nn.Module,
        save_dir: str = "",
        *,
        keep: int = 0,
        classes: list[str] | None = None,
        average: WeightAverage | None = None,
        **checkpointables: object,
    ):
        """
        Args:
            model: distributed or not.
            keep: the newest `model_<iteration>.pth` that stay in the folder; 0: all.
            classes: names that are saved with the weights, and compared on resuming.
            average: of the weights; it is then saved as `model`, and the weights as `raw_model`.
            checkpointables: have a `state_dict` and are saved under these names.
        """
        super().__init__(model, save_dir, **checkpointables)
        if keep < 0:
            raise UserError(
                f"MODEL.RETINA_FOCAL.TRAIN.KEEP_CHECKPOINTS is {keep}; expected a number of "
                "checkpoints, or 0 for all"
            )
        self.keep, self.classes, self.average = keep, classes, average
        self._last: str | None = None
        self._read: dict[str, dict] = {}
        self._is_own: dict[Path, bool] = {}  # of this run, of those that were looked at
        self._resumes = False

    def save(self, name: str, **extra: object) -> None:
        """Write ``name.pth``, its SHA-256 beside it, and then the tag ``last_checkpoint``.

        Raises:
            UserError: a weight is not finite, or the folder can't be written to; what was there
                before is as it was.
        """
        if not (self.save_dir and self.save_to_disk):
            return
        content = {"model": self.model.state_dict()}
        if self.average is not None:
            raw = content["model"]
            content = {"model": self.average.averaged(raw), "raw_model": raw}
        content |= {key: x.state_dict() for key, x in self.checkpointables.items()}
        # A momentum that is not finite spoils the weights of the next step.
        wrong = not_finite(content)
        if wrong:
            raise UserError(
                f"{wrong} is not finite, so that {name}.pth is not written; "
                f"{self._whole_one()}: go on from it with a lower learning rate: --resume "
                "SOLVER.BASE_LR ... (in a LazyConfig: optimizer.lr=...)"
            )
        content |= extra | ({} if self.classes is None else {"classes": self.classes})
        path = Path(self.save_dir, f"{name}.pth")
        self.logger.info("Saving checkpoint to %s", path)
        try:
            if not self._is_own.get(path):
                keep_earlier(path, run_of(self.save_dir))
            write_checkpoint(path, content)
            if name != BEST:  # which may be older than the last
                self.tag_last_checkpoint(path.name)
        except UserError as error:
            raise UserError(f"{error}; {self._whole_one()}") from error
        self._last, self._is_own[path] = str(path), True
        self._discard(extra.get("iteration", -1))

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        with durable_file(Path(self.save_dir, TAG)) as file:
            file.write(last_filename_basename.encode())

    def has_checkpoint(self) -> bool:
        return bool(self.get_checkpoint_file())

    def get_checkpoint_file(self) -> str:
        """The checkpoint that was saved or resumed from last, else the folder's newest, or ""."""
        if self._last is None:
            return next(map(str, own_checkpoints(self.save_dir)), "")
        return self._last

    def resume_or_load(self, path: str, *, resume: bool = True) -> dict:
        """With `resume`, from the newest whole checkpoint of the folder's run, where there is one;
        else `path`.

        Raises:
            UserError: the folder holds checkpoints but none is whole and finite; or the one found
                is of another model.
        """
        self._last = self._newest_whole() if resume else ""
        if not self._last:
            return self.load(path, checkpointables=[])
        self._resumes = True
        try:
            return self.load(self._last)
        finally:
            self._resumes = False

    def _newest_whole(self) -> str:
        """The path, the same in all processes, of which the main one looks for it."""
        found, error = "", None
        if comm.is_main_process():
            try:
                found = self._first_whole(checkpoints_of(self.save_dir))
            except UserError as wrong:
                error = wrong
        raised_in_all(error)
        return comm.all_gather(found)[0]

    def _first_whole(self, paths: list[Path]) -> str:
        tag, tagged = Path(self.save_dir, TAG), tagged_checkpoint(self.save_dir)
        if os.path.lexists(tag) and tagged not in paths:
            wrong = f"names {tagged}, which isn't there" if tagged else "names no .pth beside it"
            self.logger.warning("%s %s", tag, wrong)
        optimizer = getattr(self.checkpointables.get("trainer"), "optimizer", None)
        reasons, others, run = [], [], run_of(self.save_dir)
        for path in paths:
            if is_of_another_run(path, run):
                others.append(path.name)
                if path == tagged:
                    self.logger.warning(
                        "%s names %s, which is of an earlier run and is not gone on with; to go "
                        "on with it, delete %s",
                        *(tag, path.name, Path(self.save_dir, RUN)),
                    )
                continue
            try:
                content = read_checkpoint(path)
                if optimizer is not None:
                    check_state(path, content)
                self._expect_same_run(path, content, optimizer)
                if optimizer is not None:
                    check_state(path, content, optimizer)
                self._read = {str(path): content}
                return str(path)
            except AnotherRun:
                raise
            except UserError as error:
                reasons.append(f"; {error}")
                self.logger.warning("%s; it is skipped", error)
        if others:
            self.logger.warning(
                "%s holds %d checkpoints of an earlier run (%s), which stay, as earlier-1_NAME "
                "where this one writes NAME; to go on with one, write its name into %s and delete "
                "%s",
                *(self.save_dir, len(others), listed(others), TAG, RUN),
            )
        if reasons or (os.path.lexists(tag) and tagged not in paths):
            names = listed([x.name for x in paths if x.name not in others]) or f"only {TAG}"
            raise UserError(
                f"no checkpoint in '{self.save_dir}' can be used (there: {names}"
                f"{reasons[0] if reasons else ''}); to start again, "
                "leave out --resume, or name another folder: OUTPUT_DIR ANOTHER (in a LazyConfig: "
                "train.output_dir=...)"
            )
        return ""

    def _load_file(self, filename: str) -> dict:
        self._path = filename
        read = self._read.pop(filename, None)
        return super()._load_file(filename) if read is None else read

    def _load_model(self, checkpoint: dict):
        goes_on = self._resumes and bool(self.checkpointables)  # an evaluation takes `model`
        averaged, raw = checkpoint["model"], checkpoint.pop("raw_model", None)
        if goes_on and raw is not None:
            checkpoint["model"] = raw
        if not self._resumes and self.classes is not None:
            match_class_rows(self.model, checkpoint, self.classes, self._path)
        incompatible = super()._load_model(checkpoint)
        if goes_on and self.average is not None:
            self.average.start_from(averaged)
        return incompatible

    def _expect_same_run(self, path: Path, content: Mapping, optimizer: Optimizer | None) -> None:
        """Refuse (AnotherRun) to go on with another model or training."""
        expect_same_classes(path, content.get("classes"), self.classes)
        expect_same_weights(path, content.get("raw_model", content["model"]), self.model)
        if optimizer is not None:
            hooks = content.get("trainer", {}).get("hooks", {})
            now = training_of(self.model, optimizer)
            expect_same_training(path, hooks.get(RESUME_HOOK, {}), now)

    def _whole_one(self) -> str:
        path = self.get_checkpoint_file()
        return f"the last checkpoint is {path}" if path else "there is no checkpoint before it"

    def _discard(self, iteration: int) -> None:
        """Delete what `keep` leaves over of this run; later iterations were given up."""
        if not self.keep:
            return
        found = {path: number_of(path) for path in Path(self.save_dir).glob("model_*.pth")}
        old = sorted((n, path) for path, n in found.items() if n is not None and n <= iteration)
        run = run_of(self.save_dir)
        for _, path in old:
            self._is_own.setdefault(path, not is_of_another_run(path, run))
        for path in [path for _, path in old if self._is_own[path]][: -self.keep]:
            for file in (path, hash_file(path)):
                with suppress(OSError):
                    file.unlink()


def expect_classes_of_run(folder: str, classes: list[str] | None) -> None:
    """Refuse (UserError) other classes than those of the checkpoint that a run would go on from."""
    contents = ((path, peek(path)) for path in own_checkpoints(folder))
    path, content = next(((path, x) for path, x in contents if x), (folder, {}))
    expect_same_classes(path, content.get("classes"), classes)
