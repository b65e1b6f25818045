"""Datasets in COCO format, registered from the config or the command line."""

import difflib
import json
import os
from collections.abc import Sequence

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json
from detectron2.utils.file_io import PathManager

from retina_focal.errors import UserError


def use_datasets(cfg: CfgNode, names: Sequence[str]) -> None:
    """Register, look for and compare with the model the datasets that a command reads.

    Raises:
        UserError: there is no name, or one is not registered; files are missing; the model has
            another number of classes.
    """
    if not names:
        raise UserError("the config names no dataset; add: DATASETS.TEST \"('name',)\"")
    register_datasets(cfg, names)
    check_datasets(names)
    if cfg.MODEL.META_ARCHITECTURE == "FocalRetinaNet":
        check_num_classes(names, cfg.MODEL.RETINANET.NUM_CLASSES)


def register_datasets(cfg: CfgNode, names: Sequence[str] | None = None) -> None:
    """Register the rows of ``DATASETS.COCO_JSON`` with these names; again it changes nothing.

    Every process needs the registration.

    Args:
        names: of datasets; default: those of ``DATASETS.TRAIN`` and ``DATASETS.TEST``.
    Raises:
        UserError: see `register_coco_json`.
    """
    names = (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST) if names is None else names
    for row in cfg.DATASETS.get("COCO_JSON", []):
        if len(row) != 3:
            raise UserError(
                f"DATASETS.COCO_JSON has the row {list(row)}; expected "
                "[name, annotation json, image folder]"
            )
        if row[0] in names:
            register_coco_json(*row)


def register_coco_json(name: str, json_file: str, image_root: str) -> None:
    """Register one dataset, with `thing_classes` and `evaluator_type` "coco".

    Args:
        name: as ``DATASETS.TRAIN`` and ``DATASETS.TEST`` give it.
        json_file: annotations in COCO format.
        image_root: folder that the json's file names start from.
    Raises:
        UserError: the json or the folder is missing, the json has no categories, or the name is
            taken by another dataset.
    """
    metadata = MetadataCatalog.get(name)
    if name in DatasetCatalog:
        registered = (metadata.get("json_file"), metadata.get("image_root"))
        if registered != (json_file, image_root):
            raise UserError(
                f"dataset '{name}' is registered with {registered}, and now asked for with "
                f"{(json_file, image_root)}; give one of them another name"
            )
        return
    classes = _read_classes(name, json_file)
    if not os.path.isdir(image_root):
        raise UserError(
            f"dataset '{name}': the image folder '{image_root}' does not exist "
            f"(relative paths start from {os.getcwd()})"
        )
    metadata.set(
        json_file=json_file, image_root=image_root, evaluator_type="coco", thing_classes=classes
    )
    DatasetCatalog.register(name, lambda: _load(name, json_file, image_root))


def check_datasets(names: Sequence[str]) -> None:
    """Look for the datasets before anything is built.

    Raises:
        UserError: a name is not registered, or its annotation file is missing.
    """
    for name in names:
        if name not in DatasetCatalog:
            near = difflib.get_close_matches(name, DatasetCatalog.list(), n=3)
            raise UserError(
                f"dataset '{name}' is not registered{'; near it: ' if near else ''}"
                f"{', '.join(near)}; to register your own add: --dataset {name} JSON IMAGES"
            )
        json_file = MetadataCatalog.get(name).get("json_file")
        if json_file is not None and not PathManager.isfile(json_file):
            raise UserError(
                f"dataset '{name}': the annotation file '{json_file}' does not exist; detectron2 "
                "looks for its own datasets in the folder that DETECTRON2_DATASETS names, now "
                f"'{os.environ.get('DETECTRON2_DATASETS', 'datasets')}'"
            )


def check_num_classes(
    names: Sequence[str], num_classes: int, setting: str = "MODEL.RETINANET.NUM_CLASSES "
) -> None:
    """Compare the model's number of classes with that of each dataset that tells its classes.

    Args:
        setting: what the user types before the number.
    Raises:
        UserError: they differ.
    """
    for name in names:
        classes = MetadataCatalog.get(name).get("thing_classes")
        if classes is not None and len(classes) != num_classes:
            raise UserError(
                f"dataset '{name}' has {len(classes)} classes ({', '.join(classes[:5])}"
                f"{', ...' if len(classes) > 5 else ''}) but {setting.rstrip(' =')} is "
                f"{num_classes}; add: {setting}{len(classes)}"
            )


def classes_of(names: Sequence[str]) -> list[str] | None:
    """Class names of the first of these datasets that tells its own."""
    found = (MetadataCatalog.get(name).get("thing_classes") for name in names)
    return next((list(classes) for classes in found if classes is not None), None)


def _load(name: str, json_file: str, image_root: str) -> list[dict]:
    try:
        return load_coco_json(json_file, image_root, name)
    except (AssertionError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"dataset '{name}': {json_file} is not in COCO format ({error!r}); expected images "
            "with id, file_name, height and width, and annotations with id, image_id, category_id "
            "and bbox"
        ) from error


def _read_classes(name: str, json_file: str) -> list[str]:
    """Category names by rising id, detectron2's order of contiguous classes."""
    try:
        with open(json_file, encoding="utf-8") as file:
            content = json.load(file)
    except FileNotFoundError as error:
        raise UserError(
            f"dataset '{name}': the annotation file '{json_file}' does not exist "
            f"(relative paths start from {os.getcwd()})"
        ) from error
    except (OSError, ValueError) as error:  # no JSON, or no text at all
        raise UserError(f"dataset '{name}': {json_file} is not JSON: {error}") from error
    categories = content.get("categories") if isinstance(content, dict) else None
    if not categories:
        raise UserError(
            f"dataset '{name}': {json_file} has no 'categories'; expected COCO format, an object "
            "with 'images', 'annotations' and 'categories'"
        )
    try:
        return [category["name"] for category in sorted(categories, key=lambda c: c["id"])]
    except (KeyError, TypeError) as error:
        raise UserError(
            f"dataset '{name}': the 'categories' of {json_file} are {str(categories)[:80]}; "
            'expected a list of {"id": 1, "name": "..."}'
        ) from error
