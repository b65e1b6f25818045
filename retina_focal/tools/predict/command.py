"""Boxes of pictures, folders and videos, by a trained model: `retina-focal predict`."""

import argparse
import shlex
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
from detectron2.utils.logger import setup_logger
from tqdm import tqdm

from retina_focal.data.images import BadPicture
from retina_focal.errors import UserError
from retina_focal.evaluation import operating_points
from retina_focal.evaluation.inputs import Input, find_inputs
from retina_focal.evaluation.operating_points import OperatingPoints
from retina_focal.evaluation.prediction import Prediction, Predictor
from retina_focal.files import write_error
from retina_focal.tools.arguments import listed, number, tool_parser
from retina_focal.tools.common import command
from retina_focal.tools.points import points_of
from retina_focal.tools.predict.outputs import OUTPUTS, Drawings, Found, Output
from retina_focal.tools.runs import Run, open_run, run_model

THRESHOLD = 0.3  # where nothing better is known
MAX_PIXELS = 200_000_000  # of a picture, which is decoded once and not kept
BATCH_ON_DEVICE = 8
EPILOG = """
Examples:
  a folder:          %(prog)s output/bccd photos/
  several, to YOLO:  %(prog)s output/bccd a.jpg "days/*/*.png" film.mp4 --format yolo,drawings
  large pictures:    %(prog)s output/bccd slide.tif --tile 1024
  a config:          %(prog)s --config-file my.yaml photos/ --opts MODEL.WEIGHTS model_final.pth

Exit status: 0; 1 where a file could not be used (the others are done) or the run is wrong; 2 usage.
"""


@command
def main(argv: list[str]) -> None:
    """``retina-focal predict``: write what is found, picture by picture."""
    args = parse_args(argv)
    setup_logger(name="retina_focal")
    inputs = find_inputs(args.inputs, leave_out=args.output / Drawings.FOLDER)
    run = open_run(args.run, args.config_file, args.opts, own=_own_options(args))
    points = points_of(run) if args.threshold is None else None
    thresholds = _thresholds(run.classes, points, args.threshold)
    predictor = _predictor(run, args, float(thresholds.min()))
    num_pictures, boxes_per_class, bad = 0, Counter(), []
    try:
        with _outputs(args.output, args.format, run.classes) as outputs:
            for result in _progress(predictor(inputs), inputs):
                if isinstance(result, BadPicture):
                    bad.append(result)
                    tqdm.write(f"left out: {result}", file=sys.stderr)
                    continue
                found = _found(result, run.classes, thresholds, points)
                for output in outputs:
                    output.add(result, found)
                num_pictures += 1
                boxes_per_class.update(found.names)
    except KeyboardInterrupt as error:
        raise UserError(
            f"interrupted after {num_pictures} pictures; what is finished is in {args.output}"
        ) from error
    except OSError as error:
        raise write_error(Path(error.filename or args.output), error) from error
    shown = ", ".join(f"{name} {boxes_per_class[name]}" for name in run.classes)
    print(f"{num_pictures} pictures, {boxes_per_class.total()} boxes ({shown}): {args.output}")
    print(_about_thresholds(run, thresholds, points, args.threshold))
    if bad:
        raise UserError(f"{len(bad)} of the files could not be used; the first: {bad[0]}")


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = tool_parser("predict", __doc__, EPILOG, has_folder=True)
    parser.usage = "%(prog)s [options] (RUN | --config-file FILE) INPUT ... [--opts KEY VALUE ...]"
    parser.add_argument(
        "inputs", nargs="+", metavar="RUN INPUT", help="a run's folder; then pictures, folders, "
        "patterns in quotes, videos"
    )  # fmt: skip
    parser.add_argument("--config-file", metavar="FILE", help="in place of RUN; as of train")
    parser.add_argument(
        "--format", type=listed(str), default=["csv", "drawings"], metavar="NAME,NAME",
        help=f"of {', '.join(OUTPUTS)}; default: csv,drawings",
    )  # fmt: skip
    parser.add_argument(
        "--threshold", type=number(float, 0, 1), metavar="SCORE",
        help="boxes of this score or more are written; default: that of each class in the run's "
        f"{operating_points.FILE}, else {THRESHOLD}",
    )  # fmt: skip
    parser.add_argument(
        "--tile", type=number(), metavar="PX", help="cut larger pictures into tiles of this side; "
        "default: the config's TEST.TILE"
    )  # fmt: skip
    parser.add_argument(
        "--batch-size", type=number(), metavar="N",
        help=f"pictures or tiles at once; default: {BATCH_ON_DEVICE} on a GPU, else 1",
    )  # fmt: skip
    every = {"type": number(), "default": 1, "metavar": "N"}
    parser.add_argument("--every", **every, help="of a video every Nth frame; default: 1")
    opts = {"nargs": argparse.REMAINDER, "default": [], "metavar": "KEY VALUE"}
    parser.add_argument("--opts", **opts, help="for the config, at the end")
    args = parser.parse_args(argv)
    args.run = None if args.config_file else args.inputs.pop(0)
    if not args.inputs:
        parser.error("no INPUT is given; type RUN INPUT, or --config-file FILE INPUT")
    unknown = [x for x in args.format if x not in OUTPUTS]
    if unknown:
        parser.error(f"there is no format '{unknown[0]}'; expected {', '.join(OUTPUTS)}")
    return args


def _own_options(args: argparse.Namespace) -> list[str]:
    """KEY VALUE pairs for the config; what is typed as such counts more."""
    options = ["MODEL.RETINA_FOCAL.DATA.MAX_PIXELS", str(MAX_PIXELS)]
    if args.tile:
        options += ["MODEL.RETINA_FOCAL.TEST.TILE", str(args.tile)]
    return options


def _thresholds(
    classes: Sequence[str], points: OperatingPoints | None, threshold: float | None
) -> np.ndarray:
    """(K,) the lowest score of each class that counts."""
    known = points.thresholds if points else {}
    other = THRESHOLD if threshold is None else threshold
    return np.array([known.get(name, other) for name in classes])


def _predictor(run: Run, args: argparse.Namespace, lowest: float) -> Predictor:
    """The model with the run's weights, which returns boxes of the lowest threshold."""
    model = run_model(run)
    if lowest <= run.cfg.MODEL.RETINANET.SCORE_THRESH_TEST:
        model.test_score_thresh = np.nextafter(np.float32(lowest), np.float32(-1)).item()
    batch_size = args.batch_size or (1 if model.device.type == "cpu" else BATCH_ON_DEVICE)
    preview = Drawings.SIDE if "drawings" in args.format else 0
    return Predictor(run.cfg, model, batch_size, args.every, preview)


@contextmanager
def _outputs(
    folder: Path, formats: Sequence[str], classes: Sequence[str]
) -> Iterator[list[Output]]:
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as files:
        yield [OUTPUTS[name](folder, classes, files) for name in dict.fromkeys(formats)]


def _progress(
    results: Iterator[Prediction | BadPicture], inputs: Sequence[Input]
) -> Iterator[Prediction | BadPicture]:
    """The same, with a bar; how many frames a video has is not known."""
    total = None if any(x.is_video for x in inputs) else len(inputs)
    return tqdm(results, total=total, unit="picture", disable=None)


def _found(
    picture: Prediction,
    classes: Sequence[str],
    thresholds: np.ndarray,
    points: OperatingPoints | None,
) -> Found:
    """The detections of a picture that count."""
    instances = picture.instances
    scores, labels = instances.scores.numpy(), instances.pred_classes.numpy()
    counts = scores >= thresholds[labels]
    labels = labels[counts]
    names = [classes[i] for i in labels]
    boxes = instances.pred_boxes.tensor.numpy()[counts]
    probabilities = points.calibrate(scores[counts], names) if points else None
    return Found(boxes, scores[counts], labels, names, probabilities)


def _about_thresholds(
    run: Run, thresholds: np.ndarray, points: OperatingPoints | None, threshold: float | None
) -> str:
    if points:
        shown = ", ".join(
            f"{name} never"  # no score of it reached the rule
            if np.isinf(threshold)
            else f"{name} {threshold:.2f}" + " (not in it)" * (name not in points.thresholds)
            for name, threshold in zip(run.classes, thresholds, strict=True)
        )
        return f"a box counts from its class's score in {operating_points.FILE} on: {shown}"
    line = f"a box counts from a score of {thresholds[0]:g} on"
    if threshold is not None:
        return line
    folder = shlex.quote(str(run.weights.parent))
    return f"{line}; the best for each class: retina-focal evaluate {folder}"
