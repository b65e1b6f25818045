"""The numbers of a dataset that decide how it is trained, and the input size that follows."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from detectron2.structures import Boxes, pairwise_iou
from torch import from_numpy

from retina_focal.data.coverage import BoxTable
from retina_focal.errors import UserError

SMALL = 0.1  # quantile of a class's sizes; the class where it is least decides the input size
LEAST_BOXES = 10  # of a class that may decide
SMALL_SIDE = 32  # px, square root of the area, that this quantile shall have; COCO's "small" ends
LEAST_SIDE = 12  # px; smaller ones lie between the cells of the finest level
GRAIN = 32  # px; shorter sides are multiples, as the network pads to
SHORTEST, LONGEST = 224, 1333  # px of a shorter side, of a longer side
MAX_ENLARGEMENT = 1.5  # of a picture: beyond it there is nothing more to see
TILE = 640  # px of the network's input where pictures are cut

# What the boxes of pictures without an up and a down stay within: mean distance of their centres
# from the middle, in heights of the picture; mean logarithm of width over height; correlation of
# height in the picture and area.
MOST_SHIFT, MOST_LOG_RATIO, MOST_CORRELATION = 0.025, 0.15, 0.15

ENOUGH_EPOCHS, ENOUGH_STEPS = 13, 250  # what a training gets before its pictures become larger
# What it gets before they become larger than their files, or are turned upside down: both take
# longer to learn. In 5 minutes of tree tiles of 400 px AP50 of val was 56.6 at 544 px, 56.9 at 400;
# with turned pictures 51.2 for 57.7, in 3 minutes 54.7 for 56.4. Blood cells, turned in 744 steps,
# gained AP (57.6 for 57.2). One seed each.
MANY_STEPS = 500
SPENT = 0.95  # of the minutes: machines are not even
EVALUATIONS, SHARE_OF_EVALUATIONS = 3, 0.06  # before the last; of the time
SAVED_EVERY, LEAST_SAVES = 5.0, 4  # minutes between checkpoints, and their number in a short run


@dataclass(frozen=True)
class Fingerprint:
    """The numbers of the training pictures that decide."""

    classes: tuple[str, ...]
    boxes_of_class: tuple[int, ...]
    pictures_of_class: tuple[int, ...]
    num_pictures: int
    num_empty: int  # pictures without a box
    num_val: int  # pictures to evaluate
    shorter: float  # px, median
    aspect: float  # longer side over shorter, 95% of the pictures have less
    small: float  # px, square root of the area: the class's quantile `SMALL` that is the least
    most_boxes: int  # of one picture
    most_in_tile: int  # of a part of `TILE` px
    num_tiles: int  # of `TILE` px, that fill the pictures
    most_pixels: int  # of one picture
    overlap: float  # IoU that 1% of the boxes exceed with another one of their class
    has_up: bool = True  # whether anything in the boxes tells up from down

    @property
    def epoch(self) -> int:
        """Pictures, or tiles of them, that the network sees in an epoch."""
        return self.num_tiles if is_tiled(self) else self.num_pictures


@dataclass(frozen=True)
class Machine:
    """What trains."""

    has_gpu: bool
    cores: int
    has_hotcoco: bool = False  # whether it is installed


@dataclass(frozen=True)
class Pace:
    """What was measured with a shorter side of `shorter` px."""

    shorter: int
    batch: int
    start: float  # s from the command to the first step, and of the end
    step: float  # s
    picture: float  # s of evaluating one, its share of the AP's computation included
    save: float = 0.0  # s of writing a checkpoint

    def step_at(self, shorter: float) -> float:
        """Seconds of a step: they grow as the pixels do."""
        return self.step * (shorter / self.shorter) ** 2

    def picture_at(self, shorter: float) -> float:
        return self.picture * (shorter / self.shorter) ** 2


def fingerprint(table: BoxTable, classes: Sequence[str], num_val: int) -> Fingerprint:
    """The fingerprint of a training set.

    Raises:
        UserError: it has no box with an area.
    """
    num_boxes, table = len(table), table.with_area()
    if not len(table):
        without = f"the {num_boxes:,} boxes that are no crowds have no area"
        raise UserError(
            f"the training set has nothing to learn from: {without if num_boxes else 'no boxes'}; "
            "expected one at least"
        )
    sides = np.sqrt((table.boxes[:, 2:] - table.boxes[:, :2]).prod(1))
    of_class = [sides[table.classes == x] for x in range(len(classes))]
    of_class = [x for x in of_class if len(x) >= LEAST_BOXES] or [sides]
    num_pictures = len(table.sizes)
    pairs = np.unique(np.stack([table.classes, table.pictures]), axis=1)
    per_picture = np.bincount(table.pictures, minlength=num_pictures)
    return Fingerprint(
        tuple(classes),
        tuple(np.bincount(table.classes, minlength=len(classes)).tolist()),
        tuple(np.bincount(pairs[0], minlength=len(classes)).tolist()),
        num_pictures,
        int((per_picture == 0).sum()),
        num_val,
        float(np.median(table.sizes.min(1))),
        float(np.quantile(table.sizes.max(1) / table.sizes.min(1), 0.95)),
        min(float(np.quantile(x, SMALL)) for x in of_class),
        int(per_picture.max()),
        _most_in_tile(table),
        int(np.ceil(table.sizes / TILE).prod(1).sum()),
        int(table.sizes.prod(1).max()),
        _overlap(table),
        bool(_has_up(table)),
    )


def _has_up(table: BoxTable) -> bool:
    """Whether the boxes tell up from down.

    Seen from above, or through a microscope, the objects of each class are as wide as high in the
    mean, and lie as often and as large in the upper half as in the lower. Things that stand on the
    ground don't. The brightness of pictures does not tell: a microscope's light has a gradient too.
    """
    sides, classes = table.boxes[:, 2:] - table.boxes[:, :2], table.classes
    place = table.boxes[:, 1::2].mean(1) / table.sizes[table.pictures, 0] - 0.5
    ratio, area = np.log(sides[:, 0] / sides[:, 1]), np.log(sides.prod(1))
    of_class = [
        ratio[classes == x].mean()
        for x in np.unique(classes)
        if (classes == x).sum() >= LEAST_BOXES
    ]
    varies = place.std() > 0 and area.std() > 0
    correlation = np.corrcoef(place, area)[0, 1] if varies else 0.0
    return (
        abs(place.mean()) > MOST_SHIFT
        or abs(correlation) > MOST_CORRELATION
        or max(map(abs, of_class), default=1.0) > MOST_LOG_RATIO
    )


def _most_in_tile(table: BoxTable) -> int:
    """Centres of boxes in a square of `TILE` px, the most of those that are half a side apart."""
    cells = (table.boxes[:, :2] + table.boxes[:, 2:]) // TILE  # of half a side
    places, counts = np.unique(
        np.column_stack([table.pictures, cells]).astype(np.int64), axis=0, return_counts=True
    )
    of_cell = dict(zip(map(tuple, places.tolist()), counts.tolist(), strict=True))
    return max(
        sum(of_cell.get((picture, x + i, y + j), 0) for i in (0, 1) for j in (0, 1))
        for picture, x0, y0 in of_cell
        for x, y in ((x0, y0), (x0 - 1, y0), (x0, y0 - 1), (x0 - 1, y0 - 1))
    )


def _overlap(table: BoxTable, max_pictures: int = 500) -> float:
    """Quantile 99% of the IoU of a box with its closest neighbour of the same class."""
    best = [np.zeros(1)]
    step = -(-len(table.sizes) // max_pictures)
    for picture in range(0, len(table.sizes), step):
        mine = table.pictures == picture
        boxes = Boxes(from_numpy(table.boxes[mine]))
        ious = pairwise_iou(boxes, boxes).numpy()
        ious[table.classes[mine][:, None] != table.classes[mine]] = 0
        np.fill_diagonal(ious, 0)
        if len(ious):
            best.append(ious.max(1))
    return float(np.quantile(np.concatenate(best), 0.99))


def is_tiled(found: Fingerprint) -> bool:
    """Whether small boxes would be too small in whole pictures of any size that fits."""
    whole = found.small * min(MAX_ENLARGEMENT, LONGEST / (found.shorter * found.aspect))
    return whole < LEAST_SIDE and found.small * MAX_ENLARGEMENT > whole


def wanted_shorter(found: Fingerprint) -> int:
    """px of the shorter side, of pictures or of tiles, at which small boxes are large enough."""
    if is_tiled(found):
        return TILE
    most = min(found.shorter * MAX_ENLARGEMENT, LONGEST / found.aspect)
    return grained(min(found.shorter * SMALL_SIDE / found.small, most), SHORTEST)


def affordable_shorter(found: Fingerprint, pace: Pace, minutes: float) -> int:
    """The largest px up to `wanted_shorter` at which the minutes suffice for enough steps."""
    wanted = wanted_shorter(found)
    least = wanted if is_tiled(found) else max(SHORTEST, found.shorter * LEAST_SIDE / found.small)
    fits = [
        side
        for side in range(grained(least, SHORTEST), wanted + 1, GRAIN)
        if steps_within(found, pace, minutes, side) >= enough_steps(found, pace.batch, side)
    ]
    return max(fits, default=min(wanted, grained(least, SHORTEST)))


def enough_steps(found: Fingerprint, batch: int, shorter: float = 0) -> int:
    """Steps of `ENOUGH_EPOCHS`, at least `ENOUGH_STEPS`; of enlarged pictures `MANY_STEPS`."""
    is_enlarged = shorter > grained(found.shorter, SHORTEST)
    least = MANY_STEPS if is_enlarged else ENOUGH_STEPS
    return max(least, math.ceil(ENOUGH_EPOCHS * found.epoch / batch))


def padded_side(sides: Sequence[int], batch: int) -> float:
    """px of the shorter side of a batch whose pictures are drawn of these sizes, each as often.

    All are padded to the largest one: the root of the mean square of the largest of `batch` draws.
    """
    of_rank = (np.arange(len(sides) + 1) / len(sides)) ** batch  # P(largest <= that side)
    return math.sqrt(np.dot(np.square(sorted(sides)), np.diff(of_rank)))


def steps_within(
    found: Fingerprint, pace: Pace, minutes: float, shorter: float, padded: float = 0
) -> int:
    """Steps that fit beside the start, the evaluations and the checkpoints.

    Args:
        shorter: px, of evaluated pictures.
        padded: px, of those that are trained on; default: the same.
    """
    seconds = minutes * 60 * SPENT
    evaluation = evaluation_seconds(found, pace, shorter)
    evaluations = 1 + num_evaluations(evaluation, seconds)
    # Each evaluation may be the best one, which is saved. The end's are measured with the start.
    saves = evaluations + max(LEAST_SAVES, math.ceil(minutes / SAVED_EVERY)) - 1
    left = seconds - pace.start - evaluation * evaluations - pace.save * saves
    return max(0, int(left / pace.step_at(padded or shorter)))


def evaluation_seconds(found: Fingerprint, pace: Pace, shorter: float) -> float:
    """Of all pictures of val."""
    return found.num_val * pace.picture_at(shorter)


def num_evaluations(evaluation: float, seconds: float) -> int:
    """Evaluations before the last one, of `evaluation` s each, in a training of `seconds`."""
    return min(EVALUATIONS, int(SHARE_OF_EVALUATIONS * seconds / max(evaluation, 1e-9)))


def grained(px: float, least: int) -> int:
    return max(least, int(px / GRAIN + 0.5) * GRAIN)
