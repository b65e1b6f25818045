"""docs/EXTENDING.md: its files are written out and its commands run, as a user would."""

import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import pictures
from detectron2.structures import Boxes
from test_processes import needs_cpu_processes
from test_train import PYTHONPATH, ROOT, SMALL, metrics

from retina_focal import CLS_LOSS_REGISTRY

BLOCKS = re.findall(r"```(\w+)\n(.*?)```", (ROOT / "docs/EXTENDING.md").read_text(), re.DOTALL)
FILES = {text.split()[1]: text for kind, text in BLOCKS if kind in ("python", "yaml")}
COMMANDS = [line for kind, text in BLOCKS if kind == "bash" for line in text.splitlines()]
PARTS = ("Poly1FocalLoss", "TopIoUAssigner", "SharedTowerHead", "at_least_eight")
# Appended to the user's script: what was built, and what the training really ran through.
WITNESS = """
from retina_focal import FocalRetinaNet
from detectron2.utils import comm

forward = FocalRetinaNet.forward

def watched(self, *args):
    if self.training:
        parts = self.criterion.classification_loss, self.assigner, self.head
        names = [type(part).__name__ for part in parts] + [self.criterion.normalizer.__name__]
        print(f"process {comm.get_rank()} trains {' '.join(names)}\\n", end="", flush=True)
    return forward(self, *args)

FocalRetinaNet.forward = watched
"""
LAZY_SMALL = [
    "dataloader.train.dataset.names=rectangles",
    "dataloader.test.dataset.names=rectangles",
    "dataloader.evaluator.dataset_name=rectangles",
    "dataloader.train.total_batch_size=2",
    "dataloader.train.num_workers=0",
    "dataloader.test.num_workers=0",
    "train.init_checkpoint=",
    "dataloader.train.mapper.augmentations.0.short_edge_length=[64]",
    "dataloader.test.mapper.augmentations.0.short_edge_length=64",
    "model.num_classes=2",
    "optimizer.lr=1e-6",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The user's folder, with every file of the document."""
    path = tmp_path_factory.mktemp("user")
    for name, text in FILES.items():
        (path / name).write_text(text.replace("CLONE", str(ROOT)))
    # The witness stands where it runs in every process, before `main`.
    script = path / "my_train.py"
    script.write_text(script.read_text().replace("\nif __name__", f"{WITNESS}\nif __name__"))
    return path


def run_python(folder: Path, *arguments: str) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": PYTHONPATH}
    command = [sys.executable, "-W", "ignore", *arguments]
    result = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, env=environment, check=False
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return result.stdout + result.stderr


def test_the_document_is_short_and_has_what_is_tested():
    assert len((ROOT / "docs/EXTENDING.md").read_text().splitlines()) <= 210
    assert COMMANDS[0] == COMMANDS[1].replace(" --num-gpus 2", "")
    assert len(COMMANDS) == 3 and len(FILES) == 8


def test_value_and_derivative_of_the_loss_are_those_of_its_definition(folder, monkeypatch):
    # In this process, as importing costs seconds; its registration is taken back.
    monkeypatch.setattr(CLS_LOSS_REGISTRY, "_obj_map", dict(CLS_LOSS_REGISTRY))
    monkeypatch.syspath_prepend(folder)
    try:
        runpy.run_path(str(folder / "check_my_loss.py"))
    finally:
        sys.modules.pop("my_loss", None)


@needs_cpu_processes
# The first command is the second without its flag.
@pytest.mark.parametrize("command", COMMANDS[1:])
def test_every_command_trains_ten_iterations_with_all_parts(command, folder, data, tmp_path):
    python, script, *arguments = shlex.split(command)
    assert python == "python"
    dataset = ["--dataset", "rectangles", str(data / "a.json"), str(data)]
    if "my_lazy.py" in command:
        small = [*LAZY_SMALL, f"train.output_dir={tmp_path}"]
    else:
        small = [*SMALL, "SOLVER.MAX_ITER", "10", "DATASETS.TRAIN", "('rectangles',)"]
        small += ["DATASETS.TEST", "('rectangles',)", "OUTPUT_DIR", str(tmp_path)]
        small += ["SOLVER.CHECKPOINT_PERIOD", "10", "SOLVER.STEPS", "(9,)"]
    printed = run_python(folder, script, *dataset, *arguments, *small)
    for rank in range(2 if "--num-gpus 2" in command else 1):
        assert printed.count(f"process {rank} trains {' '.join(PARTS)}\n") == 10
    last = metrics(tmp_path)
    assert last["num_pos_anchors"] > 0 and "bbox/AP" in last
    # The head is new, and the closed form is that of the user's loss.
    first_step = "retina_focal/first_step/per_positive"
    if "my_lazy.py" not in command:  # there, frozen norms without statistics
        assert last[first_step] == pytest.approx(last[f"{first_step}_closed_form"], rel=0.1)


def test_the_assigner_gives_each_box_its_best_anchors_and_bears_images_without_boxes():
    namespace = {"__name__": "my_assigner"}
    source = FILES["my_assigner.py"].replace("@ASSIGNER_REGISTRY.register()\n", "")
    exec(source, namespace)
    # Two levels; both boxes want the last anchor, which the first overlaps more.
    anchors = [
        Boxes(torch.tensor([[50.0, 50, 60, 60], [0, 0, 8, 8]])),
        Boxes(torch.tensor([[0.0, 0, 10, 10]])),
    ]
    one, none = (x["instances"] for x in pictures([(64, 64)] * 2, [2, 0]))
    one.gt_boxes = Boxes(torch.tensor([[0.0, 0, 10, 10], [0, 0, 9, 10]]))
    one.gt_classes[:] = torch.tensor([2, 1])
    labels, matched_idxs = namespace["TopIoUAssigner"](3, top_k=1)(anchors, [one, none])
    assert labels.tolist() == [[3, 3, 2], [3, 3, 3]]
    assert matched_idxs.shape == labels.shape and labels.dtype == matched_idxs.dtype == torch.int64
