"""The best checkpoint is that of the dataset which choices are made on, and of no other."""

from types import SimpleNamespace

import pytest
from detectron2.utils.events import EventStorage
from test_resume import ScriptedTrainer, small, small_lazy, train
from test_resume import toy as toy  # a fixture

from retina_focal.errors import UserError
from retina_focal.training.best import BestCheckpoint, EarlyStop, best_checkpoint

BEST, VAL = "MODEL.RETINA_FOCAL.TRAIN.BEST", "MODEL.RETINA_FOCAL.DATA.VAL"


def saved(hook: BestCheckpoint, evaluations: list[dict[str, float]]) -> list[int]:
    """Iterations whose weights a hook keeps, of one evaluation in each."""
    kept: list[int] = []

    def save(name: str, iteration: int) -> None:
        if name == "model_best":
            kept.append(iteration)

    with EventStorage() as storage:
        trainer = SimpleNamespace(storage=storage, checkpointer=SimpleNamespace(save=save))
        hook.trainer = trainer
        for trainer.iter, metrics in enumerate(evaluations):
            storage.iter = trainer.evaluated = trainer.iter
            storage.put_scalars(**metrics, smoothing_hint=False)
            hook.after_step()
    return kept


def test_only_val_is_judged_by_and_the_earlier_wins_ties(tmp_path):
    # AP on val, and on test, which is best where val is worst.
    scores = [(10, 9), (30, 1), (30, 8), (20, 9), (31, 0)]
    rows = [{"val/bbox/AP": val, "test/bbox/AP": test} for val, test in scores]
    for names in (("val", "test"), ("test", "val")):
        keys = {BEST: "bbox/AP", VAL: "val", "DATASETS.TEST": names}
        assert saved(best_checkpoint(small(tmp_path, **keys)), rows) == [0, 1, 4]
    alone = best_checkpoint(small(tmp_path, **{BEST: "bbox/AP", VAL: "val"}, dataset="val"))
    assert saved(alone, [{"bbox/AP": val} for val, _ in scores]) == [0, 1, 4]


def test_the_run_ends_when_val_gets_no_better(tmp_path):
    keys = {BEST: "bbox/AP50", VAL: "val", "DATASETS.TEST": ("test", "val")}
    hook = best_checkpoint(small(tmp_path, **keys, **{"MODEL.RETINA_FOCAL.TRAIN.PATIENCE": 2}))
    rows = [{"val/bbox/AP50": val, "test/bbox/AP50": -val} for val in (3, 2, 1)]
    with pytest.raises(EarlyStop):
        saved(hook, rows)
    assert hook.best == 3 and hook.best_iteration == 0


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"MODEL.RETINA_FOCAL.TRAIN.PATIENCE": 2}, "PATIENCE is 2, without the metric"),
        ({BEST: "bbox/AP"}, "no dataset is named to judge by.* add: MODEL.RETINA_FOCAL.DATA.VAL"),
        ({BEST: "bbox/AP", VAL: "val"}, r"'val' is not evaluated; add: DATASETS.TEST .\('val',\)"),
    ],
)
def test_without_a_dataset_to_judge_by_nothing_is_chosen(keys, message, tmp_path):
    with pytest.raises(UserError, match=message):
        best_checkpoint(small(tmp_path, **keys))


def test_a_lazyconfig_judges_by_its_test_loader_where_that_reads_val_alone(toy, tmp_path):
    cfg = small_lazy(tmp_path)
    cfg.train.retina_focal = {"train": {"best": "bbox/AP"}, "data": {"val": "toy"}}
    assert saved(best_checkpoint(cfg), [{"bbox/AP": 1}, {"bbox/AP": 2}]) == [0, 1]
    cfg.dataloader.test.dataset.names = ["toy", "other"]
    with pytest.raises(UserError, match=r"evaluates toy, other, and not.*dataset.names=toy"):
        best_checkpoint(cfg)


def test_a_metric_that_is_not_measured_is_refused(toy, tmp_path, monkeypatch):
    monkeypatch.setattr(ScriptedTrainer, "scores", (1.0,))
    keys = {BEST: "bbox/AP99", VAL: "toy", "TEST.EVAL_PERIOD": 1}
    with pytest.raises(UserError, match=r"TRAIN.BEST is 'bbox/AP99'.*expected one of: bbox/AP"):
        train(small(tmp_path, **keys), kind=ScriptedTrainer)
