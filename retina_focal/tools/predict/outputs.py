"""What `retina-focal predict` writes, a file or a line for each picture as it is done."""

import csv
import json
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Protocol
from xml.etree import ElementTree

import numpy as np

from retina_focal.evaluation.drawing import class_color, draw_boxes
from retina_focal.evaluation.prediction import Prediction
from retina_focal.files import write_whole


class Output(Protocol):
    """One format."""

    def __init__(self, folder: Path, classes: Sequence[str], files: ExitStack):
        """
        Args:
            folder: to write to; it exists.
            classes: their names.
            files: closes the files that grow with each picture, at the end.
        """

    def add(self, picture: Prediction, found: "Found") -> None: ...


@dataclass(frozen=True)
class Found:
    """The M detections of a picture that count, by falling score; rows belong together."""

    boxes: np.ndarray  # (M, 4) XYXY in pixels
    scores: np.ndarray  # (M,)
    labels: np.ndarray  # (M,) indices of classes
    names: list[str]  # of those classes
    probabilities: np.ndarray | None  # (M,) calibrated, where that is known


class Csv:
    """`detections.csv`: a row for each box; `retina-focal` reads it as a dataset, too."""

    HEADER = ("image_path", "xmin", "ymin", "xmax", "ymax", "label", "score", "probability")

    def __init__(self, folder: Path, classes: Sequence[str], files: ExitStack):
        path = folder / "detections.csv"
        self.file = files.enter_context(path.open("w", newline="", encoding="utf-8"))
        self.rows = csv.writer(self.file)
        self.rows.writerow((*self.HEADER, "frame"))

    def add(self, picture: Prediction, found: Found) -> None:
        frame = "" if picture.frame is None else picture.frame
        for i, box in enumerate(found.boxes):
            known = found.probabilities is not None
            probability = f"{found.probabilities[i]:.4f}" if known else ""
            numbers = (*(f"{x:.2f}" for x in box), found.names[i], f"{found.scores[i]:.4f}")
            self.rows.writerow((picture.source.path, *numbers, probability, frame))
        self.file.flush()  # what is done stays, whatever happens


class Coco:
    """`results.json` in COCO's format of results, and `images.json` with what its ids mean.

    Both are whole JSON at the end; `COCO("images.json").loadRes("results.json")` reads them.
    """

    def __init__(self, folder: Path, classes: Sequence[str], files: ExitStack):
        categories = [{"id": i, "name": name} for i, name in enumerate(classes, start=1)]
        head = f'{{"categories": {json.dumps(categories)}, "annotations": [], "images": ['
        self.images = _JsonList(folder / "images.json", files, head, "]}")
        self.results = _JsonList(folder / "results.json", files, "[", "]")
        self.count = 0

    def add(self, picture: Prediction, found: Found) -> None:
        self.count += 1
        image = {"id": self.count, "file_name": str(picture.source.path)}
        if picture.frame is not None:
            image["frame"] = picture.frame
        self.images.add(image | {"width": picture.width, "height": picture.height})
        for box, score, label in zip(found.boxes, found.scores, found.labels, strict=True):
            x0, y0, x1, y1 = (round(float(x), 3) for x in box)
            bbox = [x0, y0, round(x1 - x0, 3), round(y1 - y0, 3)]
            row = {"image_id": self.count, "category_id": int(label) + 1, "bbox": bbox}
            self.results.add(row | {"score": round(float(score), 6)})


class _JsonList:
    """A list that grows in a file."""

    def __init__(self, path: Path, files: ExitStack, head: str, tail: str):
        self.file = files.enter_context(path.open("w", encoding="utf-8"))
        self.file.write(head)
        self.comma = "\n"
        files.callback(self.file.write, f"\n{tail}\n")

    def add(self, item: dict) -> None:
        self.file.write(self.comma + json.dumps(item))
        self.comma = ",\n"


class Yolo:
    """`labels/NAME.txt`: class, centre, width and height in parts of the picture, and score."""

    def __init__(self, folder: Path, classes: Sequence[str], files: ExitStack):
        self.folder = folder / "labels"
        lines = [f"  {i}: {json.dumps(name)}" for i, name in enumerate(classes)]
        write_whole(folder / "classes.yaml", "\n".join(["names:", *lines, ""]))

    def add(self, picture: Prediction, found: Found) -> None:
        lines = []
        for (x0, y0, x1, y1), score, label in zip(
            found.boxes, found.scores, found.labels, strict=True
        ):
            x, y = (x0 + x1) / 2 / picture.width, (y0 + y1) / 2 / picture.height
            width, height = (x1 - x0) / picture.width, (y1 - y0) / picture.height
            lines.append(f"{label} {x:.6f} {y:.6f} {width:.6f} {height:.6f} {score:.4f}\n")
        write_whole(self.folder / f"{picture.name}.txt", "".join(lines))


class Voc:
    """`annotations/NAME.xml` in PASCAL VOC's format, with a score for each object."""

    def __init__(self, folder: Path, classes: Sequence[str], files: ExitStack):
        self.folder = folder / "annotations"

    def add(self, picture: Prediction, found: Found) -> None:
        root = ElementTree.Element("annotation")
        _texts(root, filename=picture.source.path.name)
        size = ElementTree.SubElement(root, "size")
        _texts(size, width=picture.width, height=picture.height, depth=3)
        for box, score, name in zip(found.boxes, found.scores, found.names, strict=True):
            item = ElementTree.SubElement(root, "object")
            _texts(item, name=name, difficult=0, score=f"{score:.4f}")
            corners = dict(zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True))
            bndbox = ElementTree.SubElement(item, "bndbox")
            _texts(bndbox, **{key: f"{x:.2f}" for key, x in corners.items()})
        ElementTree.indent(root)
        text = ElementTree.tostring(root, encoding="unicode")
        write_whole(self.folder / f"{picture.name}.xml", text + "\n")


def _texts(parent: ElementTree.Element, **values: object) -> None:
    for name, value in values.items():
        ElementTree.SubElement(parent, name).text = str(value)


class Drawings:
    """`drawings/NAME.jpg`: the picture, at most `SIDE` pixels long, with its boxes."""

    FOLDER = "drawings"
    SIDE = 2048

    def __init__(self, folder: Path, classes: Sequence[str], files: ExitStack):
        self.folder = folder / self.FOLDER

    def add(self, picture: Prediction, found: Found) -> None:
        scale = picture.preview.width / picture.width
        colors = [class_color(label) for label in found.labels]
        drawn = draw_boxes(picture.preview, found.boxes * scale, colors, _titles(found))
        content = BytesIO()
        drawn.save(content, "JPEG", quality=90)
        write_whole(self.folder / f"{picture.name}.jpg", content.getvalue())


def _titles(found: Found) -> list[str]:
    return [f"{name} {score:.2f}" for name, score in zip(found.names, found.scores, strict=True)]


OUTPUTS: dict[str, type[Output]] = {
    "csv": Csv,
    "coco": Coco,
    "yolo": Yolo,
    "voc": Voc,
    "drawings": Drawings,
}
