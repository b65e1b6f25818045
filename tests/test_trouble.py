"""A loss that is not finite stops a run with what reproduces it; bad pictures are counted."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import pictures, small_cfg
from detectron2.engine import TrainerBase
from detectron2.modeling import build_model

from retina_focal.errors import UserError
from retina_focal.training import trouble
from retina_focal.training.steps import StepTrainer
from retina_focal.training.trouble import BadLoss, Trouble, read_dump


class Run(TrainerBase):
    """A training of a few steps with the hook alone."""

    def __init__(self, batches: list[list[dict]], folder: Path, limit: int = 0, lr: float = 0.01):
        super().__init__()
        torch.manual_seed(0)
        self.model = build_model(small_cfg(**{"MODEL.META_ARCHITECTURE": "FocalRetinaNet"}))
        optimizer = torch.optim.SGD(self.model.parameters(), lr=lr)
        self._trainer = StepTrainer(self.model.train(), batches, optimizer)
        self.hook = Trouble(str(folder), limit)
        self.register_hooks([self.hook])
        self.batches = batches

    def run_step(self) -> None:
        self._trainer.iter = self.iter
        self._trainer.run_step()

    def go(self) -> None:
        self.train(0, len(self.batches))


def batch(*names: str) -> list[dict]:
    samples = pictures([(64, 96)] * len(names), [2] * len(names))
    return [{**x, "file_name": name} for x, name in zip(samples, names, strict=True)]


def test_a_bad_loss_stops_before_the_weights_change_and_names_what_it_came_from(tmp_path):
    bad = batch("a.jpg", "b.jpg")
    bad[1]["image"] = bad[1]["image"].float()
    bad[1]["image"][0, 0, 0] = torch.nan
    run = Run([batch("c.jpg"), bad], tmp_path)
    states = []
    run._trainer.after_backward = lambda: states.append(
        {k: v.clone() for k, v in run.model.state_dict().items() if "running" not in k}
    )
    with pytest.raises(BadLoss) as caught:
        run.go()
    for words in (
        "infinite or NaN (FloatingPointError) at iteration 1 (loss_cls nan",
        "learning rate 0.01; 2 images per step",
        "The batch: a.jpg; b.jpg; not finite are pixels or boxes of: b.jpg",
        str(tmp_path / trouble.DUMP),
        "SOLVER.BASE_LR 0.00125",
    ):
        assert words in str(caught.value)
    after = run.model.state_dict()
    assert all(torch.equal(x, after[name]) for name, x in states[1].items() if "num_b" not in name)


def test_the_dump_makes_the_same_losses_again(tmp_path, monkeypatch):
    """Of a loss that is finite, to be compared: only its verdict is forced."""
    run = Run([batch("a.jpg", "b.jpg")], tmp_path)
    drawn = []
    monkeypatch.setattr(run._trainer, "after_backward", lambda: drawn.append(torch.rand(3)))
    real = torch.Tensor.isfinite
    share = run._trainer._share

    def not_finite(*args):
        monkeypatch.setattr(torch.Tensor, "isfinite", lambda x: torch.zeros_like(real(x)))
        share(*args)

    monkeypatch.setattr(run._trainer, "_share", not_finite)
    with pytest.raises(BadLoss, match="The weights are not finite themselves"):
        run.go()
    monkeypatch.undo()
    dump, inputs = read_dump(tmp_path / trouble.DUMP)
    model = build_model(small_cfg(**{"MODEL.META_ARCHITECTURE": "FocalRetinaNet"})).train()
    model.load_state_dict(dump["model"])
    found = {name: x.item() for name, x in model(inputs).items()}
    assert found == pytest.approx(dump["losses"], rel=1e-6)
    torch.set_rng_state(dump["random_state"]["torch"])
    assert torch.equal(torch.rand(3), drawn[0])
    assert os.path.getsize(tmp_path / trouble.DUMP) < 1.1 * sum(
        x.numel() * x.element_size() for x in model.state_dict().values()
    ) + sum(x["image"].numel() for x in inputs)


def test_a_folder_that_is_closed_does_not_hide_the_bad_loss(tmp_path):
    (tmp_path / "file").write_text("")
    bad = batch("a.jpg")
    bad[0]["image"] = bad[0]["image"] * torch.nan
    with pytest.raises(BadLoss, match=r"infinite or NaN.*nothing was written to reproduce it"):
        Run([bad], tmp_path / "file").go()


def test_weights_that_are_not_finite_are_named_as_the_cause(tmp_path):
    run = Run([batch("a.jpg")], tmp_path)
    run.model.head.cls_score.bias.data.fill_(torch.nan)
    with pytest.raises(BadLoss, match="The weights are not finite themselves"):
        run.go()


PROCESS = """
import sys, torch
from pathlib import Path
from torch import distributed
from detectron2.utils import comm
sys.path.insert(0, sys.argv[3])
rank = int(sys.argv[1])
distributed.init_process_group("gloo", rank=rank, world_size=2, init_method="file://" + sys.argv[2])
comm.create_local_process_group(2)
from test_trouble import Run, batch, skipping
from retina_focal.training.processes import closed_process_group, distribute
inputs = batch(f"of_{rank}.jpg")
skipped = skipping("a.jpg", *["x.jpg", "y.jpg"][: rank + 1])
bad = batch(f"of_{rank}.jpg")
if rank == 1:
    bad[0]["image"] = bad[0]["image"] * torch.nan
with closed_process_group():
    for steps in ([inputs, skipped, inputs], [bad]):
        run = Run(steps, Path(sys.argv[2] + "_out"), limit=1)
        run._trainer.model = distribute(run.model)
        try:
            run.go()
        except Exception as error:
            print(type(error).__name__, error, f"after step {run.iter}")
"""


def test_two_processes_stop_after_the_same_step_with_one_message_that_names_all_files(tmp_path):
    arguments = [str(tmp_path / "store"), str(Path(__file__).parent)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", PROCESS, str(rank), *arguments],
            **{"stdout": subprocess.PIPE, "text": True, "env": environment},
        )
        for rank in (0, 1)
    ]
    said = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 1]
    for skipped in (said[1], said[0].splitlines(keepends=True)[0]):
        assert skipped.startswith("UserError pictures that can't be used: 2; MODEL.RETINA_FOCAL")
        assert "image 'x.jpg' can't be used; image 'y.jpg' can't be used. To" in skipped
        assert skipped.endswith("after step 1\n")
    bad_loss = said[0].splitlines()[1]
    assert bad_loss.startswith("BadLoss the loss became infinite or NaN")
    assert "in process 1" in bad_loss and "The batch: of_1.jpg" in bad_loss
    _, inputs = read_dump(tmp_path / "store_out" / trouble.DUMP)
    assert [x["file_name"] for x in inputs] == ["of_1.jpg"]


def skipping(name: str, *bad: str) -> list[dict]:
    (sample,) = batch(name)
    return [{**sample, "skipped": [(x, f"image '{x}' can't be used") for x in bad]}]


def test_bad_pictures_are_counted_once_and_stop_the_run_beyond_the_limit(tmp_path, caplog):
    steps = [skipping("a.jpg", "x.jpg", "y.jpg"), skipping("b.jpg", "x.jpg"), batch("c.jpg")]
    run = Run(steps, tmp_path, limit=2)
    run.go()
    assert set(run.hook.bad) == {"x.jpg", "y.jpg"}
    assert "2 pictures were skipped: x.jpg; y.jpg" in caplog.text
    with pytest.raises(UserError, match=r"can't be used: 2; .*MAX_BAD_IMAGES is 1: image"):
        Run(steps, tmp_path, limit=1).go()
    with pytest.raises(UserError, match=r"MAX_BAD_IMAGES is 0"):
        Run(steps, tmp_path).go()


def test_what_was_counted_survives_resuming(tmp_path):
    run = Run([skipping("a.jpg", "x.jpg")], tmp_path, limit=1)
    run.go()
    resumed = Run([skipping("a.jpg", "y.jpg")], tmp_path, limit=1)
    resumed.load_state_dict(run.state_dict())
    with pytest.raises(UserError, match="can't be used: 2; "):
        resumed.go()
    lower = Run([batch("a.jpg")], tmp_path)
    lower.load_state_dict(run.state_dict())
    with pytest.raises(UserError, match="can't be used: 1; "):
        lower.go()
    assert lower.iter == 0
