"""Kill a small training again and again: it must end with the weights of one that never stopped.

    OMP_NUM_THREADS=1 python tests/attacks/kill.py --kills 200

Each run is killed by SIGKILL at a random time, while a checkpoint is written or in an evaluation.
Between two runs a file may be torn, flipped or filled with NaN, or the tag or the end of
metrics.json lost. After each kill, every checkpoint but the one being written must be there and
whole. At the end, the weights must be bit-equal to the uninterrupted run's, and metrics.json must
have the same iterations and values, each once.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path
from xml.etree import ElementTree

import torch

from retina_focal.errors import UserError
from retina_focal.tools import train
from retina_focal.training.checkpoint_files import hash_file, read_checkpoint, write_checkpoint

# Share of the kills, and what is added to the command line.
KINDS = {"process": 0.4, "workers": 0.3, "lazy": 0.2, "gloo": 0.1}
ITERATIONS, SAVE_PERIOD, EVAL_PERIOD, LOG_PERIOD = 36, 3, 9, 20
DAMAGES = ("none", "none", "none", "torn", "flipped", "nan", "tag", "metrics")
TIMEOUT = 300  # s for one run

YAML = """
VERSION: 2
MODEL:
  META_ARCHITECTURE: FocalRetinaNet
  WEIGHTS: ""
  DEVICE: cpu
  BACKBONE: {NAME: build_retina_focal_timm_fpn_backbone, FREEZE_AT: 0}
  FPN: {IN_FEATURES: [res3, res4, res5], OUT_CHANNELS: 32}
  ANCHOR_GENERATOR: {NAME: OctaveAnchorGenerator}
  RETINANET: {NUM_CLASSES: 3, NUM_CONVS: 1, SCORE_THRESH_TEST: 0.0}
  RETINA_FOCAL:
    TIMM: {NAME: mobilenetv3_small_050, NORM: BN}
    TRAIN: {BEST: "bbox/AP"}
    DATA: {VAL: cells_test}
INPUT: {MIN_SIZE_TRAIN: [64, 80, 96], MIN_SIZE_TEST: 96}
SOLVER: {IMS_PER_BATCH: 4, BASE_LR: 0.01, STEPS: [24], WARMUP_ITERS: 8}
"""
LAZY = """
from detectron2.config import LazyCall as L, LazyConfig
from detectron2.data import transforms as T
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone import BasicStem, ResNet
from detectron2.modeling.backbone.resnet import BasicBlock
from retina_focal.config import config_path

cfg = LazyConfig.load(config_path("lazy/retinanet_R_50_FPN_1x.py"))
model, optimizer, lr_multiplier = cfg.model, cfg.optimizer, cfg.lr_multiplier
train, dataloader = cfg.train, cfg.dataloader
bottom_up = model.backbone.bottom_up
bottom_up.freeze_at, bottom_up.stem = 0, L(BasicStem)(in_channels=3, out_channels=32, norm="GN")
bottom_up.stages = [  # a block with a stride needs another number of channels
    L(ResNet.make_stage)(
        block_class=BasicBlock,
        num_blocks=1,
        stride_per_block=[stride],
        in_channels=channels,
        out_channels=out_channels,
        norm="GN",
    )
    for stride, channels, out_channels in [(1, 32, 32), (2, 32, 64), (2, 64, 32), (2, 32, 64)]
]
model.backbone.top_block.in_channels, model.backbone.out_channels = 64, 32
model.head.input_shape, model.head.conv_dims = [ShapeSpec(channels=32)] * 5, [32]
model.num_classes, model.postprocessor.score_thresh = 3, 0.0
for split in ("train", "test"):
    dataloader[split].dataset.names, dataloader[split].num_workers = "cells_" + split, 0
dataloader.train.mapper.augmentations[0].short_edge_length = (64, 80, 96)
dataloader.test.mapper.augmentations[0].short_edge_length = 96
dataloader.train.total_batch_size = 2
optimizer.lr, train.device, train.init_checkpoint = 1e-3, "cpu", ""
"""


def main() -> None:
    """Run the attack and exit with 1 where anything differs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=12, help="in all; default: %(default)s")
    parser.add_argument("--kinds", default=",".join(KINDS), help="default: %(default)s")
    parser.add_argument("--jobs", type=int, default=2, help="kinds at a time; default: %(default)s")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, help="folder; default: a temporary one")
    args = parser.parse_args()
    torch.set_num_threads(1)
    work = args.work or Path(tempfile.mkdtemp(prefix="kill-"))
    prepare(work)
    kinds, running, failed = args.kinds.split(","), {}, []
    total = sum(KINDS[kind] for kind in kinds)
    waiting = [(kind, max(1, round(args.kills * KINDS[kind] / total))) for kind in kinds]
    start = time.perf_counter()
    while waiting or running:
        while waiting and len(running) < args.jobs:
            kind, kills = waiting.pop(0)
            running[in_a_child(attack, work, kind, kills, args.seed)] = kind
        pid, status = os.wait()
        kind = running.pop(pid)
        failed += [kind] * bool(status)
    print(f"{time.perf_counter() - start:.0f} s in {work}; failed: {', '.join(failed) or 'none'}")
    if not (failed or args.work):
        shutil.rmtree(work)
    sys.exit(bool(failed))


def prepare(work: Path) -> None:
    """24 photographs of blood cells for training, 6 for the evaluation, and the configs."""
    bccd = Path(os.environ.get("DETECTRON2_DATASETS", "datasets"), "bccd")
    names = sorted(bccd.glob("Annotations/*.xml"))[:30]
    if len(names) < 30:
        sys.exit(f"{bccd} has no BCCD; set DETECTRON2_DATASETS to the folder that holds it")
    work.mkdir(parents=True, exist_ok=True)
    classes = {"RBC": 1, "WBC": 2, "Platelets": 3}
    for split, part in (("train", names[:24]), ("test", names[24:])):
        images, boxes = [], []
        for number, name in enumerate(part):
            root = ElementTree.parse(name).getroot()
            width, height = (int(root.find("size").find(x).text) for x in ("width", "height"))
            image = {"id": number, "file_name": f"{name.stem}.jpg"}
            images.append({**image, "width": width, "height": height})
            for thing in root.iter("object"):
                corners = ("xmin", "ymin", "xmax", "ymax")
                x0, y0, x1, y1 = (int(thing.find("bndbox").find(x).text) for x in corners)
                box = {"bbox": [x0, y0, x1 - x0, y1 - y0], "area": (x1 - x0) * (y1 - y0)}
                label = {"category_id": classes[thing.find("name").text], "iscrowd": 0}
                if box["area"]:
                    boxes.append({"id": len(boxes) + 1, "image_id": number, **label, **box})
        categories = [{"id": number, "name": name} for name, number in classes.items()]
        content = {"images": images, "annotations": boxes, "categories": categories}
        (work / f"{split}.json").write_text(json.dumps(content))
    (work / "images").unlink(missing_ok=True)
    (work / "images").symlink_to(bccd.absolute() / "JPEGImages")
    (work / "small.yaml").write_text(YAML)
    (work / "small.py").write_text(LAZY)


def arguments(work: Path, kind: str, output: Path) -> list[str]:
    """The command line of a run."""
    is_lazy = kind == "lazy"
    options = ["--config-file", str(work / ("small.py" if is_lazy else "small.yaml"))]
    for split in ("train", "test"):
        options += [
            "--dataset",
            f"cells_{split}",
            str(work / f"{split}.json"),
            str(work / "images"),
        ]
    options += ["--num-gpus", "2"] if kind == "gloo" else []
    if is_lazy:
        numbers = f"train.max_iter={ITERATIONS} train.eval_period={EVAL_PERIOD}"
        numbers += (
            f" train.checkpointer.period={SAVE_PERIOD} train.seed=1 train.output_dir={output}"
        )
        return [*options, "--resume", *numbers.split(), f"dataloader.evaluator.output_dir={output}"]
    numbers = f"SOLVER.MAX_ITER {ITERATIONS} SOLVER.CHECKPOINT_PERIOD {SAVE_PERIOD} SEED 1"
    numbers += f" TEST.EVAL_PERIOD {EVAL_PERIOD} OUTPUT_DIR {output}"
    numbers += f" DATALOADER.NUM_WORKERS {2 if kind == 'workers' else 0}"
    names = ["DATASETS.TRAIN", "('cells_train',)", "DATASETS.TEST", "('cells_test',)"]
    return [*options, "--resume", *names, *numbers.split()]


def in_a_child(function, *args: object, log: Path | None = None) -> int:
    """Fork, which spares the seconds of the imports; returns the process's number."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        if log:
            os.setsid()
            file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(file, 1)
            os.dup2(file, 2)
        function(*args)
        status = 0
    except SystemExit as stop:
        status = int(bool(stop.code)) if not isinstance(stop.code, str) else 1
        print(stop.code)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(status)


def attack(work: Path, kind: str, kills: int, seed: int) -> None:
    """Kill a run of a kind so many times, and compare; a run that ends early starts anew."""
    draw = random.Random(f"{seed} {kind}")
    whole = work / f"{kind}-whole"
    duration = run_to_its_end(work, kind, whole)
    say(kind, f"the uninterrupted run takes {duration:.1f} s")
    done, runs, places = 0, 0, {"time": 0, "write": 0, "evaluation": 0}
    while done < kills:
        runs += 1
        output = work / f"{kind}-{runs}"
        shutil.rmtree(output, ignore_errors=True)
        output.mkdir()
        seen: dict[str, int] = {}
        for _ in range(draw.randint(4, 9)):
            place = draw.choice(("time", "write", "evaluation"))
            after = draw.uniform(0, 0.6 * duration) if place == "time" else draw.uniform(0, 0.5)
            if not run_and_kill(work, kind, output, place, after):
                break
            done += 1
            places[place] += 1
            expect_whole(output, seen)
            damage(output, draw, seen)
            if done >= kills:
                break
        run_to_its_end(work, kind, output)
        compare(whole, output)
    say(kind, f"{done} kills in {runs} runs, bit-equal; killed in {places}")


def run_to_its_end(work: Path, kind: str, output: Path) -> float:
    start = time.perf_counter()
    log = output.parent / f"{output.name}.log"
    pid = in_a_child(train.main, arguments(work, kind, output), log=log)
    _, status = os.waitpid(pid, 0)
    if status:
        raise SystemExit(f"{output}: the run ends with {status}: {log.read_text()[-1500:]}")
    return time.perf_counter() - start


def run_and_kill(work: Path, kind: str, output: Path, place: str, after: float) -> bool:
    """Whether it was killed before it ended by itself."""
    log = output.parent / f"{output.name}.log"
    log.touch()
    begin = log.stat().st_size
    pid = in_a_child(train.main, arguments(work, kind, output), log=log)
    start = time.perf_counter()
    is_there = place == "time"
    while True:
        if not is_there:
            if place == "write":
                is_there = any(output.glob(".writing-*"))
            else:
                with log.open("rb") as file:
                    file.seek(begin)
                    is_there = b"Start inference" in file.read()
            if is_there:  # and a moment in it
                after, start = after * 0.1, time.perf_counter()
        if is_there and time.perf_counter() - start >= after:
            break
        if os.waitpid(pid, os.WNOHANG)[0]:
            return False
        time.sleep(0.002)
    os.killpg(pid, signal.SIGKILL)
    return os.waitpid(pid, 0)[1] == signal.SIGKILL


def expect_whole(output: Path, seen: dict[str, int]) -> None:
    """Every checkpoint is whole, and none of those before the kill is lost."""
    found = {path.name: path.stat().st_mtime_ns for path in output.glob("model*.pth")}
    lost = seen.keys() - found.keys()
    if lost:
        raise SystemExit(f"{output}: {', '.join(sorted(lost))} lost")
    for name, time_ns in found.items():
        if seen.get(name) != time_ns:
            read_checkpoint(output / name)
    seen.update(found)


def damage(output: Path, draw: random.Random, seen: dict[str, int]) -> None:
    """Spoil what the next run finds; at least one checkpoint stays whole."""
    kind = draw.choice(DAMAGES)
    paths = sorted(output.glob("model_0*.pth"))
    if kind == "tag":
        (output / "last_checkpoint").unlink(missing_ok=True)
    elif kind == "metrics" and (output / "metrics.json").is_file():
        with (output / "metrics.json").open("a") as file:
            file.write('{"iteration": 9')
    elif kind in ("torn", "flipped", "nan") and len(paths) > 1:
        path = paths[-1]
        try:
            read_checkpoint(path)
        except UserError:
            return  # spoilt before, and not written anew since
        size = path.stat().st_size
        if kind == "torn":
            os.truncate(path, draw.randrange(size))
        elif kind == "flipped":
            with path.open("r+b") as file:
                file.seek(draw.randrange(size // 4, size))
                byte = file.read(1)
                file.seek(-1, os.SEEK_CUR)
                file.write(bytes([byte[0] ^ 1 << draw.randrange(8)]))
            if draw.random() < 0.3:
                hash_file(path).unlink(missing_ok=True)
        else:
            content = torch.load(path)
            next(x for x in content["model"].values() if x.is_floating_point()).fill_(float("nan"))
            write_checkpoint(path, content)
        seen[path.name] = path.stat().st_mtime_ns  # its content is known
        try:
            read_checkpoint(path)
        except UserError:
            return
        raise SystemExit(f"{path}: {kind}, and taken as whole")


def compare(whole: Path, output: Path) -> None:
    """Bit-equal weights and optimizer, and the same metrics."""
    one, other = (torch.load(path / "model_final.pth") for path in (whole, output))
    for name, tensor in one["model"].items():
        if not torch.equal(tensor, other["model"][name]):
            raise SystemExit(f"{output}: {name} differs")
    lines = []
    for path in (whole, output):
        found = [json.loads(line) for line in (path / "metrics.json").read_text().splitlines()]
        drop = ("time", "data_time", "rank_data_time", "eta_seconds")
        lines.append([{k: x for k, x in line.items() if k not in drop} for line in found])
    if repr(lines[0]) != repr(lines[1]):
        raise SystemExit(f"{output}/metrics.json differs from {whole}/metrics.json")


def say(kind: str, text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {kind}: {text}", flush=True)


if __name__ == "__main__":
    main()
