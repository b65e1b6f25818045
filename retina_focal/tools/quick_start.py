"""From nothing to a trained detector in minutes on two cores: `retina-focal quick-start`."""

import argparse
import math
import os
import time
from pathlib import Path

from retina_focal.config import config_path
from retina_focal.data.sample import PREPARE
from retina_focal.evaluation.drawing import draw_detections
from retina_focal.tools.arguments import tool_parser
from retina_focal.tools.common import command, read_cfg, set_up
from retina_focal.training.assembly import fit
from retina_focal.training.run_lock import sole_run
from retina_focal.weights.lite0 import prepare_weights

TEST_IMAGES = {"trees_test": "held-out tiles", "bccd_test": "test photographs"}


@command
def main(argv: list[str]) -> None:
    """``retina-focal quick-start``: prepare the data, train, evaluate, draw, print the AP.

    A run in the output folder is continued; one that has ended is evaluated, where that was
    interrupted, and drawn again.
    """
    parser = tool_parser("quick-start", __doc__)
    parser.add_argument("name", choices=sorted(PREPARE))
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE pairs for the config")
    args = parser.parse_args(argv)
    PREPARE[args.name](Path("datasets", args.name))
    prepare_weights()
    path = config_path(f"quick_start/{args.name}.yaml")
    settings = {"config_file": path, "opts": args.opts, "dataset": [], "eval_only": False}
    run_args = argparse.Namespace(**settings, resume=True)
    cfg = read_cfg(run_args)
    with sole_run(cfg.OUTPUT_DIR, math.inf, goes_on=True):
        cfg = set_up(run_args, cfg)
        start = time.perf_counter()
        trainer = fit(cfg, resume=True)
    minutes, seconds = divmod(round(time.perf_counter() - start), 60)
    picture = os.path.join(cfg.OUTPUT_DIR, "detections.png")
    draw_detections(cfg, trainer.model, picture)
    print(f"detections beside ground truth: {picture}")
    # With several test sets the results are keyed by name; the picture shows the first one's too.
    tested = cfg.DATASETS.TEST[0]
    ap = trainer.results.get(tested, trainer.results).get("bbox")
    took = f"{minutes} min {seconds} s"
    if trainer.start_iter >= trainer.max_iter:
        took = f"trained before; to train anew: rm -r {cfg.OUTPUT_DIR}"
    if ap:
        images = TEST_IMAGES.get(tested, tested)
        print(f"AP {ap['AP']:.1f}  AP50 {ap['AP50']:.1f}  ({images}, {took})")
