"""Measure a finished run, or a file of results, or compare two: `retina-focal evaluate`."""

import argparse
import json
import shlex
from pathlib import Path
from typing import NamedTuple

from retina_focal.config import retina_focal_node
from retina_focal.data.sources import load
from retina_focal.errors import UserError
from retina_focal.evaluation.charts import FIGURES
from retina_focal.evaluation.detections import read_results
from retina_focal.evaluation.operating_points import OperatingPoints, check_rule
from retina_focal.evaluation.summary import Subject, compare, measure
from retina_focal.export.runners import exported_file
from retina_focal.files import write_whole
from retina_focal.tools.arguments import number, tool_parser
from retina_focal.tools.common import command
from retina_focal.tools.evaluate.tables import comparison_text, report_text
from retina_focal.tools.points import choose_points, points_of
from retina_focal.tools.reports import figure
from retina_focal.tools.runs import Run, detections, open_run, run_model, use_data

CHECKPOINTS = (".pth", ".pkl", ".safetensors")
EPILOG = """
RUN is the folder of a training, or a file that `retina-focal export` wrote, or its folder; that
needs --data. FILE holds results in COCO format, as training leaves them in
inference/coco_instances_results.json, and needs --data.

Where the config of a RUN names MODEL.RETINA_FOCAL.DATA.VAL, the operating point and the calibration
of each class are chosen on that dataset and written beside the weights, for `predict`.

Examples:
  %(prog)s output/bccd
  %(prog)s output/bccd --data 'voc:photos?split=test' --rule precision=0.9 --output output/measured
  %(prog)s output/onnx --data bccd_test
  %(prog)s results.json --data test.json --json
  %(prog)s output/a output/b --compare
"""


class Opened(NamedTuple):
    """What an argument leads to."""

    subject: Subject
    points: OperatingPoints | None = None
    is_same: bool = False  # whether the points were chosen on the dataset that is measured


@command
def main(argv: list[str]) -> None:
    """``retina-focal evaluate``: print tables, or JSON; with `--output` write them and figures."""
    args = parse_args(argv)
    opened = [_open(name, args) for name in args.inputs]
    if args.compare:
        first, second = (x.subject for x in opened)
        content = compare(first, second, args.draws, args.seed)
        text = comparison_text(content)
    else:
        content = [measure(*x, args.draws, args.seed) for x in opened]
        text = "\n".join(map(report_text, content))
    printed = json.dumps(content, indent=1)
    print(printed if args.json else text)
    if args.output:
        write_whole(args.output / "evaluation.json", printed)
        write_whole(args.output / "evaluation.md", text)
        for i, report in enumerate([] if args.compare else content):
            several = len(content) > 1
            _write_figures(report, args.output / str(i + 1) if several else args.output)


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = tool_parser("evaluate", __doc__, EPILOG)
    parser.add_argument("inputs", nargs="+", metavar="RUN|FILE")
    parser.add_argument("--config-file", metavar="FILE", help="in place of a RUN's; as of train")
    default = "default: the first of DATASETS.TEST of the RUN"
    parser.add_argument("--data", help=f"a dataset's name, URI or path; {default}")
    parser.add_argument("--compare", action="store_true", help="the second with the first")
    rules = "f1 (default), precision=0.9 or fppi=0.5 (false positives per image)"
    parser.add_argument("--rule", default="f1", help=f"of the operating points: {rules}")
    parser.add_argument("--json", action="store_true", help="print JSON in place of tables")
    parser.add_argument("--output", type=Path, metavar="DIR", help="write JSON and figures there")
    draws = "of images, for the intervals; default: %(default)s"
    parser.add_argument("--draws", type=number(), default=1000, help=draws)
    seed = "of the draws; default: %(default)s"
    parser.add_argument("--seed", type=number(least=0), default=0, help=seed)
    parser.add_argument("--opts", nargs=argparse.REMAINDER, default=[], help="KEY VALUE pairs")
    args = parser.parse_args(argv)
    if args.compare and len(args.inputs) != 2:
        parser.error(f"--compare takes two of RUN or FILE, not {len(args.inputs)}")
    try:
        check_rule(args.rule)
    except UserError as error:
        parser.error(str(error))
    return args


def _open(name: str, args: argparse.Namespace) -> Opened:
    """The detections of a run, or the results in a file."""
    if exported_file(name) or not Path(name).is_file():
        return _of_run(open_run(name, args.config_file, args.opts), args)
    if Path(name).suffix in CHECKPOINTS:
        raise UserError(
            f"'{name}' is a checkpoint; name the folder of its run: retina-focal evaluate "
            f"{shlex.quote(str(Path(name).parent))} --opts MODEL.WEIGHTS {shlex.quote(name)}"
        )
    if args.data is None:
        raise UserError(f"'{name}' is a file; name the dataset of its results: --data DATA")
    dataset = json.loads(load(args.data).json_file.read_bytes())
    return Opened(Subject(name, args.data, dataset, read_results(name, dataset)))


def _of_run(run: Run, args: argparse.Namespace) -> Opened:
    """The operating points are chosen anew where there is a dataset for it."""
    if args.data is None and not run.cfg.DATASETS.TEST:
        named = retina_focal_node(run.cfg).DATA.VAL or "DATA"
        raise UserError(f"the config names no dataset to test on; add: --data {named}")
    data = args.data or run.cfg.DATASETS.TEST[0]
    val = "" if args.compare else retina_focal_node(run.cfg).DATA.VAL
    names = [use_data(run, name) for name in dict.fromkeys(filter(None, (data, val)))]
    model = run_model(run)
    files = {name: load(name).json_file for name in names}
    subjects = {}
    for name, file in files.items():
        dataset = json.loads(file.read_bytes())
        results = detections(run, model, name)
        subjects[name] = Subject(str(run.weights), name, dataset, results)
    points = choose_points(run, subjects[val], args.rule) if val else points_of(run)
    same = [name for name, file in files.items() if file == files[data]]  # by another name, too
    return Opened(subjects[data], points, bool(points) and points.content.get("dataset") in same)


def _write_figures(report: dict, folder: Path) -> None:
    for name, draw in FIGURES.items():
        with figure(folder / f"{name}.svg", 6.5, 5) as drawn:
            draw(drawn.subplots(), report)
