"""A split that is made where a dataset has none: drawn by a seed, near-duplicates kept together."""

from pathlib import Path

from retina_focal.data.uri import Location
from retina_focal.errors import UserError

VERSION = 1  # of the rules below


def held_out(json_file: Path, image_root: Path, location: Location) -> Path:
    """The COCO file, in the cache, of the part `location.split` ("train" or "val") of a whole."""
    raise UserError("not yet")
