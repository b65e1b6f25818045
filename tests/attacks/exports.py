"""Every exported format of trained runs, measured as the run is: AP, and detections found again.

    python tests/attacks/exports.py OUTPUT RUN ...

Each format is written once into OUTPUT/<run>/<format> (what is there is used again), evaluated by
the code of `retina-focal evaluate`, and printed as a row of a Markdown table. A detection of the
eager model with a score above 0.2 is found again where the export has one of the same class with an
IoU of at least 0.5, each used once. The eager model computes in fp32, whatever its config says.
"""

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from pycocotools import mask

from retina_focal.data.sources import load
from retina_focal.evaluation.summary import Subject
from retina_focal.export.metadata import Metadata
from retina_focal.export.onnx_format import write_onnx
from retina_focal.export.openvino_format import quantize, to_openvino
from retina_focal.export.torch_formats import write_torch_export, write_torchscript
from retina_focal.tools.common import ignore_deprecations
from retina_focal.tools.export.pictures import calibration_images
from retina_focal.tools.runs import Run, detections, open_run, run_model, use_data

SCORE, IOU = 0.2, 0.5
OPENVINO = ("fp32", "bf16", "int8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("runs", nargs="+", metavar="RUN")
    parser.add_argument("--formats", default="onnx,fp32,bf16,int8,pt2,torchscript")
    args = parser.parse_args()
    ignore_deprecations()
    torch.set_num_threads(1)
    print("| run | format | AP | AP - eager | found again | seconds |\n|---|---|--:|--:|--:|--:|")
    for name in args.runs:
        run = open_run(name, opts=["MODEL.RETINA_FOCAL.PRECISION", "fp32"])
        folder = args.output / Path(name).name
        data = use_data(run, run.cfg.DATASETS.TEST[0])
        eager = found_by(run, data, folder / "eager.json")
        dataset = json.loads(load(data).json_file.read_bytes())
        base = ap(data, dataset, eager)
        print(f"| {folder.name} | eager | {base:.2f} | | {len(strong(eager))} | |", flush=True)
        for kind in args.formats.split(","):
            start = time.perf_counter()
            path = written(run, kind, folder)
            found = found_by(open_run(path), data, folder / f"{kind}.json")
            value, (again, all_) = ap(data, dataset, found), found_again(eager, found)
            print(
                f"| | {kind} | {value:.2f} | {value - base:+.3f} | {again} of {all_} "
                f"({100 * again / max(all_, 1):.1f}%) | {time.perf_counter() - start:.0f} |",
                flush=True,
            )


def written(run: Run, kind: str, folder: Path) -> Path:
    """The exported file of a kind, written where it is missing."""
    ending = {"onnx": "onnx", "pt2": "pt2", "torchscript": "torchscript"}.get(kind, "xml")
    path = folder / kind / f"model.{ending}"
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = Metadata.of_run(run.cfg, run.classes, run.weights)
    if kind in OPENVINO:
        onnx = written(run, "onnx", folder)
        if kind == "int8":
            images = calibration_images(run, None, False)
            return quantize(onnx, path.parent, images, replace(metadata, precision=kind))
        return to_openvino(onnx, path.parent, kind, metadata)
    write = {"onnx": write_onnx, "pt2": write_torch_export, "torchscript": write_torchscript}[kind]
    write(run_model(run).cpu(), metadata, path)
    return path


def found_by(run: Run, data: str, cached: Path) -> list[dict]:
    """Detections in COCO format; those of an earlier call are read again."""
    if not cached.exists():
        cached.parent.mkdir(parents=True, exist_ok=True)
        with torch.no_grad():
            cached.write_text(json.dumps(detections(run, run_model(run), data)))
    return json.loads(cached.read_text())


def ap(data: str, dataset: dict, results: list[dict]) -> float:
    """In percent."""
    return 100 * float(np.nanmean(Subject("", data, dataset, results).ap))


def strong(results: list[dict]) -> list[dict]:
    return [x for x in results if x["score"] > SCORE]


def found_again(eager: list[dict], found: list[dict]) -> tuple[int, int]:
    """How many strong detections of `eager` are in `found`, and how many there are."""
    by_place: dict[tuple, list[dict]] = {}
    for row in found:
        by_place.setdefault((row["image_id"], row["category_id"]), []).append(row)
    count = 0
    for row in sorted(strong(eager), key=lambda x: -x["score"]):
        others = by_place.get((row["image_id"], row["category_id"]), [])
        if others:
            ious = mask.iou([x["bbox"] for x in others], [row["bbox"]], [0])[:, 0]
            if ious.max() >= IOU:
                others.pop(int(ious.argmax()))
                count += 1
    return count, len(strong(eager))


if __name__ == "__main__":
    sys.exit(main())
