"""Datasets of which only some classes count, by ``MODEL.RETINA_FOCAL.DATA.CLASSES``."""

import hashlib
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path

from detectron2.data import MetadataCatalog

from retina_focal.data.classes import listed
from retina_focal.errors import UserError
from retina_focal.files import write_whole

logger = logging.getLogger(__name__)


def keep_classes(name: str, classes: Sequence[str]) -> None:
    """Leave the boxes of other classes out of a registered dataset, for training and evaluation.

    Classes are numbered in the order of `classes`. Objects of others become background. A second
    call changes nothing.

    Args:
        name: of a dataset that this package registered.
        classes: names, at least one.
    Raises:
        UserError: one of them is not the dataset's or is there twice, the dataset has no box of
            them, or it was registered by others.
    """
    metadata, classes = MetadataCatalog.get(name), list(classes)
    if metadata.get("kept_classes") == classes:
        return
    own = list(metadata.get("thing_classes", []))
    unknown = [x for x in classes if x not in own]
    reason = None
    if metadata.get("source_file") is None or metadata.get("kept_classes"):
        reason = "only one that --dataset registers can be filtered, once"
    elif unknown:
        reason = f"it has not {listed(unknown)}; its classes are: {listed(own)}"
    elif len(set(classes)) < len(classes):
        reason = "a name is there twice"
    if reason:
        raise UserError(
            f"dataset '{name}' can't be filtered by DATA.CLASSES {listed(classes)}: {reason}"
        )
    by_class = {own[i]: x for x, i in metadata.thing_dataset_id_to_contiguous_id.items()}
    ids = {by_class[x]: i for i, x in enumerate(classes)}
    path, num_kept, num_boxes = _filtered(metadata.json_file, ids)
    if not num_kept:
        raise UserError(
            f"dataset '{name}' has no box of DATA.CLASSES {listed(classes)}; name others of its "
            f"classes: {listed(own)}"
        )
    logger.info(
        "dataset '%s': %d of %d annotations are of DATA.CLASSES %s; the others are left out",
        *(name, num_kept, num_boxes, listed(classes)),
    )
    # Metadata can't be changed, only made anew; records are read by them.
    values = metadata.as_dict() | {
        "json_file": path,
        "thing_classes": classes,
        "thing_dataset_id_to_contiguous_id": ids,
        "kept_classes": classes,
    }
    MetadataCatalog.remove(name)
    MetadataCatalog.get(name).set(**values)


def _filtered(json_file: str, ids: dict[int, int]) -> tuple[str, int, int]:
    """Path of a copy in the cache with these categories alone; its annotations, and those before.

    Args:
        ids: of the categories that stay.
    """
    data = Path(json_file).read_bytes()
    content = json.loads(data)
    before = len(content["annotations"])
    content["annotations"] = [x for x in content["annotations"] if x["category_id"] in ids]
    content["categories"] = [x for x in content["categories"] if x["id"] in ids]
    key = hashlib.sha256(data + json.dumps(sorted(ids)).encode()).hexdigest()[:24]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "retina_focal")
    path = cache / "datasets" / f"{Path(json_file).stem[:80]}-{key}-classes.json"
    if not path.exists():
        write_whole(path, json.dumps(content))
    return str(path), len(content["annotations"]), before
