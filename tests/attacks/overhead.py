"""What the assembly of a training costs beyond its bare steps: under 1%.

    OMP_NUM_THREADS=1 python tests/attacks/overhead.py --pairs 60

R-50-FPN on one image of 320x480 on a CPU, the smallest step that a user may have. A whole step (all
hooks, metrics, signals, checks; no evaluation, no checkpoint) and a bare `StepTrainer` step on the
same model and batch take turns. The median of paired ratios, of seconds and of the processor's,
has the noise of the machine; the hooks' own seconds have little, and include the writers, which act
every 20 iterations.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import cv2
import numpy as np
import torch
from detectron2.engine import HookBase
from detectron2.utils.events import EventStorage

from retina_focal.config import config_path, get_cfg
from retina_focal.data.registration import register_coco_json
from retina_focal.training.assembly import Trainer
from retina_focal.training.signals import handled_signals

LIMIT = 0.01  # of a bare step
BEFORE = 5  # steps that are not counted
CLOCKS = (("on the clock", time.perf_counter), ("of the processor", time.process_time))
POINTS = ("before_step", "after_backward", "after_step")


def main() -> None:
    """Measure, print, and exit with 1 where the hooks take more than the limit."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=60, help="default: %(default)s")
    args = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    with tempfile.TemporaryDirectory(prefix="overhead-") as folder, handled_signals():
        trainer = small_trainer(Path(folder))
        seconds = timed_hooks(trainer)
        whole, bare = measure(trainer, args.pairs, seconds)
    for clock, (kind, _) in enumerate(CLOCKS):
        pairs = [(x[clock], y[clock]) for x, y in zip(whole, bare, strict=True)]
        low, middle, high = statistics.quantiles([x / y for x, y in pairs], n=4)
        step = statistics.median(y for _, y in pairs)
        print(f"bare step: median {step:.3f} s {kind} of {args.pairs}")
        print(f"whole step / bare step: median {middle:.4f}, quartiles {low:.4f} to {high:.4f}")
    cost = sum(sum(times) for times in seconds.values()) / sum(x for x, _ in bare)
    print(f"the hooks take {cost:.3%} of the bare steps' time:")
    for name, times in sorted(seconds.items(), key=lambda x: -sum(x[1])):
        print(f"  {name}: mean {1e3 * statistics.mean(times):.3f} ms, max {1e3 * max(times):.3f}")
    sys.exit(cost > LIMIT)


def small_trainer(folder: Path) -> Trainer:
    """Four pictures, whose batches are read once."""
    draw = np.random.default_rng(0)
    images, boxes = [], []
    for number in range(4):
        picture = draw.integers(0, 255, (320, 480, 3), np.uint8)
        cv2.imwrite(str(folder / f"{number}.png"), picture)
        images.append({"id": number, "file_name": f"{number}.png", "height": 320, "width": 480})
        for x, y, side in draw.integers(20, 150, (7, 3)).tolist():
            box = {"bbox": [x, y, side, side], "area": side**2, "category_id": 1, "iscrowd": 0}
            boxes.append({"id": len(boxes) + 1, "image_id": number, **box})
    content = {"images": images, "annotations": boxes, "categories": [{"id": 1, "name": "x"}]}
    (folder / "x.json").write_text(json.dumps(content))
    register_coco_json("squares", str(folder / "x.json"), str(folder))
    cfg = get_cfg()
    cfg.merge_from_file(config_path("COCO-Detection/retinanet_R_50_FPN_1x.yaml"))
    changes = f"""MODEL.WEIGHTS '' MODEL.DEVICE cpu MODEL.RETINANET.NUM_CLASSES 1
        DATASETS.TRAIN ('squares',) DATASETS.TEST () SOLVER.IMS_PER_BATCH 1 SOLVER.BASE_LR 1e-5
        INPUT.MIN_SIZE_TRAIN (320,) DATALOADER.NUM_WORKERS 0 SEED 1 OUTPUT_DIR {folder}/run"""
    cfg.merge_from_list(["" if word == "''" else word for word in changes.split()])
    trainer = Trainer(cfg)
    # Both steps of a pair have the same.
    batches = [next(trainer._trainer._data_loader_iter) for _ in range(4)]
    trainer._trainer._data_loader_iter_obj = (batches[i // 2 % 4] for i in range(10**9))
    return trainer


def timed_hooks(trainer: Trainer) -> dict[str, list[float]]:
    """Seconds of each hook's calls, which are filled in from now on."""
    seconds: dict[str, list[float]] = defaultdict(list)
    for hook in trainer._hooks:
        for point in POINTS:
            if getattr(type(hook), point) is not getattr(HookBase, point):
                name = f"{type(hook).__name__}.{point}"
                setattr(hook, point, timed(getattr(hook, point), seconds[name]))
    return seconds


def timed(call, times: list[float]):
    def wrapper() -> None:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)

    return wrapper


def measure(
    trainer: Trainer, num_pairs: int, seconds: dict[str, list[float]]
) -> tuple[list[tuple[float, ...]], list[tuple[float, ...]]]:
    """Seconds by each clock of whole and of bare steps; the order by turns."""

    def whole() -> None:
        trainer.before_step()
        trainer.run_step()
        trainer.after_step()

    def bare() -> None:
        trainer._trainer.run_step()

    taken = {whole: [], bare: []}
    trainer.start_iter = 0
    with EventStorage(0) as trainer.storage:
        trainer.before_train()
        for trainer.iter in range(BEFORE + num_pairs):
            if trainer.iter == BEFORE:
                for times in [*taken.values(), *seconds.values()]:
                    times.clear()
            for step in (whole, bare) if trainer.iter % 2 else (bare, whole):
                starts = [now() for _, now in CLOCKS]
                step()
                ends = [now() for _, now in CLOCKS]
                taken[step].append(tuple(y - x for x, y in zip(starts, ends, strict=True)))
        trainer.after_train()
    return taken[whole], taken[bare]


if __name__ == "__main__":
    main()
