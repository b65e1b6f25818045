"""What the commands share: how they end, read a config and name the machine."""

import argparse
import platform
import sys
import warnings
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path

import torch
from detectron2.config import CfgNode, LazyConfig
from detectron2.engine import default_setup
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from omegaconf import DictConfig, OmegaConf

from retina_focal.config import config_path, get_cfg, merge_file, merge_options
from retina_focal.data.registration import (
    check_datasets,
    check_num_classes,
    register_coco_json,
    use_datasets,
)
from retina_focal.errors import UserError
from retina_focal.training.assembly import plain_values
from retina_focal.training.processes import available_device


def command(main: Callable[..., object]) -> Callable[..., object]:
    """A command's entry: what a user can put right ends it in words and with exit status 1."""

    @wraps(main)
    def run(*args, **kwargs) -> object:
        # Of the libraries below, not of what the user's own file calls.
        for module in ("torch", "detectron2", "fvcore", "pkg_resources"):
            for category in (DeprecationWarning, FutureWarning, UserWarning):
                warnings.filterwarnings("ignore", ".*deprecated", category, rf"{module}\b")
        try:
            return main(*args, **kwargs)
        except UserError as error:
            sys.exit(f"{Path(sys.argv[0]).name}: {error}")

    return run


def add_config_arguments(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """`--config-file FILE` and `--dataset NAME JSON IMAGES`, the latter a list of rows."""
    parser.add_argument("--config-file", required=required, metavar="FILE", help="as of train")
    add_dataset_argument(parser)


def add_dataset_argument(parser: argparse.ArgumentParser) -> None:
    """`--dataset NAME JSON IMAGES`, a list of rows."""
    parser.add_argument(
        "--dataset",
        nargs=3,
        action="append",
        default=[],
        metavar=("NAME", "JSON", "IMAGES"),
        help="register a dataset in COCO format; may be repeated",
    )


def load_cfg(
    config_file: str, opts: Sequence[str] = (), datasets: Sequence[Sequence[str]] = ()
) -> CfgNode:
    """The frozen config of a file and its overrides; its datasets are not looked for yet.

    Args:
        config_file: a path, or a name inside the package.
        opts: KEY VALUE pairs.
        datasets: rows of [name, annotation json, image folder].
    Raises:
        UserError: no such file, an unknown key, a value of another type, or a dataset
            that the config does not use.
    """
    cfg = get_cfg()
    merge_file(cfg, config_path(config_file))
    merge_options(cfg, opts)
    unnamed = [x for x, *_ in datasets if x not in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST)]
    if unnamed:
        raise UserError(
            f"--dataset {unnamed[0]} is used by neither DATASETS.TRAIN {cfg.DATASETS.TRAIN} nor "
            f"DATASETS.TEST {cfg.DATASETS.TEST}; add: DATASETS.TRAIN \"('{unnamed[0]}',)\""
        )
    cfg.DATASETS.COCO_JSON = [*cfg.DATASETS.COCO_JSON, *map(list, datasets)]
    cfg.MODEL.DEVICE = available_device(cfg.MODEL.DEVICE)
    cfg.freeze()
    return cfg


def load_lazy_cfg(
    config_file: str, opts: Sequence[str] = (), datasets: Sequence[Sequence[str]] = ()
) -> DictConfig:
    """The LazyConfig of a file and its KEY=VALUE overrides; see `load_cfg`."""
    cfg = LazyConfig.load(config_path(config_file))
    wrong = [option for option in opts if "=" not in option]
    if wrong:
        raise UserError(
            f"'{wrong[0]}' changes nothing in a LazyConfig; expected KEY=VALUE, for example: "
            "train.max_iter=1000"
        )
    try:
        LazyConfig.apply_overrides(cfg, list(opts))
    except Exception as error:  # what hydra and omegaconf raise has no other base in common
        raise UserError(f"{' '.join(opts)}: {str(error).splitlines()[0]}") from error
    for row in datasets:
        register_coco_json(*row)
    cfg.train.device = available_device(cfg.train.device)
    return cfg


def set_up(
    args: argparse.Namespace, cfg: CfgNode | DictConfig | None = None
) -> CfgNode | DictConfig:
    """The config of a training or evaluation, with its datasets and logging to its output folder.

    Args:
        args: of `tools.train.parse_args`; with a config only `config_file` and `eval_only`.
        cfg: default: that of `args`.
    Raises:
        UserError: the config or a dataset is wrong.
    """
    if cfg is None:
        load = load_lazy_cfg if args.config_file.endswith(".py") else load_cfg
        cfg = load(args.config_file, args.opts, args.dataset)
    values = plain_values(cfg)
    names = [*(() if args.eval_only else values.DATASETS.TRAIN), *values.DATASETS.TEST]
    if isinstance(cfg, DictConfig):
        check_datasets(names)
        num_classes = OmegaConf.select(cfg, "model.num_classes")
        if num_classes is not None:
            check_num_classes(names, num_classes, setting="model.num_classes=")
    else:
        use_datasets(cfg, names)
    default_setup(cfg, args)
    setup_logger(values.OUTPUT_DIR, comm.get_rank(), name="retina_focal")
    return cfg


def processor(device: str) -> str:
    """Name of what computes."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
