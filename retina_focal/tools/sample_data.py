"""Small datasets of real photographs, and ImageNet weights: `retina-focal sample-data`."""

from pathlib import Path

from retina_focal.data.sample import PREPARE
from retina_focal.tools.arguments import tool_parser
from retina_focal.tools.common import command
from retina_focal.weights.lite0 import DEFAULT_WEIGHTS, prepare_weights


@command
def main(argv: list[str]) -> None:
    """``retina-focal sample-data``: write the dataset and the weights of EfficientNet-Lite0."""
    parser = tool_parser("sample-data", __doc__)
    parser.add_argument("name", choices=tuple(PREPARE))
    parser.add_argument("--output", type=Path, metavar="DIR", help="default: datasets/<name>")
    weights = {"type": Path, "metavar": "FILE", "default": DEFAULT_WEIGHTS}
    parser.add_argument("--weights", **weights, help="default: %(default)s")
    args = parser.parse_args(argv)
    PREPARE[args.name](args.output or Path("datasets", args.name))
    prepare_weights(args.weights)
