"""What an exported file says of itself: one JSON text, under one key in every format."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from detectron2.config import CfgNode

from retina_focal.config import retina_focal_node
from retina_focal.errors import UserError
from retina_focal.evaluation.operating_points import OperatingPoints
from retina_focal.weights.formats import sha256_of

KEY = "retina_focal"
VERSION = 1
AGAIN = "export the run again: retina-focal export RUN --output DIR"
CHOICES = {
    "format": ("RGB", "BGR"),
    "dtype": ("float32", "uint8"),
    "nms": ("inside", "outside"),
    "scores": ("raw", "calibrated"),
    "precision": ("fp32", "bf16", "int8"),
}

KINDS = {
    "resize": dict,
    "score_thresh": (int, float),
    "nms_thresh": (int, float),
    "class_agnostic_nms": bool,
    "topk_candidates": int,
    "detections_per_image": int,
    "operating_points": (dict, type(None)),
    "calibration": (dict, type(None)),
}


@dataclass(frozen=True)
class Metadata:
    """What whoever runs the file needs to know."""

    classes: tuple[str, ...]  # K names
    format: str  # channel order of the input
    dtype: str  # of the input
    resize: dict  # {"kind": "shortest_edge", "min": 800, "max": 1333}, pixels
    score_thresh: float
    nms_thresh: float
    nms: str
    class_agnostic_nms: bool
    topk_candidates: int
    detections_per_image: int
    operating_points: dict[str, float | None] | None
    calibration: dict | None
    scores: str
    precision: str
    checkpoint_sha256: str
    producer: str

    @classmethod
    def of_run(
        cls,
        cfg: CfgNode,
        classes: Sequence[str],
        weights: Path,
        points: OperatingPoints | None = None,
        *,
        uint8: bool = False,
        nms: str = "inside",
        scores: str = "raw",
    ) -> "Metadata":
        """What a run's config, weights and operating points say.

        Args:
            classes: K names, in the order of the model's scores.
            weights: the checkpoint.
            points: of these weights, where there are any.
        Raises:
            UserError: the config is of imported weights that detect in another way.
        """
        _expect_own_ways(cfg)
        node, edges = cfg.MODEL.RETINANET, cfg.INPUT
        resize = {"kind": "shortest_edge", "min": edges.MIN_SIZE_TEST, "max": edges.MAX_SIZE_TEST}
        return cls(
            classes=tuple(classes),
            format=edges.FORMAT,
            dtype="uint8" if uint8 else "float32",
            resize=resize if edges.MIN_SIZE_TEST else {"kind": "none"},
            score_thresh=node.SCORE_THRESH_TEST,
            nms_thresh=node.NMS_THRESH_TEST,
            nms=nms,
            class_agnostic_nms=retina_focal_node(cfg).TEST.CLASS_AGNOSTIC_NMS,
            topk_candidates=node.TOPK_CANDIDATES_TEST,
            detections_per_image=cfg.TEST.DETECTIONS_PER_IMAGE,
            operating_points=None if points is None else _thresholds(points),
            calibration=None if points is None else _calibration(points),
            scores=scores,
            precision="fp32",
            checkpoint_sha256=sha256_of(weights),
            producer=f"retina_focal {_own_version()}",
        )

    def to_json(self) -> str:
        content = asdict(self)
        image = {key: content.pop(key) for key in ("format", "dtype")}
        return json.dumps({"version": VERSION, "input": image, **content}, allow_nan=False)

    def _expect_sense(self) -> None:
        """ValueError: numbers that no export writes, or no class."""
        edges = [self.resize.get(x, 1) for x in ("min", "max")]
        if not all(type(x) is int and x > 0 for x in edges):
            raise ValueError(f"resize is {self.resize!r:.80}")
        if not self.classes or not self.detections_per_image > 0 <= self.topk_candidates:
            raise ValueError(
                f"it names {len(self.classes)} classes, and {self.detections_per_image} detections"
            )

    @classmethod
    def from_json(cls, text: str, source: str) -> "Metadata":
        """
        Args:
            source: names the file in messages.
        Raises:
            UserError: it is no JSON, of another version, or lacks something.
        """
        try:
            content = json.loads(text, parse_constant=int)  # which takes no NaN
            version = content.pop("version")
            if type(version) is not int or not 1 <= version <= VERSION:
                raise UserError(
                    f"'{source}' has metadata of version {version!r:.40}; this retina_focal reads "
                    f"{VERSION}: upgrade it, or {AGAIN}"
                )
            image = content.pop("input")
            known = {x.name for x in fields(cls)}
            content = {k: v for k, v in {**image, **content}.items() if k in known}
            content["classes"] = tuple(map(str, content["classes"]))
            metadata = cls(**content)
            for key, choices in CHOICES.items():
                if getattr(metadata, key) not in choices:
                    raise ValueError(f"{key} is {getattr(metadata, key)!r:.80}")
            for key, kind in KINDS.items():
                if not isinstance(getattr(metadata, key), kind):
                    raise ValueError(f"{key} is {getattr(metadata, key)!r:.80}")
            metadata._expect_sense()
            return metadata
        except UserError:
            raise
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise UserError(f"'{source}' has wrong metadata ({error}); {AGAIN}") from error


def _expect_own_ways(cfg: CfgNode) -> None:
    """Refuse (UserError) what imported weights can ask for and exported files can't do."""
    name = cfg.MODEL.ANCHOR_GENERATOR.NAME
    if name == "TorchvisionAnchorGenerator":
        raise UserError(
            f"MODEL.ANCHOR_GENERATOR.NAME is {name}, whose steps from anchor to anchor depend on "
            "the picture: no file is written of it; fine-tune the model with OctaveAnchorGenerator"
        )
    test = retina_focal_node(cfg).TEST
    ways = {"RESIZE": "detectron2", "CLIP_BEFORE_NMS": False, "KEEP_EMPTY_BOXES": False}
    for key, known in ways.items():
        if test[key] != known:
            raise UserError(
                f"MODEL.RETINA_FOCAL.TEST.{key} is {test[key]}, which exported files don't know; "
                "to write one whose detections are a little others, add: --opts "
                + " ".join(f"MODEL.RETINA_FOCAL.TEST.{x} {y}" for x, y in ways.items())
            )


def _thresholds(points: OperatingPoints) -> dict[str, float | None]:
    return {x: None if math.isinf(y) else y for x, y in points.thresholds.items()}


def _calibration(points: OperatingPoints) -> dict[str, dict]:
    return {name: entry["calibration"] for name, entry in points.content["classes"].items()}


def _own_version() -> str:
    try:
        return version("retina_focal")
    except PackageNotFoundError:  # a checkout that is not installed
        return "of a checkout"
