"""Whether the pictures of a dataset are there, before hours of training find that one is not."""

import logging
import os
from collections import defaultdict
from collections.abc import Iterable, Sequence

from detectron2.data import DatasetCatalog

from retina_focal.data.classes import listed
from retina_focal.errors import UserError

# Up to this many files of a folder each is looked at. For more the folder is listed: over a network
# that takes a second, where a look at each of 118,000 files takes minutes.
FEW = 100

logger = logging.getLogger(__name__)


def expect_pictures(records: Iterable[dict], whose: str, max_missing: int = 0) -> None:
    """Refuse records whose pictures are missing.

    Args:
        records: in detectron2's format; those without a local "file_name" are not looked at.
        whose: what the message calls them.
        max_missing: so many or fewer give a warning only.
    Raises:
        UserError: there are more; the first ones are named.
    """
    missing = missing_files([x["file_name"] for x in records if "file_name" in x])
    if not missing:
        return
    text = f"{whose}: {len(missing)} pictures are not there: {listed(missing)}"
    if len(missing) <= max_missing:
        logger.warning("%s; they are skipped (DATA.MAX_BAD_IMAGES)", text)
        return
    raise UserError(
        f"{text}; correct the image folder or the file names, or put the pictures there; to train "
        f"without them add: MODEL.RETINA_FOCAL.DATA.MAX_BAD_IMAGES {len(missing)}"
    )


def expect_test_pictures(names: Sequence[str]) -> None:
    """The same for all pictures of datasets, as an evaluation reads them."""
    for name in names:
        expect_pictures(DatasetCatalog.get(name), f"dataset '{name}'")


def missing_files(paths: Iterable[str]) -> list[str]:
    """Those of the local paths that are not there, each once and in order."""
    by_folder: dict[str, dict[str, None]] = defaultdict(dict)
    for path in paths:
        if "://" not in path:
            folder, name = os.path.split(path)
            by_folder[folder][name] = None
    missing = []
    for folder, names in by_folder.items():
        listing = _listing(folder) if len(names) > FEW else set()
        left = [os.path.join(folder, name) for name in names if name not in listing]
        missing += [path for path in left if not os.path.exists(path)]
    return missing


def _listing(folder: str) -> set[str]:
    try:
        return set(os.listdir(folder or os.curdir))
    except OSError:  # a look at each tells the same
        return set()
