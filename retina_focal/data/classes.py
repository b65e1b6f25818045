"""Class lists, which are compared by their names: of datasets and of a checkpoint."""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence

from detectron2.data import MetadataCatalog

from retina_focal.data.coco import coco_file
from retina_focal.data.findings import RECORD, shortened
from retina_focal.errors import UserError

SHOWN = 8  # names that a line shows

logger = logging.getLogger(__name__)


def class_names(datasets: Sequence[str]) -> list[str] | None:
    """Class names, in order, of the first of these datasets that tells them."""
    return next((x for x in map(_classes, datasets) if x is not None), None)


def _classes(dataset: str) -> list[str] | None:
    names = MetadataCatalog.get(dataset).get("thing_classes")
    if names is None:  # detectron2 sets them when it reads the records
        file = coco_file(dataset)
        names = None if file is None else file.check.classes
    return list(names) if names else None  # of pictures alone there are none


def match_classes(
    datasets: Sequence[str], classes: Sequence[str] | None = None, whose: str = ""
) -> None:
    """Number the classes of every dataset as the first does, or as a model does.

    Before the records are read. A dataset of ours whose classes stand in another order takes the
    new one.

    Args:
        classes: names of the model's; default: those of the first dataset that tells its classes.
        whose: where `classes` come from.
    Raises:
        UserError: the names differ, or only the order of a dataset that is registered by others.
    """
    if classes is None:
        classes = class_names(datasets)
        whose = f"dataset '{datasets[0]}'" if datasets else ""
    for name in dict.fromkeys(datasets):
        metadata, own = MetadataCatalog.get(name), _classes(name)
        if own is None or own == list(classes):
            continue
        reason = ""
        if sorted(own) != sorted(classes):
            reason = f"{difference(own, classes)}; give the same classes the same names"
        elif len(set(own)) < len(own):
            reason = "two classes of one name are told apart by their order alone; rename one"
        elif metadata.get("source_file") is None:
            reason = "the order differs; number the categories alike, or register the file with "
            reason += "--dataset NAME JSON IMAGES, whose classes are matched by name"
        elif metadata.get("classes_of", whose) != whose:
            reason = f"the order differs from that of {metadata.classes_of}, which it is matched to"
        if reason:
            raise UserError(
                f"dataset '{name}' has the classes {listed(own)}, and {whose} has "
                f"{listed(classes)}: {reason}"
            )
        _renumber(name, list(classes), whose)


def match_checkpoint(datasets: Sequence[str], checkpoint: Mapping[str, object], path: str) -> None:
    """Number the classes of the datasets as a checkpoint does; a line says where that changes them.

    Args:
        checkpoint: what `Checkpointer.load` returns; "classes" are the names.
    Raises:
        UserError: the names differ.
    """
    names, found = checkpoint.get("classes"), class_names(datasets)
    if names is None:
        if found is not None:
            logger.warning(
                "'%s' does not name its classes: they are taken to be those of the dataset, in "
                "this order: %s",
                *(path, listed(found)),
            )
        return
    match_classes(datasets, names, f"'{path}'")
    if found is not None and found != list(names):
        logger.warning(
            "the classes of the datasets, %s, are matched by name to those of '%s': %s",
            *(listed(found), path, listed(names)),
        )


def difference(own: Sequence[str], classes: Sequence[str]) -> str:
    """Which names are missing among `own`, and which are there alone; one may be there twice."""
    parts = {
        "missing": (Counter(classes) - Counter(own)).elements(),
        "only there": (Counter(own) - Counter(classes)).elements(),
    }
    found = {words: list(names) for words, names in parts.items()}
    return "; ".join(f"{words}: {listed(names)}" for words, names in found.items() if names)


def listed(names: Sequence[str]) -> str:
    """The first names, of classes or files, for a line."""
    shown, more = (shortened(x, RECORD) for x in names[:SHOWN]), len(names) - SHOWN
    return ", ".join(shown) + (f", ... ({more} more)" if more > 0 else "")


def _renumber(name: str, classes: list[str], whose: str) -> None:
    """Metadata can't be changed, only made anew; the records follow them when they are read."""
    metadata = MetadataCatalog.get(name).as_dict()
    by_class = dict(zip(metadata["thing_classes"], range(len(classes)), strict=True))
    ids = {i: x for x, i in metadata["thing_dataset_id_to_contiguous_id"].items()}
    metadata |= {
        "thing_classes": classes,
        "thing_dataset_id_to_contiguous_id": {ids[by_class[x]]: i for i, x in enumerate(classes)},
        "classes_of": whose,
    }
    MetadataCatalog.remove(name)
    MetadataCatalog.get(name).set(**metadata)
