"""What an exported file says of itself: all that its users need besides the arithmetic."""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from detectron2.config import CfgNode

from retina_focal.config import retina_focal_node
from retina_focal.errors import UserError
from retina_focal.evaluation.operating_points import OperatingPoints
from retina_focal.files import open_regular

KEY = "retina_focal"  # under which a file holds the JSON text
VERSION = 1
RESIZES = ("shortest_edge", "none")


@dataclass(frozen=True)
class Metadata:
    """Of one exported file. The fields are those of the JSON object, in its order."""

    classes: tuple[str, ...]
    input: dict  # {"format": "RGB" or "BGR", "dtype": "float32" or "uint8"}
    resize: dict  # {"kind": one of RESIZES, "min": pixels, "max": pixels}
    score_thresh: float
    nms_thresh: float
    nms: str  # "inside" or "outside"
    class_agnostic_nms: bool
    topk_candidates: int
    detections_per_image: int
    operating_points: dict[str, float | None] | None  # by class; None: no score reaches the rule
    calibration: dict[str, dict] | None  # by class, as operating_points.json has it
    scores: str  # "raw" or "calibrated"
    precision: str  # "fp32", "bf16" or "int8"
    checkpoint_sha256: str
    producer: str
    version: int = VERSION

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
        precision: str = "fp32",
    ) -> "Metadata":
        """What a run's config, weights and operating points say.

        Args:
            classes: K names, in the order of the model's scores.
            weights: the checkpoint.
            points: of these weights, where there are any.
        """
        node, smallest = cfg.MODEL.RETINANET, cfg.INPUT.MIN_SIZE_TEST
        edges = {"kind": "shortest_edge", "min": smallest, "max": cfg.INPUT.MAX_SIZE_TEST}
        return cls(
            classes=tuple(classes),
            input={"format": cfg.INPUT.FORMAT, "dtype": "uint8" if uint8 else "float32"},
            resize=edges if smallest else {"kind": "none"},
            score_thresh=node.SCORE_THRESH_TEST,
            nms_thresh=node.NMS_THRESH_TEST,
            nms=nms,
            class_agnostic_nms=retina_focal_node(cfg).TEST.CLASS_AGNOSTIC_NMS,
            topk_candidates=node.TOPK_CANDIDATES_TEST,
            detections_per_image=cfg.TEST.DETECTIONS_PER_IMAGE,
            operating_points=points and _thresholds(points),
            calibration=points and _calibration(points),
            scores=scores,
            precision=precision,
            checkpoint_sha256=_sha256(weights),
            producer=f"retina_focal {_own_version()}",
        )

    def to_json(self) -> str:
        """One line; `from_json` gives the same back."""
        return json.dumps(asdict(self), ensure_ascii=False, allow_nan=False)

    @classmethod
    def from_json(cls, text: str, source: str | Path) -> "Metadata":
        """What the text of a file says.

        Args:
            source: of the text, for messages.
        Raises:
            UserError: it is no such text, of a newer version, or lacks a field or has it wrong.
        """
        try:
            content = json.loads(text)
            found = content["version"]
            if not isinstance(found, int) or not 1 <= found <= VERSION:
                raise UserError(
                    f"'{source}' was exported with version {found!r} of the metadata, and this "
                    f"package reads {VERSION}: update it with pip install -U retina_focal, or "
                    "export the run with this one"
                )
            metadata = cls(**{name: content[name] for name in cls.__annotations__})
            return cls(**{**metadata.__dict__, "classes": tuple(_checked(metadata).classes)})
        except UserError:
            raise
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            reason = f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else error
            raise UserError(
                f"the metadata '{KEY}' of '{source}' can't be used: {reason}; expected a file "
                "that retina-focal export wrote"
            ) from error


def _checked(metadata: Metadata) -> Metadata:
    """The same; raises ValueError, TypeError or KeyError where a field is wrong."""
    wrong = [
        name
        for name, is_right in {
            "classes": _are_names(metadata.classes),
            "input": metadata.input["format"] in ("RGB", "BGR")
            and metadata.input["dtype"] in ("float32", "uint8"),
            "resize": _is_resize(metadata.resize),
            "score_thresh": 0 <= metadata.score_thresh <= 1,
            "nms_thresh": 0 <= metadata.nms_thresh <= 1,
            "nms": metadata.nms in ("inside", "outside"),
            "class_agnostic_nms": isinstance(metadata.class_agnostic_nms, bool),
            "topk_candidates": metadata.topk_candidates >= 1,
            "detections_per_image": metadata.detections_per_image >= 1,
            "operating_points": _are_by_class(metadata.operating_points, metadata.classes),
            "calibration": _are_by_class(metadata.calibration, metadata.classes),
            "scores": metadata.scores in ("raw", "calibrated"),
            "precision": metadata.precision in ("fp32", "bf16", "int8"),
        }.items()
        if not is_right
    ]
    if wrong:
        raise ValueError(f"{wrong[0]} is {getattr(metadata, wrong[0])!r}")
    return metadata


def _are_names(classes: object) -> bool:
    return isinstance(classes, list) and all(isinstance(x, str) for x in classes) and bool(classes)


def _is_resize(resize: dict) -> bool:
    if resize["kind"] == "none":
        return True
    return resize["kind"] in RESIZES and 0 < resize["min"] <= resize["max"]


def _are_by_class(value: dict | None, classes: Sequence[str]) -> bool:
    return value is None or set(value) <= set(classes)


def _thresholds(points: OperatingPoints) -> dict[str, float | None]:
    return {x: None if math.isinf(y) else y for x, y in points.thresholds.items()}


def _calibration(points: OperatingPoints) -> dict[str, dict]:
    return {name: entry["calibration"] for name, entry in points.content["classes"].items()}


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open_regular(path) as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _own_version() -> str:
    try:
        return version("retina_focal")
    except PackageNotFoundError:  # a checkout that is not installed
        return "of a checkout"
