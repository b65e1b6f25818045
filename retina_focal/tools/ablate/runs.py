"""Rows of an ablation, the runs that they ask for, and one run from its config to its AP."""

import argparse
import fcntl
import hashlib
import itertools
import json
import math
import re
import time
import traceback
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path

import torch
from detectron2.config import CfgNode

from retina_focal.config import config_path, flatten, get_cfg
from retina_focal.data.check import ALLOW_OUTSIDE
from retina_focal.errors import UserError
from retina_focal.files import write_whole
from retina_focal.limits import check_values
from retina_focal.merging import merge_options
from retina_focal.safe_yaml import BASE_KEY, read_text, read_yaml
from retina_focal.tools.common import (
    ignore_deprecations,
    load_cfg,
    refuse_proposal_files,
    set_up,
)
from retina_focal.training.assembly import Trainer
from retina_focal.training.processes import available_device
from retina_focal.training.trouble import BadLoss

METRICS = ("AP", "AP50", "AP75", "AR@100")
PAPER_AP = re.compile(r"^# The paper's AP, AP50, AP75: ([\d.]+), ([\d.]+), ([\d.]+)", re.MULTILINE)
# What differs between repetitions of a run, or between machines that run it.
NOT_COMPARED = ("SEED", "OUTPUT_DIR", "MODEL.DEVICE", "DATALOADER.NUM_WORKERS")


@dataclass(frozen=True)
class Row:
    """One line of a table: its own keys, and what the paper measured (AP, AP50, AP75)."""

    name: str
    keys: dict[str, object]
    paper: tuple[float, ...] = ()
    file: str = ""  # the whole config that has these keys


@dataclass(frozen=True)
class Run:
    """One training: `settings` is the `fingerprint` of its config, which names its folder."""

    settings: str
    seed: int
    name: str = field(compare=False)  # of the first row that asks for it
    cfg: CfgNode = field(compare=False)

    @property
    def folder(self) -> Path:
        return Path(self.cfg.OUTPUT_DIR)


def read_row(name: str) -> Row:
    """The row of a file, or of ``configs/ablations/<name>.yaml``: its keys without ``_BASE_``.

    Raises:
        UserError: neither exists, or the file is no YAML.
    """
    path = Path(name if Path(name).is_file() else config_path(f"ablations/{name}.yaml"))
    keys = flatten(read_yaml(path))
    keys.pop(BASE_KEY, None)
    keys.pop(ALLOW_OUTSIDE, None)  # of the command line alone, as `merge_file` has it
    paper = PAPER_AP.search(read_text(path))
    return Row(path.stem, keys, tuple(map(float, paper.groups())) if paper else (), str(path))


def row_names(pattern: str) -> list[str]:
    """Names of the package's rows that a pattern such as ``table_1a_*`` means; a file is itself."""
    if not any(character in pattern for character in "*?["):
        return [pattern]
    folder = Path(config_path("ablations/hinge.yaml")).parent
    names = sorted(path.stem for path in folder.glob(f"{pattern}.yaml"))
    if not names:
        raise UserError(f"no row matches '{pattern}'; expected a name in {folder}, such as hinge")
    return names


def grid_rows(axes: dict[str, Sequence[object]]) -> list[Row]:
    """A row for each combination of the values of some keys."""
    rows = []
    for values in itertools.product(*axes.values()):
        keys = dict(zip(axes, values, strict=True))
        name = ", ".join(f"{key.rpartition('.')[2]} {value}" for key, value in keys.items())
        rows.append(Row(name, keys))
    return rows


def plan(
    rows: Sequence[Row],
    base: str | None,
    opts: Sequence[str],
    datasets: Sequence[Sequence[str]],
    seeds: Sequence[int],
    output: Path,
) -> dict[str, list[Run]]:
    """The runs of each row, by name; rows that come to the same config share theirs.

    Args:
        rows: unique in name.
        base: config that a row's own keys are merged onto; None: each row's whole file.
        opts: KEY VALUE pairs for every run; onto a `base`, a row's own keys are merged after them.
        datasets: rows of [name, annotation json, image folder].
        seeds: of each row.
        output: folder of the runs' folders.
    Raises:
        UserError: a config or a dataset is wrong.
    """
    planned: dict[str, list[Run]] = {}
    known: dict[tuple[str, int], Run] = {}
    shared = load_cfg(base, opts, datasets) if base else None
    for row in rows:
        cfg = _merged(shared, row.keys) if shared else load_cfg(row.file, opts, datasets)
        runs = []
        for seed in seeds:
            cfg = cfg.clone()
            cfg.defrost()
            cfg.SEED = seed
            settings = fingerprint(cfg)
            # Readable, and one folder for the same settings whoever asks for them.
            name = re.sub(r"[^\w.+-]+", "_", row.name)
            cfg.OUTPUT_DIR = str(output / f"{name}_{settings[:8]}" / f"seed_{seed}")
            cfg.freeze()
            runs.append(known.setdefault((settings, seed), Run(settings, seed, row.name, cfg)))
        planned[row.name] = runs
    return planned


def _merged(cfg: CfgNode, keys: dict[str, object]) -> CfgNode:
    """A copy of a config with other values of some keys."""
    cfg = cfg.clone()
    cfg.defrost()
    before = flatten(cfg)
    for key, value in keys.items():
        # yacs wants 2.0 where a person writes 2.
        is_float = isinstance(before.get(key), float) and isinstance(value, int)
        merge_options(cfg, [key, float(value) if is_float else value])
    refuse_proposal_files(cfg)
    check_values(cfg)
    return cfg


def fingerprint(cfg: CfgNode) -> str:
    """Digest of the values in which a config differs from the defaults, without `NOT_COMPARED`."""
    defaults = flatten(get_cfg())
    differing = {
        key: value
        for key, value in flatten(cfg).items()
        if key not in NOT_COMPARED and (key not in defaults or defaults[key] != value)
    }
    return hashlib.sha256(json.dumps(differing, sort_keys=True).encode()).hexdigest()


def execute(config: str, threads: int = 0) -> dict:
    """Train and evaluate one run in this process, going on from its last checkpoint.

    What it prints goes to ``log.txt`` and ``output.txt`` of its folder, its result to
    ``result.json``, which is returned as it is where it exists. A second process waits.

    Args:
        config: of the run, as YAML.
        threads: for arithmetic; 0 leaves torch's choice.
    """
    cfg = get_cfg()
    cfg.merge_from_other_cfg(CfgNode.load_cfg(config))
    folder = Path(cfg.OUTPUT_DIR)
    ignore_deprecations()
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock, open(folder / "output.txt", "a") as output:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "result.json").exists():
            if threads:
                torch.set_num_threads(threads)
            with redirect_stdout(output), redirect_stderr(output):
                try:
                    result = _train(cfg)
                except Exception:
                    traceback.print_exc()  # whoever started the run shows its message alone
                    raise
            write_whole(folder / "result.json", json.dumps(result))
        return json.loads((folder / "result.json").read_text())


def iterations_done(run: Run) -> int:
    """How many iterations a run has made, by what its trainer has written."""
    try:
        last = (run.folder / "metrics.json").read_text().splitlines()[-1]
        return json.loads(last)["iteration"] + 1
    except (FileNotFoundError, IndexError, ValueError):  # before the first line, or half of one
        return 0


def _train(cfg: CfgNode) -> dict:
    """Outcome of a run: "ok", "nan" (the loss was not finite) or "no detections"; and its AP."""
    cfg.MODEL.DEVICE = available_device(cfg.MODEL.DEVICE)
    cfg.freeze()
    set_up(argparse.Namespace(config_file="", eval_only=False), cfg)
    start = time.perf_counter()
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=True)
    result = {"seed": cfg.SEED, "outcome": "ok", "iterations": cfg.SOLVER.MAX_ITER}
    try:
        trainer.train()
    except BadLoss:
        result.update(outcome="nan", iterations=trainer.iter)
        measured = {}
    else:
        # Of detections, or of a proposal network's boxes.
        (measured,) = trainer.results.get(cfg.DATASETS.TEST[0], trainer.results).values()
        # detectron2 calls the AP of nothing nan; by COCO's definition it is 0.
        if math.isnan(measured.get("AP", 0)):
            result["outcome"] = "no detections"
            measured = {"AP": 0.0, "AP50": 0.0, "AP75": 0.0}
    result.update({metric: round(measured[metric], 3) for metric in METRICS if metric in measured})
    result["seconds"] = round(time.perf_counter() - start, 1)
    return result
