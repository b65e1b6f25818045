"""Where a config differs from the paper, Detectron and the zoo: `retina-focal fidelity`."""

import argparse
import math
from functools import cache, partial
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

from detectron2.config import CfgNode
from tabulate import tabulate

from retina_focal.config import config_path, flatten, get_cfg, package_config
from retina_focal.errors import UserError
from retina_focal.merging import merge_file, merge_options
from retina_focal.safe_yaml import bases, read_text, read_yaml
from retina_focal.tools.arguments import tool_parser
from retina_focal.tools.common import command
from retina_focal.tools.fidelity.settings import SETTINGS, Choice, Setting, frozen

REFERENCES = {
    "paper": "the paper (arXiv:1708.02002)",
    "detectron": "Detectron, the authors' code",
    "detectron2": "detectron2's model zoo (RetinaNet)",
}
ZOO = ("retinanet_R_50_FPN_1x", "retinanet_R_50_FPN_3x", "retinanet_R_101_FPN_3x")
# Keys that change nothing that is learnt or found, and those of other models.
PASSIVE = (
    *("CUDNN_BENCHMARK", "FLOAT32_PRECISION", "GLOBAL.", "OUTPUT_DIR", "SEED", "VERSION"),
    *("VIS_PERIOD", "DATALOADER.NUM_WORKERS", "DATASETS.COCO_JSON", "DATASETS.P"),
    *("SOLVER.CHECKPOINT_PERIOD", "TEST.E", "MODEL.DEVICE", "MODEL.META_ARCHITECTURE"),
    *("MODEL.KEYPOINT_ON", "MODEL.LOAD_PROPOSALS", "MODEL.MASK_ON", "MODEL.PANOPTIC_FPN."),
    *("MODEL.PROPOSAL_GENERATOR.", "MODEL.ROI_", "MODEL.RPN.", "MODEL.SEM_SEG_HEAD."),
    *("MODEL.RETINA_FOCAL.ACCUMULATE_STEPS", "MODEL.RETINA_FOCAL.DATA.VAL"),
    "MODEL.RETINA_FOCAL.TRAIN.CACHE_IMAGES",
)
COLUMNS = {"setting": 20, "this config": 24, "reference": 28, "consequence": 42, "source": 28}
EPILOG = """
The header of a config, and those of the configs that it is based on, can say
  # Follows: paper
  # Differs in: warm-up, box loss
with a reference as of --reference and settings as printed here. Without --reference, a config is
compared with the one that it follows, or with all three.

Examples:
  %(prog)s COCO-Detection/retinanet_R_50_FPN_paper_600.yaml
  %(prog)s --reference detectron cfg.yaml MODEL.RETINANET.FOCAL_LOSS_GAMMA 1.0
"""


class Row(NamedTuple):
    """A setting that a reference tells, in words."""

    setting: str
    here: str
    reference: str
    consequence: str
    source: str
    differs: bool


class Declaration(NamedTuple):
    """What a config's header says of itself."""

    reference: str | None  # one of REFERENCES that it follows
    differences: frozenset[str]  # names of settings


@command
def main(argv: list[str]) -> None:
    """``retina-focal fidelity``: a table for each config and reference."""
    parser = tool_parser("fidelity", __doc__, EPILOG)
    parser.usage = "%(prog)s [options] CONFIG.yaml ... [KEY VALUE ...]"
    add = partial(parser.add_argument, metavar="CONFIG.yaml")
    add("configs", nargs="*", help="configs, then KEY VALUE pairs")
    text = "the same as without the option; may be repeated"
    add("--config-file", action="append", default=[], help=text)
    parser.add_argument("--reference", choices=[*REFERENCES, "all"], help="what to compare with")
    parser.add_argument("--all", action="store_true", help="list the settings that agree too")
    parser.add_argument("--markdown", action="store_true", help="tables for a Markdown file")
    args = parser.parse_intermixed_args(argv)
    configs = list(takewhile(lambda x: x.endswith((".yaml", ".yml")), args.configs))
    opts = args.configs[len(configs) :]
    names = [*args.config_file, *configs]
    if not names:
        found = f"'{opts[0]}' is no YAML config" if opts else "no config is given"
        parser.error(f"{found}; for example: quick_start/bccd.yaml")
    for name in names:
        path = config_path(name)
        cfg = get_cfg()
        merge_file(cfg, path)
        merge_options(cfg, opts)
        report(name, cfg, declaration(path), args)


def report(name: str, cfg: CfgNode, declared: Declaration, args: argparse.Namespace) -> None:
    """Print the tables of one config, with what its header declared; `args` are the command's."""
    reference = args.reference or declared.reference or "all"
    print(f"# {name}: follows {declared.reference or 'no reference that its header names'}")
    for key in REFERENCES if reference == "all" else (reference,):
        rows = compare(cfg, key)
        different = [row.setting for row in rows if row.differs]
        word = "difference" if len(different) == 1 else "differences"
        print(f"\n## {len(different) or 'no'} {word} from {REFERENCES[key]}\n")
        shown = [row for row in rows if row.differs or args.all]
        if shown:
            print(_table(shown, args.markdown))
        if key == declared.reference:
            hidden = [setting for setting in different if setting not in declared.differences]
            if hidden:
                print(f"\nnot declared in the header: {', '.join(hidden)}")
    print()


def compare(cfg: CfgNode, reference: str) -> list[Row]:
    """The settings that `reference` tells and that have an effect in `cfg`.

    Args:
        cfg: of a RetinaNet, ours or detectron2's, with the package's keys.
        reference: one of REFERENCES. For "detectron2" the other keys that differ come last.
    Raises:
        UserError: another meta-architecture.
    """
    if not cfg.MODEL.META_ARCHITECTURE.endswith("RetinaNet"):
        raise UserError(
            f"MODEL.META_ARCHITECTURE is {cfg.MODEL.META_ARCHITECTURE}; what can be compared are "
            "RetinaNet and FocalRetinaNet"
        )
    rows = []
    for setting in SETTINGS:
        value, choice = setting.read(cfg), choice_of(setting, reference)
        if choice is None or value is None:
            continue
        text = choice.text or " or ".join(map(_show, choice.values))
        differs = not any(same(value, other) for other in choice.values)
        rows.append(
            Row(setting.name, _show(value), text, setting.consequence, choice.source, differs)
        )
    return rows + (_other_keys(cfg) if reference == "detectron2" else [])


@cache
def choice_of(setting: Setting, reference: str) -> Choice | None:
    """What a reference does in a setting; None where it is silent."""
    if reference != "detectron2":
        return getattr(setting, reference)
    values = list(dict.fromkeys(setting.read(cfg) for cfg in zoo()))
    if None in values:
        return None
    is_default = values == [setting.read(get_cfg())]
    source = "detectron2 defaults.py" if is_default else "detectron2 model zoo"
    return Choice(tuple(values), setting.detectron2_source or source)


@cache
def zoo() -> tuple[CfgNode, ...]:
    """detectron2's own RetinaNet configs, with the package's keys at their stock values."""
    # Not at the top: it warns of deprecations, which `command` has silenced by now.
    from detectron2 import model_zoo

    cfgs = tuple(get_cfg() for _ in ZOO)
    for cfg, name in zip(cfgs, ZOO, strict=True):
        merge_file(cfg, model_zoo.get_config_file(f"COCO-Detection/{name}.yaml"))
    return cfgs


def _other_keys(cfg: CfgNode) -> list[Row]:
    """Keys that no setting reads and that differ from the first config of the zoo."""
    covered = {key for setting in SETTINGS for key in setting.keys}
    here, there = (
        {key: frozen(value) for key, value in flatten(x).items()} for x in (cfg, zoo()[0])
    )
    return [
        Row(key, _show(value), _show(there.get(key)), "not known", "detectron2 defaults.py", True)
        for key, value in here.items()
        if key not in covered and not key.startswith(PASSIVE) and value != there.get(key)
    ]


def same(one: object, other: object) -> bool:
    """Equal, numbers up to the rounding of how they are written."""
    if isinstance(one, tuple) and isinstance(other, tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, int | float) and isinstance(other, int | float):
        return math.isclose(one, other, rel_tol=1e-6)
    return one == other


def declaration(path: str | Path) -> Declaration:
    """What the leading comments of a config and of its bases declare.

    The nearest "Follows:" counts; "Differs in:" of a base counts where it follows the same.

    Raises:
        UserError: a header follows what is none of REFERENCES.
    """
    lines = read_text(path).splitlines()
    header = [line[1:].strip() for line in takewhile(lambda line: line.startswith("#"), lines)]
    own = [x.removeprefix("Follows:").strip() for x in header if x.startswith("Follows:")]
    if own and own[0] not in REFERENCES:
        raise UserError(
            f"the header of {path} follows '{own[0]}'; expected one of {', '.join(REFERENCES)}"
        )
    names = ",".join(x.partition(":")[2] for x in header if x.startswith("Differs in:"))
    differences = frozenset(name.strip() for name in names.split(",") if name.strip())
    inherited = Declaration(None, frozenset())
    for base in bases(path, read_yaml(path), package_config):  # the last one's keys count
        inherited = declaration(base)
    reference = own[0] if own else inherited.reference
    if reference == inherited.reference:
        differences |= inherited.differences
    return Declaration(reference, differences)


def _show(value: object) -> str:
    if isinstance(value, bool):  # tabulate takes the text "False" for a truth value, True
        return "on" if value else "off"
    if isinstance(value, tuple):
        return ", ".join(f"({_show(x)})" if isinstance(x, tuple) else _show(x) for x in value)
    if isinstance(value, float):
        return f"{value:.6g}"
    return str(value) if value != "" else "none"


def _table(rows: list[Row], markdown: bool) -> str:
    grid = {"tablefmt": "grid", "maxcolwidths": list(COLUMNS.values())}
    style = {"tablefmt": "github"} if markdown else grid
    return tabulate([row[:-1] for row in rows], list(COLUMNS), disable_numparse=True, **style)
