"""What the page says, as plain values: pictures with boxes, data findings, anchors, anatomy."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from retina_focal.config import retina_focal_node
from retina_focal.data.coverage import anchors_of, box_table, cover, policy_of, size_classes
from retina_focal.data.inspection import DONE, Inspected, compare, inspect
from retina_focal.data.registration import register_datasets
from retina_focal.errors import UserError
from retina_focal.evaluation.detections import Evaluated
from retina_focal.evaluation.drawing import draw_boxes
from retina_focal.evaluation.inputs import read_picture
from retina_focal.evaluation.matches import match
from retina_focal.evaluation.mistakes import SUSPECTS
from retina_focal.weights.formats import sha256_of

SIZES = {"APs": "up to 32 px", "APm": "32 to 96 px", "APl": "from 96 px"}
COLOURS = {"right": (0, 158, 115), "wrong": (213, 94, 0), "missed": (86, 180, 233)}
WIDTH = 480  # pixels of a picture's longer side on the page
CROP = 160  # of a suspected label's
LEAST = 6  # pixels of a box's side that is seen there
MAX_INSPECTED = 5000  # pictures; of more only the annotations are looked at


class Shown(NamedTuple):
    """A picture with boxes, and what is to be said of it."""

    name: str
    text: str
    image: Image.Image


def or_reason(make: Callable[[], object]) -> tuple[object | None, str]:
    """What is made, or why it can't be: a part of the page may be left out."""
    try:
        return make(), ""
    except UserError as error:
        return None, str(error)


def worst_pictures(kept: Evaluated, worst: Sequence[dict], paths: dict, pixels: int) -> list[Shown]:
    """Pictures with what is right, wrong and missed in them.

    Args:
        kept: only the detections that count.
        worst: of `mistakes.worst_images`.
        paths: of pictures by the ids of their images.
        pixels: of the largest picture that is decoded.
    """
    matches = match(kept, np.array([0.5]))
    is_right, ignored, box = matches.right[0], matches.ignored[0], matches.box[0]
    missed = ~kept.truth.crowd
    missed[box[is_right]] = False
    places = {image["id"]: place for place, image in enumerate(kept.images)}
    shown = []
    for row in worst:
        place, path = places[row["image_id"]], paths[row["image_id"]]
        groups = {
            "right": (kept.found, is_right),
            "wrong": (kept.found, ~is_right & ~ignored),
            "missed": (kept.truth, missed),
        }
        boxes, colours, titles = [], [], []
        for kind, (records, mask) in groups.items():
            for i in np.nonzero(mask & (records.image == place))[0]:
                x, y, width, height = records.boxes[i]
                boxes.append([x, y, x + width, y + height])
                colours.append(COLOURS[kind])
                titles.append("" if kind == "right" else kept.classes[records.label[i]])
        image = read_picture(Path(path), pixels)
        scale = min(WIDTH / max(image.size), 1)
        image = image.resize([max(round(x * scale), 1) for x in image.size])
        drawn = draw_boxes(image, np.array(boxes).reshape(-1, 4) * scale, colours, titles)
        counts = ", ".join(f"{row[kind]} {kind}" for kind in COLOURS)
        shown.append(Shown(row["file_name"], counts, drawn))
    return shown


def suspects(rows: Sequence[dict], paths: dict, pixels: int) -> list[Shown]:
    """A piece of the picture around each suspected label."""
    shown = []
    for row in rows:
        image = read_picture(Path(paths[row["image_id"]]), pixels)
        x, y, width, height = row["bbox"]
        margin = max(width, height, 16) / 2
        low = np.array([x, y]) - margin
        high = np.array([x + width, y + height]) + margin
        corner = np.clip(low, 0, np.array(image.size) - 1).round()  # a label may lie outside
        crop = image.crop((*corner, *np.clip(high, corner + 1, image.size).round()))
        scale = CROP / max(crop.size)
        crop = crop.resize([max(round(a * scale), 1) for a in crop.size])
        box = scale * (np.array([[x, y, x + width, y + height]]) - np.tile(corner, 2))
        box[0, 2:] = np.maximum(box[0, 2:], box[0, :2] + LEAST)  # also of a box without area
        colour = COLOURS["wrong" if row["class"] else "missed"]
        text = SUSPECTS[row["kind"]].format(**row)
        drawn = draw_boxes(crop, box, [colour], [""])
        shown.append(Shown(row["file_name"], f"{text} ({row['suspicion']:.2f})", drawn))
    return shown


def data_findings(cfg: CfgNode, names: Sequence[str]) -> dict:
    """What `check` finds in the datasets, and between them."""
    node = retina_focal_node(cfg).DATA
    register_datasets(cfg, names)
    sizes = [len(DatasetCatalog.get(x)) if x in DatasetCatalog else 0 for x in names]
    with_pictures = sum(sizes) <= MAX_INSPECTED
    datasets = [inspect(x, with_pictures, node.MAX_PIXELS, node.ALLOW_OUTSIDE) for x in names]
    return {
        "datasets": [_dataset(x) for x in datasets],
        "between": _findings(compare(datasets)),
        "with_pictures": with_pictures,
    }


def _dataset(seen: Inspected) -> dict:
    return {
        "name": seen.data,
        "summary": seen.check.summary(),
        "boxes_per_class": seen.boxes_per_class,
        "findings": _findings(seen.findings),
    }


def _findings(found: Sequence) -> list[dict]:
    order = list(DONE)
    ranked = sorted(found, key=lambda x: order.index(x.severity))
    return [
        {"severity": x.severity, "kind": x.kind, "text": str(x), "done": DONE[x.severity]}
        for x in ranked
    ]


def anchor_coverage(cfg: CfgNode, name: str) -> dict:
    """How well the anchors reach the boxes of a dataset, by class and by size.

    Raises:
        UserError: the dataset can't be read, or has no box.
    """
    register_datasets(cfg, [name])
    if name not in DatasetCatalog:
        raise UserError(f"dataset '{name}' is not registered")
    boxes = box_table(DatasetCatalog.get(name))
    if not len(boxes):
        raise UserError(f"dataset '{name}' has no boxes")
    _, layout = anchors_of(cfg)
    found = cover(boxes, layout, *policy_of(cfg))
    thresholds = cfg.MODEL.RETINANET.IOU_THRESHOLDS
    bounds = thresholds[0], thresholds[-1]
    names = MetadataCatalog.get(name).get("thing_classes") or []
    masks = [("all", np.ones(len(found.ious), bool))]
    masks += [(x, found.classes == i) for i, x in enumerate(names)]
    masks += [(x, mask) for x, mask in size_classes(found.sides) if mask.any()]
    rows = [{"name": x, **found.shares(bounds, mask)} for x, mask in masks]
    return {"dataset": name, "thresholds": bounds, "rows": rows}


def anatomy(folder: Path, weights: Path) -> dict | None:
    """What `retina-focal anatomy --output FOLDER` has written of these weights, where it has."""
    path = folder / "anatomy.json"
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text())
        text = f"{found['sentence']} Of {found['images']} images of {found['dataset']}."
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"'{path}' is not of retina-focal anatomy ({error})") from error
    is_other = found.get("sha256", "") not in ("", sha256_of(weights))
    return None if is_other else {"text": text, "figure": folder / "anatomy.png"}
