"""Train and evaluate from a config: `retina-focal train`, and `train_net.py`."""

import argparse
import logging
import math
import os
import shlex
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing import parent_process
from pathlib import Path
from urllib.parse import urlsplit

import torch
from detectron2.config import CfgNode
from detectron2.engine import default_argument_parser
from detectron2.utils import comm
from omegaconf import DictConfig

from retina_focal.config import config_path, retina_focal_node
from retina_focal.data.classes import listed
from retina_focal.data.uri import with_whole_rows
from retina_focal.errors import UserError
from retina_focal.tools.arguments import add_dataset_argument
from retina_focal.tools.common import command, read_cfg, set_up
from retina_focal.training.assembly import evaluate, fit
from retina_focal.training.checkpoint_files import checkpoints_of, expect_run_file
from retina_focal.training.launchers import World, is_restarted, may_restart, world_of
from retina_focal.training.peers import joined
from retina_focal.training.processes import (
    closed_process_group,
    die_with_parent,
    share_cores,
)
from retina_focal.training.run_lock import sole_run
from retina_focal.training.signals import ended_at_once, handled_signals
from retina_focal.training.spawning import start
from retina_focal.training.values import plain_values

EPILOG = """
Examples:
  one machine:     %(prog)s --config-file COCO-Detection/retinanet_R_50_FPN_1x.yaml --num-gpus 8
  no GPU:          %(prog)s --config-file quick_start/trees.yaml --num-gpus 2
  change options:  %(prog)s --config-file cfg.yaml MODEL.WEIGHTS weights.pth SOLVER.BASE_LR 0.001
  your own data:   %(prog)s --config-file cfg.yaml --dataset mine train.json images/
                     DATASETS.TRAIN "('mine',)" MODEL.RETINANET.NUM_CLASSES 3
  VOC, YOLO, CSV:  %(prog)s --config-file cfg.yaml --dataset mine 'voc:FOLDER?split=train'
                     DATASETS.TRAIN "('mine',)"
  LazyConfig:      %(prog)s --config-file cfg.py train.max_iter=1000
"""

logger = logging.getLogger(__name__)


@command
def main(argv: list[str] | None = None) -> None:
    """Parse the command line and run on every process that it or another launcher asks for."""
    args = parse_args(argv)
    args.resume = args.resume or (is_restarted(os.environ) and not _refusal().exists())
    world = world_of(args, os.environ)
    if world and world.launcher == "torchrun" and os.getppid() > 1:
        die_with_parent(os.getppid())
    starts_others = world is None and (args.num_gpus or 1) * args.num_machines > 1
    if starts_others or (world and world.rank > 0):
        logging.disable(logging.WARNING)  # the first process of the training says it
    cfg = read_cfg(args)
    logging.disable(logging.NOTSET)
    if not args.eval_only:
        _check_batch(cfg, world.size if world else (args.num_gpus or 1) * args.num_machines)
    with ended_at_once(by_words=bool(world and world.size > 1)):
        if starts_others:
            start(run, args, timeout_of(cfg))
        else:
            run(args, world or World(), cfg)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The arguments of `train`, checked as far as they can be without reading the config."""
    parser = default_argument_parser(epilog=EPILOG)
    parser.set_defaults(dist_url="auto", num_gpus=None)
    add_dataset_argument(parser)
    args = parser.parse_args(with_whole_rows(argv))
    if not args.config_file:
        parser.error("--config-file is missing; for example: --config-file quick_start/trees.yaml")
    if (args.num_gpus or 0) < 0 or args.num_machines < 1:
        parser.error(
            f"--num-gpus is {args.num_gpus} and --num-machines {args.num_machines}; expected at "
            "least one machine, and no negative number"
        )
    if not 0 <= args.machine_rank < args.num_machines:
        parser.error(
            f"--machine-rank is {args.machine_rank} with --num-machines {args.num_machines}; "
            f"expected 0 to {args.num_machines - 1}, another one on each machine"
        )
    if args.num_machines > 1 and args.dist_url == "auto":
        parser.error(
            f"--num-machines is {args.num_machines}, so --dist-url must name the machine of rank 0:"
            " --dist-url tcp://ADDRESS:PORT"
        )
    if args.dist_url != "auto" and not _is_tcp(args.dist_url):
        parser.error(f"--dist-url is {args.dist_url}; expected tcp://ADDRESS:PORT")
    if 0 < torch.cuda.device_count() < (args.num_gpus or 1):
        parser.error(f"--num-gpus is {args.num_gpus}, but there are {torch.cuda.device_count()}")
    flags = [option for option in args.opts if option.startswith("--")]
    if flags:
        parser.error(f"{flags[0]} comes after the options {args.opts[0]} ...; put it before them")
    try:
        args.config_file = config_path(args.config_file)
    except UserError as error:
        parser.error(str(error))
    return args


def _check_batch(cfg: CfgNode | DictConfig, num_processes: int) -> None:
    """Refuse images per step that the processes can't share, before there are any (UserError)."""
    node = plain_values(cfg).SOLVER
    if not node.REFERENCE_WORLD_SIZE and node.IMS_PER_BATCH % num_processes:
        raise UserError(
            f"SOLVER.IMS_PER_BATCH is {node.IMS_PER_BATCH}, for {num_processes} processes; "
            "expected a multiple of their number (in a LazyConfig: "
            "dataloader.train.total_batch_size)"
        )


def _is_tcp(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return parts.scheme == "tcp" and bool(parts.hostname) and bool(parts.port)
    except ValueError:  # a port beyond the last
        return False


@command
def run(
    args: argparse.Namespace, world: World | None = None, cfg: CfgNode | DictConfig | None = None
) -> dict:
    """What each process does; returns the evaluation's results on the main one.

    Args:
        world: None: the one that detectron2's `launch` has joined, or this process alone.
        cfg: default: that of `args`.
    """
    rank = world.rank if world else comm.get_rank()
    is_spawned = world is None and parent_process() is not None  # by detectron2's `launch`
    with ExitStack() as stack:
        if is_spawned:
            stack.enter_context(ended_at_once())
        stack.enter_context(handled_signals(speaks=rank == 0))
        stack.enter_context(closed_process_group())
        cfg = cfg or read_cfg(args)
        with joined(world or World(), timeout_of(cfg)):
            if not torch.cuda.is_available():
                share_cores(comm.get_local_size())
            resume = any(comm.all_gather(args.resume))  # torchrun counts one machine's restarts
            if args.eval_only:
                return evaluate(set_up(args, cfg), resume)
            if isinstance(cfg, CfgNode) and not cfg.DATASETS.TRAIN:
                raise UserError("DATASETS.TRAIN is empty; add: DATASETS.TRAIN \"('NAME',)\"")
            folder = plain_values(cfg).OUTPUT_DIR
            with _refusals_told():
                stack.enter_context(sole_run(folder, timeout_of(cfg), resume))
                expect_run_file(folder)
                if not resume:
                    _check_folder(folder)
            results = fit(set_up(args, cfg), resume).results
            if results:  # of the main process
                logger.info("to see what it learned: retina-focal report %s", shlex.quote(folder))
            return results


def _check_folder(folder: str) -> None:
    """Say that another run is there; refuse where torchrun, starting again, would go on with it."""
    found = checkpoints_of(folder)
    if may_restart(os.environ) and found:
        raise UserError(
            f"torchrun would start this run again from its last checkpoint, but '{folder}' holds "
            "those of another run; go on with that (--resume), or name another OUTPUT_DIR"
        )
    if found and comm.is_main_process():
        logger.warning(
            "'%s' holds checkpoints of another run (%s): from the first step on --resume goes on "
            "with this one, and where it writes NAME, theirs becomes earlier-1_NAME; to start a "
            "run of its own name another OUTPUT_DIR",
            *(folder, listed([x.name for x in found])),
        )


@contextmanager
def _refusals_told() -> Iterator[None]:
    """What the block refuses is not gone on with when torchrun starts this process again."""
    try:
        yield
    except (UserError, SystemExit):
        if may_restart(os.environ):
            _refusal().touch()
        raise
    _refusal().unlink(missing_ok=True)  # of another process that had this parent's number


def _refusal() -> Path:
    """The file that tells the next start by this torchrun that the run was refused."""
    return Path(tempfile.gettempdir(), f"retina_focal_refused_by_{os.getppid()}")


def timeout_of(cfg: CfgNode | DictConfig) -> float:
    """Seconds that a process may let the others wait.

    Raises:
        UserError: it is not more than 0.
    """
    timeout = retina_focal_node(plain_values(cfg)).TRAIN.TIMEOUT
    if not 0 < timeout < math.inf:
        raise UserError(
            f"MODEL.RETINA_FOCAL.TRAIN.TIMEOUT is {timeout}; expected seconds, more than 0"
        )
    return timeout
