"""A split that is made where a dataset has none: drawn by a seed, near-duplicates kept together."""

import hashlib
import json
import os
from pathlib import Path

import numpy as np

from retina_focal.data.coco import read_coco
from retina_focal.data.duplicates import groups
from retina_focal.data.findings import SOURCE
from retina_focal.data.pictures import look_at_all, thumbnails
from retina_focal.data.uri import Location
from retina_focal.errors import UserError
from retina_focal.files import cache_folder, leads_outside, write_whole

VERSION = 1  # of the rules below


def held_out(json_file: Path, image_root: Path, location: Location) -> Path:
    """The COCO file, in the cache, of the part `location.split` of a whole.

    "val" holds about `location.val` of the pictures, "train" the others; both have all classes.
    Pictures that are equal or look alike are in one part. The draw depends on the seed and on what
    the pictures are, not on their order or names.

    Args:
        json_file: of the whole.
        image_root: folder that its file names start from.
    Raises:
        UserError: the file can't be used, or all pictures are alike.
    """
    is_ours = json_file.parent == cache_folder() / "datasets"
    file = read_coco(str(json_file), location.uri if is_ours else None)
    file.refuse(location.uri, trained_on=False, allow_outside=location.allow_outside)
    data = Path(file.mended).read_bytes()
    key = hashlib.sha256(data)
    key.update(repr((VERSION, str(image_root), location.val, location.seed)).encode())
    stem = f"{location.format}-{{}}-{key.hexdigest()[:24]}.json"
    places = {x: cache_folder() / "datasets" / stem.format(x) for x in ("train", "val")}
    if not all(path.exists() for path in places.values()):
        content = json.loads(data)
        if not is_ours:
            _name_records(content)
        is_val = _draw(content["images"], image_root, location)
        for name, path in places.items():
            write_whole(path, json.dumps(_part(content, is_val == (name == "val"))))
    return places[location.split]


def _name_records(content: dict) -> None:
    """As messages name the records of a file that a user gave."""
    content["info"] = {"findings": [], "unread": 0}
    for section in ("images", "annotations"):
        for i, record in enumerate(content.get(section, [])):
            record[SOURCE] = f"{section}[{i}] (id {record['id']})"


def _draw(images: list[dict], image_root: Path, location: Location) -> np.ndarray:
    """(n,) bool: which images are held out."""
    assert location.val is not None
    names = [image["file_name"] for image in images]
    assert location.allow_outside or not any(map(leads_outside, names))
    paths = [os.path.join(image_root, name) for name in names]
    looks = look_at_all(paths, what="looking for near-duplicates")
    usable = [i for i, look in enumerate(looks) if not look.kind]  # the others stay in train
    if not usable:
        raise UserError(f"'{location.uri}': '{paths[0]}' and all others are bad: {looks[0].reason}")
    good = [looks[i] for i in usable]
    members: dict[int, list[int]] = {}
    for i, first in zip(usable, groups([x.digest for x in good], thumbnails(good)), strict=True):
        members.setdefault(int(first), []).append(i)
    if len(members) < 2:
        raise UserError(
            f"'{location.uri}': its {len(good)} pictures are all alike, so that no part can be "
            "held out; name another dataset for val"
        )

    def drawn(pictures: list[int]) -> bytes:
        lowest = min(looks[i].digest for i in pictures)
        return hashlib.sha256(b"%d %b" % (location.seed, lowest)).digest()

    order = sorted(members.values(), key=drawn)
    left, is_val = round(location.val * len(good)), np.zeros(len(images), bool)
    for pictures in order:
        if len(pictures) <= left:
            is_val[pictures] = True
            left -= len(pictures)
    if not is_val.any():
        is_val[min(order, key=len)] = True
    return is_val


def _part(content: dict, kept: np.ndarray) -> dict:
    images = [x for x, keep in zip(content["images"], kept, strict=True) if keep]
    ids = {x["id"] for x in images}
    annotations = [x for x in content.get("annotations", []) if x["image_id"] in ids]
    return content | {"images": images, "annotations": annotations}
