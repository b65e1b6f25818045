"""Detections beside ground truth, as one picture."""

import os
from pathlib import Path

import cv2
import numpy as np
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog
from detectron2.data.detection_utils import read_image
from detectron2.evaluation import inference_context
from detectron2.structures import Boxes, BoxMode
from detectron2.utils.visualizer import Visualizer
from torch import nn

from retina_focal.errors import UserError
from retina_focal.files import whole_file

PANEL_WIDTH = 480  # pixels
WHITE = (255, 255, 255)
HEADER_HEIGHT = 32  # pixels
GAP = 6  # pixels between panels
# RGB of the first classes, bright on dark and on green ground alike.
COLORS = ((255, 225, 25), (255, 0, 255), (0, 255, 255), (255, 130, 48), (170, 255, 195))


def draw_detections(
    cfg: CfgNode, model: nn.Module, output: str, num_images: int = 4, score_thresh: float = 0.3
) -> None:
    """Write a picture with a row an image: ground truth left, detections right.

    Args:
        cfg: its first test set gives the images.
        model: called in evaluation mode.
        output: file to write; its ending tells the format.
        num_images: rows, spread evenly over the dataset.
        score_thresh: detections of a higher score are drawn, [0, 1].
    Raises:
        UserError: the dataset has no images, or the picture can't be written.
    """
    check_output(output)
    name = cfg.DATASETS.TEST[0]
    records = DatasetCatalog.get(name)
    if not records:
        raise UserError(f"dataset '{name}' has no images; expected at least one to draw")
    chosen = np.linspace(0, len(records) - 1, min(num_images, len(records))).round().astype(int)
    mapper = DatasetMapper(cfg, is_train=False)
    rows = []
    with inference_context(model):
        for record in (records[i] for i in chosen):
            detections = model([mapper(record)])[0]["instances"].to("cpu")
            detections = detections[detections.scores > score_thresh]
            image = read_image(record["file_name"], format="RGB")
            panels = [
                _panel(image, *_ground_truth(record)),
                _panel(image, detections.pred_boxes, detections.pred_classes.numpy()),
            ]
            gap = np.full((len(panels[0]), GAP, 3), 255, np.uint8)
            rows.append(cv2.hconcat([panels[0], gap, panels[1]]))
    classes = MetadataCatalog.get(name).thing_classes
    header = _header(rows[0].shape[1], classes, score_thresh)
    picture = cv2.vconcat([header, *rows])[:, :, ::-1]  # RGB to BGR
    with whole_file(Path(output)) as temporary:
        if not cv2.imwrite(str(temporary), picture):
            raise OSError("OpenCV could not write it")


def _ground_truth(record: dict) -> tuple[Boxes, np.ndarray]:
    """Boxes and classes of one record of a dataset; crowds are not objects."""
    annotations = [a for a in record.get("annotations", []) if not a.get("iscrowd", 0)]
    boxes = [BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS) for a in annotations]
    classes = np.array([a["category_id"] for a in annotations], dtype=int)
    return Boxes(np.array(boxes, dtype=np.float32).reshape(-1, 4)), classes


def _panel(image: np.ndarray, boxes: Boxes, classes: np.ndarray) -> np.ndarray:
    """(H, PANEL_WIDTH, 3) RGB with a box an object, coloured by class."""
    scale = PANEL_WIDTH / image.shape[1]
    image = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    # Not overlay_instances: it draws boxes half transparent.
    visualizer = Visualizer(image)
    for box, index in zip(boxes.tensor.numpy() * scale, classes, strict=True):
        visualizer.draw_box(box, alpha=1, edge_color=_color(index))
    return visualizer.output.get_image()


def _color(index: int) -> np.ndarray:
    """RGB in [0, 1] of a class."""
    return np.array(COLORS[index % len(COLORS)]) / 255


def _header(width: int, classes: list[str], score_thresh: float) -> np.ndarray:
    """What the two columns are, and the colours of the first classes."""
    header = np.zeros((HEADER_HEIGHT, width, 3), np.uint8)
    draw = (cv2.FONT_HERSHEY_SIMPLEX, 0.5)
    cv2.putText(header, "ground truth", (8, 21), *draw, WHITE, 1, cv2.LINE_AA)
    text = f"detections, score > {score_thresh:g}"
    cv2.putText(header, text, (PANEL_WIDTH + GAP + 8, 21), *draw, WHITE, 1, cv2.LINE_AA)
    x = 140
    for index, name in enumerate(classes):
        x_end = x + cv2.getTextSize(name, *draw, 1)[0][0] + 16
        if x_end > PANEL_WIDTH:
            break
        color = tuple(255 * float(c) for c in _color(index))
        cv2.putText(header, name, (x, 21), *draw, color, 1, cv2.LINE_AA)
        x = x_end
    return header


def check_output(path: str) -> None:
    """Before minutes of detection rather than after them."""
    if not os.path.isdir(os.path.dirname(path) or "."):
        raise UserError(f"can't write '{path}'; expected a folder that exists")
    if not cv2.haveImageWriter(path):
        raise UserError(f"can't write '{path}'; expected a name that ends in .png or .jpg")
