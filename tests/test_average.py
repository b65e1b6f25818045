"""Laws of the moving average of the weights."""

import pytest
import torch
from test_resume import DroppingTrainer, Trainer, expect_equal, small, train
from test_resume import toy as toy
from torch import nn

from retina_focal.data.registration import register_coco_json
from retina_focal.errors import UserError
from retina_focal.training.assembly import evaluate
from retina_focal.training.average import WeightAverage

SHORT = {"SOLVER.MAX_ITER": 3, "SOLVER.STEPS": (2,), "TEST.EVAL_PERIOD": 0}
EMA = {"MODEL.RETINA_FOCAL.TRAIN.EMA": 0.3, **SHORT}


def net() -> nn.Module:
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 1)).double()
    model[2].requires_grad_(False)
    return model


def steps(model: nn.Module, average: WeightAverage, number: int) -> list[dict]:
    """Weights before and after each step, which changes all parameters and buffers."""
    generator = torch.Generator().manual_seed(0)
    seen = [{k: x.clone() for k, x in model.state_dict().items()}]
    for _ in range(number):
        with torch.no_grad():
            for x in [*model.parameters(), model[1].running_mean]:
                if x.requires_grad or x is model[1].running_mean:
                    x += torch.randn(x.shape, generator=generator)
        average.after_step()
        seen.append({k: x.clone() for k, x in model.state_dict().items()})
    return seen


@pytest.mark.parametrize("decay", [0.15, 0.999])
def test_the_average_is_its_definition_and_buffers_are_copied(decay):
    model = net()
    average = WeightAverage(model, decay)
    average.before_train()
    seen = steps(model, average, 5)
    expected = seen[0]["0.weight"]
    for t, weights in enumerate(seen[1:]):
        d = min(decay, (1 + t) / (10 + t))
        expected = d * expected + (1 - d) * weights["0.weight"]
    found = average.averaged(model.state_dict())
    torch.testing.assert_close(found["0.weight"], expected, rtol=1e-14, atol=1e-15)
    assert list(found) == list(model.state_dict())
    for name in ("1.running_mean", "1.num_batches_tracked", "2.weight"):
        assert torch.equal(found[name], seen[-1][name])
    average.before_train()  # of a resumed run: it goes on
    assert torch.equal(average.averaged({})["0.weight"], found["0.weight"])


def test_an_evaluation_has_the_average_and_a_step_the_weights():
    model = net()
    average = WeightAverage(model, 0.9)
    average.before_train()
    own, found = steps(model, average, 3)[-1], average.averaged(model.state_dict())
    with pytest.raises(KeyError), average.in_the_model():
        assert all(torch.equal(x, found[k]) for k, x in model.state_dict().items())
        raise KeyError
    assert all(torch.equal(x, own[k]) for k, x in model.state_dict().items())


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_a_decay_that_is_none_is_refused(decay, toy, tmp_path):
    with pytest.raises(UserError, match=r"EMA is .*; expected a decay from 0"):
        DroppingTrainer(small(tmp_path, **{"MODEL.RETINA_FOCAL.TRAIN.EMA": decay}))


class Watching(DroppingTrainer):
    """Keeps the weights that are evaluated."""

    @classmethod
    def test(cls, cfg, model, evaluators=None):
        cls.evaluated_weights = {k: x.clone() for k, x in model.state_dict().items()}
        return super().test(cfg, model, evaluators)


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """An uninterrupted run, and the weights that its evaluation saw."""
    register_coco_json("toy", str(data / "a.json"), str(data))
    output = tmp_path_factory.mktemp("average") / "whole"
    train(small(output, **EMA), kind=Watching)
    return output, Watching.evaluated_weights


def load(folder, name="model_final.pth") -> dict:
    return torch.load(folder / name)


def test_the_average_is_what_is_evaluated_and_saved(whole):
    content = load(whole[0])
    for name, x in content["model"].items():
        assert torch.equal(x, whole[1][name]), name
    raw = content["raw_model"]
    weights = [k for k, x in content["model"].items() if not torch.equal(x, raw[k])]
    assert "head.cls_score.weight" in weights and not [k for k in weights if "running" in k]


def test_a_resumed_run_has_the_average_and_the_weights_of_one_that_never_stopped(
    whole, toy, tmp_path
):
    train(small(tmp_path, **EMA), kill=2)
    train(small(tmp_path, **EMA), resume=True, seed=2)
    expect_equal(tmp_path, whole[0])
    found = [load(folder)["raw_model"] for folder in (tmp_path, whole[0])]
    assert all(torch.equal(x, found[1][name]) for name, x in found[0].items())


def test_who_evaluates_gets_the_average_and_who_resumes_the_weights(
    whole, toy, tmp_path, monkeypatch
):
    run, weights = whole
    seen = []
    monkeypatch.setattr(Trainer, "test", lambda cfg, model: seen.append(model.state_dict()) or {})
    evaluate(small(run, **EMA), resume=True)
    evaluate(small(tmp_path, **{"MODEL.WEIGHTS": str(run / "model_final.pth")}), resume=False)
    # Resumed without the key, it goes on with the weights, and the average is gone.
    trainer = DroppingTrainer(small(run, **SHORT))
    trainer.resume_or_load(True)
    assert torch.equal(
        trainer.model.state_dict()["head.cls_score.weight"],
        load(run)["raw_model"]["head.cls_score.weight"],
    )
    for state in seen:
        assert all(torch.equal(x, weights[k]) for k, x in state.items())
