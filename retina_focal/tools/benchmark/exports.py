"""Latency of exported files beside eager models, on a processor: `benchmark --what export`."""

import logging
import platform
import statistics
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from time import perf_counter, sleep

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from retina_focal.candidates import logit
from retina_focal.config import retina_focal_node
from retina_focal.errors import UserError
from retina_focal.export.metadata import Metadata
from retina_focal.export.onnx_format import write_onnx
from retina_focal.export.openvino_format import quantize, to_openvino
from retina_focal.export.runners import ExportedModel, open_exported
from retina_focal.export.sessions import Session, padded_run
from retina_focal.export.torch_formats import write_torch_export, write_torchscript
from retina_focal.precision import has_bf16
from retina_focal.tools.benchmark.inputs import PASSING_FRACTION, pictures
from retina_focal.tools.benchmark.instruments import WARM_UP, after_head
from retina_focal.tools.benchmark.models import Setting, build, calibrate
from retina_focal.tools.reports import table

STOCK = "stock eager"
ROUNDS = 20
# Beside the config of the command, where that is the default.
LITE0 = ("quick_start/trees.yaml", (400, 400))
# Instructions that decide what a precision is worth, as Linux names them.
FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")
PERCENTILE = 20
# Seconds before each run: a runtime's threads spin for a while after its own.
SETTLE = 0.1

Model = Callable[[list[dict]], list[dict]]


@dataclass
class Prepared:
    """The models of one config, and why others are left out."""

    batch: list[dict]
    models: dict[str, Model]
    left_out: dict[str, str]


def measure(
    title: str,
    setting: Setting,
    prepare: Callable[[Setting, Path], Prepared],
    rounds: int,
    save: Callable[[dict], None],
) -> dict:
    """Time every model once in each round, in turn; the row of the report.

    Args:
        title: of the config.
        prepare: makes the models, into a folder.
        save: called with the row after each round.
    """
    row = {"config": title, "image_size": list(setting.image_size), "seconds": {}, "left_out": {}}
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        prepared = prepare(setting, Path(folder))
        row["left_out"] = prepared.left_out
        found = {name: model(prepared.batch) for name, model in prepared.models.items()}
        row["detections"] = {x: len(y[0]["instances"]) for x, y in found.items()}
        for model in prepared.models.values():
            for _ in range(WARM_UP - 1):
                model(prepared.batch)
        for _ in tqdm(range(rounds), title, unit="round"):
            for name, model in prepared.models.items():
                sleep(SETTLE)
                start = perf_counter()
                model(prepared.batch)
                row["seconds"].setdefault(name, []).append(perf_counter() - start)
            save(row)
    return row


def prepare(setting: Setting, folder: Path) -> Prepared:
    """Export a network with random weights that detects, in every way there is here."""
    batch = [{"image": x["image"]} for x in pictures(setting)]
    stock = _detecting(setting, batch)
    ours, half = (with_weights(setting, x, stock) for x in ("fp32", "bf16"))
    metadata = metadata_of(setting, folder)
    prepared = Prepared(batch, {STOCK: stock, "ours, eager, fp32": ours}, {})
    makers = {
        "ours, eager, bf16": partial(_eager_bf16, half),
        "jit": partial(_jit, ours, metadata, folder),
        "onnxruntime, fp32": partial(_onnx, ours, metadata, folder),
        **{
            f"OpenVINO, {precision}": partial(_openvino, precision, metadata, folder, batch)
            for precision in ("fp32", "bf16", "int8")
        },
        "AOTInductor": partial(_aot, ours, metadata, folder),
    }
    optional_models(makers, prepared)
    return prepared


def optional_models(makers: dict[str, Callable[[], Model]], prepared: Prepared) -> None:
    """Add what can be made here, and why the others can't."""
    for name, make in (progress := tqdm(makers.items(), unit="model", leave=False)):
        progress.set_description(name)
        try:
            prepared.models[name] = make()
        except UserError as error:
            prepared.left_out[name] = str(error)


def abilities() -> str:
    """Of the instructions that matter which this processor has, in words."""
    cpuinfo = Path("/proc/cpuinfo")  # of Linux
    if not cpuinfo.is_file():
        return f"instructions of {platform.machine()} not known"
    lines = cpuinfo.read_text().splitlines()
    flags = next((x.split() for x in lines if x.startswith(("flags", "Features"))), [])
    has, lacks = ([x for x in FLAGS if (x in flags) == wanted] for wanted in (True, False))
    return (
        f"has {', '.join(has) or 'none'} and lacks {', '.join(lacks) or 'none'} of the instructions"
    )


def markdown(report: dict) -> str:
    """What it ran on, and a table for each config."""
    parts = [
        f"`{report['command']}`\n\n{report['processor']}, {report['threads']} threads, "
        f"{report['date']}; the processor {report['abilities']}; torch {report['torch']}. "
        f"Milliseconds of one image, network and detections, the {PERCENTILE}th percentile of "
        "rounds in which every model runs once in turn; how many times as fast as stock "
        "detectron2, by these, and by the median of the quotients within a round."
    ]
    for row in report["rows"]:
        seconds = row["seconds"]
        lines = [
            [
                name,
                f"{1000 * low(times):.1f}",
                f"{low(seconds[STOCK]) / low(times):.2f}",
                f"{statistics.median(map(_quotient, seconds[STOCK], times)):.2f}",
                row["detections"][name],
            ]
            for name, times in seconds.items()
        ]
        height, width = row["image_size"]
        rounds = len(seconds[STOCK])
        heads = [f"{row['config']}, {height}x{width}, {rounds} rounds", "ms", "stock / it"]
        parts.append(table([*heads, "median", "detections"], lines))
        parts += [f"{name}: left out: {reason}" for name, reason in row["left_out"].items()]
    return "\n\n".join(parts) + "\n"


def low(times: list[float]) -> float:
    """The percentile of the table, in seconds."""
    return float(np.percentile(times, PERCENTILE))


def _quotient(x: float, y: float) -> float:
    return x / y


@torch.no_grad()
def _detecting(setting: Setting, batch: list[dict]) -> nn.Module:
    """Stock with random weights, of whose class logits as many pass as of `realistic_logits`."""
    model = calibrate(build("stock", setting))
    heads: list[tuple] = []
    with after_head(model, heads.append):
        model(batch)
    logits = torch.cat([x.flatten() for x in heads[0][0][:3]])[::7]
    highest = logits.topk(max(int(PASSING_FRACTION * len(logits)), 1)).values[-1]
    score, factor = model.head.cls_score, 1 / logits.std()
    threshold = logit(setting.cfg.MODEL.RETINANET.SCORE_THRESH_TEST)
    score.weight.mul_(factor)
    score.bias.sub_(highest).mul_(factor).add_(threshold)
    return model


def with_weights(setting: Setting, precision: str, stock: nn.Module) -> nn.Module:
    cfg = setting.cfg.clone()
    cfg.defrost()
    retina_focal_node(cfg).PRECISION = precision
    model = build("ours", replace(setting, cfg=cfg)).eval()
    model.load_state_dict(stock.state_dict())
    return model


def metadata_of(setting: Setting, folder: Path) -> Metadata:
    weights = folder / "random.pth"
    weights.touch()
    return Metadata.of_run(setting.cfg, [*map(str, range(setting.classes))], weights)


def _eager_bf16(model: nn.Module) -> Model:
    if not has_bf16("cpu"):
        raise UserError("this processor has no bf16, which torch would compute by way of fp32")
    return model


def _jit(model: nn.Module, metadata: Metadata, folder: Path) -> Model:
    path = folder / "model.torchscript"
    write_torchscript(model, metadata, path)
    return open_exported(path)


def _aot(model: nn.Module, metadata: Metadata, folder: Path) -> Model:
    path = folder / "model.pt2"
    write_torch_export(model, metadata, path)
    logging.getLogger("torch._inductor").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            package = torch._inductor.aoti_compile_and_package(
                torch.export.load(path), package_path=str(folder / "compiled.pt2")
            )
            program = torch._inductor.aoti_load_package(package)
    except Exception as error:  # of torch's compiler, or of the C++ compiler that it calls
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"it does not compile here: {reason}") from error
    run = padded_run(program, metadata, torch.get_num_threads())
    return ExportedModel(Session(metadata, run), "AOTInductor")


def _onnx(model: nn.Module, metadata: Metadata, folder: Path) -> Model:
    path = folder / "model.onnx"
    write_onnx(model, metadata, path)
    return open_exported(path)


def _openvino(precision: str, metadata: Metadata, folder: Path, batch: list[dict]) -> Model:
    onnx, output = folder / "model.onnx", folder / precision
    if precision == "bf16" and not has_bf16("cpu"):
        raise UserError("this processor has no bf16")
    if not onnx.exists():
        raise UserError("it is made of the ONNX file, which is left out")
    if precision == "int8":
        images = [x["image"][None].float().numpy() for x in batch]  # any: only time is measured
        return open_exported(quantize(onnx, output, images, metadata))
    return open_exported(to_openvino(onnx, output, precision, metadata))
