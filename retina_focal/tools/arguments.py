"""The arguments of the commands."""

import argparse
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from retina_focal.data.uri import with_whole_rows
from retina_focal.errors import UserError
from retina_focal.training.launchers import world_of

Item = TypeVar("Item")


def tool_parser(
    name: str, doc: str, epilog: str = "", has_folder: bool = False
) -> argparse.ArgumentParser:
    """The parser of `retina-focal <name>`.

    Args:
        doc: its first line describes the command.
        epilog: printed as it is, behind the options.
        has_folder: the command writes a folder; adds `--output DIR`, default ``output/<name>``.
    Raises:
        UserError: torchrun or srun started several of it.
    """
    expect_one_process(f"retina-focal {name}")
    parser = _Parser(
        prog=f"retina-focal {name}",
        description=doc.splitlines()[0],
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    if has_folder:
        folder = {"type": _folder, "default": Path("output", name), "metavar": "DIR"}
        parser.add_argument("--output", **folder, help="folder; default: %(default)s")
    return parser


def expect_one_process(name: str) -> None:
    """Refuse a command that torchrun or srun started several times, to do the same (UserError)."""
    on_purpose = argparse.Namespace(num_gpus=1, num_machines=1)  # in a job of several tasks
    world = world_of(on_purpose, os.environ)
    if world and world.size > 1:
        raise UserError(
            f"{world.launcher} started {world.size} processes, each of which would do all of "
            f"{name}; type it without torchrun, or with: srun --ntasks 1"
        )


class _Parser(argparse.ArgumentParser):
    def parse_known_args(self, args=None, namespace=None):
        found, rest = super().parse_known_args(with_whole_rows(args), namespace)
        for action in self._actions:
            if action.nargs == argparse.REMAINDER:  # which takes options for pairs
                pairs = getattr(found, action.dest)
                if flags := [x for x in pairs if x.startswith("--")]:
                    first = action.option_strings or pairs
                    self.error(f"{flags[0]} comes after {first[0]} ...; put it before them")
        return found, rest


def _folder(text: str) -> Path:
    """The type of an argument that is a folder to write to, looked at before minutes of work."""
    path = Path(text)
    nearest = next(x for x in (path, *path.absolute().parents) if x.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise argparse.ArgumentTypeError(f"'{nearest}' is no folder that you may write to")
    return path


def add_config_arguments(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """`--config-file FILE`, `--dataset` and the KEY VALUE pairs at the end."""
    parser.add_argument("--config-file", required=required, metavar="FILE", help="as of train")
    add_dataset_argument(parser)
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE pairs for the config")


def add_dataset_argument(parser: argparse.ArgumentParser) -> None:
    """`--dataset NAME JSON IMAGES`, or `NAME URI` (see `with_whole_rows`), a list of rows."""
    parser.add_argument(
        "--dataset",
        nargs=3,
        action="append",
        default=[],
        metavar=("NAME", "JSON", "IMAGES"),
        help="register a dataset in COCO format, or any by NAME URI, as in: mine "
        "'voc:FOLDER?split=train' (docs/DATA.md); may be repeated",
    )


def number(kind: type = int, least: float = 1, most: float = math.inf) -> Callable[[str], float]:
    """The type of an argument that is a finite number from `least` to `most`."""

    def read(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not least <= value <= most or value == math.inf:
            noun = "whole number" if kind is int else "number"
            wanted = f"of at least {least}" if most == math.inf else f"from {least} to {most}"
            raise argparse.ArgumentTypeError(f"{text!r} is not a {noun} {wanted}")
        return value

    return read


def listed(item: Callable[[str], Item]) -> Callable[[str], list[Item]]:
    """The type of an argument that is one or several items, with commas between them."""
    return lambda text: [item(part) for part in text.split(",")]
