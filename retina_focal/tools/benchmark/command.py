"""Time and memory beside detectron2's and torchvision's RetinaNet: `retina-focal benchmark`."""

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import product

import torch
from detectron2.config import CfgNode
from tqdm import tqdm

from retina_focal.config import retina_focal_node
from retina_focal.errors import UserError
from retina_focal.files import write_whole
from retina_focal.precision import PRECISIONS
from retina_focal.tools.arguments import listed, number, tool_parser
from retina_focal.tools.benchmark import exports, gpu, gpu_report, gpu_timing, sparse
from retina_focal.tools.benchmark.cases import INDEPENDENT_OF, MEMORY, TIMED
from retina_focal.tools.benchmark.instruments import Probe, check_fp32, memory_probes, timing_probes
from retina_focal.tools.benchmark.models import MODELS, Setting, torchvision_has
from retina_focal.tools.benchmark.report import markdown, plot, rows_of
from retina_focal.tools.common import command, expect_focal_retinanet, load_cfg
from retina_focal.tools.reports import origin

WHAT = (*TIMED, "memory")
EXPORT = "export"  # on a CPU, and alone
DEFAULT_CONFIG, DEFAULT_SIZE = "COCO-Detection/retinanet_R_50_FPN_1x.yaml", (800, 1216)
# Of steps on a GPU between two synchronisations.
STEPS_SECONDS = 0.2
EPILOG = """
Boxes have sides from 8 px to half the image's, log-uniform, at uniform places. Weights are random.
On a CPU the precision is that of our model, and the others compute in fp32. On a GPU all models
compute in the same, but for ours-bf16: PRECISION bf16. Ctrl-C ends in a table of what is finished;
on a GPU the same command then goes on from there.

Examples:
  %(prog)s --what loss,matching --boxes 20,500,2000
  %(prog)s --what train,memory --classes 80,1203 --image-size 384x512
  %(prog)s --what train,inference,convolutions --precision fp32,bf16
  %(prog)s --what export --threads 2
  %(prog)s --config-file quick_start/bccd.yaml --image-size 240x320 --batch 8 --classes 3
"""


@command
def main(argv: list[str]) -> None:
    """``retina-focal benchmark``: measure, then print and write the table."""
    args = parse_args(argv)
    torch.set_num_threads(args.threads)
    cfg = config_of(args)
    device = cfg.MODEL.DEVICE
    check_fp32(device)
    report = {**origin("benchmark", argv, device), "rounds": args.rounds, "rows": []}
    if args.what and EXPORT in args.what:
        measure_exports(args, cfg, report)
    elif args.gpu_rows or gpu_timing.on_gpu(device):
        measure_on_gpu(args, cfg, report)
    else:
        measure_on_cpu(args, cfg, report)


def measure_on_gpu(args: argparse.Namespace, cfg: CfgNode, report: dict) -> None:
    """Fill the report with what `gpu.jobs` names, and write it after each."""
    deadline = time.monotonic() + args.seconds
    what = _expected("--what", args.what, gpu.WHAT, "a GPU")
    precisions = _expected("--precision", args.precision, [*gpu.PRECISIONS], "a GPU")
    classes = _only("--classes", args.classes, cfg.MODEL.RETINANET.NUM_CLASSES, "a GPU")
    cfg = _with(cfg, classes, retina_focal_node(cfg).PRECISION)
    batches = args.batch or [1, 2, 16]
    todo = [*gpu.jobs(cfg, what, args.image_size, batches, args.boxes, precisions)]
    report |= {"source": gpu_report.source_digest(), "left_out": 0, "finished": False}
    report = gpu_report.started(args.output / "results.json", report)
    if report["rows"]:
        print(f"going on from the {len(report['rows'])} rows of a run that was interrupted")

    def save() -> None:
        gpu_report.write(report, args.output)

    profiles = args.output / "profile.txt"
    if not report["rows"]:
        profiles.unlink(missing_ok=True)
    try:
        gpu.measure(todo, report, args.rounds, STEPS_SECONDS, deadline, profiles, save)
        report["finished"] = not (report["left_out"] or any(map(gpu.has_failed, report["rows"])))
    except KeyboardInterrupt:
        print("\ninterrupted; what was measured before:")
    if report["rows"]:
        print(f"{gpu_report.write(report, args.output)}\nwritten to {args.output}")
        plot(gpu_report.bars(report["rows"]), args.output / "results.png")
    else:
        print("no row was finished")
    for row in filter(gpu.has_failed, report["rows"]):
        raise UserError(
            f"{row['what']}, batch {row['batch']}, {row['precision']}, {row['model']} failed: "
            f"{row['error']}; the same command measures what failed again"
        )


def measure_on_cpu(args: argparse.Namespace, cfg: CfgNode, report: dict) -> None:
    """Fill the report with rows of rounds, and write it after each."""
    what = _expected("--what", args.what, WHAT, "a CPU")
    settings = settings_of(args, cfg)

    def save() -> None:
        write_whole(args.output / "results.json", json.dumps(report, indent=1))

    try:
        benchmark(settings, what, args.rounds, report["rows"], save)
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


def measure_exports(args: argparse.Namespace, cfg: CfgNode, report: dict) -> None:
    """Fill the report with a row for each config, and write it after each round."""
    if len(args.what) > 1 or gpu_timing.on_gpu(cfg.MODEL.DEVICE):
        raise UserError("--what export is measured alone, on a CPU; add: --device cpu")
    setting = settings_of(args, cfg)[0]
    todo = [(args.config_file, setting, exports.prepare)]
    if (args.config_file, args.image_size) == (DEFAULT_CONFIG, DEFAULT_SIZE):
        name, size = exports.LITE0
        lite0 = load_cfg(name, [*args.opts, "MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", ""])
        objects = f"{args.config_file}, {setting.boxes} objects on grey"
        todo.append((objects, setting, sparse.prepare_sparse))
        todo.append((name, Setting(lite0, size, 1, args.boxes[0]), exports.prepare))
    report |= {"abilities": exports.abilities(), "finished": False}

    def save(row: dict) -> None:
        if row not in report["rows"]:
            report["rows"].append(row)
        write_whole(args.output / "results.json", json.dumps(report, indent=1))

    try:
        for how in todo:
            exports.measure(*how, args.rounds, save)
        report["finished"] = True
    except KeyboardInterrupt:
        print("\ninterrupted; what was measured before:")
    if report["rows"]:
        text = exports.markdown(report)
        write_whole(args.output / "results.md", text)
        print(f"{text}\nwritten to {args.output}")


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = tool_parser("benchmark", __doc__, EPILOG, has_folder=True)
    add = partial(parser.add_argument, metavar="X")
    choices = [*dict.fromkeys([*WHAT, *gpu.WHAT]), EXPORT]
    help_ = (
        f"some of {','.join(choices)}; default: all (memory on a CPU, profile on a GPU) but export"
    )
    add("--what", type=partial(_names, choices=choices), help=help_)
    add("--config-file", default=DEFAULT_CONFIG, help="as of train")
    add("--image-size", type=_size, default=DEFAULT_SIZE, help="HxW in pixels; default: 800x1216")
    add("--batch", type=listed(number()), help="images; default: 1, on a GPU 1,2,16")
    add("--classes", type=listed(number()), help="default: the config's; several: 1,80,1203")
    boxes = "per image; default: 20; several: 20,500,2000"
    add("--boxes", type=listed(number()), default=[20], help=boxes)
    precision = (
        f"CPU: {','.join(PRECISIONS)}, default the config's; GPU: {','.join(gpu.PRECISIONS)}"
    )
    both = partial(_names, choices=[*PRECISIONS, *gpu.PRECISIONS])
    add("--precision", type=both, help=precision)
    rounds = f"times each model is run; default: 5, of exported files {exports.ROUNDS}"
    add("--rounds", type=number(), help=rounds)
    add("--threads", type=number(), default=torch.get_num_threads(), help="default: %(default)s")
    add("--device", help="cpu or cuda; default: the config's")
    gpu_rows = "the rows of a GPU on a CPU too, to try them"
    parser.add_argument("--gpu-rows", action="store_true", help=gpu_rows)
    seconds = "on a GPU no row is begun after as many; default: no limit"
    add("--seconds", type=number(float, 0), default=math.inf, help=seconds)
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE pairs for the config")
    args = parser.parse_args(argv)
    args.rounds = args.rounds or (exports.ROUNDS if args.what == [EXPORT] else 5)
    return args


def config_of(args: argparse.Namespace) -> CfgNode:
    """
    Raises:
        UserError: the config is not one of our model's.
    """
    device = ["MODEL.DEVICE", args.device] if args.device else []
    cfg = load_cfg(args.config_file, [*args.opts, *device])
    expect_focal_retinanet(cfg, "from which stock's is derived")
    return cfg


def settings_of(args: argparse.Namespace, cfg: CfgNode) -> list[Setting]:
    """On a CPU: one for each combination of number of classes, number of boxes and precision."""
    classes = args.classes or [cfg.MODEL.RETINANET.NUM_CLASSES]
    precisions = args.precision or [retina_focal_node(cfg).PRECISION]
    _expected("--precision", precisions, PRECISIONS, "a CPU")
    batch = _only("--batch", args.batch, 1, "a CPU")
    return [
        Setting(_with(cfg, k, precision), args.image_size, batch, boxes)
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


def _expected(
    flag: str, names: Sequence[str] | None, choices: Sequence[str], where: str
) -> Sequence[str]:
    """The names, by default all choices; UserError where one is for another device."""
    unknown = [name for name in names or () if name not in choices]
    if unknown:
        raise UserError(f"{flag} {unknown[0]} is not for {where}; expected {','.join(choices)}")
    return names or choices


def _only(flag: str, numbers: Sequence[int] | None, default: int, where: str) -> int:
    if numbers and len(numbers) > 1:
        raise UserError(f"{flag} has {len(numbers)} numbers, {numbers}; on {where} give one")
    return numbers[0] if numbers else default


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
