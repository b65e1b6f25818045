"""The operating points of a run: chosen on a dataset, and found again where they are its own."""

import logging
import shlex
import sys
from collections.abc import Mapping

from detectron2.config import CfgNode

from retina_focal.config import flatten
from retina_focal.errors import UserError
from retina_focal.evaluation import operating_points
from retina_focal.evaluation.operating_points import FILE, OperatingPoints
from retina_focal.evaluation.summary import Subject
from retina_focal.export.metadata import AGAIN
from retina_focal.tools.runs import Run
from retina_focal.weights.formats import sha256_of

# Keys that move scores, or choose among boxes: thresholds belong to their values.
KEYS = (
    "INPUT.FORMAT",
    "INPUT.MIN_SIZE_TEST",
    "INPUT.MAX_SIZE_TEST",
    "MODEL.RETINANET.NMS_THRESH_TEST",
    "MODEL.RETINANET.SCORE_THRESH_TEST",
    "MODEL.RETINANET.TOPK_CANDIDATES_TEST",
    "TEST.DETECTIONS_PER_IMAGE",
    "MODEL.RETINA_FOCAL.TEST.CLASS_AGNOSTIC_NMS",
    "MODEL.RETINA_FOCAL.TEST.RESIZE",
    "MODEL.RETINA_FOCAL.TEST.TILE",
    "TEST.AUG.ENABLED",
)
AUGMENTED = ("TEST.AUG.MIN_SIZES", "TEST.AUG.MAX_SIZE", "TEST.AUG.FLIP")  # where it is enabled
TILED = ("MODEL.RETINA_FOCAL.TEST.TILE_OVERLAP",)  # where there are tiles

BEFORE = {"MODEL.RETINA_FOCAL.TEST.TILE": 0}  # of files that don't tell it

logger = logging.getLogger(__name__)


def choose_points(run: Run, chosen_on: Subject, rule: str = "f1") -> OperatingPoints | None:
    """Write the operating points of a run beside its weights.

    Args:
        chosen_on: the run's detections on the dataset that is kept for choices.
        rule: see `operating_points.check_rule`.
    """
    about = (rule, chosen_on.data, run.weights.name)
    content = operating_points.make(chosen_on.evaluated, chosen_on.matches, *about)
    content |= {"sha256": sha256_of(run.weights), "settings": _settings(run.cfg)}
    path = operating_points.write(run.weights.parent, content)
    print(f"operating points, which predict uses: {path}", file=sys.stderr)
    return operating_points.read(run.weights.parent)


def points_of(run: Run) -> OperatingPoints | None:
    """Those beside the weights, else those that an exported file holds itself.

    None where there are none of these weights. Where they were chosen with other settings, as of
    test-time augmentation, it is said.
    """
    points = operating_points.read(run.weights.parent) or _of_metadata(run)
    if points is None:
        return None
    content = points.content
    if content.get("weights") != run.weights.name:
        names = (content.get("weights"), run.weights.name)
        again = _again(run, {} if run.exported else {"MODEL.WEIGHTS": run.weights})
        logger.warning("%s is of %s, not of %s, so it is not used; again: %s", FILE, *names, again)
        return None
    if content.get("sha256", "") not in ("", sha256_of(run.weights)):
        text = "%s is of an earlier %s, so it is not used; again: %s"
        logger.warning(text, FILE, run.weights.name, _again(run, {}))
        return None
    then = content.get("settings")
    if isinstance(then, dict):
        _compare({**BEFORE, **then}, _settings(run.cfg), run)
    return points


def _again(run: Run, values: Mapping[str, object]) -> str:
    """The command that chooses the points of a run anew, with these values of its config."""
    command = f"retina-focal evaluate {shlex.quote(str(run.weights.parent))}"
    if run.exported is not None:  # whose config names no dataset
        command, values = (
            f"{command} --data DATA",
            {"MODEL.RETINA_FOCAL.DATA.VAL": "DATA", **values},
        )
    elif run.built is not None:
        command = f"{command} --config-file FILE.py"
    pairs = " ".join(f"{key} {shlex.quote(str(value))}" for key, value in values.items())
    return f"{command} --opts {pairs}" if pairs else command


def _settings(cfg: CfgNode) -> dict[str, object]:
    values = flatten(cfg)
    keys = [*KEYS]
    keys += AUGMENTED if cfg.TEST.AUG.ENABLED else ()
    keys += TILED if values["MODEL.RETINA_FOCAL.TEST.TILE"] else ()
    return {key: values[key] for key in keys}


def _compare(then: dict[str, object], here: dict[str, object], run: Run) -> None:
    """Say where thresholds were chosen with other settings, and how to choose them with these."""
    other = [x for x in here if x in then and then[x] != here[x]]
    if not other:
        return
    told = ", ".join(f"{x} {then[x]} (here {here[x]})" for x in other)
    again = _again(run, {x: here[x] for x in here if x in other or x not in then})
    text = "%s was chosen with %s; to choose with what holds here: %s"
    logger.warning(text, FILE, told, again)


def _of_metadata(run: Run) -> OperatingPoints | None:
    metadata = run.exported and run.exported.metadata
    # Thresholds are of raw scores.
    if not metadata or not metadata.operating_points or metadata.scores != "raw":
        return None
    classes = {
        name: {"threshold": threshold, "calibration": (metadata.calibration or {}).get(name)}
        for name, threshold in metadata.operating_points.items()
    }
    about = {"dataset": "the exported file", "weights": run.weights.name}
    try:
        return operating_points.parse({**about, "classes": classes})
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"'{run.weights}' has operating points that can't be used ({error}); {AGAIN}"
        ) from error
