"""AP against time per image (Fig. 2), of one's own checkpoints: `retina-focal speed`."""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.evaluation import DatasetEvaluator, inference_context
from torch import nn
from tqdm import tqdm

from retina_focal.config import retina_focal_node
from retina_focal.data.classes import match_classes
from retina_focal.data.images import naming
from retina_focal.data.registration import use_datasets
from retina_focal.data.resizing import mapper_of_test
from retina_focal.errors import UserError
from retina_focal.evaluation.evaluators import build_evaluator
from retina_focal.export.runners import exported_file, open_exported
from retina_focal.files import write_whole
from retina_focal.tools.arguments import add_dataset_argument, listed, number, tool_parser
from retina_focal.tools.common import command, load_cfg
from retina_focal.tools.reports import figure, origin, table
from retina_focal.tools.runs import exported_cfg
from retina_focal.weights.load import load_model

WARM_UP = 3  # images that are not timed
# (ms per image, AP) on one Nvidia M40, COCO test-dev; paper, table 1e and Fig. 2.
PUBLISHED = {
    "RetinaNet-50, 400 to 800 px": [(64, 30.5), (72, 32.5), (98, 34.3), (121, 35.1), (153, 35.7)],
    "RetinaNet-101, 400 to 800 px": [(81, 31.9), (90, 34.4), (122, 36.0), (154, 37.1), (198, 37.8)],
    "SSD321": [(61, 28.0)],
    "DSSD321": [(85, 28.0)],
    "R-FCN (extrapolated)": [(85, 29.9)],
    "SSD513": [(125, 31.2)],
    "DSSD513": [(156, 33.2)],
    "FPN Faster R-CNN": [(172, 36.2)],
}
EPILOG = """
What is timed is the model's call with one image: normalisation, network, decoding and NMS, not
reading or resizing the file. Every checkpoint sees an image at every scale before the next image.

Example:
  %(prog)s --checkpoint output/bccd/config.yaml output/bccd/model_final.pth \\
    --checkpoint output/half/config.yaml output/half/model_final.pth --sizes 160,240,320
  %(prog)s --exported output/onnx --exported output/int8 --dataset mine 'voc:photos' \\
    DATASETS.TEST "('mine',)"
"""


@dataclass
class Point:
    """One checkpoint at one scale: what is measured of it."""

    label: str
    size: int  # shorter side of the image, pixels
    model: nn.Module
    mapper: Callable[[dict], dict]
    evaluator: DatasetEvaluator
    seconds: list[float] = field(default_factory=list)
    found: int = 0  # detections on the images seen

    def see(self, record: dict) -> None:
        inputs = [self.mapper(record)]
        _synchronize()
        start = time.perf_counter()
        outputs = self.model(inputs)
        _synchronize()
        self.seconds.append(time.perf_counter() - start)
        self.found += len(outputs[0].get("instances", ()))
        self.evaluator.process(inputs, outputs)

    def row(self) -> dict:
        """AP of the images seen, and quartiles of the time in ms."""
        results = self.evaluator.evaluate()["bbox"]
        # detectron2's nan: it does not ask for the AP of no detection, which is 0.
        ap = {metric: results[metric] if self.found else 0.0 for metric in ("AP", "AP50")}
        quartiles = statistics.quantiles(self.seconds[WARM_UP:], n=4)
        ms = [1000 * x for x in quartiles]
        row = {"checkpoint": self.label, "size": self.size, "detections": self.found}
        return {**row, **ap, "ms": ms}


@command
def main(argv: list[str]) -> None:
    """``retina-focal speed``: measure, then write ``speed.md``, ``.json`` and ``.png``."""
    args = parse_args(argv)
    exported = [open_exported(path) for path in args.exported]
    files = [[str(exported_file(path))] for path in args.exported]
    labels = _labels([*args.checkpoint, *files])
    cfgs = [
        load_cfg(config, [*args.opts, "MODEL.WEIGHTS", weights], args.dataset)
        for config, weights in args.checkpoint
    ]
    cfgs += [exported_cfg(x.metadata, args.opts, args.dataset) for x in exported]
    cfgs = dict(zip(labels, cfgs, strict=True))
    name = _common_test_set(cfgs.values())
    models = [load_model(cfg) for cfg in list(cfgs.values())[: len(args.checkpoint)]]
    for path, model in zip(args.exported, exported, strict=True):
        match_classes([name], model.metadata.classes, f"'{path}'")
    models = dict(zip(labels, [*models, *exported], strict=True))
    records = DatasetCatalog.get(name)  # with classes numbered as the models do
    if len(records) < 2 * WARM_UP:
        raise UserError(
            f"dataset '{name}' has {len(records)} images; timing needs {2 * WARM_UP} or more"
        )
    points = [
        _point(label, models[label], cfg, size)
        for label, cfg in cfgs.items()
        for size in args.sizes or [cfg.INPUT.MIN_SIZE_TEST]
    ]
    rows = measure(points, records)
    report = {
        **origin("speed", argv, next(iter(cfgs.values())).MODEL.DEVICE),
        "dataset": name,
        "images": len(records),
        "rows": rows,
    }
    text = markdown(report)
    write_whole(args.output / "speed.json", json.dumps(report, indent=1))
    write_whole(args.output / "speed.md", text)
    plot(report, args.output / "speed.png")
    print(f"{text}\nwritten to {args.output}")


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = tool_parser("speed", __doc__, EPILOG, has_folder=True)
    pair = {"nargs": 2, "action": "append", "metavar": ("CONFIG", "WEIGHTS")}
    parser.add_argument("--checkpoint", **pair, default=[], help="may be repeated")
    file = {"action": "append", "default": [], "metavar": "FILE"}
    parser.add_argument("--exported", **file, help="of `retina-focal export`; may be repeated")
    sizes = {"type": listed(number()), "metavar": "PX,PX"}
    parser.add_argument("--sizes", **sizes, help="shorter sides; default: each config's")
    add_dataset_argument(parser)
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE pairs for every config")
    args = parser.parse_args(argv)
    if not args.checkpoint and not args.exported:
        parser.error("nothing to measure is given; type --checkpoint CONFIG WEIGHTS")
    return args


def measure(points: Sequence[Point], records: Sequence[dict]) -> list[dict]:
    """One row per point; they take turns image by image, so that a slow minute meets all."""
    for point in points:
        point.evaluator.reset()
    for record in tqdm(records, unit="image"):
        for point in points:
            with inference_context(point.model), torch.no_grad():
                point.see(record)
    return [point.row() for point in points]


def markdown(report: dict) -> str:
    """What it ran on, and a line for each point."""
    heads = ["checkpoint", "shorter side, px", "AP", "AP50", "ms per image"]
    rows = []
    for row in report["rows"]:
        ms = "{1:.0f} ({0:.0f} to {2:.0f})".format(*row["ms"])
        aps = [f"{row[metric]:.1f}" for metric in ("AP", "AP50")]
        if not row["detections"]:
            aps[0] += " (found nothing)"
        rows.append([row["checkpoint"], row["size"], *aps, ms])
    return (
        f"`{report['command']}`\n\n{report['processor']}, {report['threads']} threads, "
        f"{report['date']}; {report['images']} images of {report['dataset']}, one at a time; "
        f"ms per image: median (quartiles)\n\n{table(heads, rows)}\n"
    )


def plot(report: dict, path: Path) -> None:
    """Left what was measured here; right what the paper published, on its GPU and data."""
    with figure(path, 11, 4.5) as drawn:
        here, published = drawn.subplots(1, 2)
        for label in dict.fromkeys(row["checkpoint"] for row in report["rows"]):
            rows = [row for row in report["rows"] if row["checkpoint"] == label]
            here.plot([r["ms"][1] for r in rows], [r["AP"] for r in rows], "o-", label=label)
            for row in rows:
                point = (row["ms"][1], row["AP"])
                here.annotate(f"{row['size']} px", point, (5, -11), textcoords="offset points")
        here.set_title(f"measured: {report['dataset']}, {report['processor']}", fontsize=10)
        for label, points in PUBLISHED.items():
            published.plot(*zip(*points, strict=True), "o-", label=label)
        published.set_title("published: COCO test-dev, Nvidia M40 (arXiv:1708.02002)", fontsize=10)
        for axes in (here, published):
            axes.set(xlabel="ms per image", ylabel="AP")
            axes.grid(alpha=0.3)
            axes.legend(fontsize=8)  # where it covers least
            axes.margins(x=0.15)


def _common_test_set(cfgs: Iterable[CfgNode]) -> str:
    for cfg in cfgs:
        use_datasets(cfg, cfg.DATASETS.TEST[:1])
    names = {cfg.DATASETS.TEST[0] for cfg in cfgs}
    if len(names) > 1:
        raise UserError(
            f"the configs have the test sets {sorted(names)}, whose AP can't be compared; give one "
            "for all at the end: DATASETS.TEST \"('name',)\""
        )
    return names.pop()


def _point(label: str, model: nn.Module, cfg: CfgNode, size: int) -> Point:
    cfg = cfg.clone()
    cfg.defrost()
    cfg.INPUT.MIN_SIZE_TEST = size
    limit = cfg.TEST.DETECTIONS_PER_IMAGE
    evaluator = build_evaluator(cfg.DATASETS.TEST[0], None, limit, distributed=False)
    mapper = naming(mapper_of_test(cfg), retina_focal_node(cfg).DATA.MAX_PIXELS)
    return Point(label, size, model, mapper, evaluator)


def _labels(checkpoints: Sequence[Sequence[str]]) -> list[str]:
    """The shortest of a checkpoint's names that tell all of them apart.

    Args:
        checkpoints: config and weights of each, or an exported file.
    Raises:
        UserError: one is given twice.
    """
    folders = [Path(weights).parent.name for *_, weights in checkpoints]
    for labels in (folders, [files[-1] for files in checkpoints], map(", ".join, checkpoints)):
        labels = list(labels)
        if len(set(labels)) == len(labels) and all(labels):
            return labels
    raise UserError(
        "a --checkpoint or --exported is given twice; give each config with its weights once"
    )


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
