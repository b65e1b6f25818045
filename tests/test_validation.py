"""Laws of the loss on the validation dataset."""

import json

import pytest
import torch
from detectron2.utils.events import EventStorage
from test_resume import DroppingTrainer, small, train
from test_resume import toy as toy

from retina_focal.data.registration import register_coco_json
from retina_focal.errors import UserError
from retina_focal.training.validation import validation_sums

KEYS = {
    "MODEL.RETINA_FOCAL.TRAIN.VAL_LOSS": True,
    "SOLVER.MAX_ITER": 1,
    "SOLVER.STEPS": (),
    "TEST.EVAL_PERIOD": 0,
}


@pytest.fixture
def val(data, toy) -> dict:
    register_coco_json("toy_val", str(data / "a.json"), str(data))
    return {**KEYS, "MODEL.RETINA_FOCAL.DATA.VAL": "toy_val"}


def test_sums_and_positives_add_up_over_pictures_and_leave_the_model_as_it_was(val, tmp_path):
    trainer = DroppingTrainer(small(tmp_path, **val))
    model, loader = trainer.model, trainer._val_loss.loader
    before = {k: x.clone() for k, x in model.state_dict().items()}
    modes = [x.training for x in model.modules()]
    with EventStorage() as storage:
        sums = validation_sums(model, loader)
    assert not storage.histories()
    assert [x.training for x in model.modules()] == modes and modes[0]
    assert all(torch.equal(x, before[k]) for k, x in model.state_dict().items())
    records = [x for batch in loader for x in batch]
    assert len(records) == 6 and sums[2] == sum(model.count_positives([x]).sum() for x in records)
    # Padding adds no positive; all pictures have one size, and so one batch has the same losses.
    again = validation_sums(model, [records])
    torch.testing.assert_close(again, sums, rtol=1e-4, atol=1e-3)


def test_each_evaluation_has_it(val, tmp_path):
    trainer = train(small(tmp_path, **val))
    lines = [json.loads(line) for line in (tmp_path / "metrics.json").open()]
    found = [line for line in lines if "val/total_loss" in line]
    assert found and found == [line for line in lines if "bbox/AP" in line]
    *losses, positives = validation_sums(trainer.model, trainer._val_loss.loader).tolist()
    names = ("val/loss_cls", "val/loss_box_reg", "val/total_loss")
    expected = [*(x / positives for x in losses), sum(losses) / positives]
    assert [found[-1][name] for name in names] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    "keys, message",
    [
        ({"MODEL.RETINA_FOCAL.DATA.VAL": ""}, "add: MODEL.RETINA_FOCAL.DATA.VAL NAME"),
        ({"MODEL.RETINA_FOCAL.DATA.VAL": "toy_vall"}, "not registered; near it: toy_val"),
        ({"MODEL.RETINA_FOCAL.OHEM.ENABLED": True}, "weigh each batch by itself"),
    ],
)
def test_what_can_not_be_measured_is_refused(keys, message, val, tmp_path):
    with pytest.raises(UserError, match=message):
        DroppingTrainer(small(tmp_path, **{**val, **keys}))
