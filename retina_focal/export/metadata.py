"""What an exported file says of itself: one JSON text, under one key in every format."""

import json
from dataclasses import asdict, dataclass, fields

from retina_focal.errors import UserError

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

    def to_json(self) -> str:
        content = asdict(self)
        image = {key: content.pop(key) for key in ("format", "dtype")}
        return json.dumps({"version": VERSION, "input": image, **content})

    @classmethod
    def from_json(cls, text: str, source: str) -> "Metadata":
        """
        Args:
            source: names the file in messages.
        Raises:
            UserError: it is no JSON, of another version, or lacks something.
        """
        try:
            content = json.loads(text)
            version = content.pop("version")
            if not isinstance(version, int) or version > VERSION:
                raise UserError(
                    f"'{source}' has metadata of version {version}; this retina_focal reads "
                    f"{VERSION}: upgrade it, or {AGAIN}"
                )
            image = content.pop("input")
            known = {x.name for x in fields(cls)}
            content = {k: v for k, v in {**image, **content}.items() if k in known}
            content["classes"] = tuple(map(str, content["classes"]))
            metadata = cls(**content)
            for key, choices in CHOICES.items():
                if getattr(metadata, key) not in choices:
                    raise ValueError(f"{key} is {getattr(metadata, key)!r}")
            return metadata
        except UserError:
            raise
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise UserError(f"'{source}' has wrong metadata ({error}); {AGAIN}") from error
