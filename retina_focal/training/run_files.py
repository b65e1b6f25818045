"""What a run writes about itself: its log, and its config once the first step is made."""

import logging
import tempfile
from argparse import Namespace
from pathlib import Path

import torch
import yaml
from detectron2.config import CfgNode, LazyConfig
from detectron2.engine import HookBase
from detectron2.utils import comm
from detectron2.utils.collect_env import collect_env_info
from detectron2.utils.env import seed_all_rng
from detectron2.utils.logger import setup_logger
from omegaconf import DictConfig, OmegaConf
from yaml.nodes import MappingNode, Node

from retina_focal.config import flatten
from retina_focal.errors import UserError
from retina_focal.files import check_regular, write_error, write_whole
from retina_focal.safe_yaml import read_text
from retina_focal.training.values import plain_values

CONFIG = "config.yaml"
PLACES = ("MODEL.WEIGHTS", "MODEL.DEVICE")  # which say nothing about the model
SHOWN = 5  # keys that a message shows
# For long texts, which go to log.txt alone.
SETTINGS = logging.getLogger("retina_focal.settings")


def open_log(cfg: CfgNode | DictConfig, args: Namespace) -> None:
    """detectron2's `default_setup`, except that the config is written later (`SavedConfig`).

    Environment, command line and config go to ``OUTPUT_DIR/log.txt``, not to the screen.

    Args:
        args: of the command; with `config_file` and `eval_only`.
    Raises:
        UserError: the output folder can't be written to, or its log is no regular file.
    """
    values, rank = plain_values(cfg), comm.get_rank()
    path = Path(values.OUTPUT_DIR, "log.txt")
    if path.exists():
        check_regular(path)  # of a FIFO the log would wait for a reader
    try:
        for name in ("fvcore", "detectron2", "retina_focal"):
            logger = setup_logger(values.OUTPUT_DIR, rank, name=name)
        setup_logger(values.OUTPUT_DIR, rank, name=SETTINGS.name, configure_stdout=False)
    except OSError as error:
        raise write_error(path, error) from error
    logger.info("World size: %d; settings and environment: %s", comm.get_world_size(), path)
    SETTINGS.info("environment:\n%s", collect_env_info())
    SETTINGS.info("command line: %s", args)
    is_lazy = isinstance(cfg, DictConfig)
    SETTINGS.info("config:\n%s", Path(args.config_file).read_text() if is_lazy else cfg.dump())
    seed_all_rng(None if values.SEED < 0 else values.SEED + rank)
    if not args.eval_only:
        benchmark = OmegaConf.select(cfg, "train.cudnn_benchmark") if is_lazy else None
        torch.backends.cudnn.benchmark = bool(benchmark if is_lazy else cfg.CUDNN_BENCHMARK)


class SavedConfig(HookBase):
    """Writes ``OUTPUT_DIR/config.yaml`` when the first step is made.

    A command that ends before, be it for a picture or for memory, leaves the config of the run that
    is there.
    """

    def __init__(self, cfg: CfgNode | DictConfig, folder: str):
        """
        Args:
            cfg: as it is now; a LazyConfig that YAML can't hold is pickled beside it.
        """
        self.folder = Path(folder)
        with tempfile.TemporaryDirectory() as temporary:
            path = Path(temporary, CONFIG)
            if isinstance(cfg, DictConfig):
                LazyConfig.save(cfg, str(path))
            else:
                path.write_text(cfg.dump())
            self.files = {x.name: x.read_bytes() for x in Path(temporary).iterdir()}

    def changes(self) -> str:
        """Keys of the model that the folder's config has otherwise, to end a message with."""
        try:
            was, now = (
                flatten({"MODEL": yaml.safe_load(text).get("MODEL", {})})
                for text in (read_text(self.folder / CONFIG), self.files[CONFIG])
            )
        except (UserError, yaml.YAMLError, RecursionError, AttributeError):
            return ""  # none, or a LazyConfig's, whose tags could run code
        keys = [x for x in now if x in was and was[x] != now[x] and x not in PLACES]
        said = [f"{key} was {was[key]!r} and is {now[key]!r}" for key in keys[:SHOWN]]
        return "; by config.yaml " + ", ".join(said) if said else ""

    def after_step(self) -> None:
        if self.trainer.iter == self.trainer.start_iter and comm.is_main_process():
            for name, content in self.files.items():
                write_whole(self.folder / name, content)


def seed_of_config(folder: str) -> int | None:
    """Of the folder's ``config.yaml``, of either kind; None where it tells none."""
    try:
        # Not read as values: a LazyConfig's YAML has tags, which could run code.
        node = yaml.compose(read_text(Path(folder, CONFIG)), yaml.SafeLoader)
    except (UserError, yaml.YAMLError, RecursionError):
        return None
    found = _child(node, "SEED") or _child(_child(node, "train"), "seed")
    return int(found.value) if found is not None and str(found.value).isdecimal() else None


def _child(node: Node | None, name: str) -> Node | None:
    pairs = node.value if isinstance(node, MappingNode) else []
    return next((value for key, value in pairs if key.value == name), None)
