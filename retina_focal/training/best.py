"""The best checkpoint by a metric, and the early stop of a run that gets no better."""

import logging
import math
import os
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from omegaconf import DictConfig

from retina_focal.config import retina_focal_node
from retina_focal.errors import UserError
from retina_focal.training.checkpoints import BEST
from retina_focal.training.metrics import results_in_metrics
from retina_focal.training.resume import FollowsEvaluation
from retina_focal.training.values import plain_values

logger = logging.getLogger(__name__)


class EarlyStop(BaseException):
    """Ends a training in all processes at once. It is no fault: no traceback is logged."""


class BestCheckpoint(FollowsEvaluation):
    """Saves `model_best.pth` after an evaluation that beats all before; stops a run without them.

    It stands behind the hook that evaluates, in every process.
    """

    def __init__(self, metric: str, patience: int = 0, dataset: str = ""):
        """
        Args:
            metric: more is better; of an evaluation, such as "bbox/AP".
            patience: evaluations without a better one after which the run ends; 0: none.
            dataset: whose results count, where several are evaluated; "": there is one.
        """
        self.metric, self.patience = metric, patience
        self.prefix = f"{dataset}/" if dataset else ""  # as `metrics.json` has it
        self.best, self.best_iteration, self.num_worse, self.judged = -math.inf, -1, 0, -1

    @property
    def has_stopped(self) -> bool:
        return 0 < self.patience <= self.num_worse

    def after_step(self) -> None:
        trainer = self.trainer
        if trainer.evaluated != trainer.iter or self.judged == trainer.iter:
            return
        self._judge()
        if self.has_stopped:
            trainer.checkpointer.save("model_final", iteration=trainer.iter)
            above = f" above {self.best:.4g}, of iteration {self.best_iteration},"
            logger.info(
                "the run ends early: no %s%s in %d evaluations (TRAIN.PATIENCE)",
                self.metric,
                above if self.best_iteration >= 0 else " that is a number",
                self.num_worse,
            )
            raise EarlyStop

    def after_train(self) -> None:
        if self.trainer.evaluated == self.trainer.iter != self.judged:
            self._judge()

    def _judge(self) -> None:
        trainer = self.trainer
        latest = {name: x for name, (x, i) in trainer.storage.latest().items() if i == trainer.iter}
        # The main process alone has results.
        names = [x.removeprefix(self.prefix) for x in sorted(latest) if x.startswith(self.prefix)]
        value, names = comm.all_gather((latest.get(self.prefix + self.metric), names))[0]
        if value is None:
            raise UserError(
                f"TRAIN.BEST is '{self.metric}', which the evaluation doesn't give; expected one "
                f"of: {', '.join(name for name in names if '/AP' in name) or 'none was measured'}"
            )
        self.judged = trainer.iter
        if not value > self.best:  # NaN is not
            self.num_worse += 1
            return
        self.best, self.best_iteration, self.num_worse = value, trainer.iter, 0
        logger.info("%s %.4g is the best so far", self.metric, value)
        trainer.checkpointer.save(BEST, iteration=trainer.iter)

    def state_dict(self) -> dict:
        names = ("best", "best_iteration", "num_worse", "judged")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state_dict: dict) -> None:
        self.__dict__.update(state_dict)


def best_checkpoint(parts: CfgNode | DictConfig) -> BestCheckpoint | None:
    """What ``MODEL.RETINA_FOCAL.TRAIN`` asks for, judged on ``DATA.VAL`` alone.

    Args:
        parts: the config of either kind; a LazyConfig's test loader that names no dataset is taken
            to read ``DATA.VAL``.
    Raises:
        UserError: there is a patience, but no metric that it is about; or there is no dataset to
            judge by, or one that is not evaluated by itself.
    """
    cfg = plain_values(parts)
    node, tested, is_lazy = retina_focal_node(cfg), [*cfg.DATASETS.TEST], parts is not cfg
    train, val = node.TRAIN, node.DATA.VAL
    if train.PATIENCE and not train.BEST:
        raise UserError(
            f"TRAIN.PATIENCE is {train.PATIENCE}, without the metric that it waits for; add: "
            "MODEL.RETINA_FOCAL.TRAIN.BEST bbox/AP"
        )
    if not train.BEST:
        return None
    why = f"TRAIN.BEST is '{train.BEST}', but "
    if not val:
        raise UserError(
            f"{why}no dataset is named to judge by, and none that is tested on shall be; add: "
            "MODEL.RETINA_FOCAL.DATA.VAL NAME (in a LazyConfig: train.retina_focal.data.val=NAME)"
        )
    if is_lazy and tested not in ([], [val]):
        raise UserError(
            f"{why}the LazyConfig evaluates {', '.join(tested)}, and not DATA.VAL '{val}' by "
            f"itself; add: dataloader.test.dataset.names={val}"
        )
    if not is_lazy and val not in tested:
        raise UserError(
            f"{why}DATA.VAL '{val}' is not evaluated; add: DATASETS.TEST \"('{val}',)\", with a "
            "dataset to test on behind it where that shall be measured each time"
        )
    return BestCheckpoint(train.BEST, train.PATIENCE, val if len(tested) > 1 else "")


def has_ended(trainer: DefaultTrainer) -> bool:
    """Whether a resumed run has no step to make: then say so, with its results in `trainer`.

    What was interrupted behind the last step is made: model_final.pth, the last evaluation.
    """
    best = next((x for x in trainer._hooks if isinstance(x, BestCheckpoint)), None)
    stopped = best is not None and best.has_stopped
    if trainer.start_iter < trainer.max_iter and not stopped:
        return False
    folder, end = trainer.cfg.OUTPUT_DIR, trainer.max_iter
    results = results_in_metrics(Path(folder, "metrics.json"), trainer.start_iter)
    results = comm.all_gather(results)[0]
    is_final = os.path.basename(trainer.checkpointer.get_checkpoint_file()) == "model_final.pth"
    if trainer.start_iter == end and not stopped and not (results and is_final):
        trainer.iter = end
        with EventStorage(end) as trainer.storage:
            trainer.before_train()
            trainer.after_train()
    elif results is not None:
        trainer._last_eval_results = results
    more = "TRAIN.PATIENCE 0" if stopped else f"SOLVER.MAX_ITER {2 * trainer.start_iter}"
    logger.warning(
        "the run in %s has ended, after iteration %d; to train on, type for example --resume %s "
        "(in a LazyConfig: train.%s); to evaluate: --eval-only --resume",
        folder,
        trainer.start_iter,
        more,
        more.replace("SOLVER.MAX_ITER ", "max_iter=").replace(
            "TRAIN.PATIENCE ", "retina_focal.train.patience="
        ),
    )
    return True
