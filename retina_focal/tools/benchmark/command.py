"""Time and memory beside detectron2's and torchvision's RetinaNet: `retina-focal benchmark`."""

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import product

import torch
from detectron2.config import CfgNode
from tqdm import tqdm

from retina_focal.config import retina_focal_node
from retina_focal.files import write_whole
from retina_focal.precision import PRECISIONS
from retina_focal.tools.benchmark.cases import INDEPENDENT_OF, MEMORY, TIMED
from retina_focal.tools.benchmark.instruments import Probe, check_fp32, memory_probes, timing_probes
from retina_focal.tools.benchmark.models import MODELS, Setting, torchvision_has
from retina_focal.tools.benchmark.report import markdown, plot, rows_of
from retina_focal.tools.common import (
    command,
    expect_focal_retinanet,
    listed,
    load_cfg,
    number,
    tool_parser,
)
from retina_focal.tools.reports import origin

WHAT = (*TIMED, "memory")
EPILOG = """
Boxes have sides from 8 px to half the image's, log-uniform, at uniform places. Weights are random.
The precision is that of our model; the others compute in fp32. Ctrl-C ends in a table of the rounds
that are finished.

Examples:
  %(prog)s --what loss,matching --boxes 20,500,2000
  %(prog)s --what train,memory --classes 80,1203 --image-size 384x512
  %(prog)s --what train,inference,convolutions --precision fp32,bf16
  %(prog)s --config-file quick_start/bccd.yaml --image-size 240x320 --batch 8 --classes 3
"""


@command
def main(argv: list[str]) -> None:
    """``retina-focal benchmark``: measure, then print and write the table."""
    args = parse_args(argv)
    torch.set_num_threads(args.threads)
    settings = settings_of(args)
    device = settings[0].device
    check_fp32(device)
    report = {**origin("benchmark", argv, device), "rounds": args.rounds, "rows": []}

    def save() -> None:
        write_whole(args.output / "results.json", json.dumps(report, indent=1))

    try:
        benchmark(settings, args.what, args.rounds, report["rows"], save)
    except KeyboardInterrupt:
        print("\ninterrupted; what was measured before:")
    if not report["rows"]:
        print("no round was finished")
        return
    save()
    text = markdown(report)
    write_whole(args.output / "results.md", text)
    plot(report["rows"], args.output / "results.png")
    print(f"{text}\nwritten to {args.output}")


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = tool_parser("benchmark", __doc__, EPILOG, has_folder=True)
    add = partial(parser.add_argument, metavar="X")
    what = {"type": partial(_names, choices=WHAT), "default": list(WHAT)}
    add("--what", **what, help=f"some of {','.join(WHAT)}; default: all")
    add("--config-file", default="COCO-Detection/retinanet_R_50_FPN_1x.yaml", help="as of train")
    add("--image-size", type=_size, default=(800, 1216), help="HxW in pixels; default: 800x1216")
    add("--batch", type=number(), default=1, help="images; default: %(default)s")
    add("--classes", type=listed(number()), help="default: the config's; several: 1,80,1203")
    boxes = "per image; default: 20; several: 20,500,2000"
    add("--boxes", type=listed(number()), default=[20], help=boxes)
    precision = "of our model; default: the config's; several: fp32,bf16"
    add("--precision", type=partial(_names, choices=PRECISIONS), help=precision)
    add("--rounds", type=number(), default=5, help="times each model is run; default: %(default)s")
    add("--threads", type=number(), default=torch.get_num_threads(), help="default: %(default)s")
    add("--device", help="cpu or cuda; default: the config's")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE pairs for the config")
    return parser.parse_args(argv)


def settings_of(args: argparse.Namespace) -> list[Setting]:
    """One for each combination of number of classes, number of boxes and precision.

    Raises:
        UserError: the config is not one of our model's.
    """
    device = ["MODEL.DEVICE", args.device] if args.device else []
    cfg = load_cfg(args.config_file, [*args.opts, *device])
    expect_focal_retinanet(cfg, "from which stock's is derived")
    classes = args.classes or [cfg.MODEL.RETINANET.NUM_CLASSES]
    precisions = args.precision or [retina_focal_node(cfg).PRECISION]
    return [
        Setting(_with(cfg, k, precision), args.image_size, args.batch, boxes)
        for k, boxes, precision in product(classes, args.boxes, precisions)
    ]


def benchmark(
    settings: Sequence[Setting],
    what: Sequence[str],
    rounds: int,
    rows: list[dict],
    after_round: Callable[[], None],
) -> None:
    """Measure; in each round every model runs once, in turn.

    Args:
        settings: the first gives what a row does not depend on.
        what: of `WHAT`.
        rows: filled as it goes: an interruption leaves the finished rounds in it.
        after_round: called when `rows` is up to date.
    """
    jobs = [
        (title, make_probes, setting, 1 if name == "memory" else rounds)
        for name in what
        for title, make_probes, independent_of in _titles(name)
        for setting in settings
        if all(getattr(setting, x) == getattr(settings[0], x) for x in independent_of)
    ]
    names = MODELS if torchvision_has(settings[0].cfg) else ("stock", "ours")
    with tqdm(total=sum(job[-1] for job in jobs), unit="round", dynamic_ncols=True) as progress:
        for title, make_probes, setting, job_rounds in jobs:
            numbers = f"{setting.classes} classes, {setting.boxes} boxes, {setting.precision}"
            progress.set_description(f"{title}, {numbers}")
            probes = make_probes(setting, names)
            first, records = len(rows), []
            for _ in range(job_rounds):
                records.append({name: probe() for name, probe in probes.items()})
                rows[first:] = rows_of(title, setting, records)
                after_round()
                progress.update()


def _titles(what: str) -> Iterator[tuple[str, Callable[..., dict[str, Probe]], set[str]]]:
    """Title, maker of probes, and what the row does not depend on."""
    for name in MEMORY if what == "memory" else (what,):
        make, prefix = (memory_probes, "memory, ") if what == "memory" else (timing_probes, "")
        for title, case in TIMED[name].items():
            yield prefix + title, partial(make, case), INDEPENDENT_OF.get(name, set())


def _with(cfg: CfgNode, classes: int, precision: str) -> CfgNode:
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.RETINANET.NUM_CLASSES = classes
    retina_focal_node(cfg).PRECISION = precision
    cfg.freeze()
    return cfg


def _names(text: str, choices: Sequence[str]) -> list[str]:
    names = text.split(",")
    unknown = [name for name in names if name not in choices]
    if unknown:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is not one of {', '.join(choices)}")
    return names


def _size(text: str) -> tuple[int, ...]:
    sides = tuple(map(number(), text.split("x")))
    if len(sides) != 2:
        raise argparse.ArgumentTypeError(f"{text!r} is not HxW, as 800x1216 is")
    return sides
