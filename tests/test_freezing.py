"""Laws of freezing by name."""

import pytest
import torch
from detectron2.utils.env import seed_all_rng
from test_resume import DroppingTrainer, small, train
from test_resume import toy as toy

from retina_focal.errors import UserError
from retina_focal.training.freezing import freeze

FROZEN = ["backbone.bottom_up", "head.cls_subnet", "head.cls_score.bias"]


def test_what_is_named_stays_and_the_rest_is_trained(toy, tmp_path):
    keys = {"MODEL.RETINA_FOCAL.TRAIN.FREEZE": FROZEN, "SOLVER.MAX_ITER": 2, "DATASETS.TEST": ()}
    keys |= {"SOLVER.STEPS": (), "SOLVER.BASE_LR": 0.1}
    seed_all_rng(1)
    fresh = DroppingTrainer(small(tmp_path / "fresh", **keys)).model.state_dict()
    trainer = train(small(tmp_path / "run", **keys), seed=1)
    found = trainer.model.state_dict()
    changed = {k for k, x in fresh.items() if not torch.equal(x, found[k])}
    assert not [k for k in changed if k.startswith(tuple(FROZEN))]
    assert {"head.cls_score.weight", "head.bbox_subnet.0.weight"} <= changed
    assert any(k.startswith("backbone.fpn") for k in changed)
    in_optimizer = [x for group in trainer.optimizer.param_groups for x in group["params"]]
    assert all(x.requires_grad for x in in_optimizer)


def net() -> torch.nn.Module:
    return torch.nn.ModuleDict({"body": torch.nn.Linear(1, 1), "tail": torch.nn.BatchNorm1d(1)})


def test_a_name_that_is_none_is_refused_with_what_is_near():
    for name, near in [("boddy", "body"), ("body.weigth", "body.weight"), ("x", "body, tail")]:
        with pytest.raises(
            UserError, match=f"names '{name}', which the model does not have; .*{near}"
        ):
            freeze(net(), [name])
    with pytest.raises(UserError, match="names '', which"):
        freeze(net(), [""])


def test_a_model_without_anything_to_train_is_refused():
    with pytest.raises(UserError, match="leaves nothing to train"):
        freeze(net(), ["body", "tail"])


def test_statistics_stay_and_no_name_freezes_nothing():
    model = net()
    assert freeze(model, []) is None and all(x.requires_grad for x in model.parameters())
    hook = freeze(model, ["tail"])
    model.train()
    hook.before_step()
    model["tail"](torch.ones(3, 1))
    assert model["tail"].running_mean.item() == 0 and model["body"].training
