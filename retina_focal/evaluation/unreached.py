"""Pictures of the boxes that no anchor reaches."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from detectron2.data.detection_utils import read_image

from retina_focal.data.coverage import AnchorLayout, BoxTable, Coverage, best_anchors, resize
from retina_focal.evaluation.drawing import FONT, WHITE, class_color, legend, write_picture

MAX_BOXES = 12  # that are drawn
COLUMNS, TILE, CAPTION = 4, 240, 40  # px
CONTEXT, MIN_CROP = 2.5, 48  # of the larger of box and anchor; px of the picture


class UnreachedBox(NamedTuple):
    """A box, and the anchor that overlaps it most."""

    file_name: str
    label: int
    iou: float
    size: tuple[float, float]  # px, width and height after resizing
    corners: np.ndarray  # (2, 2, 2): anchor, box; low, high; x, y; parts of the picture's sides


def unreached(
    table: BoxTable, layout: AnchorLayout, coverage: Coverage, longer: int, lower: float
) -> list[UnreachedBox]:
    """Up to `MAX_BOXES` boxes that overlap every anchor by less than `lower`, the worst first.

    Args:
        coverage: of the table.
        longer: see `resize`.
    """
    below = (coverage.ious < lower).nonzero()[0]
    below = below[coverage.ious[below].argsort(kind="stable")]
    # A box that is missed at several shorter sides is shown once.
    _, first = np.unique(coverage.kept[below], return_index=True)
    found = []
    for pair in below[np.sort(first)[:MAX_BOXES]]:
        index = coverage.kept[pair]
        picture = table.pictures[index]
        alone = table.of_pictures(np.array([picture]))
        boxes, kept, sizes = resize(alone, int(coverage.shorter[pair]), longer)
        place = np.searchsorted(kept, index - np.searchsorted(table.pictures, picture))
        box = boxes[place : place + 1]
        corners = np.concatenate([best_anchors(layout, box, sizes), box]).reshape(2, 2, 2)
        found.append(
            UnreachedBox(
                table.file_names[picture],
                int(coverage.classes[pair]),
                float(coverage.ious[pair]),
                tuple((box[0, 2:] - box[0, :2]).tolist()),
                corners / sizes[0, ::-1],
            )
        )
    return found


def draw_unreached(found: Sequence[UnreachedBox], class_names: Sequence[str], path: Path) -> None:
    """Crops of boxes, at least one; raises as `write_picture` does."""
    tiles = [_tile(box, class_names) for box in found]
    tiles += [np.full_like(tiles[0], 255)] * (-len(tiles) % COLUMNS)
    rows = [cv2.hconcat(tiles[i : i + COLUMNS]) for i in range(0, len(tiles), COLUMNS)]
    header = np.zeros((CAPTION, rows[0].shape[1], 3), np.uint8)
    entries = [("boxes that no anchor reaches, worst first (white: the best anchor):", WHITE)]
    entries += [(name, class_color(i)) for i, name in enumerate(class_names)]
    legend(header, (8, 26), entries, header.shape[1])
    write_picture(path, cv2.vconcat([header, *rows]))


def _tile(found: UnreachedBox, class_names: Sequence[str]) -> np.ndarray:
    """(TILE + CAPTION, TILE, 3) RGB."""
    image = read_image(found.file_name, format="RGB")
    corners = found.corners * image.shape[1::-1]  # px of the picture
    side = max(CONTEXT * (corners[:, 1] - corners[:, 0]).max(), MIN_CROP)
    scale = TILE / side
    shift = TILE / 2 - scale * corners[1].mean(0)
    affine = np.array([[scale, 0, shift[0]], [0, scale, shift[1]]])
    tile = np.full((TILE + CAPTION, TILE, 3), 255, np.uint8)
    tile[:TILE] = cv2.warpAffine(image, affine, (TILE, TILE), borderValue=(128,) * 3)
    places = (corners * scale + shift).round().astype(int).tolist()
    for (first, second), color in zip(places, (WHITE, class_color(found.label)), strict=True):
        for line, width in (((0, 0, 0), 4), (color, 2)):
            cv2.rectangle(tile[:TILE], first, second, line, width)
    width, height = found.size
    texts = class_names[found.label], f"IoU {found.iou:.2f}, {width:.0f} x {height:.0f} px"
    for y, text in zip((16, 34), texts, strict=True):
        cv2.putText(tile, text, (2, TILE + y), *FONT, (0, 0, 0), 1, cv2.LINE_AA)
    return tile
