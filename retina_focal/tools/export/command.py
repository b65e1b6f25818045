"""A trained model as a file for other runtimes, compared with itself: `retina-focal export`."""

import argparse
import logging
import re
import shlex
import sys
from dataclasses import replace
from pathlib import Path

from detectron2.utils.logger import setup_logger

from retina_focal.config import retina_focal_node
from retina_focal.errors import UserError
from retina_focal.evaluation import operating_points
from retina_focal.export.metadata import Metadata
from retina_focal.export.page import cached_package
from retina_focal.export.proof import table
from retina_focal.export.sparse_boxes import expect_no_norm
from retina_focal.export.triton_repository import check_name
from retina_focal.export.writing import FORMATS, PAGE, TRITON, expect_installed, export
from retina_focal.tools.arguments import tool_parser
from retina_focal.tools.common import (
    command,
    expect_focal_retinanet,
    sigterm_interrupts,
    status_of,
)
from retina_focal.tools.export.pictures import calibration_images, proof_pictures
from retina_focal.tools.points import points_of
from retina_focal.tools.runs import Run, open_run, run_model

logger = logging.getLogger(__name__)
EPILOG = """
Examples:
  for onnxruntime:   %(prog)s output/bccd --output exported
  8-bit pictures in: %(prog)s output/bccd --uint8 --output exported
  a config:          %(prog)s --config-file my.yaml --opts MODEL.WEIGHTS model_final.pth

Before it is written the file runs in its own runtime, on pictures of the run's validation or test
dataset or on those of --pictures, and has to detect what the model does.

Exit status: 0; 1 where it detects something else (nothing is written) or the run is wrong; 2 usage;
130 after Ctrl-C, 143 after SIGTERM.
"""


@command
def main(argv: list[str]) -> None:
    """``retina-focal export``: write the model of a run, and print what was compared."""
    try:
        with sigterm_interrupts():
            _export(parse_args(argv))
    except KeyboardInterrupt as stop:
        print("retina-focal export: interrupted; nothing was written", file=sys.stderr)
        sys.exit(status_of(stop))


def _export(args: argparse.Namespace) -> None:
    setup_logger(name="retina_focal")
    run = open_run(args.run, args.config_file, args.opts)
    if run.exported:
        raise UserError(f"'{args.run}' is exported already; expected a run, or --config-file FILE")
    expect_focal_retinanet(run.cfg, "which alone is exported")
    if args.sparse_boxes:
        expect_no_norm(run.cfg.MODEL.RETINANET.NORM)
    _say_what_stays(run)
    expect_installed(args.format, args.precision)
    if args.page:
        cached_package()  # before the minutes that all else takes
    if args.triton is not None:
        check_name(args.triton)
    metadata = _metadata(run, args)
    pictures = proof_pictures(run, args.pictures)
    calibration = ()
    if args.precision == "int8":
        calibration = calibration_images(run, args.calibration, args.uint8)
    model = run_model(run).cpu()
    how = (args.format, args.output, pictures, calibration, args.page, args.triton)
    path, rows = export(model, metadata, *how, args.sparse_boxes)
    print(f"{path} against the model, the greatest differences:\n\n{table(rows)}")
    page, repository = args.output / PAGE, args.output / TRITON
    if args.page:
        print(f"{page}: {page.stat().st_size / 1e6:.0f} MB; open it in a browser")
    if args.triton is not None:
        print(f"{repository}: tritonserver --model-repository={repository}")
    for other, is_new in ((page, args.page), (repository, args.triton is not None)):
        if other.exists() and not is_new:
            logger.warning("%s is of an earlier export", other)


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = tool_parser("export", __doc__, EPILOG, has_folder=True)
    parser.usage = "%(prog)s [options] (RUN | --config-file FILE) [--opts KEY VALUE ...]"
    parser.add_argument("run", nargs="?", metavar="RUN", help="a run's folder")
    parser.add_argument("--config-file", metavar="FILE", help="in place of RUN; as of train")
    parser.add_argument(
        "--format", choices=FORMATS, default="onnx",
        help="default: onnx; torchscript is for programs that know no other: torch calls it "
        "deprecated",
    )  # fmt: skip
    parser.add_argument(
        "--precision", choices=FORMATS["openvino"].precisions, default="fp32",
        help="bf16 and int8: of openvino alone; default: fp32",
    )  # fmt: skip
    parser.add_argument(
        "--uint8", action="store_true", help="the file takes (N, H, W, 3) uint8; default: "
        "(N, 3, H, W) float32 of 0 to 255"
    )  # fmt: skip
    parser.add_argument(
        "--nms", choices=("inside", "outside"), default="inside", help="outside: the file gives "
        "the candidates of non-maximum suppression; default: inside"
    )  # fmt: skip
    parser.add_argument(
        "--calibrated", action="store_true", help="scores are the probabilities of the run's "
        f"{operating_points.FILE}; default: the model's own"
    )  # fmt: skip
    parser.add_argument(
        "--sparse-boxes", action="store_true", help="compute boxes where detections may be, alone, "
        "if those places are few: faster on a processor; for a head without norms"
    )  # fmt: skip
    parser.add_argument(
        "--pictures", nargs="+", metavar="FILE", help="to compare on: pictures, folders, patterns "
        "in quotes; default: of the run's validation or test dataset"
    )  # fmt: skip
    parser.add_argument(
        "--calibration", nargs="+", metavar="FILE", help="for int8: pictures like those that the "
        "file will see, named as --pictures; default: of the run's training dataset"
    )  # fmt: skip
    parser.add_argument(
        "--page", action="store_true", help="write page.html too, which finds objects in a picture "
        "in any browser, without a network"
    )  # fmt: skip
    parser.add_argument(
        "--triton", metavar="NAME", help="write the model repository triton too, for Triton "
        "Inference Server, with the model under that name"
    )  # fmt: skip
    opts = {"nargs": argparse.REMAINDER, "default": [], "metavar": "KEY VALUE"}
    parser.add_argument("--opts", **opts, help="for the config, at the end")
    args, rest = parser.parse_known_args(argv)
    keys = [x for x in (args.run, *rest) if x and _is_key(x)]
    if keys:
        parser.error(f"{keys[0]} looks like a key of the config; put KEY VALUE behind --opts")
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if (args.run is None) == (args.config_file is None):
        parser.error("give one of RUN and --config-file FILE")
    if args.precision not in FORMATS[args.format].precisions:
        parser.error(f"--precision {args.precision} needs --format openvino")
    if args.format != "onnx" and (args.page or args.triton is not None):
        parser.error("--page and --triton need --format onnx")
    if args.sparse_boxes and (args.format not in ("onnx", "openvino") or args.precision == "int8"):
        parser.error("--sparse-boxes needs --format onnx, or openvino in fp32 or bf16")
    if args.calibrated and args.nms == "outside":
        parser.error("--calibrated needs --nms inside: calibration may change which box is best")
    return args


def _is_key(text: str) -> bool:
    is_name = re.fullmatch(r"[A-Z][A-Z0-9_]*(\.[A-Z0-9_]+)+", text) is not None
    return is_name and not Path(text).exists()


def _say_what_stays(run: Run) -> None:
    """What the config asks of evaluation and prediction that a graph can't do."""
    node = retina_focal_node(run.cfg)
    if run.cfg.TEST.AUG.ENABLED:
        logger.warning("TEST.AUG.ENABLED: the exported file sees each picture once")
    if node.TEST.TILE:
        logger.warning("TEST.TILE %s: the exported file sees pictures whole", node.TEST.TILE)
    if node.PRECISION != "fp32":
        logger.warning("PRECISION %s: the exported file computes in fp32", node.PRECISION)


def _metadata(run: Run, args: argparse.Namespace) -> Metadata:
    points = points_of(run)
    if args.calibrated and points is None:
        raise UserError(
            f"--calibrated needs {operating_points.FILE} beside '{run.weights}'; write it: "
            f"retina-focal evaluate {shlex.quote(str(run.weights.parent))}"
        )
    metadata = Metadata.of_run(
        run.cfg, run.classes, run.weights, points, uint8=args.uint8, nms=args.nms
    )
    scores = "calibrated" if args.calibrated else "raw"
    return replace(metadata, scores=scores, precision=args.precision)
