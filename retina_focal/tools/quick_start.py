"""From nothing to a trained detector in minutes on two cores: `retina-focal quick-start`."""

import argparse
import os
import time
from pathlib import Path

from retina_focal.config import config_path
from retina_focal.data.sample import PREPARE
from retina_focal.evaluation.drawing import draw_detections
from retina_focal.tools.common import command, set_up, tool_parser
from retina_focal.training.assembly import fit
from retina_focal.weights.lite0 import prepare_weights

TEST_IMAGES = {"trees": "held-out tiles", "bccd": "test photographs"}


@command
def main(argv: list[str]) -> None:
    """``retina-focal quick-start``: prepare the data, train, evaluate, draw, print the AP.

    An unfinished run in the output folder is continued.
    """
    parser = tool_parser("quick-start", __doc__)
    parser.add_argument("name", choices=sorted(TEST_IMAGES))
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE pairs for the config")
    args = parser.parse_args(argv)
    PREPARE[args.name](Path("datasets", args.name))
    prepare_weights()
    path = config_path(f"quick_start/{args.name}.yaml")
    cfg = set_up(argparse.Namespace(config_file=path, opts=args.opts, dataset=[], eval_only=False))
    start = time.perf_counter()
    trainer = fit(cfg, resume=_is_unfinished(Path(cfg.OUTPUT_DIR)))
    minutes, seconds = divmod(round(time.perf_counter() - start), 60)
    picture = os.path.join(cfg.OUTPUT_DIR, "detections.png")
    draw_detections(cfg, trainer.model, picture)
    print(f"detections beside ground truth: {picture}")
    # With several test sets the results are keyed by name; the picture shows the first one's too.
    ap = trainer.results.get(cfg.DATASETS.TEST[0], trainer.results)["bbox"]
    print(
        f"AP {ap['AP']:.1f}  AP50 {ap['AP50']:.1f}  "
        f"({TEST_IMAGES[args.name]}, {minutes} min {seconds} s)"
    )


def _is_unfinished(output_dir: Path) -> bool:
    """Whether the folder holds a run that stopped between its first checkpoint and its last."""
    # Not by model_final.pth: an earlier run may have left it, or an interruption half of it.
    last = output_dir / "last_checkpoint"
    return last.is_file() and last.read_text() != "model_final.pth"
