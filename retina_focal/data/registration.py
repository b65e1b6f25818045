"""Datasets in COCO format, registered from the config or the command line."""

import difflib
import logging
import os
from collections.abc import Sequence

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json
from detectron2.utils.file_io import PathManager

from retina_focal.config import retina_focal_node
from retina_focal.data.class_filter import keep_classes
from retina_focal.data.classes import class_names, listed, match_classes
from retina_focal.data.coco import CocoFile, coco_file, read_coco
from retina_focal.data.sources import load, locate, open_coco
from retina_focal.errors import UserError

logger = logging.getLogger(__name__)


def use_datasets(
    cfg: CfgNode, names: Sequence[str], trained_on: Sequence[str] = (), measured: bool = True
) -> None:
    """Register, check and compare with the model the datasets that a command reads.

    Args:
        trained_on: the names among `names` that are trained on.
        measured: else only the pictures count, and there may be no class.
    Raises:
        UserError: there is no name, or one is not registered; files are missing or can't be used;
            the model has another number of classes, or the datasets have other classes.
    """
    if not names:
        raise UserError("the config names no dataset; add: DATASETS.TEST \"('name',)\"")
    register_datasets(cfg, names)
    check_datasets(names, trained_on, measured)
    if cfg.MODEL.META_ARCHITECTURE == "FocalRetinaNet":
        check_num_classes(names, cfg.MODEL.RETINANET.NUM_CLASSES)
    match_classes(names)


def register_datasets(cfg: CfgNode, names: Sequence[str] | None = None) -> None:
    """Register the rows of ``DATASETS.SOURCES`` and ``DATASETS.COCO_JSON`` with these names.

    A second call changes nothing.

    Every process needs the registration.

    Args:
        names: of datasets; default: those of ``DATASETS.TRAIN`` and ``DATASETS.TEST``.
    Raises:
        UserError: see `register_coco_json`.
    """
    names = (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST) if names is None else names
    allow_outside = retina_focal_node(cfg).DATA.ALLOW_OUTSIDE
    for row in _rows(cfg):
        if row[0] in names:
            register(*row, allow_outside=allow_outside)
    for row in cfg.DATASETS.get("COCO_JSON", []):
        if len(row) != 3:
            raise UserError(
                f"DATASETS.COCO_JSON has the row {list(row)}; expected "
                "[name, annotation json, image folder]"
            )
        if row[0] in names:
            register_coco_json(*row, allow_outside=allow_outside)
    classes = retina_focal_node(cfg).DATA.CLASSES
    for name in dict.fromkeys(names) if classes else ():
        if name in DatasetCatalog:
            keep_classes(name, classes)


def set_num_classes(cfg: CfgNode) -> None:
    """Set ``NUM_CLASSES`` from the first dataset of ``DATASETS.SOURCES``, where it is read.

    Raises:
        UserError: the dataset can't be used.
    """
    uris, data = {name: uri for name, uri in _rows(cfg)}, retina_focal_node(cfg).DATA
    first = next((x for x in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST) if x in uris), None)
    if first is not None:
        classes = data.CLASSES or load(uris[first], data.ALLOW_OUTSIDE).classes
        if classes:
            cfg.MODEL.RETINANET.NUM_CLASSES = len(classes)


def _rows(cfg: CfgNode) -> list[list[str]]:
    """``DATASETS.SOURCES``, checked (UserError)."""
    rows = cfg.DATASETS.get("SOURCES", [])
    for row in rows:
        if not isinstance(row, (list, tuple)) or [*map(type, row)] != [str, str]:
            raise UserError(f"DATASETS.SOURCES has the row {row!r}; expected [name, uri]")
    return rows


def register_coco_json(
    name: str, json_file: str, image_root: str, allow_outside: bool = False
) -> None:
    """Register one dataset, with `thing_classes` and `evaluator_type` "coco".

    Args:
        name: as ``DATASETS.TRAIN`` and ``DATASETS.TEST`` give it.
        json_file: annotations in COCO format.
        image_root: folder that the json's file names start from.
        allow_outside: whether they may lead out of it, by ".." or as absolute paths.
    Raises:
        UserError: the json or the folder is missing, the json has what can't be used
            (`data.check`), or the name is taken by another dataset.
    """
    if _is_registered(name, (json_file, image_root)):
        return
    try:
        file = read_coco(json_file)
    except UserError as error:
        raise UserError(f"dataset '{name}': {error}") from error
    _register(name, file, json_file, image_root, allow_outside)


def register(name: str, uri: str, allow_outside: bool = False) -> None:
    """Register one dataset by its URI or path; see `sources.load` and `register_coco_json`.

    Raises:
        UserError: it is not there or has what can't be used, or the name is taken by another.
    """
    if _is_registered(name, (uri,)):
        return
    try:
        json_file, image_root = locate(uri, allow_outside)
        file = open_coco(uri, json_file)
    except UserError as error:
        raise UserError(f"dataset '{name}': {error}") from error
    _register(name, file, str(json_file), str(image_root), allow_outside, (uri,))


def _is_registered(name: str, what: tuple[str, ...]) -> bool:
    """Whether the name stands for this already (UserError: for something else)."""
    if name not in DatasetCatalog:
        return False
    metadata = MetadataCatalog.get(name)
    registered = metadata.get("registered", (None, None))
    if registered != what:
        raise UserError(
            f"dataset '{name}' is registered with {registered}, and now asked for with {what}; "
            "give one of them another name"
        )
    return True


def _register(
    name: str,
    file: CocoFile,
    json_file: str,
    image_root: str,
    allow_outside: bool,
    registered: tuple[str, ...] = (),
) -> None:
    file.refuse(name, trained_on=False, allow_outside=allow_outside)
    if not os.path.isdir(image_root):
        raise UserError(
            f"dataset '{name}': the image folder '{image_root}' does not exist "
            f"(relative paths start from {os.getcwd()})"
        )
    MetadataCatalog.get(name).set(
        json_file=file.mended,
        source_file=json_file,
        uri=file.path if file.path != json_file else None,
        registered=registered or (json_file, image_root),
        image_root=image_root,
        evaluator_type="coco",
        **({"thing_classes": file.check.classes} if file.check.classes else {}),
        thing_dataset_id_to_contiguous_id={x: i for i, x in enumerate(file.check.category_ids)},
    )
    DatasetCatalog.register(name, lambda: _load(name))


def check_datasets(
    names: Sequence[str], trained_on: Sequence[str] = (), measured: bool = True
) -> None:
    """Look for the datasets, and check their annotations, before anything is built.

    Args:
        names: of those that are read.
        trained_on: of those among them that are trained on.
        measured: whether the others are measured with.
    Raises:
        UserError: a name is not registered, or its annotation file is missing or can't be used.
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
        file = coco_file(name)
        if file is not None:
            file.refuse(name, name in trained_on)
            if name in trained_on or not measured:
                continue
            if not file.check.classes:
                raise UserError(f"dataset '{name}': {file.path} has no classes to measure by")
            if MetadataCatalog.get(name).get("source_file") is None:
                file.refuse_unmended(name)


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
        classes = class_names([name])
        if classes is not None and len(classes) != num_classes:
            raise UserError(
                f"dataset '{name}' has {len(classes)} classes ({listed(classes)}) but "
                f"{setting.rstrip(' =')} is {num_classes}; add: {setting}{len(classes)}"
            )


def report_datasets(names: Sequence[str], trained_on: Sequence[str] = ()) -> None:
    """Log what the datasets have, what was found in their files, and how classes were matched."""
    for name in dict.fromkeys(names):
        file = coco_file(name)
        if file is not None:
            file.report(name, name in trained_on)
            classes = MetadataCatalog.get(name).thing_classes
            kept = MetadataCatalog.get(name).get("kept_classes")
            if file.check.classes and not kept and classes != file.check.classes:
                logger.warning(
                    "dataset '%s': the classes of %s, %s, are matched by name: %s",
                    *(name, file.path, listed(file.check.classes), listed(classes)),
                )


def _load(name: str) -> list[dict]:
    """Records in detectron2's format, with classes as the metadata number them."""
    metadata = MetadataCatalog.get(name)
    try:
        # Without its name: detectron2 would number the classes by rising id.
        records = load_coco_json(metadata.json_file, metadata.image_root)
    except (AssertionError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"dataset '{name}': {metadata.source_file} is not in COCO format ({error!r}); expected "
            "images with id, file_name, height and width, and annotations with id, image_id, "
            "category_id and bbox"
        ) from error
    classes = metadata.thing_dataset_id_to_contiguous_id
    for record in records:
        for annotation in record["annotations"]:
            annotation["category_id"] = classes[annotation["category_id"]]
            # detectron2 resizes integers in place, and so cuts off up to a pixel of each corner.
            annotation["bbox"] = [float(x) for x in annotation["bbox"]]
    return records
