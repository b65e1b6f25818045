"""Crowds as regions that a training ignores: they get through any mapper, with its transforms."""

from collections.abc import Callable
from functools import partial

# Stands for a class where detectron2's mapper would drop a crowd.
REGION = -1


def keeping_regions(mapper: Callable[[dict], dict | None]) -> Callable[[dict], dict | None]:
    """A mapper whose samples have `ignore_regions` beside `instances`; see `map_with_regions`."""
    return partial(map_with_regions, mapper)


def map_with_regions(mapper: Callable[[dict], dict | None], record: dict) -> dict | None:
    """What `mapper` makes of a record; its `instances` have no crowds, as always.

    Returns:
        None where `mapper` returns None; else its sample. Where the record has crowds (iscrowd 1),
        the sample has them as `ignore_regions`, `Boxes` in pixels of its image.
    """
    annotations = record.get("annotations", [])
    crowds = [x for x in annotations if x.get("iscrowd", 0)]
    if not crowds:
        return mapper(record)
    regions = [{**x, "iscrowd": 0, "category_id": REGION} for x in crowds]
    objects = [x for x in annotations if not x.get("iscrowd", 0)]
    sample = mapper({**record, "annotations": [*objects, *regions]})
    if sample is not None:
        is_region = sample["instances"].gt_classes == REGION
        sample["ignore_regions"] = sample["instances"].gt_boxes[is_region]
        sample["instances"] = sample["instances"][~is_region]
    return sample
