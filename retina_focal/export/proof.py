"""Whether an exported file detects what the model detects, picture by picture."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from detectron2.evaluation import inference_context
from detectron2.structures import Instances, pairwise_iou
from PIL import Image
from torch import Tensor, nn

from retina_focal.errors import UserError
from retina_focal.evaluation.calibration import Map
from retina_focal.export.metadata import Metadata
from retina_focal.export.runners import ExportedModel
from retina_focal.export.sessions import Run

BATCH_SIZES = (1, 2)
# Heights and widths in parts of those that the config resizes to; the second one is turned.
PARTS = ((1.0, 1.0), (0.6, 0.85), (0.8, 0.5))
NEAR = 1e-3  # IoUs and scores this near to a threshold may fall on either side


@dataclass(frozen=True)
class Tolerance:
    """When two detections of one class are the same, and how many have to be."""

    box: float  # pixels, of each coordinate; or, below 0, minus the least IoU
    score: float
    share: float = 1.0  # of eager's detections that are found again
    above: float = 0.0  # which of eager's count


# Lower precisions move what is near a threshold; evaluation tells what they are worth.
TOLERANCES = {
    "fp32": Tolerance(box=0.05, score=1e-3),
    "bf16": Tolerance(box=-0.5, score=1.0, share=0.97, above=0.2),
    "int8": Tolerance(box=-0.5, score=1.0, share=0.97, above=0.2),
}


@dataclass(frozen=True)
class Row:
    """What was compared at one size and batch size."""

    images: int
    height: int
    width: int
    detections: int  # of eager's that count
    box: float  # greatest difference of a coordinate, pixels
    score: float
    different: int  # detections of one side without an equal one of the other


def prove(exported: ExportedModel, model: nn.Module, pictures: Sequence[np.ndarray]) -> list[Row]:
    """Run both at three sizes and two batch sizes.

    Args:
        exported: opened in the runtime of its format.
        model: `FocalRetinaNet` with the weights that were exported; it computes in fp32 here.
        pictures: (H, W, 3) uint8, in the channel order of the metadata.
    Raises:
        UserError: the two differ, an output breaks the contract of exported files, or nothing was
            detected, so that nothing is proved.
    """
    recorder = _Recorder(exported.session.run)
    recorded = ExportedModel(replace(exported.session, run=recorder), exported.label)
    precision, model.precision = model.precision, "fp32"
    rows = []
    try:
        with inference_context(model), torch.no_grad():
            for i, size in enumerate(_sizes(pictures[0], exported.metadata)):
                for count in BATCH_SIZES:
                    batch = _batch(pictures[i % len(pictures) :] + pictures, size, count)
                    rows.append(_compare(recorded, model, batch))
                    expect_contract(exported.label, recorder.arrays, exported.metadata, size)
    finally:
        model.precision = precision
    _judge(exported, rows)
    return rows


class _Recorder:
    """A session's `run` that remembers what it gave last."""

    def __init__(self, run: Run):
        self.run = run
        self.arrays: Sequence[np.ndarray] = ()

    def __call__(self, images: np.ndarray) -> Sequence[np.ndarray]:
        self.arrays = self.run(images)
        return self.arrays


def expect_contract(
    label: str, arrays: Sequence[np.ndarray], metadata: Metadata, size: tuple[int, int]
) -> None:
    """Look at what every exported file promises of its outputs (UserError); see `Session`."""
    boxes, scores, classes = arrays
    used = classes >= 0
    right = {
        "the types": (boxes.dtype, scores.dtype, classes.dtype)
        == (np.float32, np.float32, np.int64),
        "the shapes": boxes.shape == (*scores.shape, 4) and scores.shape == classes.shape,
        "the classes": (classes >= -1).all() and (classes < len(metadata.classes)).all(),
        "the unused rows": not scores[~used].any() and not boxes[~used].any(),
    }
    if metadata.nms == "inside":
        limits = np.array([size[1], size[0]] * 2)
        right |= {
            "the number of rows": scores.shape[1] == metadata.detections_per_image,
            "the order": (np.diff(scores) <= 0).all(),
            "the place of unused rows": (np.diff(used.astype(int)) <= 0).all(),
            "the boxes": (boxes >= 0).all() and (boxes <= limits).all(),
        }
    wrong = [name for name, is_right in right.items() if not is_right]
    if wrong:
        raise UserError(
            f"{label} is wrong in {', '.join(wrong)} of its outputs, so it is not written; please "
            "report this"
        )


def table(rows: Sequence[Row]) -> str:
    """The greatest differences in Markdown."""
    lines = [
        "| images | height x width | detections | box, px | score | different |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {x.images} | {x.height} x {x.width} | {x.detections} | {x.box:.1e} | {x.score:.1e} | "
        f"{x.different} |"
        for x in rows
    ]
    return "\n".join(lines)


def _judge(exported: ExportedModel, rows: Sequence[Row]) -> None:
    tolerance = TOLERANCES[exported.metadata.precision]
    total = sum(x.detections for x in rows)
    if not total:
        raise UserError(
            f"the model detects nothing in these pictures{_above(tolerance)}, so that nothing is "
            "proved; give pictures with objects: --pictures FILE ..."
        )
    different = sum(x.different for x in rows)
    if different > (1 - tolerance.share) * total:
        raise UserError(
            f"{exported.label} differs from the model in {different} of {total} detections"
            f"{_above(tolerance)}:\n{table(rows)}\nit is not written; please report this"
        )


def _above(tolerance: Tolerance) -> str:
    return f" above a score of {tolerance.above}" if tolerance.above else ""


def _sizes(picture: np.ndarray, metadata: Metadata) -> list[tuple[int, int]]:
    """Heights and widths; some are no multiples of any stride."""
    height, width = picture.shape[:2]
    if metadata.resize["kind"] == "shortest_edge":
        smallest, largest = metadata.resize["min"], metadata.resize["max"]
        scale = min(smallest / min(height, width), largest / max(height, width))
        height, width = height * scale, width * scale
    return [
        (max(1, round(x)), max(1, round(y)))
        for x, y in (
            (height * PARTS[0][0], width * PARTS[0][1]),
            (width * PARTS[1][0], height * PARTS[1][1]),
            (height * PARTS[2][0], width * PARTS[2][1]),
        )
    ]


def _batch(pictures: Sequence[np.ndarray], size: tuple[int, int], count: int) -> list[dict]:
    """`count` pictures in one size: the first alone, and for a larger batch those after it."""
    first = 0 if count == 1 else 1
    images = [Image.fromarray(pictures[(first + i) % len(pictures)]) for i in range(count)]
    resized = [np.array(x.resize(size[::-1], Image.Resampling.BILINEAR)) for x in images]
    return [{"image": torch.from_numpy(x.transpose(2, 0, 1).copy())} for x in resized]


def _compare(exported: ExportedModel, model: nn.Module, batch: list[dict]) -> Row:
    metadata, tolerance = exported.metadata, TOLERANCES[exported.metadata.precision]
    found, checked = exported(batch), []
    expected = [_calibrated(x["instances"].to("cpu"), metadata) for x in model(batch)]
    for ours, theirs in zip(expected, found, strict=True):
        checked.append(differences(ours, theirs["instances"], metadata, tolerance))
    height, width = batch[0]["image"].shape[1:]
    counts, boxes, scores, different = zip(*checked, strict=True)
    return Row(len(batch), height, width, sum(counts), max(boxes), max(scores), sum(different))


def differences(
    expected: Instances, found: Instances, metadata: Metadata, tolerance: Tolerance
) -> tuple[int, float, float, int]:
    """How many of eager's detections count, the greatest differences of boxes and of scores among
    the pairs, and how many have no partner, though nothing was near a threshold."""
    box = (expected.pred_boxes.tensor[:, None] - found.pred_boxes.tensor).abs().amax(2)
    score = (expected.scores[:, None] - found.scores).abs()
    same = expected.pred_classes[:, None] == found.pred_classes
    if tolerance.box < 0:
        near = pairwise_iou(expected.pred_boxes, found.pred_boxes) > -tolerance.box
    else:
        near = box <= tolerance.box
    rows, columns = _pairs(box, same & near & (score <= tolerance.score))
    counts = expected.scores > tolerance.above
    alone = torch.ones(len(expected), dtype=torch.bool)
    alone[rows] = False
    alone &= counts & ~_undecided(expected, metadata)
    new = torch.ones(len(found), dtype=torch.bool)
    new[columns] = False
    new &= ~_undecided(found, metadata)
    different = int(alone.sum()) + (int(new.sum()) if tolerance.share == 1 else 0)
    paired = counts[rows]
    greatest = [
        x[rows, columns][paired].max().item() if paired.any() else 0.0 for x in (box, score)
    ]
    return int(counts.sum()), *greatest, different


def _pairs(cost: Tensor, allowed: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and columns of the pairs, each at most once, the nearest first."""
    rows, columns = allowed.nonzero().unbind(1)
    pairs, row_taken, column_taken = [], set(), set()
    for i in cost[rows, columns].argsort(stable=True).tolist():
        row, column = int(rows[i]), int(columns[i])
        if row not in row_taken and column not in column_taken:
            pairs.append((row, column))
            row_taken.add(row)
            column_taken.add(column)
    return torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2).unbind(1)


def _undecided(instances: Instances, metadata: Metadata) -> Tensor:
    """(D,) bool: those that rounding may add or take away.

    Near the threshold of scores, or near that of the last detection where there are as many as can
    be. (Candidates and IoUs near their thresholds are too rare to matter.)
    """
    scores = instances.scores
    if metadata.scores == "calibrated":
        return torch.zeros_like(scores, dtype=torch.bool)
    undecided = (scores - metadata.score_thresh).abs() < NEAR * metadata.score_thresh
    if len(scores) == metadata.detections_per_image:
        undecided |= scores < scores[-1] * (1 + NEAR)
    return undecided


def _calibrated(instances: Instances, metadata: Metadata) -> Instances:
    """The same with the scores that the file is to give."""
    if metadata.scores == "raw":
        return instances
    scores = instances.scores.numpy().astype(np.float64)
    for label, name in enumerate(metadata.classes):
        entry = metadata.calibration.get(name)
        if entry:
            mine = instances.pred_classes.numpy() == label
            knots = (np.array(entry[key], dtype=np.float64) for key in ("scores", "values"))
            scores[mine] = Map(entry["method"], *knots)(scores[mine])
    calibrated = Instances(instances.image_size, **instances.get_fields())
    calibrated.scores = torch.from_numpy(scores).float()
    return calibrated
