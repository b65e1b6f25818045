"""Exported files inside the product: they detect as `FocalRetinaNet` does."""

from collections.abc import Callable
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from detectron2.modeling import detector_postprocess
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn

from retina_focal.errors import UserError
from retina_focal.export.metadata import Metadata
from retina_focal.export.sessions import (
    AGAIN,
    Session,
    open_onnx,
    open_openvino,
    open_torch_export,
    open_torchscript,
)
from retina_focal.postprocess import suppress

# By the ending of the file.
FORMATS: dict[str, Callable[[Path, int], Session]] = {
    ".onnx": open_onnx,
    ".xml": open_openvino,
    ".pt2": open_torch_export,
    ".torchscript": open_torchscript,
}

ROUNDING = 1e-6  # of a score in fp32


def exported_file(path: str | Path) -> Path | None:
    """The exported model that a path means: itself, or the one in a folder that `retina-focal
    export` wrote. None: it means something else, such as a run.

    Raises:
        UserError: a folder holds several.
    """
    path = Path(path)
    if not path.is_dir():
        return path if path.suffix in FORMATS else None
    found = [x for x in (path / f"model{ending}" for ending in FORMATS) if x.exists()]
    if len(found) > 1:
        names = ", ".join(x.name for x in found)
        raise UserError(f"'{path}' holds several exported models, {names}; name one of them")
    return found[0] if found else None


def open_session(path: str | Path, threads: int | None = None) -> Session:
    """An exported model as a function of numpy arrays, in the runtime of its format.

    Args:
        path: of the model, or of the folder that `retina-focal export` wrote.
        threads: of the processor; default: as many as torch takes.
    Raises:
        UserError: it is not there, is no exported model, is not whole, is of a newer version, its
            metadata is missing or is of another model, or its runtime is not installed.
    """
    file = exported_file(path)
    if file is None:
        raise UserError(
            f"'{path}' is no exported model; expected a file that ends in {', '.join(FORMATS)}, or "
            "the folder of one"
        )
    if not file.exists():
        raise UserError(f"'{file}' does not exist (relative paths start from {Path.cwd()})")
    return FORMATS[file.suffix](file, threads or torch.get_num_threads())


def open_exported(path: str | Path, threads: int | None = None) -> "ExportedModel":
    """An exported model as a module of detectron2's kind; see `open_session`."""
    return ExportedModel(open_session(path, threads), str(path))


class ExportedModel(nn.Module):
    """Takes and gives what `FocalRetinaNet` does in inference."""

    def __init__(self, session: Session, label: str):
        """
        Args:
            session: of `open_session`.
            label: names the file in messages.
        """
        super().__init__()
        self.session = session
        self.label = label

    @property
    def metadata(self) -> Metadata:
        return self.session.metadata

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    @property
    def test_score_thresh(self) -> float:
        """As of `FocalRetinaNet`; what the file leaves out can't be had again."""
        return self.metadata.score_thresh

    @test_score_thresh.setter
    def test_score_thresh(self, value: float) -> None:
        if value < self.metadata.score_thresh - ROUNDING:
            raise UserError(
                f"'{self.label}' gives detections above a score of "
                f"{self.metadata.score_thresh:g} alone; {AGAIN} --opts "
                f"MODEL.RETINANET.SCORE_THRESH_TEST {max(value, 0):.4g}"
            )

    def forward(self, batched_inputs: list[dict]) -> list[dict[str, Instances]]:
        """
        Args:
            batched_inputs: `image` (3, H, W) in the channel order of `metadata`, resized as it
                says; `height` and `width` in pixels of the picture, default: those of the image.
                Images that follow each other in one size are one batch.
        Returns:
            `instances` of each, in pixels of the picture, by falling scores.
        """
        found = []
        for _, same in groupby(batched_inputs, lambda x: x["image"].shape):
            found += self._detect(list(same))
        return found

    def _detect(self, batch: list[dict]) -> list[dict[str, Instances]]:
        arrays = self.session(self._images([x["image"] for x in batch]))
        found = [x.shape for x in arrays]
        rows = (len(batch), found[0][1] if len(found[0]) == 3 else 0)
        if found != [(*rows, 4), rows, rows]:
            raise UserError(f"'{self.label}' gives arrays of {found}, no boxes, scores and classes")
        results = []
        for record, *rows in zip(batch, *map(torch.from_numpy, arrays), strict=True):
            size = tuple(record["image"].shape[1:])
            instances = self._instances(size, *rows)
            height, width = record.get("height", size[0]), record.get("width", size[1])
            results.append({"instances": detector_postprocess(instances, height, width)})
        return results

    def _images(self, images: list[Tensor]) -> np.ndarray:
        batch = torch.stack(images)
        if self.metadata.dtype == "uint8":
            return batch.to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu().numpy()
        return batch.float().cpu().numpy()

    def _instances(
        self, size: tuple[int, int], boxes: Tensor, scores: Tensor, classes: Tensor
    ) -> Instances:
        """What the rows of an image hold; of candidates, what non-maximum suppression leaves."""
        metadata = self.metadata
        used = classes >= 0
        boxes, scores, classes = boxes[used], scores[used], classes[used]
        if len(classes) and classes.max() >= len(metadata.classes):
            raise UserError(
                f"'{self.label}' finds a class {int(classes.max())} but its metadata names "
                f"{len(metadata.classes)} classes: it is of another model; {AGAIN}"
            )
        if metadata.nms == "outside":
            kept = suppress(
                boxes, scores, classes, metadata.nms_thresh, metadata.class_agnostic_nms
            )[: metadata.detections_per_image]
            boxes, scores, classes = boxes[kept], scores[kept], classes[kept]
        return Instances(size, pred_boxes=Boxes(boxes), scores=scores, pred_classes=classes)
