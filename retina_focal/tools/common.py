"""What the commands share: how they end, and how they read a config."""

import argparse
import logging
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from pathlib import Path

import torch
from detectron2.config import CfgNode, LazyConfig
from detectron2.modeling import ANCHOR_GENERATOR_REGISTRY, BACKBONE_REGISTRY, META_ARCH_REGISTRY
from omegaconf import DictConfig, OmegaConf
from torch import nn

from retina_focal.config import check_choice, config_path, flatten, get_cfg
from retina_focal.data.classes import class_names, match_classes
from retina_focal.data.registration import (
    check_datasets,
    check_num_classes,
    register,
    register_coco_json,
    report_datasets,
    set_num_classes,
    use_datasets,
)
from retina_focal.errors import UserError
from retina_focal.limits import check_ranges, check_values
from retina_focal.merging import merge_file, merge_options
from retina_focal.training.checkpoints import expect_classes_of_run
from retina_focal.training.lazy_run import build_lazy_model, values_of_test
from retina_focal.training.processes import available_device
from retina_focal.training.run_files import open_log
from retina_focal.training.seeds import saved_seed, with_seed
from retina_focal.training.values import LAZY_NAMES, plain_values

STOPPED = 128  # and the signal's number: the exit status, as of a shell
UNSET = -(2**31)  # a number of classes that nobody types
LAZY_PARTS = ("model", "dataloader", "optimizer", "lr_multiplier", "train")
REGISTRIES = {
    "MODEL.META_ARCHITECTURE": META_ARCH_REGISTRY,
    "MODEL.BACKBONE.NAME": BACKBONE_REGISTRY,
    "MODEL.ANCHOR_GENERATOR.NAME": ANCHOR_GENERATOR_REGISTRY,
}


def command(main: Callable[..., object]) -> Callable[..., object]:
    """A command's entry: a UserError ends it with the message alone and exit status 1.

    Ctrl-C ends it with a line and exit status 130, where it does not end by itself.
    """

    @wraps(main)
    def run(*args, **kwargs) -> object:
        ignore_deprecations()
        logging.raiseExceptions = False  # a full disk would add a traceback to each line of the log
        try:
            return main(*args, **kwargs)
        except UserError as error:
            sys.exit(f"{Path(sys.argv[0]).name}: {harmless(str(error))}")
        except KeyboardInterrupt as stop:
            print(f"{Path(sys.argv[0]).name}: interrupted", file=sys.stderr)
            sys.exit(status_of(stop))

    return run


class Terminated(KeyboardInterrupt):
    """By SIGTERM."""


@contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """SIGTERM raises `Terminated` here, so that what Ctrl-C cleans up is cleaned up as well."""

    def stop(*_: object) -> None:
        raise Terminated

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def status_of(stop: KeyboardInterrupt) -> int:
    """The exit status that a shell expects of what a signal ended."""
    return STOPPED + (signal.SIGTERM if isinstance(stop, Terminated) else signal.SIGINT)


def harmless(text: str) -> str:
    """A message in which no name of a file or a class moves the cursor of a terminal."""
    escaped = (x if x.isprintable() or x == "\n" else ascii(x)[1:-1] for x in text)
    return "".join(escaped)


def ignore_deprecations() -> None:
    """Silence what the libraries below warn of and no user of this package can mend."""
    for module in ("torch", "detectron2", "fvcore", "pkg_resources"):
        for category in (DeprecationWarning, FutureWarning, UserWarning):
            message = ".*(deprecated|in an upcoming release|NumPy array is not writable)"
            warnings.filterwarnings("ignore", message, category, rf"{module}\b")


def load_cfg(
    config_file: str, opts: Sequence[str] = (), datasets: Sequence[Sequence[str]] = ()
) -> CfgNode:
    """The frozen config of a file and its overrides; its datasets are not looked for yet.

    Args:
        config_file: a path, or a name inside the package.
        opts: KEY VALUE pairs.
        datasets: rows of [name, annotation json, image folder], or [name, uri, ""].
    Raises:
        UserError: no such file, an unknown key, device or registered name, a value that can't be
            (`limits.check_values`), a dataset that the config does not use, or files of proposals.
    """
    if config_file.endswith(".py"):
        raise UserError(
            f"'{config_file}' is a LazyConfig; expected a YAML config of the same model"
        )
    flags = [x for x in opts if str(x).startswith("--")]
    if flags:
        raise UserError(f"{flags[0]} comes after the options {opts[0]} ...; put it before them")
    cfg = get_cfg()
    default, cfg.MODEL.RETINANET.NUM_CLASSES = cfg.MODEL.RETINANET.NUM_CLASSES, UNSET
    merge_file(cfg, config_path(config_file))
    merge_options(cfg, opts)
    refuse_proposal_files(cfg)
    takes_classes = cfg.MODEL.RETINANET.NUM_CLASSES == UNSET
    if takes_classes:
        cfg.MODEL.RETINANET.NUM_CLASSES = default
    check_values(cfg)
    unnamed = [x for x, *_ in datasets if x not in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST)]
    if unnamed:
        others = {x for x, *_ in datasets} - set(unnamed)
        free = "TEST" if others & set(cfg.DATASETS.TRAIN) else "TRAIN"
        raise UserError(
            f"--dataset {unnamed[0]} is used by neither DATASETS.TRAIN {cfg.DATASETS.TRAIN} nor "
            f"DATASETS.TEST {cfg.DATASETS.TEST}; add: DATASETS.{free} \"('{unnamed[0]}',)\""
        )
    cfg.DATASETS.SOURCES = [*cfg.DATASETS.SOURCES, *([x, y] for x, y, z in datasets if not z)]
    cfg.DATASETS.COCO_JSON = [*cfg.DATASETS.COCO_JSON, *(list(x) for x in datasets if x[2])]
    if takes_classes:
        set_num_classes(cfg)
    for key, registry in REGISTRIES.items():
        check_choice(key, flatten(cfg)[key], sorted(name for name, _ in registry))
    try:
        torch.device(cfg.MODEL.DEVICE)
    except RuntimeError as error:
        raise UserError(
            f"MODEL.DEVICE is '{cfg.MODEL.DEVICE}', which torch does not know; expected cpu or "
            "cuda: add MODEL.DEVICE cpu"
        ) from error
    if cfg.MODEL.DEVICE == "meta":
        raise UserError("MODEL.DEVICE is 'meta', which holds no numbers; add MODEL.DEVICE cpu")
    cfg.MODEL.DEVICE = available_device(cfg.MODEL.DEVICE)
    cfg.freeze()
    return cfg


def refuse_proposal_files(cfg: CfgNode) -> None:
    """Refuse a config whose proposals come from files (UserError)."""
    if cfg.MODEL.LOAD_PROPOSALS:
        raise UserError(
            "MODEL.LOAD_PROPOSALS is True: detectron2 reads DATASETS.PROPOSAL_FILES_* as pickles, "
            "and runs what they say; add: MODEL.LOAD_PROPOSALS False"
        )


def expect_focal_retinanet(cfg: CfgNode, reason: str) -> None:
    """Refuse a config of another model (UserError); `reason` follows the model's name."""
    if cfg.MODEL.META_ARCHITECTURE != "FocalRetinaNet":
        raise UserError(
            f"MODEL.META_ARCHITECTURE is {cfg.MODEL.META_ARCHITECTURE}; expected FocalRetinaNet, "
            f"{reason}; add: MODEL.META_ARCHITECTURE FocalRetinaNet"
        )


def load_lazy_cfg(
    config_file: str, opts: Sequence[str] = (), datasets: Sequence[Sequence[str]] = ()
) -> DictConfig:
    """The LazyConfig of a file and its KEY=VALUE overrides, with its datasets; see `load_cfg`.

    `train.retina_focal.sources` is what ``DATASETS.SOURCES`` is in YAML.
    """
    cfg = read_lazy_cfg(config_file, opts)
    allow = OmegaConf.select(cfg, "train.retina_focal.data.allow_outside", default=False)
    sources = OmegaConf.select(cfg, "train.retina_focal.sources", default=[])
    for name, data, folder in [*([*row, ""] for row in sources), *datasets]:
        if folder:
            register_coco_json(name, data, folder, allow_outside=allow)
        else:
            register(name, data, allow_outside=allow)
    return cfg


def read_lazy_cfg(config_file: str, opts: Sequence[str] = ()) -> DictConfig:
    """The same without its datasets."""
    path = config_path(config_file)
    try:
        cfg = LazyConfig.load(path)
    except SyntaxError as error:  # detectron2's, which hides the line
        cause = error.__cause__ or error
        raise UserError(f"{path}: {cause}") from error
    missing = [key for key in LAZY_PARTS if key not in cfg]
    if missing:
        raise UserError(f"{path} has no {', '.join(missing)}; expected {', '.join(LAZY_PARTS)}")
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
    check_ranges(plain_values(cfg), LAZY_NAMES)
    cfg.train.device = available_device(cfg.train.device)
    return cfg


def open_lazy(
    config_file: str,
    opts: Sequence[str],
    datasets: Sequence[Sequence[str]] = (),
    own: Sequence[str] = (),
) -> tuple[CfgNode, nn.Module]:
    """What detects with a LazyConfig: values under the names of a YAML config, and the model.

    Args:
        datasets, own: of `runs.open_run`; no dataset is looked for yet.
    Raises:
        UserError: see `read_lazy_cfg`, `build_lazy_model` and `values_of_test`.
    """
    pairs = zip(own[::2], own[1::2], strict=True)
    own = [f"train.{key.removeprefix('MODEL.').lower()}={value}" for key, value in pairs]
    lazy = read_lazy_cfg(config_file, [*own, *opts])
    model = build_lazy_model(lazy)
    cfg = values_of_test(lazy, model)
    cfg.DATASETS.SOURCES += [[name, uri] for name, uri, folder in datasets if not folder]
    cfg.DATASETS.COCO_JSON = [[*row] for row in datasets if row[2]]
    return cfg, model


def read_cfg(args: argparse.Namespace) -> CfgNode | DictConfig:
    """The config that the arguments of `train` name; see `load_cfg`."""
    load = load_lazy_cfg if args.config_file.endswith(".py") else load_cfg
    return load(args.config_file, args.opts, args.dataset)


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
    cfg = cfg or read_cfg(args)
    values = plain_values(cfg)
    if values.SEED < 0:
        goes_on = getattr(args, "resume", False) or args.eval_only
        cfg = with_seed(cfg, saved_seed(values.OUTPUT_DIR) if goes_on else None)
    trained_on = () if args.eval_only else values.DATASETS.TRAIN
    names = [*trained_on, *values.DATASETS.TEST]
    if isinstance(cfg, DictConfig):
        check_datasets(names, trained_on)
        num_classes = OmegaConf.select(cfg, "model.num_classes")
        if num_classes is not None:
            check_num_classes(names, num_classes, setting="model.num_classes=")
        match_classes(names)
    else:
        use_datasets(cfg, names, trained_on)
    if getattr(args, "resume", False) and trained_on:
        expect_classes_of_run(values.OUTPUT_DIR, class_names(trained_on))
    open_log(cfg, args)
    report_datasets(names, trained_on)
    return cfg
