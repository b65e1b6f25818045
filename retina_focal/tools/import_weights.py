"""Weights of other projects, with the config they need: `retina-focal import-weights`."""

import argparse
from collections.abc import Sequence
from pathlib import Path

import yaml
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from torch import nn

from retina_focal.config import config_path, flatten, get_cfg
from retina_focal.errors import UserError
from retina_focal.files import whole_file
from retina_focal.merging import merge_file
from retina_focal.safe_yaml import read_text
from retina_focal.tools.arguments import number, tool_parser
from retina_focal.tools.common import command, harmless
from retina_focal.weights.formats import write_weights
from retina_focal.weights.imported import (
    BASE,
    Imported,
    check_network,
    import_config,
    read_import,
)

CONFIG = "config.yaml"
EPILOG = """
Examples:
  a detector:      %(prog)s retinanet_resnet50_fpn_coco.pth --output output/torchvision
  and then:        retina-focal predict output/torchvision photos/
  a backbone:      %(prog)s resnet50.pth --output weights/r50
  and then:        retina-focal train --config-file weights/r50/config.yaml ...
  of timm:         %(prog)s model.safetensors --opts MODEL.RETINA_FOCAL.TIMM.NAME resnest50d

Which project a file is of, its contents tell; docs/IMPORT.md has what becomes of each.
"""


@command
def main(argv: list[str]) -> None:
    """``retina-focal import-weights``: write a checkpoint and its config, or say what is wrong."""
    args = parse_args(argv)
    found = read_import(args.file, args.opts, args.classes, args.batch_norm_eps)
    cfg = import_config(found, args.opts)
    check_network(found, _network(cfg))
    for line in (f"{args.file}: {found.layout.name}", *(f"  {x}" for x in found.notes)):
        _say(line)
    _write(args.output, found, cfg)


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    parser = tool_parser("import-weights", __doc__, EPILOG, has_folder=True)
    parser.add_argument("file", metavar="FILE", help="of weights: .pth, .pkl or .safetensors")
    parser.add_argument(
        "--classes",
        type=_names,
        metavar="NAMES",
        help="of the scores, in their order: with commas between them, or a file with one per line",
    )
    parser.add_argument(
        "--batch-norm-eps",
        type=number(float, least=0),
        metavar="EPS",
        help="that frozen norms were trained with; default: 1e-5, or what is known of the file",
    )
    parser.add_argument(
        "--opts", nargs=argparse.REMAINDER, default=[], help="KEY VALUE pairs for the config"
    )
    return parser.parse_args(argv)


def _names(text: str) -> list[str]:
    is_file = "," not in text and Path(text).is_file()
    try:
        lines = read_text(text).splitlines() if is_file else text.split(",")
    except UserError as error:  # argparse would say of a ValueError no more than that it is one
        raise argparse.ArgumentTypeError(str(error)) from error
    names = [name.strip() for name in lines if name.strip()]
    if repeated := {name for name in names if names.count(name) > 1}:
        raise argparse.ArgumentTypeError(f"{', '.join(sorted(repeated))} is there more than once")
    return names


def _network(cfg: CfgNode) -> nn.Module:
    cfg = cfg.clone()
    cfg.MODEL.DEVICE = "cpu"
    return build_model(cfg)


def _write(folder: Path, found: Imported, cfg: CfgNode) -> None:
    """Both files, or none."""
    is_backbone = found.layout.is_backbone
    weights = folder / ("backbone.pth" if is_backbone else "model_final.pth")
    cfg.MODEL.WEIGHTS = str(weights.absolute())
    with whole_file(folder / CONFIG) as temporary:
        temporary.write_text(_config_text(found, cfg))
        write_weights(weights, found.checkpoint())
    command = f"train --config-file {folder / CONFIG}" if is_backbone else f"predict {folder}"
    _say(f"wrote {weights} and {folder / CONFIG}; next: retina-focal {command} ...")


def _say(line: str) -> None:
    """Print a line, of whatever names of files."""
    print(harmless(line).replace("\n", r"\n"))


def _config_text(found: Imported, cfg: CfgNode) -> str:
    """As YAML, what differs from `BASE`."""
    base = get_cfg()
    merge_file(base, config_path(BASE))
    before = flatten(base)
    tree: dict = {}
    for key, value in flatten(cfg).items():
        if value != before[key]:
            *nodes, leaf = key.split(".")
            node = tree
            for name in nodes:
                node = node.setdefault(name, {})
            node[leaf] = value
    name = ascii(Path(found.path).name)  # no line break ends the comment
    source = f"# Of {name}, {found.layout.name}, SHA-256 {found.sha256}.\n"
    text = yaml.safe_dump({"_BASE_": BASE, **tree}, sort_keys=False, allow_unicode=True)
    return source + text


if __name__ == "__main__":
    main()
