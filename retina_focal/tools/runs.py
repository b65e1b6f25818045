"""A finished run as an argument: its config, its weights, its classes and what it detects.

An exported file stands for a run whose config is made of its metadata.
"""

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import inference_context
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from torch import nn
from tqdm import tqdm

from retina_focal.config import flatten, retina_focal_node
from retina_focal.data.classes import class_names, match_classes
from retina_focal.data.registration import register, register_datasets, use_datasets
from retina_focal.errors import UserError
from retina_focal.evaluation.tested import as_tested
from retina_focal.export.metadata import AGAIN, Metadata
from retina_focal.export.runners import ExportedModel, exported_file, open_exported
from retina_focal.safe_yaml import read_text
from retina_focal.tools.common import load_cfg, open_lazy
from retina_focal.training.checkpoint_files import (
    checkpoints_of,
    is_regular,
    own_first,
    peek,
    read_checkpoint,
    run_of,
)
from retina_focal.training.checkpoints import BEST
from retina_focal.training.measure import yaml_test_loader
from retina_focal.weights.load import load_model, local_weights

CONFIG = "config.yaml"  # what a training writes into its folder
IS_LAZY = (
    "is of a LazyConfig, code that runs only where you name it: beside the folder (evaluate, "
    "report) by --config-file FILE.py, or in its place (predict, export) by --config-file FILE.py "
    "--opts train.init_checkpoint="
)
FIRST = (f"{BEST}.pth", "model_final.pth")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """What predicts, as `open_run` found it."""

    cfg: CfgNode  # frozen; MODEL.WEIGHTS names the weights, OUTPUT_DIR is the run's folder
    weights: Path
    classes: tuple[str, ...]  # K names, in the order of the model's scores
    exported: ExportedModel | None = None  # `weights` is an exported file, and this is its model
    built: nn.Module | None = None  # of a LazyConfig, without weights


def open_run(
    folder: str | Path | None = None,
    config_file: str | None = None,
    opts: Sequence[str] = (),
    datasets: Sequence[Sequence[str]] = (),
    own: Sequence[str] = (),
) -> Run:
    """A run by its folder, by a config that names weights, or by a folder's weights and a config.

    Args:
        folder: of a run: its config.yaml, and its model_best.pth, else its model_final.pth, else
            its newest checkpoint; one that is not whole is skipped, with a line, and those of an
            earlier run come last. Or an exported file, or the folder of one.
        config_file: in place of the folder's; as of `train`. A LazyConfig runs if it stands here.
        opts: KEY VALUE pairs, of a LazyConfig KEY=VALUE; weights among them go before the folder's.
        datasets: rows of `--dataset`.
        own: KEY VALUE pairs of the command for ``MODEL.RETINA_FOCAL``, before `opts`.
    Raises:
        UserError: neither is given; no such folder or config, or the folder's is a LazyConfig; no
            whole weights, or of another number of classes; or see `open_exported`, `lazy_run`.
    """
    if folder is None and config_file is None:
        raise UserError("no run is given; expected its folder, or --config-file FILE")
    if folder is not None and (exported := exported_file(folder)):
        return _open_exported(exported, [*own, *opts])
    built = None
    if config_file is not None and config_file.endswith(".py"):
        cfg, built = open_lazy(config_file, opts, datasets, own)
        names_weights = any(x.startswith("train.init_checkpoint=") for x in opts)
    else:
        cfg = load_cfg(config_file or _config_of(Path(folder)), [*own, *opts], datasets).clone()
        names_weights = "MODEL.WEIGHTS" in opts[::2]
    cfg.defrost()
    if folder is not None:
        cfg.OUTPUT_DIR = str(folder)
        if not names_weights:
            cfg.MODEL.WEIGHTS = str(weights_of(Path(folder)))
    cfg.freeze()
    if not cfg.MODEL.WEIGHTS:
        raise UserError(
            "no weights are given; add: MODEL.WEIGHTS output/model_final.pth (in a LazyConfig: "
            "train.init_checkpoint=output/model_final.pth)"
        )
    weights = local_weights(cfg.MODEL.WEIGHTS)
    return Run(cfg, weights, _classes(cfg, weights), built=built)


def weights_of(folder: Path) -> Path:
    """The whole checkpoint that a run's folder means; see `open_run`.

    Raises:
        UserError: there is none.
    """
    first = [x for x in (folder / name for name in FIRST) if is_regular(x)]
    for path in own_first([*dict.fromkeys(first + checkpoints_of(folder))], run_of(folder)):
        try:
            read_checkpoint(path)
            return path
        except UserError as error:
            logger.warning("%s; it is skipped", error)
    raise UserError(
        f"'{folder}' holds no whole checkpoint; expected {FIRST[0]}, {FIRST[1]} or "
        "model_<iteration>.pth, as a training writes them: name another folder"
    )


def use_data(run: Run, data: str, measured: bool = True) -> str:
    """Register a dataset that a command names, with the classes of a run; its name.

    Args:
        data: a name that the run's config or detectron2 has, a URI or a path.
        measured: see `use_datasets`.
    Raises:
        UserError: it is not there, can't be used, or has other classes.
    """
    rows = (*run.cfg.DATASETS.get("SOURCES", ()), *run.cfg.DATASETS.get("COCO_JSON", ()))
    if data not in DatasetCatalog and data not in [name for name, *_ in rows]:
        register(data, data, allow_outside=retina_focal_node(run.cfg).DATA.ALLOW_OUTSIDE)
    use_datasets(run.cfg, [data], measured=measured)
    match_classes([data], run.classes, f"'{run.weights}'")
    return data


def run_model(run: Run) -> nn.Module:
    """The trained model, for `detections`."""
    if run.exported:
        return run.exported
    cfg = run.cfg.clone()
    cfg.defrost()
    cfg.DATASETS.TEST = ()  # whose classes are compared where they are read: `use_data`
    return load_model(cfg, run.built)


def detections(run: Run, model: nn.Module, dataset: str) -> list[dict]:
    """What a run detects, in COCO format, with the ids of the dataset's categories.

    Args:
        model: of `run_model`.
        dataset: of `use_data`.
    """
    ids = MetadataCatalog.get(dataset).get("thing_dataset_id_to_contiguous_id")
    by_class = {index: category for category, index in ids.items()}
    found = []
    model = as_tested(run.cfg, model)
    with inference_context(model), torch.no_grad():
        for inputs in tqdm(yaml_test_loader(run.cfg, dataset), dataset, unit="image"):
            for image, output in zip(inputs, model(inputs), strict=True):
                instances = output["instances"].to("cpu")
                found += instances_to_coco_json(instances, image["image_id"])
    for result in found:
        result["category_id"] = by_class[result["category_id"]]
    return found


def exported_cfg(
    metadata: Metadata, opts: Sequence[str] = (), datasets: Sequence[Sequence[str]] = ()
) -> CfgNode:
    """The config of an exported file, as far as it has one; see `load_cfg`.

    Raises:
        UserError: an option changes what the file fixes.
    """
    fixed = {
        "MODEL.RETINANET.NUM_CLASSES": len(metadata.classes),
        "MODEL.RETINANET.NMS_THRESH_TEST": float(metadata.nms_thresh),
        "MODEL.RETINANET.SCORE_THRESH_TEST": float(metadata.score_thresh),
        "MODEL.RETINANET.TOPK_CANDIDATES_TEST": metadata.topk_candidates,
        "MODEL.RETINA_FOCAL.TEST.CLASS_AGNOSTIC_NMS": metadata.class_agnostic_nms,
        "TEST.DETECTIONS_PER_IMAGE": metadata.detections_per_image,
        "TEST.AUG.ENABLED": False,
        "INPUT.FORMAT": metadata.format,
        "MODEL.WEIGHTS": "",
    }
    free = {
        **_test_sizes(metadata),
        "MODEL.DEVICE": "cpu",
        "DATALOADER.NUM_WORKERS": 0,  # a process that holds a runtime's threads is not forked
        "DATASETS.TRAIN": (),
        "DATASETS.TEST": (),
    }
    pairs = [x for pair in {**fixed, **free}.items() for x in pair]
    cfg = load_cfg("Base-RetinaFocal.yaml", [*pairs, *opts], datasets)
    changed = [key for key, value in fixed.items() if flatten(cfg)[key] != value]
    if changed:
        raise UserError(
            f"{changed[0]} is fixed in an exported file; leave it out, or export the run again "
            "with it"
        )
    return cfg


def _test_sizes(metadata: Metadata) -> dict[str, int]:
    """How pictures are resized, as keys of a config."""
    resize = metadata.resize
    if resize.get("kind") == "none":
        return {"INPUT.MIN_SIZE_TEST": 0}
    sides = [resize.get(x) for x in ("min", "max")]
    if resize.get("kind") != "shortest_edge" or not all(type(x) is int and x > 0 for x in sides):
        raise UserError(
            f"the exported file resizes by {resize}; expected shortest_edge with min and max in "
            f"pixels, or none: upgrade retina_focal, or {AGAIN}"
        )
    return dict(zip(("INPUT.MIN_SIZE_TEST", "INPUT.MAX_SIZE_TEST"), sides, strict=True))


def _open_exported(file: Path, opts: Sequence[str]) -> Run:
    model = open_exported(file)
    cfg = exported_cfg(model.metadata, opts)
    return Run(cfg, file, model.metadata.classes, model)


def _config_of(folder: Path) -> str:
    if not folder.is_dir():
        raise UserError(
            f"the run '{folder}' is no folder (relative paths start from {Path.cwd()}); expected "
            "the OUTPUT_DIR of a training"
        )
    path = folder / CONFIG
    if not path.exists():
        raise UserError(
            f"'{folder}' holds no {CONFIG}, so it is no run; expected the OUTPUT_DIR of a "
            "training, or a config in its place: --config-file FILE"
        )
    if re.search(r"^dataloader:", read_text(path), re.MULTILINE):
        weights = next((folder / x for x in FIRST if is_regular(folder / x)), "WEIGHTS")
        raise UserError(f"'{path}' {IS_LAZY}{weights}")
    return str(path)


def _classes(cfg: CfgNode, weights: Path) -> tuple[str, ...]:
    """Those of the checkpoint; of one that doesn't tell them the config's datasets', or numbers."""
    expected = cfg.MODEL.RETINANET.NUM_CLASSES
    classes = peek(weights).get("classes")
    whose, remedy = f"'{weights}' has", ""
    if classes is None:
        classes = _classes_of_datasets(cfg)
        told = f"as in {cfg.DATASETS.TRAIN}" if classes else "and neither do the datasets"
        logger.warning("'%s' does not name its classes, %s", weights, told)
        whose = f"'{weights}' names none, and {cfg.DATASETS.TRAIN or cfg.DATASETS.TEST} has"
        remedy = "name the dataset that it was trained on: DATASETS.TRAIN \"('NAME',)\"; or "
    if not classes:
        return tuple(map(str, range(expected)))
    if len(classes) != expected:
        raise UserError(
            f"{whose} {len(classes)} classes but MODEL.RETINANET.NUM_CLASSES is {expected}; "
            f"{remedy}add: MODEL.RETINANET.NUM_CLASSES {len(classes)}"
        )
    return tuple(classes)


def _classes_of_datasets(cfg: CfgNode) -> list[str] | None:
    names = (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST)
    try:
        register_datasets(cfg, names)
        return class_names(names)
    except UserError:  # files that are no longer there
        return None
