"""Train and evaluate from a config: `retina-focal train`, and `train_net.py`."""

import argparse
import sys

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from detectron2.engine import default_argument_parser, default_setup, launch
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from torch.multiprocessing import ProcessExitedException

from retina_focal.config import config_path, get_cfg
from retina_focal.datasets import check_data_sets, check_num_classes, register_datasets
from retina_focal.engine import Trainer, available_device, keep_freed_memory, share_cores
from retina_focal.tools import lazy_train
from retina_focal.tools.cli import exit_in_words

EPILOG = """
Examples:
  one machine:     %(prog)s --config-file COCO-Detection/retinanet_R_50_FPN_1x.yaml --num-gpus 8
  no GPU:          %(prog)s --config-file quick_start/trees.yaml --num-gpus 2
  change options:  %(prog)s --config-file cfg.yaml MODEL.WEIGHTS weights.pth SOLVER.BASE_LR 0.001
  your own data:   %(prog)s --config-file cfg.yaml --dataset mine train.json images/
                     DATASETS.TRAIN "('mine',)" MODEL.RETINANET.NUM_CLASSES 3
  LazyConfig:      %(prog)s --config-file cfg.py train.max_iter=1000
"""


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
    except FileNotFoundError as error:
        parser.error(str(error))
    return args


def add_dataset_argument(parser: argparse.ArgumentParser) -> None:
    """`--dataset NAME JSON IMAGES`, a list of rows."""
    parser.add_argument(
        "--dataset",
        nargs=3,
        action="append",
        default=[],
        metavar=("NAME", "JSON", "IMAGES"),
        help="register a data set in COCO format; may be repeated",
    )


def run(args: argparse.Namespace) -> dict:
    """What each process does; returns the evaluation's results on the main one."""
    if not torch.cuda.is_available():
        share_cores(args.num_gpus)
    keep_freed_memory()
    if args.config_file.endswith(".py"):
        return lazy_train.run(args)
    cfg = set_up(args)
    if not args.eval_only:
        return fit(cfg, args.resume).results
    model = Trainer.build_model(cfg)
    DetectionCheckpointer(model, save_dir=cfg.OUTPUT_DIR).resume_or_load(
        cfg.MODEL.WEIGHTS, resume=args.resume
    )
    return Trainer.test(cfg, model)


def set_up(args: argparse.Namespace) -> CfgNode:
    """The config that the arguments ask for, with logging to its output folder.

    Exits in words where the config or a data set is wrong.
    """
    with exit_in_words():
        cfg = load_cfg(args.config_file, args.opts, args.dataset)
        names = cfg.DATASETS.TEST if args.eval_only else (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST)
        check_data_sets(names)
        if cfg.MODEL.META_ARCHITECTURE == "FocalRetinaNet":
            check_num_classes(names, cfg.MODEL.RETINANET.NUM_CLASSES)
    default_setup(cfg, args)
    setup_logger(cfg.OUTPUT_DIR, comm.get_rank(), name="retina_focal")
    return cfg


def fit(cfg: CfgNode, resume: bool) -> Trainer:
    """Train to ``SOLVER.MAX_ITER``; with `resume`, from the last checkpoint where there is one."""
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=resume)
    trainer.train()
    return trainer


def load_cfg(config_file: str, opts: list[str] = (), datasets: list[list[str]] = ()) -> CfgNode:
    """The frozen config of a file and its overrides, with its data sets registered.

    Args:
        config_file: a path, or a name inside the package.
        opts: KEY VALUE pairs.
        datasets: rows of [name, annotation json, image folder].
    """
    cfg = get_cfg()
    cfg.merge_from_file(config_path(config_file))
    cfg.merge_from_list(list(opts))
    cfg.DATASETS.COCO_JSON = [*cfg.DATASETS.COCO_JSON, *map(list, datasets)]
    cfg.MODEL.DEVICE = available_device(cfg.MODEL.DEVICE)
    cfg.freeze()
    register_datasets(cfg)
    return cfg
