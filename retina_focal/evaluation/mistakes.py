"""What goes wrong: kinds of errors, classes taken for each other, images, suspected labels."""

import contextlib
import io
from collections.abc import Mapping, Sequence

import numpy as np

from retina_focal.evaluation.detections import Evaluated, Truth
from retina_focal.evaluation.evaluators import COCO_LIMIT
from retina_focal.evaluation.hotcoco_evaluator import hotcoco, results_array
from retina_focal.evaluation.matches import match, pairs

BACKGROUND = "background"
TOUCH = 0.1  # IoU below which a detection has nothing to do with a box; TIDE's
KINDS = {
    "Cls": "the box is right, the class is not",
    "Loc": "the class is right, the box is not (IoU 0.1 to 0.5)",
    "Both": "neither is right",
    "Dupe": "the object has been found already",
    "Bkg": "there is no object",
    "Miss": "an object that nothing has found",
}
# By the kind of `suspected_labels`.
SUSPECTS = {
    "missing": "{class} without a label",
    "class": "labelled {label}, detected as {class}",
    "box": "the box of {label} fits no detection",
    "spurious": "labelled {label}, where nothing is detected",
}


def error_types(
    dataset: dict, results: Sequence[dict], limit: int = COCO_LIMIT
) -> dict[str, dict[str, float]]:
    """TIDE's errors (arXiv:2008.08115) at the IoU 0.5, by hotcoco.

    Args:
        dataset: ground truth in COCO format.
        results: in COCO format, at least one.
        limit: detections per image and class that count.
    Returns:
        Of each of KINDS the "count", and "dAP": what AP50, in percent, would gain without them.
    Raises:
        UserError: hotcoco is not installed.
    """
    module = hotcoco()
    with contextlib.redirect_stdout(io.StringIO()):
        truth = module.COCO(dataset)
        measured = module.COCOeval(truth, truth.load_res(results_array(results)), "bbox")
        measured.params.max_dets = [1, 10, limit]
        measured.evaluate()
        found = measured.tide_errors()
    return {
        kind: {"count": int(found["counts"][kind]), "dAP": 100 * float(found["delta_ap"][kind])}
        for kind in KINDS
    }


def kept_at(evaluated: Evaluated, thresholds: Mapping[str, float], default: float) -> Evaluated:
    """Only the detections that reach the threshold of their class, or else the default."""
    least = np.array([thresholds.get(name, default) for name in evaluated.classes])
    found = evaluated.found
    kept = found[found.score >= least[found.label]]
    return Evaluated(evaluated.images, evaluated.classes, evaluated.truth, kept)


def confusion(kept: Evaluated, iou: float = 0.5) -> np.ndarray:
    """(K + 1, K + 1) counts: rows the class of the box, columns of the detection.

    The last row are detections on no box, the last column boxes that nothing has found. Boxes are
    matched whatever their class; what lies on a crowd does not count.
    """
    truth, found, last = kept.truth, kept.found, len(kept.classes)
    matches = match(kept, np.array([iou]), by_class=False)
    right, ignored, box = matches.right[0], matches.ignored[0], matches.box[0]
    counts = np.zeros((last + 1, last + 1), dtype=int)
    rows = np.where(right, np.append(truth.label, last)[box], last)
    np.add.at(counts, (rows[~ignored], found.label[~ignored]), 1)
    missed = ~truth.crowd
    missed[box[right]] = False
    np.add.at(counts, (truth.label[missed], last), 1)
    return counts


def worst_images(kept: Evaluated, count: int = 12, iou: float = 0.5) -> list[dict]:
    """The images with mistakes, those with the most first.

    Each has its image_id and file_name, the number of "right" and of "wrong" detections, and that
    of "missed" boxes.
    """
    matches = match(kept, np.array([iou]))
    n, truth = len(kept.images), kept.truth
    right = np.bincount(kept.found.image[matches.right[0]], minlength=n)
    counted = ~matches.ignored[0]
    wrong = np.bincount(kept.found.image[counted], minlength=n) - right
    missed = np.bincount(truth.image[~truth.crowd], minlength=n) - right
    order = np.argsort(-(wrong + missed), kind="stable")[:count]
    return [
        {
            "image_id": kept.images[i]["id"],
            "file_name": kept.images[i]["file_name"],
            **{"right": int(right[i]), "wrong": int(wrong[i]), "missed": int(missed[i])},
        }
        for i in order
        if wrong[i] + missed[i]
    ]


def suspected_labels(evaluated: Evaluated, least: float = 0.5, count: int = 50) -> list[dict]:
    """Where the detections speak against the labels, the strongest suspicion first.

    "missing": a detection of a score of at least `least` that touches no box;
    "class": one on a box (IoU 0.5) of another class, on which no detection of its own class is
    surer; "box": one that touches a box of its class (IoU 0.1 to 0.5) that no detection fits;
    "spurious": a box that no detection of that score touches.

    Returns:
        Of each the "kind", "suspicion" (the score; of a spurious box 1 minus the highest score that
        touches it, times the share of the other boxes of its class that a detection fits: of a
        class that is hardly ever found a box without a detection tells little), "image_id",
        "file_name", "bbox" (XYWH, pixels), "class" of the detection, and "annotation_id" and
        "label" of the box; None where there is none.
    """
    truth, found = evaluated.truth, evaluated.found
    which, box, iou = pairs(truth, found, 0, TOUCH)
    num_found, num_boxes = len(found.image), len(truth.image)
    touches = np.bincount(which, minlength=num_found) > 0
    same = truth.label[box] == found.label[which]
    fits = iou >= 0.5
    own, touching = np.zeros(num_boxes), np.zeros(num_boxes)  # highest scores
    np.maximum.at(own, box[same & fits], found.score[which[same & fits]])
    np.maximum.at(touching, box, found.score[which])
    nearest = np.full(num_found, -1)
    by_iou = np.argsort(iou, kind="stable")
    nearest[which[by_iou]] = box[by_iou]  # the last one written is the nearest
    best = np.zeros(num_found)
    np.maximum.at(best, which, iou)
    on = np.where(touches, nearest, 0)
    sure = found.score >= least
    if num_boxes:
        mine = (truth.label[on] == found.label) & touches & ~truth.crowd[on]
        other = (truth.label[on] != found.label) & touches & ~truth.crowd[on]
        kinds = {
            "missing": sure & ~touches,
            "class": sure & other & (best >= 0.5) & (found.score > own[on]),
            "box": sure & mine & (best < 0.5) & (own[on] == 0),
        }
    else:
        kinds = {"missing": sure}
    rows = [(found.score[d], kind, d, None) for kind, x in kinds.items() for d in np.nonzero(x)[0]]
    unfound = (1 - touching) * _found_of_class(truth, own >= least)
    is_spurious = ~truth.crowd & (touching < least) & (unfound > 0)
    rows += [(unfound[g], "spurious", None, g) for g in np.nonzero(is_spurious)[0]]
    rows.sort(key=lambda row: -row[0])
    made, seen = [], set()
    for suspicion, kind, d, g in rows:
        g = int(on[d]) if g is None and kind != "missing" else g
        if g is not None and (kind, g) in seen:  # two detections of one fault
            continue
        seen.add((kind, g))
        image = evaluated.images[found.image[d] if d is not None else truth.image[g]]
        made.append(
            {
                "kind": kind,
                "suspicion": float(suspicion),
                "image_id": image["id"],
                "file_name": image["file_name"],
                "bbox": (found.boxes[d] if d is not None else truth.boxes[g]).tolist(),
                "class": None if d is None else evaluated.classes[found.label[d]],
                "annotation_id": None if g is None else int(truth.id[g]),
                "label": None if g is None else evaluated.classes[truth.label[g]],
            }
        )
        if len(made) == count:
            break
    return made


def _found_of_class(truth: Truth, is_found: np.ndarray) -> np.ndarray:
    """(G,) for each box that is not found the share of the other boxes of its class that are."""
    if not len(is_found):
        return np.zeros(0)
    counted = ~truth.crowd
    boxes = np.bincount(truth.label, counted)
    found = np.bincount(truth.label, counted & is_found)
    return (found / np.maximum(boxes - 1, 1))[truth.label]
