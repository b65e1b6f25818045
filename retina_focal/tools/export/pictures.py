"""The pictures that an exported file is compared on."""

import logging
from collections.abc import Iterator, Sequence

import numpy as np
from detectron2.data import DatasetCatalog
from detectron2.data.detection_utils import read_image

from retina_focal.config import retina_focal_node
from retina_focal.data.images import BadPicture, check_head
from retina_focal.data.registration import register_datasets
from retina_focal.errors import UserError
from retina_focal.evaluation.inputs import find_inputs
from retina_focal.tools.runs import Run

# One for itself and two in a batch.
COUNT = 3
logger = logging.getLogger(__name__)


def proof_pictures(run: Run, named: Sequence[str] | None) -> list[np.ndarray]:
    """At most `COUNT` pictures, (H, W, 3) uint8 in the channel order of the run's config.

    Args:
        named: files, folders and patterns; default: the first pictures with boxes of the run's
            ``DATA.VAL``, else of its ``DATASETS.TEST``, else of its ``DATASETS.TRAIN``.
    Raises:
        UserError: there is none that can be read.
    """
    names = [str(x.path) for x in find_inputs(named) if not x.is_video] if named else _of_run(run)
    pictures, limit = [], retina_focal_node(run.cfg).DATA.MAX_PIXELS
    for name in names:
        try:
            check_head(name, limit)
            pictures.append(np.ascontiguousarray(read_image(name, run.cfg.INPUT.FORMAT)))
        except BadPicture as error:
            logger.warning("%s; it is left out", error)
        if len(pictures) == COUNT:
            break
    if not pictures:
        raise UserError(
            "no picture of the run's datasets is there to compare on; add: --pictures FILE ..."
            if named is None
            else f"none of the pictures {' '.join(named)} can be read; name others"
        )
    return pictures


def _of_run(run: Run) -> Iterator[str]:
    datasets = retina_focal_node(run.cfg).DATA.VAL, *run.cfg.DATASETS.TEST, *run.cfg.DATASETS.TRAIN
    for dataset in filter(None, datasets):
        try:
            register_datasets(run.cfg, [dataset])
            records = DatasetCatalog.get(dataset)
        except (UserError, KeyError, OSError) as error:
            logger.warning("the dataset '%s' can't be used: %s", dataset, error)
            continue
        yield from (x["file_name"] for x in records if x.get("annotations"))
