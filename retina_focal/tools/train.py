"""Train and evaluate from a config: `retina-focal train`, and `train_net.py`."""

import argparse
import sys

import torch
from detectron2.engine import default_argument_parser, launch
from torch.multiprocessing import ProcessExitedException

from retina_focal.config import config_path
from retina_focal.errors import UserError
from retina_focal.tools.common import add_dataset_argument, command, set_up
from retina_focal.training.assembly import evaluate, fit
from retina_focal.training.processes import closed_process_group, share_cores

EPILOG = """
Examples:
  one machine:     %(prog)s --config-file COCO-Detection/retinanet_R_50_FPN_1x.yaml --num-gpus 8
  no GPU:          %(prog)s --config-file quick_start/trees.yaml --num-gpus 2
  change options:  %(prog)s --config-file cfg.yaml MODEL.WEIGHTS weights.pth SOLVER.BASE_LR 0.001
  your own data:   %(prog)s --config-file cfg.yaml --dataset mine train.json images/
                     DATASETS.TRAIN "('mine',)" MODEL.RETINANET.NUM_CLASSES 3
  LazyConfig:      %(prog)s --config-file cfg.py train.max_iter=1000
"""


@command
def main(argv: list[str] | None = None) -> None:
    """Parse the command line and run on every process that it asks for."""
    args = parse_args(argv)
    try:
        launch(
            run,
            args.num_gpus,
            num_machines=args.num_machines,
            machine_rank=args.machine_rank,
            dist_url=args.dist_url,
            args=(args,),
        )
    except ProcessExitedException as error:  # the process itself has said why
        sys.exit(str(error))


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The arguments of `train`, checked as far as they can be without reading the config."""
    parser = default_argument_parser(epilog=EPILOG)
    parser.set_defaults(dist_url="auto")
    add_dataset_argument(parser)
    args = parser.parse_args(argv)
    if not args.config_file:
        parser.error("--config-file is missing; for example: --config-file quick_start/trees.yaml")
    if args.num_machines > 1 and args.dist_url == "auto":
        parser.error(
            f"--num-machines is {args.num_machines}, so --dist-url must name the machine of rank 0:"
            " --dist-url tcp://ADDRESS:PORT"
        )
    if 0 < torch.cuda.device_count() < args.num_gpus:
        parser.error(f"--num-gpus is {args.num_gpus}, but there are {torch.cuda.device_count()}")
    flags = [option for option in args.opts if option.startswith("--")]
    if flags:
        parser.error(f"{flags[0]} comes after the options {args.opts[0]} ...; put it before them")
    try:
        args.config_file = config_path(args.config_file)
    except UserError as error:
        parser.error(str(error))
    return args


@command
def run(args: argparse.Namespace) -> dict:
    """What each process does; returns the evaluation's results on the main one."""
    if not torch.cuda.is_available():
        share_cores(args.num_gpus)
    with closed_process_group():
        cfg = set_up(args)
        return evaluate(cfg, args.resume) if args.eval_only else fit(cfg, args.resume).results
