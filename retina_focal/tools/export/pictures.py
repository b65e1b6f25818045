"""The pictures that an exported file is compared and calibrated on."""

import logging
from collections.abc import Iterator, Sequence

import numpy as np
from detectron2.data import DatasetCatalog
from detectron2.data.detection_utils import read_image
from detectron2.data.transforms import ResizeShortestEdge

from retina_focal.config import retina_focal_node
from retina_focal.data.images import BadPicture, check_head
from retina_focal.data.registration import register_datasets
from retina_focal.errors import UserError
from retina_focal.evaluation.inputs import find_inputs
from retina_focal.export.openvino_format import MOST_PICTURES
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
    cfg = run.cfg
    names = (retina_focal_node(cfg).DATA.VAL, *cfg.DATASETS.TEST, *cfg.DATASETS.TRAIN)
    return _read(run, named, names, COUNT, "--pictures")


def calibration_images(run: Run, named: Sequence[str] | None, uint8: bool) -> list[np.ndarray]:
    """At most `MOST_PICTURES` batches of one image, resized as the run's config says.

    Args:
        named: as of `proof_pictures`; default: of ``DATASETS.TRAIN``.
    Returns:
        (1, 3, H, W) float32 or (1, H, W, 3) uint8 each.
    """
    edges = run.cfg.INPUT
    resize = ResizeShortestEdge([edges.MIN_SIZE_TEST] * 2, edges.MAX_SIZE_TEST)
    images = []
    for picture in _read(run, named, run.cfg.DATASETS.TRAIN, MOST_PICTURES, "--calibration"):
        image = resize.get_transform(picture).apply_image(picture)
        images.append(image[None] if uint8 else image.transpose(2, 0, 1)[None].astype(np.float32))
    return images


def _read(
    run: Run, named: Sequence[str] | None, datasets: Sequence[str], count: int, option: str
) -> list[np.ndarray]:
    if named is None:
        names = _of_datasets(run, datasets)
    else:
        names = (str(x.path) for x in find_inputs(named) if not x.is_video)
    pictures, limit = [], retina_focal_node(run.cfg).DATA.MAX_PIXELS
    for name in names:
        try:
            check_head(name, limit)
            pictures.append(np.ascontiguousarray(read_image(name, run.cfg.INPUT.FORMAT)))
        except BadPicture as error:
            logger.warning("%s; it is left out", error)
        if len(pictures) == count:
            break
    if not pictures:
        raise UserError(
            f"no picture of the run's datasets {[x for x in datasets if x]} can be read; add: "
            f"{option} FILE ..."
            if named is None
            else f"none of the pictures {' '.join(named)} can be read; name others"
        )
    return pictures


def _of_datasets(run: Run, datasets: Sequence[str]) -> Iterator[str]:
    for dataset in filter(None, datasets):
        try:
            register_datasets(run.cfg, [dataset])
            records = DatasetCatalog.get(dataset)
        except (UserError, KeyError, OSError) as error:
            logger.warning("the dataset '%s' can't be used: %s", dataset, error)
            continue
        yield from (x["file_name"] for x in records if x.get("annotations"))
