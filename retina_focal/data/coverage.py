"""Which boxes the anchors of a model reach: the best IoU of each, in closed form.

Anchors of one shape stand on a grid, and along each axis an overlap shrinks with the distance of
the centres. So of all of them the one that is nearest to the box's centre overlaps it most.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from detectron2.config import CfgNode
from detectron2.data.transforms import ResizeShortestEdge
from detectron2.modeling import Backbone, build_anchor_generator, build_backbone
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.structures import BoxMode

from retina_focal.data.resizing import middle_tile

CHUNK = 2048  # boxes that are looked at together: what stays in the cache
MIN_SIDE = 1e-5  # px; detectron2 drops smaller boxes
RANGE_SIZES = 5  # that stand for a range of shorter sides
# px, square root of the area after resizing: half octaves where most objects are.
SIZE_EDGES = (8, 16, 32, 64, 128, 256, 512)


@dataclass(frozen=True)
class BoxTable:
    """The M boxes of N pictures that a training sees: no crowds."""

    boxes: np.ndarray  # (M, 4) float64 XYXY, pixels of the file
    classes: np.ndarray  # (M,) int64
    pictures: np.ndarray  # (M,) int64, which picture a box is in
    sizes: np.ndarray  # (N, 2) int64 height, width, pixels of the file
    file_names: tuple[str, ...]  # N

    def __len__(self) -> int:
        return len(self.boxes)

    def with_area(self) -> "BoxTable":
        """Those that can be learned from."""
        kept = (self.boxes[:, 2:] > self.boxes[:, :2]).all(1)
        rows = (x[kept] for x in (self.boxes, self.classes, self.pictures))
        return BoxTable(*rows, self.sizes, self.file_names)

    def of_pictures(self, chosen: np.ndarray) -> "BoxTable":
        """Those of some pictures, given by rising index."""
        mine = np.isin(self.pictures, chosen)
        return BoxTable(
            self.boxes[mine],
            self.classes[mine],
            np.searchsorted(chosen, self.pictures[mine]),
            self.sizes[chosen],
            tuple(self.file_names[i] for i in chosen),
        )

    def middle_tiles(self, side: int) -> "BoxTable":
        """The part of each picture that `middle_tile` shows, with the boxes that lie in it."""
        tiles = np.array([middle_tile(*x, side) for x in self.sizes.tolist()]).reshape(-1, 4)
        corner, size = (np.tile(x[self.pictures], 2) for x in (tiles[:, :2], tiles[:, 2:]))
        boxes = self.boxes - corner
        cut = tiles[self.pictures, 2:] < self.sizes[self.pictures, ::-1]  # it has such edges
        outside = (boxes[:, :2] < 0) | (boxes[:, 2:] > size[:, :2])
        kept = ~(cut & outside).any(1)
        rows = (x[kept] for x in (boxes.clip(0, size), self.classes, self.pictures))
        return BoxTable(*rows, tiles[:, :1:-1], self.file_names).with_area()


def box_table(records: Sequence[dict]) -> BoxTable:
    """The boxes of a dataset's records, in detectron2's format."""
    boxes, classes, pictures = [], [], []
    for index, record in enumerate(records):
        for annotation in record.get("annotations", ()):
            if not annotation.get("iscrowd", 0):
                mode, box = annotation["bbox_mode"], annotation["bbox"]
                if mode == BoxMode.XYWH_ABS:  # what COCO has; `convert` takes 10 us
                    box = (box[0], box[1], box[0] + box[2], box[1] + box[3])
                elif mode != BoxMode.XYXY_ABS:
                    box = BoxMode.convert(list(map(float, box)), mode, BoxMode.XYXY_ABS)
                boxes.append(box)
                classes.append(annotation["category_id"])
                pictures.append(index)
    return BoxTable(
        np.array(boxes, dtype=np.float64).reshape(-1, 4),
        np.array(classes, dtype=np.int64),
        np.array(pictures, dtype=np.int64),
        np.array([(x["height"], x["width"]) for x in records], dtype=np.int64).reshape(-1, 2),
        tuple(str(x.get("file_name", "")) for x in records),
    )


def shorter_sides(min_sizes: int | Sequence[int], style: str) -> list[int]:
    """The shorter sides that ``INPUT.MIN_SIZE_TRAIN`` and its ``_SAMPLING`` draw, each as often.

    A range is stood for by `RANGE_SIZES` sizes, its ends among them.
    """
    sizes = [min_sizes] if isinstance(min_sizes, int) else list(min_sizes)
    if style == "range" and len(sizes) == 2:
        return sorted({round(x) for x in np.linspace(*sizes, RANGE_SIZES)})
    return sorted(sizes)


def resize(table: BoxTable, shorter: int, longer: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The boxes as `DatasetMapper` gives them to the model.

    Args:
        shorter: px of the shorter side, 0: as the files are.
        longer: px that the longer side has at most.
    Returns:
        boxes: (P, 4) float64 XYXY, fp32 numbers; those that keep an area.
        kept: (P,) int64, which boxes of the table they are.
        sizes: (N, 2) int64 height and width of the pictures.
    """
    sizes, which = np.unique(table.sizes, axis=0, return_inverse=True)
    new = np.array(
        [
            ResizeShortestEdge.get_output_shape(h, w, shorter, longer) if shorter else (h, w)
            for h, w in sizes.tolist()
        ],
        dtype=np.int64,
    ).reshape(-1, 2)
    sizes, new = sizes[which.reshape(-1)], new[which.reshape(-1)]
    scale, end = (new * 1.0 / sizes)[table.pictures], new[table.pictures]
    # (M, 4): x by the width's scale, y by the height's.
    boxes = table.boxes * np.tile(scale[:, ::-1], 2)
    boxes = np.minimum(boxes.clip(min=0), np.tile(end[:, ::-1], 2)).astype(np.float32)
    kept = (boxes[:, 2:] - boxes[:, :2] > MIN_SIDE).all(1).nonzero()[0]
    return boxes[kept].astype(np.float64), kept, new


@dataclass(frozen=True)
class AnchorLayout:
    """Where the anchors of a picture stand, without the anchors."""

    cells: tuple[np.ndarray, ...]  # (A, 4) float64 XYXY per level, around a centre at (0, 0)
    strides: tuple[int, ...]  # px per level
    offset: float  # of the first centre from the corner, in strides
    divisibility: int  # px; the sides of a padded picture are multiples
    square: int = 0  # px; > 0: all pictures are padded to this square

    @classmethod
    def of(
        cls, generator: DefaultAnchorGenerator, divisibility: int, constraints: dict | None = None
    ) -> "AnchorLayout":
        """The layout of a generator on a backbone with this `size_divisibility`.

        Args:
            constraints: the backbone's `padding_constraints`.
        """
        constraints = constraints or {}
        return cls(
            tuple(x.detach().cpu().double().numpy() for x in generator.cell_anchors),
            tuple(generator.strides),
            generator.offset,
            max(1, constraints.get("size_divisibility", divisibility)),
            constraints.get("square_size", 0),
        )

    @classmethod
    def on(cls, generator: DefaultAnchorGenerator, backbone: Backbone) -> "AnchorLayout":
        """The layout of a generator on a backbone."""
        return cls.of(generator, backbone.size_divisibility, backbone.padding_constraints)

    @property
    def num_per_cell(self) -> int:
        """A, of the level with most."""
        return max(map(len, self.cells))

    def grids(self, sizes: np.ndarray) -> list[np.ndarray]:
        """(N, 2) rows and columns of cells per level, of pictures of (N, 2) height and width.

        Each picture is padded alone. In a batch the largest sets the padding, so that a box at the
        right or lower edge may reach an anchor more.
        """
        if self.square:
            padded = np.full_like(sizes, self.square)
        else:
            padded = -(-sizes // self.divisibility) * self.divisibility
        return [-(-padded // stride) for stride in self.strides]


def best_ious(layout: AnchorLayout, boxes: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """The highest IoU of each box with any anchor, (M,) float64, in bounded memory.

    Args:
        boxes: (M, 4) float64 XYXY, inside their pictures.
        sizes: (M, 2) int64 height and width of each box's picture.
    """
    best = np.zeros(len(boxes))
    for first in range(0, len(boxes), CHUNK):
        chunk = slice(first, first + CHUNK)
        for iou, _, _ in _overlaps(layout, boxes[chunk], sizes[chunk]):
            np.maximum(best[chunk], iou.max(0), out=best[chunk])
    return best


def best_anchors(layout: AnchorLayout, boxes: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """(M, 4) XYXY: the anchor that each box overlaps most; arguments as of `best_ious`."""
    levels = list(_overlaps(layout, boxes, sizes))
    ious = np.concatenate([iou for iou, _, _ in levels])  # (shapes, M)
    anchors = np.concatenate(
        [cells[:, None] + np.tile(centre, (2, 1)).T for _, cells, centre in levels]
    )
    return anchors[ious.argmax(0), np.arange(len(boxes))]


def _overlaps(
    layout: AnchorLayout, boxes: np.ndarray, sizes: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Per level the (A, M) best IoU of each shape, the (A, 4) shapes, the (2, M) centres x, y."""
    low, high = np.ascontiguousarray(boxes.T).reshape(2, 2, -1)  # x and y
    area = (high - low).prod(0)
    for cells, stride, grid in zip(layout.cells, layout.strides, layout.grids(sizes), strict=True):
        place = ((low + high) / 2 / stride - layout.offset).round().clip(min=0)
        centre = (np.minimum(place, grid.T[::-1] - 1) + layout.offset) * stride
        # In float64 these differences of fp32 numbers are exact.
        (x0, y0), (x1, y1) = low - centre, high - centre
        a0, b0, a1, b1 = cells.T[:, :, None]
        intersection = np.minimum(x1, a1)
        intersection -= np.maximum(x0, a0)
        height = np.minimum(y1, b1)
        height -= np.maximum(y0, b0)
        np.maximum(intersection, 0, out=intersection)
        intersection *= np.maximum(height, 0, out=height)
        union = (area + (a1 - a0) * (b1 - b0)) - intersection
        yield np.divide(intersection, union, out=intersection), cells, centre


@dataclass(frozen=True)
class Coverage:
    """How well anchors reach boxes: P pairs of a box and a shorter side."""

    ious: np.ndarray  # (P,) the best of each
    sides: np.ndarray  # (P,) px, square root of the area after resizing
    classes: np.ndarray  # (P,)
    shorter: np.ndarray  # (P,) px of the picture's shorter side, as asked for
    kept: np.ndarray  # (P,) which box of the table

    def shares(self, thresholds: tuple[float, float], among: np.ndarray | None = None) -> dict:
        """Counts and shares of some pairs, given by a mask; default: of all.

        Args:
            thresholds: (lower, upper) of the IoU.
        """
        ious = self.ious if among is None else self.ious[among]
        lower, upper = thresholds
        of = max(len(ious), 1)
        return {
            "boxes": len(ious),
            "mean_best_iou": float(ious.mean()) if len(ious) else None,
            "at_least_upper": float((ious >= upper).sum() / of),
            "between": float(((ious >= lower) & (ious < upper)).sum() / of),
            "below_lower": float((ious < lower).sum() / of),
        }


def cover(table: BoxTable, layout: AnchorLayout, shorter: Sequence[int], longer: int) -> Coverage:
    """The best IoU of every box at every shorter side.

    Args:
        shorter, longer: see `resize`.
    """
    parts = []
    for side in shorter:
        boxes, kept, sizes = resize(table, side, longer)
        ious = best_ious(layout, boxes, sizes[table.pictures[kept]])
        sides = np.sqrt((boxes[:, 2:] - boxes[:, :2]).prod(1))
        parts.append((ious, sides, table.classes[kept], np.full(len(kept), side), kept))
    return Coverage(*map(np.concatenate, zip(*parts, strict=True)))


def size_classes(sides: np.ndarray) -> list[tuple[str, np.ndarray]]:
    """Name and mask of the boxes of each interval of `SIZE_EDGES`, and of both ends."""
    place = np.searchsorted(SIZE_EDGES, sides, side="right")
    names = [f"< {SIZE_EDGES[0]} px"]
    names += [f"{x} to {y} px" for x, y in pairwise(SIZE_EDGES)]
    names += [f">= {SIZE_EDGES[-1]} px"]
    return [(name, place == i) for i, name in enumerate(names)]


def policy_of(cfg: CfgNode) -> tuple[list[int], int]:
    """The shorter sides and the longer side's limit that a config trains with.

    [0] and 0 where it cuts tiles that keep their size, as nothing is resized; other crops don't
    count.
    """
    node = cfg.INPUT
    sides = shorter_sides(node.MIN_SIZE_TRAIN, node.MIN_SIZE_TRAIN_SAMPLING)
    if tile_of(cfg) and sides == [tile_of(cfg)]:
        return [0], 0
    return sides, node.MAX_SIZE_TRAIN


def tile_of(cfg: CfgNode) -> int:
    """px of the square tiles that a config cuts at random places in training; 0: it doesn't."""
    crop = cfg.INPUT.CROP
    is_tile = crop.ENABLED and crop.TYPE == "absolute" and len(set(crop.SIZE)) == 1
    return int(crop.SIZE[0]) if is_tile else 0


def anchors_of(cfg: CfgNode) -> tuple[DefaultAnchorGenerator, AnchorLayout]:
    """The anchors of a config's model, which is not built itself."""
    backbone = build_backbone(cfg)
    shapes = backbone.output_shape()
    levels = [shapes[name] for name in cfg.MODEL.RETINANET.IN_FEATURES]
    generator = build_anchor_generator(cfg, levels)
    return generator, AnchorLayout.on(generator, backbone)
