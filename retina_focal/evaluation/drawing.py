"""Detections beside ground truth, as one picture."""

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.detection_utils import read_image
from detectron2.evaluation import inference_context
from detectron2.structures import Boxes, BoxMode
from detectron2.utils.visualizer import Visualizer
from PIL import Image, ImageDraw, ImageFont
from torch import nn

from retina_focal.config import retina_focal_node
from retina_focal.data.images import naming
from retina_focal.errors import UserError
from retina_focal.evaluation.tested import as_tested, build_test_mapper
from retina_focal.files import write_whole

Color = tuple[int, int, int]  # RGB
PANEL_WIDTH = 480  # pixels
WHITE = (255, 255, 255)
FONT = (cv2.FONT_HERSHEY_SIMPLEX, 0.5)
HEADER_HEIGHT = 32  # pixels
GAP = 6  # pixels between panels
# RGB of the first classes, bright on dark and on green ground alike.
COLORS = ((255, 225, 25), (255, 0, 255), (0, 255, 255), (255, 130, 48), (170, 255, 195))


def draw_detections(
    cfg: CfgNode, model: nn.Module, output: str, num_images: int = 4, score_thresh: float = 0.3
) -> None:
    """Write a picture with a row for each image: ground truth left, detections right.

    Args:
        cfg: its first test set gives the images.
        model: called in evaluation mode.
        output: file to write; its ending tells the format.
        num_images: at least 1; they are spread evenly over the dataset.
        score_thresh: detections of a higher score are drawn, [0, 1].
    Raises:
        UserError: there are no images, one can't be read, or the picture can't be written.
    """
    check_output(output)
    name = cfg.DATASETS.TEST[0]
    records = DatasetCatalog.get(name)
    if not records:
        raise UserError(f"dataset '{name}' has no images; expected at least one: see DATASETS.TEST")
    chosen = np.linspace(0, len(records) - 1, min(num_images, len(records))).round().astype(int)
    mapper = naming(build_test_mapper(cfg), retina_focal_node(cfg).DATA.MAX_PIXELS)
    model, rows = as_tested(cfg, model), []
    with inference_context(model), torch.no_grad():
        for record in (records[i] for i in chosen):
            detections = model([mapper(record)])[0]["instances"].to("cpu")
            detections = detections[detections.scores > score_thresh]
            image = read_image(record["file_name"], format="RGB")
            left = _panel(image, *_ground_truth(record))
            right = _panel(image, detections.pred_boxes, detections.pred_classes.numpy())
            gap = np.full((len(left), GAP, 3), 255, np.uint8)
            rows.append(cv2.hconcat([left, gap, right]))
    classes = MetadataCatalog.get(name).get("thing_classes", [])
    header = _header(rows[0].shape[1], classes, score_thresh)
    write_picture(Path(output), cv2.vconcat([header, *rows]))


def write_picture(path: Path, image: np.ndarray) -> None:
    """Write (H, W, 3) RGB; the ending of `path` tells the format.

    Raises:
        UserError: it is too large for the format, or the file can't be written.
    """
    encoded, content = cv2.imencode(path.suffix, image[:, :, ::-1])  # RGB to BGR
    if not encoded:
        raise UserError(
            f"OpenCV can't write {image.shape[1]} x {image.shape[0]} pixels as '{path}'; give a "
            "name that ends in .png, or fewer images"
        )
    write_whole(path, content.tobytes())


def _ground_truth(record: dict) -> tuple[Boxes, np.ndarray]:
    """Boxes and classes of one record of a dataset; crowds are not objects."""
    annotations = [a for a in record.get("annotations", []) if not a.get("iscrowd", 0)]
    boxes = [BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS) for a in annotations]
    classes = np.array([a["category_id"] for a in annotations], dtype=int)
    return Boxes(np.array(boxes, dtype=np.float32).reshape(-1, 4)), classes


def _panel(image: np.ndarray, boxes: Boxes, classes: np.ndarray) -> np.ndarray:
    """(H, PANEL_WIDTH, 3) RGB with a box around each object, coloured by class."""
    scale = PANEL_WIDTH / image.shape[1]
    image = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    # Not overlay_instances: it draws boxes half transparent.
    visualizer = Visualizer(image)
    for box, index in zip(boxes.tensor.numpy() * scale, classes, strict=True):
        visualizer.draw_box(box, alpha=1, edge_color=np.array(class_color(index)) / 255)
    return visualizer.output.get_image()


def _header(width: int, classes: list[str], score_thresh: float) -> np.ndarray:
    """What the two columns are, and the colours of the first classes."""
    header = np.zeros((HEADER_HEIGHT, width, 3), np.uint8)
    entries = [(name, class_color(index)) for index, name in enumerate(classes)]
    legend(header, (8, 21), [("ground truth:", WHITE), *entries], PANEL_WIDTH)
    text = f"detections, score > {score_thresh:g}"
    legend(header, (PANEL_WIDTH + GAP + 8, 21), [(text, WHITE)], width)
    return header


def legend(
    image: np.ndarray, corner: tuple[int, int], entries: Sequence[tuple[str, Color]], end: int
) -> None:
    """Write texts, each with its RGB, into an (H, W, 3) RGB image, as many as fit in a row.

    Args:
        corner: (x, y) of the first text's lower left, pixels.
        end: x that no text crosses, pixels.
    """
    x, y = corner
    for text, color in entries:
        x_end = x + cv2.getTextSize(text, *FONT, 1)[0][0] + 16
        if x_end > end:
            break
        cv2.putText(image, text, (x, y), *FONT, color, 1, cv2.LINE_AA)
        x = x_end


def draw_boxes(
    image: Image.Image, boxes: np.ndarray, colors: Sequence[Color], titles: Sequence[str]
) -> Image.Image:
    """A copy of an RGB picture with a box and a title for each of M objects, the first on top.

    Args:
        boxes: (M, 4) XYXY in pixels of `image`.
        titles: M texts, "" for none.
    """
    drawn = image.copy()
    draw = ImageDraw.Draw(drawn)
    # Small objects get thinner lines and smaller titles, that many of them can be told apart.
    sides = (boxes[:, 2:] - boxes[:, :2]).max(1) if len(boxes) else np.array([np.inf])
    side = float(np.median(sides))
    thickness = max(round(min(max(image.size) / 320, side / 20)), 1)
    font = ImageFont.load_default(size=max(min(max(image.size) / 60, side / 3), 9))
    for box, color, title in reversed(list(zip(boxes, colors, titles, strict=True))):
        corners = [float(x) for x in box]
        draw.rectangle(corners, outline=color, width=thickness)
        if title:
            x0, y0, x1, y1 = draw.textbbox(corners[:2], title, font, anchor="ld")
            down = max(-y0, 0)  # a title at the upper edge stands inside the box
            draw.rectangle([x0 - 1, y0 + down - 1, x1 + 1, y1 + down + 1], fill=color)
            draw.text((corners[0], corners[1] + down), title, (0, 0, 0), font, anchor="ld")
    return drawn


def class_color(index: int) -> Color:
    """RGB of a class."""
    return COLORS[index % len(COLORS)]


def check_output(path: str) -> None:
    """Refuse a file that no picture can have (UserError), before minutes of detection."""
    if not Path(path).parent.is_dir():
        raise UserError(f"can't write '{path}'; expected a folder that exists")
    if not cv2.haveImageWriter(path):
        raise UserError(f"can't write '{path}'; expected a name that ends in .png or .jpg")
