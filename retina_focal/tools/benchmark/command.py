"""Time and memory beside detectron2's and torchvision's RetinaNet: `retina-focal benchmark`."""

import argparse
import ctypes
import gc
import json
import math
import multiprocessing
import os
import platform
import shlex
import statistics
from collections.abc import Callable, Sequence
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from contextlib import suppress
from datetime import datetime, timezone
from functools import partial
from itertools import product
from pathlib import Path

import detectron2
import torch
import torchvision
from detectron2.config import CfgNode
from tqdm import tqdm

from retina_focal.config import retina_focal_node
from retina_focal.errors import UserError
from retina_focal.files import whole_file
from retina_focal.precision import PRECISIONS
from retina_focal.tools.benchmark import cases
from retina_focal.tools.benchmark.cases import MODELS, Setting, Stopwatch
from retina_focal.tools.common import command, load_cfg, processor

# What can be measured: the rows of each choice, and what else than the image they depend on.
TIMED = {
    "loss": {"classification loss": cases.classification_loss},
    "matching": {"matching": cases.matching},
    "train": {"training step": cases.training_step},
    "inference": {
        "inference, initialised": cases.inference,
        "inference, realistic": cases.inference_realistic,
    },
    "convolutions": {"training step over its convolutions": cases.convolutions},
}
MEMORY = ("loss", "matching", "train")
WHAT = (*TIMED, "memory")
INDEPENDENT_OF = {
    "loss": {"precision"},
    "matching": {"classes", "precision"},
    "inference": {"boxes"},
}
# Untimed runs before the first round: torch.jit compiles stock's loss in its second.
WARM_UP = 2
WHOLE = "whole"

Probe = Callable[[], dict[str, float]]  # part of a row to seconds or bytes
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
    check_fp32(settings[0].device)
    report = {
        "command": shlex.join(["retina-focal", "benchmark", *argv]),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "processor": processor(settings[0].device),
        "threads": args.threads,
        "rounds": args.rounds,
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "detectron2": detectron2.__version__,
        "rows": [],
    }
    try:
        benchmark(settings, args.what, args.rounds, report["rows"], partial(save, report, args))
    except KeyboardInterrupt:
        print("\ninterrupted; what was measured before:")
    if not report["rows"]:
        print("no round was finished")
        return
    save(report, args)
    text = markdown(report)
    with whole_file(args.output / "results.md") as temporary:
        temporary.write_text(text)
    plot(report["rows"], args.output / "results.png")
    print(f"{text}\nwritten to {args.output}")


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="retina-focal benchmark",
        description=__doc__.splitlines()[0],
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = partial(parser.add_argument, metavar="X")
    add(
        "--what",
        type=partial(_names, choices=WHAT),
        default=list(WHAT),
        help=f"some of {','.join(WHAT)}; default: all",
    )
    add("--config-file", default="COCO-Detection/retinanet_R_50_FPN_1x.yaml", help="as of train")
    add("--image-size", type=_size, default=(800, 1216), help="HxW in pixels; default: 800x1216")
    add("--batch", type=_positive, default=1, help="images; default: %(default)s")
    add("--classes", type=_numbers, help="default: the config's; several: 1,80,1203")
    add("--boxes", type=_numbers, default=[20], help="an image; default: 20; several: 20,500,2000")
    add(
        "--precision",
        type=partial(_names, choices=PRECISIONS),
        help="of our model; default: the config's; several: fp32,bf16",
    )
    add("--rounds", type=_positive, default=5, help="times each model is run; default: %(default)s")
    add("--threads", type=_positive, default=torch.get_num_threads(), help="default: %(default)s")
    add("--device", help="cpu or cuda; default: the config's")
    add(
        "--output", type=Path, default=Path("output/benchmark"), help="folder; default: %(default)s"
    )
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE pairs for the config")
    return parser.parse_args(argv)


def settings_of(args: argparse.Namespace) -> list[Setting]:
    """One for each combination of number of classes, number of boxes and precision.

    Raises:
        UserError: the config is not one of our model's.
    """
    device = ["MODEL.DEVICE", args.device] if args.device else []
    cfg = load_cfg(args.config_file, [*args.opts, *device])
    if cfg.MODEL.META_ARCHITECTURE != "FocalRetinaNet":
        raise UserError(
            f"{args.config_file} builds {cfg.MODEL.META_ARCHITECTURE}; expected FocalRetinaNet, "
            "from which stock's is derived; add: MODEL.META_ARCHITECTURE FocalRetinaNet"
        )
    classes = args.classes or [cfg.MODEL.RETINANET.NUM_CLASSES]
    precisions = args.precision or [retina_focal_node(cfg).PRECISION]
    return [
        Setting(_with(cfg, k, precision), args.image_size, args.batch, boxes)
        for k, boxes, precision in product(classes, args.boxes, precisions)
    ]


def check_fp32(device: str) -> None:
    """That fp32 means IEEE fp32 for all models.

    Raises:
        UserError: torch may compute it in TF32 or bf16.
    """
    if torch.device(device).type == "cuda":
        if os.environ.get("NVIDIA_TF32_OVERRIDE") == "0":
            return
        found = {
            f"torch.backends.{name}.allow_tf32": backend.allow_tf32
            for name, backend in (
                ("cudnn", torch.backends.cudnn),
                ("cuda.matmul", torch.backends.cuda.matmul),
            )
        }
        found = {name: value for name, value in found.items() if value}
        remedy = "put NVIDIA_TF32_OVERRIDE=0 before the command"
    else:
        found = {"ONEDNN_DEFAULT_FPMATH_MODE": os.environ.get("ONEDNN_DEFAULT_FPMATH_MODE")}
        for name in ("", "mkldnn.", "mkldnn.conv.", "mkldnn.matmul."):
            backend = torch.backends
            for part in name.split(".")[:-1]:
                backend = getattr(backend, part, None)
            name = f"torch.backends.{name}fp32_precision"
            found[name] = getattr(backend, "fp32_precision", "none")  # older torch has no such
        ieee = (None, "", "none", "ieee", "STRICT")
        found = {name: value for name, value in found.items() if value not in ieee}
        remedy = "unset the variable, or set torch's to 'ieee'"
    if found:
        values = ", ".join(f"{name} is {value!r}" for name, value in found.items())
        raise UserError(f"fp32 would not be IEEE fp32 on {device}: {values}; {remedy}")


def benchmark(
    settings: Sequence[Setting],
    what: Sequence[str],
    rounds: int,
    rows: list[dict],
    after_round: Callable[[], None] = lambda: None,
) -> None:
    """Measure; in each round every model runs once, in turn.

    Args:
        settings: the first gives what a row does not depend on.
        what: of `WHAT`.
        rows: filled as it goes: an interruption leaves the finished rounds in it.
        after_round: called with `rows` up to date.
    """
    jobs = [
        (title, make_probes, setting, 1 if name == "memory" else rounds)
        for name in what
        for title, make_probes, independent_of in _titles(name)
        for setting in settings
        if all(getattr(setting, x) == getattr(settings[0], x) for x in independent_of)
    ]
    names = MODELS if cases.torchvision_has(settings[0].cfg) else ("stock", "ours")
    with tqdm(total=sum(job[-1] for job in jobs), unit="round", dynamic_ncols=True) as progress:
        for title, make_probes, setting, job_rounds in jobs:
            progress.set_description(
                f"{title}, {setting.classes} classes, {setting.boxes} boxes, {setting.precision}"
            )
            probes = make_probes(setting, names)
            first, records = len(rows), []
            for _ in range(job_rounds):
                records.append({name: probe() for name, probe in probes.items()})
                rows[first:] = rows_of(title, setting, records)
                after_round()
                progress.update()


def _titles(what: str) -> list[tuple[str, Callable[..., dict[str, Probe]], set[str]]]:
    """Title, maker of probes, and what the row does not depend on."""
    if what != "memory":
        independent_of = INDEPENDENT_OF.get(what, set())
        return [
            (title, partial(timing_probes, case), independent_of)
            for title, case in TIMED[what].items()
        ]
    return [
        (f"memory, {title}", partial(memory_probes, case), INDEPENDENT_OF.get(name, set()))
        for name in MEMORY
        for title, case in TIMED[name].items()
    ]


def timing_probes(case: Callable, setting: Setting, names: Sequence[str]) -> dict[str, Probe]:
    """Seconds of each part of one run, a probe a model."""
    runs = case(setting, names)
    stopwatch = Stopwatch(setting.device)

    def probe(run: cases.Run) -> dict[str, float]:
        run(stopwatch)
        return stopwatch.seconds()

    for run in runs.values():
        for _ in range(WARM_UP):
            run(stopwatch)
    return {name: partial(probe, run) for name, run in runs.items()}


def memory_probes(case: Callable, setting: Setting, names: Sequence[str]) -> dict[str, Probe]:
    """Bytes by which the first run raises the peak of a fresh process, a probe a model."""

    def probe(name: str) -> dict[str, float]:
        # Not "spawn": on Linux its processes start with the ru_maxrss of this one, so that little
        # would show. The server's children start with that of the server, which is small.
        context = multiprocessing.get_context("forkserver")
        with ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
            growth = pool.submit(memory_growth, case, setting, name, torch.get_num_threads())
            try:
                return {"memory": growth.result()}
            except BrokenExecutor:
                tqdm.write(f"{name} was killed, probably for want of memory; left out")
                return {}

    return {name: partial(probe, name) for name in names}


def memory_growth(case: Callable, setting: Setting, name: str, threads: int) -> int:
    """Bytes by which the first run raises the peak of this process, or of its GPU memory."""
    import resource  # which Windows lacks

    torch.set_num_threads(threads)
    run = case(setting, [name])[name]
    if torch.device(setting.device).type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run(Stopwatch(setting.device))
        return torch.cuda.max_memory_allocated() - before

    def peak() -> int:
        unit = 1 if platform.system() == "Darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

    # What imports and building have freed again would hide as much of the growth, whether the
    # allocator has kept it or given it back.
    gc.collect()
    with suppress(OSError, AttributeError):  # not glibc
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    ballast = torch.ones(max(peak() - _resident(), 0), dtype=torch.uint8)
    before = peak()
    run(Stopwatch(setting.device))
    del ballast
    return peak() - before


def _resident() -> float:
    """Bytes of memory that this process holds; where it can't tell, infinity."""
    try:
        pages = Path("/proc/self/statm").read_text().split()[1]
    except OSError:
        return math.inf
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def rows_of(title: str, setting: Setting, records: list[dict[str, dict[str, float]]]) -> list[dict]:
    """Rows of the table, one for the whole and one a part, from the rounds.

    Args:
        records: a round: what each model's probe gave.
    Returns:
        `values` and their `median` a model, and the `ratio` of each other model to `base`:
        median, min and max of the quotients of values from the same round.
    """
    names = [name for name in records[0] if all(record[name] for record in records)]
    base = "convolutions" if "convolutions" in names else "ours"
    # A part that only some have is no row of its own: convolutions alone are not in three parts.
    parts = [p for p in records[0]["ours"] if all(p in records[0][name] for name in names)]
    rows = []
    for part in [WHOLE, *(parts if len(parts) > 1 else [])]:
        values = {
            name: [sum(r[name].values()) if part == WHOLE else r[name][part] for r in records]
            for name in names
        }
        ratio = {
            name: [x / y for x, y in zip(values[name], values[base], strict=True)]
            for name in names
            # Nothing is a multiple of no memory, or of a process that was killed.
            if name != base and all(values.get(base, [0]))
        }
        rows.append(
            {
                "what": title,
                "part": part,
                "unit": "bytes" if any("memory" in x for x in records[0].values()) else "s",
                "image_size": list(setting.image_size),
                "batch": setting.batch,
                "classes": setting.classes,
                "boxes": setting.boxes,
                "precision": setting.precision,
                "base": base,
                "values": values,
                "median": {name: statistics.median(v) for name, v in values.items()},
                "ratio": {
                    name: {"median": statistics.median(v), "min": min(v), "max": max(v)}
                    for name, v in ratio.items()
                },
            }
        )
    return rows


def markdown(report: dict) -> str:
    """What it ran on, and a table for each set of models."""
    first = report["rows"][0]
    height, width = first["image_size"]
    lines = [
        f"`{report['command']}`",
        "",
        f"{report['processor']}, {report['threads']} threads, {report['date']}; torch "
        f"{report['torch']}, torchvision {report['torchvision']}, detectron2 "
        f"{report['detectron2']}; {first['batch']} x {height}x{width} px. Medians of "
        f"{report['rounds']} rounds (memory: 1); ratios are medians (least to most) of the "
        "quotients within a round.",
    ]
    columns = None
    for row in report["rows"]:
        names = list(row["values"])
        if (names, row["base"]) != columns:
            columns = names, row["base"]
            heads = [f"{name} / {row['base']}" for name in names if name != row["base"]]
            heads = ["what", "classes", "boxes", "precision", *names, *heads]
            lines += ["", _line(heads), _line(["---"] * len(heads))]
        title = row["what"] if row["part"] == WHOLE else f"- {row['part']}"
        medians = [_quantity(row["median"][name], row["unit"]) for name in names]
        ratios = [
            "{median:.2f} ({min:.2f} to {max:.2f})".format(**row["ratio"][name])
            if name in row["ratio"]
            else "-"
            for name in names
            if name != row["base"]
        ]
        setting = row["classes"], row["boxes"], row["precision"]
        lines.append(_line([title, *setting, *medians, *ratios]))
    return "\n".join(lines) + "\n"


def plot(rows: list[dict], path: Path) -> None:
    """The ratios as bars from 1, on a logarithmic axis; lines show the spread."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    bars = [
        (
            "{what}, {classes} classes, {boxes} boxes, {precision}: {name} / {base}".format(
                name=name, **row
            ),
            ratio,
        )
        for row in rows
        if row["part"] == WHOLE
        for name, ratio in row["ratio"].items()
    ]
    if not bars:
        return
    labels, ratios = zip(*bars, strict=True)
    medians = [r["median"] for r in ratios]
    spread = [
        [max(r["median"] - r["min"], 0) for r in ratios],
        [max(r["max"] - r["median"], 0) for r in ratios],
    ]
    figure = Figure(figsize=(9, 1.2 + 0.3 * len(bars)), layout="constrained")
    axes = figure.add_subplot()
    axes.barh(labels, [m - 1 for m in medians], left=1, xerr=spread)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.axvline(1, color="black")
    axes.invert_yaxis()
    axes.set_xlabel("ratio of times, or of memory")
    with whole_file(path) as temporary:
        figure.savefig(temporary)


def save(report: dict, args: argparse.Namespace) -> None:
    with whole_file(args.output / "results.json") as temporary:
        temporary.write_text(json.dumps(report, indent=1))


def _with(cfg: CfgNode, classes: int, precision: str) -> CfgNode:
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.RETINANET.NUM_CLASSES = classes
    retina_focal_node(cfg).PRECISION = precision
    cfg.freeze()
    return cfg


def _line(cells: Sequence[object]) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def _quantity(value: float, unit: str) -> str:
    """Three digits and a unit that fits."""
    if unit == "bytes":
        return f"{value / 1e6:,.0f} MB"
    scale, name = (1, "s") if value >= 1 else (1000, "ms")
    digits = 2 - math.floor(math.log10(value * scale)) if value > 0 else 0
    return f"{value * scale:.{max(digits, 0)}f} {name}"


def _names(text: str, choices: Sequence[str]) -> list[str]:
    names = text.split(",")
    unknown = [name for name in names if name not in choices]
    if unknown:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is not one of {', '.join(choices)}")
    return names


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def _numbers(text: str) -> list[int]:
    return [_positive(x) for x in text.split(",")]


def _size(text: str) -> tuple[int, int]:
    sides = text.split("x")
    if len(sides) != 2:
        raise argparse.ArgumentTypeError(f"{text!r} is not HxW, as 800x1216 is")
    return _positive(sides[0]), _positive(sides[1])
