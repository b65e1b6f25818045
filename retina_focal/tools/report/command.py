"""All that is known of a run, on one page that needs no network: `retina-focal report`."""

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from detectron2.data import DatasetCatalog
from torch import nn

from retina_focal.config import retina_focal_node
from retina_focal.data.sources import load
from retina_focal.data.uri import has_scheme
from retina_focal.errors import UserError
from retina_focal.evaluation.mistakes import kept_at
from retina_focal.evaluation.operating_points import OperatingPoints
from retina_focal.evaluation.summary import DEFAULT_THRESHOLD, Subject, measure
from retina_focal.files import write_whole
from retina_focal.tools.arguments import number, tool_parser
from retina_focal.tools.common import command
from retina_focal.tools.points import choose_points, points_of
from retina_focal.tools.report import content, figures
from retina_focal.tools.reports import origin
from retina_focal.tools.runs import CONFIG, Run, detections, open_run, run_model, use_data

# Enough for the shares; the paper's numbers take minutes: `retina-focal anatomy`.
WINDOWS = ("--num-negatives", "1e6", "--num-positives", "2e3")
SUSPECTS = 12  # suspected labels that are shown
EPILOG = """
The run is measured on --data. Operating points and calibration are those of operating_points.json;
where it is not there yet, they are chosen on MODEL.RETINA_FOCAL.DATA.VAL, as by `retina-focal
evaluate`, and written for `predict`. What is missing is left out.

Examples:
  %(prog)s output/bccd
  %(prog)s output/bccd --data 'voc:photos?split=test' --output bccd.html
"""


@command
def main(argv: list[str]) -> None:
    """``retina-focal report``: measure a run and write the page."""
    parser = tool_parser("report", __doc__, EPILOG)
    parser.add_argument("run", metavar="RUN", help="folder of a training")
    parser.add_argument("--config-file", metavar="FILE", help="in place of RUN's; as of train")
    default = "default: the first of DATASETS.TEST"
    parser.add_argument("--data", metavar="DATA", help=f"a dataset's name, URI or path; {default}")
    parser.add_argument("--output", type=Path, metavar="FILE", help="default: RUN/report.html")
    worst = "pictures with the most mistakes that are shown; default: %(default)s"
    parser.add_argument("--worst", type=number(least=0), default=8, metavar="N", help=worst)
    opts = {"nargs": argparse.REMAINDER, "default": [], "metavar": "KEY VALUE"}
    parser.add_argument("--opts", **opts, help="for the config, at the end")
    args = parser.parse_args(argv)
    from retina_focal.tools.report.page import render  # before minutes of work: it is an extra

    run = open_run(args.run, args.config_file, args.opts)
    if not (args.data or run.cfg.DATASETS.TEST):
        named = retina_focal_node(run.cfg).DATA.VAL or "DATA"
        raise UserError(f"the config names no dataset to test on; add: --data {named}")
    data = use_data(run, args.data or run.cfg.DATASETS.TEST[0])
    page = {
        **origin("report", argv, run.cfg.MODEL.DEVICE),
        "run": args.run,
        "weights": run.weights.name,
        **_measured(run, data, args.worst),
        **_of_training(run, args, data),
    }
    path = args.output or Path(args.run, "report.html")
    text = render(page)
    write_whole(path, text)
    print(f"{path}: {len(text.encode()) / 1e6:.2f} MB, opens without a network")


def _measured(run: Run, data: str, num_worst: int) -> dict:
    """What the run detects on the dataset, measured and shown."""
    model = run_model(run)
    subject = _subject(run, model, data)
    points, no_points = content.or_reason(lambda: _points(run, model, subject))
    is_same = points is not None and points.content.get("dataset") == data
    report = measure(subject, points, is_same)
    kept = kept_at(subject.evaluated, points.thresholds if points else {}, DEFAULT_THRESHOLD)
    paths = {x["image_id"]: x["file_name"] for x in DatasetCatalog.get(data)}
    pixels = retina_focal_node(run.cfg).DATA.MAX_PIXELS
    worst = content.worst_pictures(kept, report["worst_images"][:num_worst], paths, pixels)
    suspects = content.suspects(report["suspected_labels"][:SUSPECTS], paths, pixels)
    return {
        "report": report,
        "figures": figures.evaluation_figures(report),
        "worst": _as_uris(worst),
        "suspects": _as_uris(suspects),
        "num_suspects": len(report["suspected_labels"]),
        "no_points": no_points,
    }


def _subject(run: Run, model: nn.Module, data: str) -> Subject:
    dataset = json.loads(load(data).json_file.read_bytes())
    return Subject(str(run.weights), data, dataset, detections(run, model, data))


def _points(run: Run, model: nn.Module, measured: Subject) -> OperatingPoints | None:
    """Those of the run; where it has none yet, they are chosen."""
    points, val = points_of(run), retina_focal_node(run.cfg).DATA.VAL
    if points or not val:
        return points
    is_same = val == measured.data
    return choose_points(run, measured if is_same else _subject(run, model, use_data(run, val)))


def _as_uris(shown: Sequence[content.Shown]) -> list[dict]:
    return [{**x._asdict(), "image": figures.jpeg(x.image)} for x in shown]


def _of_training(run: Run, args: argparse.Namespace, tested: str) -> dict:
    """Data findings, curves, anchors and anatomy; each None, with the reason, where it is not."""
    cfg, folder = run.cfg, Path(args.run)
    names = [*cfg.DATASETS.TRAIN, retina_focal_node(cfg).DATA.VAL, tested]
    names = [name for name in dict.fromkeys(names) if name]
    data, no_data = content.or_reason(lambda: content.data_findings(cfg, names))
    name = cfg.DATASETS.TRAIN[0] if cfg.DATASETS.TRAIN else tested
    anchors, no_anchors = content.or_reason(lambda: _anchor_coverage(run, name))
    anatomy, no_anatomy = content.or_reason(lambda: _anatomy(run, args, tested))
    if anatomy and anatomy["figure"].is_file():
        anatomy["figure"] = figures.png(anatomy["figure"])
    return {
        "data": data,
        "curves": figures.curves(folder / "metrics.json"),
        "anchors": anchors,
        "anatomy": anatomy,
        "reasons": {"data": no_data, "anchors": no_anchors, "anatomy": no_anatomy},
    }


def _anchor_coverage(run: Run, name: str) -> dict:
    if run.built is not None:
        raise UserError("the config is a LazyConfig, which retina-focal anchors does not take")
    return content.anchor_coverage(run.cfg, name)


def _anatomy(run: Run, args: argparse.Namespace, tested: str) -> dict:
    """Of the run's folder; where it has none `retina-focal anatomy` makes it, of a few images.

    Raises:
        UserError: it can't be made.
    """
    folder = Path(args.run, "anatomy")
    found = content.anatomy(folder, run.weights)
    if found is not None:
        return found
    if run.built is not None:
        raise UserError("the config is a LazyConfig, which retina-focal anatomy does not take")
    if run.exported is not None:
        raise UserError("an exported file gives boxes, and not the scores of all anchors")
    command = [sys.executable, "-W", "ignore", "-m", "retina_focal.tools.cli", "anatomy"]
    command += ["--config-file", args.config_file or str(Path(args.run, CONFIG))]
    command += ["--output", str(folder), *WINDOWS]
    if has_scheme(tested) or Path(tested).exists():
        command += ["--dataset", tested, tested, ""]
    values = {"MODEL.WEIGHTS": str(run.weights), "DATASETS.TEST": str((tested,))}
    command += [*args.opts, *(x for pair in values.items() for x in pair)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    found = content.anatomy(folder, run.weights)
    if result.returncode or found is None:
        raise UserError((result.stderr.strip() or "it was interrupted").splitlines()[-1])
    return found
