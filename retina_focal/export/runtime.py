"""Finds objects in pictures with an exported model; needs onnxruntime and Pillow, not torch."""

import argparse
import json
import sys
from collections import namedtuple
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image

TURNS = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}  # EXIF orientation: Image.Transpose
METADATA = {  # the values and types that this file knows
    "version": [1], "classes": [list], "format": ["RGB", "BGR"], "dtype": ["float32", "uint8"],
    "kind": ["shortest_edge", "none"], "nms": ["inside", "outside"], "min": [int], "max": [int],
    "nms_thresh": [int, float], "detections_per_image": [int], "scores": ["raw", "calibrated"],
    "operating_points": [dict, None], "calibration": [dict, None]}  # fmt: skip
Detections = namedtuple("Detections", "boxes scores classes names")


class Detector:
    """Detector("model.onnx")("picture.jpg"); ValueError: what can't be used. `threshold`: the least
    score, None: that of each class which `evaluate` chose; `calibrated`: as probabilities."""

    def __init__(self, path: str | Path, threshold: float | None = 0.0, calibrated: bool = False):
        options, cpu = onnxruntime.SessionOptions(), ["CPUExecutionProvider"]
        options.log_severity_level = 4
        with using(path):
            self.session = onnxruntime.InferenceSession(Path(path).read_bytes(), options, cpu)
            text = self.session.get_modelmeta().custom_metadata_map.get("retina_focal", "{}")
            about = {"input": {}, "resize": {}, "min": 0, "max": 10**9, **json.loads(text)}
            self.about = about = {**about, **about["input"], **about["resize"]}
            needs = {"scores": ["raw"]} if calibrated or threshold is None else {}
            needs |= {"calibration": [dict]} if calibrated else {}
            for key, known in (METADATA | needs).items():
                if (x := about.get(key)) not in known and type(x) not in known:
                    names, again = [getattr(x, "__name__", x) for x in known], "export it again"
                    again = "evaluate the run, then " * (key in needs) + again
                    raise ValueError(f"its metadata has {key} {x!r}, not {names}; {again}")
            points, maps = about["operating_points"] or {}, about["calibration"] or {}
            low = [points.get(x, 0.3) if threshold is None else threshold for x in about["classes"]]
            self.least = np.array(low, dtype=float)  # NaN for None, which nothing reaches
            self.maps = {k: (m["scores"], m["values"]) for k, m in maps.items() if calibrated}

    def __call__(self, image: str | Path | Image.Image | np.ndarray) -> Detections:
        """XYXY boxes in pixels as EXIF turns them; of a file, image or RGB array (H, W, 3)."""
        with using(image):
            if not isinstance(image, Image.Image):
                image = (Image.fromarray if isinstance(image, np.ndarray) else Image.open)(image)
            if image.format == "EPS" or image.mode[0] in "IF":  # a program, or cut off at 255
                raise ValueError(f"it is {image.format} {image.mode}; convert it to PNG of 8 bits")
            image.load()
            with suppress(Exception):  # without EXIF, or where it can't be read, nothing is turned
                image = image.transpose(TURNS[image.getexif().get(274)])
            short, least = min(image.size), self.about["min"] or min(image.size)  # 0: as it is
            sides = [least if x == short else least / short * x for x in image.size]
            sides = [int(x * min(1.0, self.about["max"] / max(sides)) + 0.5) for x in sides]
            rgb = np.asarray(image.convert("RGB").resize(sides, Image.Resampling.BILINEAR))[None]
            x = rgb[..., ::-1] if self.about["format"] == "BGR" else rgb
            x = x.transpose(0, 3, 1, 2).astype("f4") if self.about["dtype"] == "float32" else x
            found = self.session.run(Detections._fields[:3], {"image": np.ascontiguousarray(x)})
            found = [x[0][found[2][0] >= 0] for x in found]
            kept = slice(None) if self.about["nms"] == "inside" else self.nms(*found)
            boxes, scores, classes = (x[kept] for x in found)
            size, sides = (np.tile(np.float32(x), 2) for x in (image.size, sides))
            boxes = (boxes * (size / sides)).clip(0, size)
            kept = (boxes[:, 2:] > boxes[:, :2]).all(axis=1) & (scores >= self.least[classes])
            names = [self.about["classes"][x] for x in classes[kept]]
            maps = [self.maps.get(x, ((0, 1), (0, 1))) for x in names]
            scores = [np.interp(x, *y) for x, y in zip(scores[kept], maps, strict=True)]
            return Detections(boxes[kept], np.float32(scores), classes[kept], names)

    def nms(self, boxes: np.ndarray, scores: np.ndarray, classes: np.ndarray) -> list[int]:
        """The rows that non-maximum suppression keeps, by falling score."""
        left, kept = np.argsort(-scores, kind="stable"), []
        areas = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
        while len(left) and len(kept) < self.about["detections_per_image"]:
            kept.append(first := left[0])
            left = left[1:]
            low, high = np.maximum(boxes[first], boxes[left]), np.minimum(boxes[first], boxes[left])
            both = (high[:, 2:] - low[:, :2]).clip(0).prod(axis=1)
            iou = both / np.maximum(areas[first] + areas[left] - both, 1e-9)
            others = (classes[left] != classes[first]) & (not self.about["class_agnostic_nms"])
            left = left[(iou <= self.about["nms_thresh"]) | others]
        return kept


@contextmanager
def using(file: object):
    """One ValueError with the file's name for all that onnxruntime and Pillow may raise."""
    name = repr(str(file)) if isinstance(file, str | Path) else f"the {type(file).__name__}"
    try:
        if name[0] != "t" and not Path(file).is_file():
            raise ValueError("there is no such file")
        yield
    except Exception as error:
        raise ValueError(f"{name} can't be used: {str(error).strip() or repr(error)}") from error


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pictures", nargs="+")
    parser.add_argument("--model", default=Path(__file__).with_name("model.onnx"))
    parser.add_argument("--threshold", type=float, default=0.0, help="the least score")
    parser.add_argument("--operating-points", dest="threshold", action="store_const", const=None)
    parser.add_argument("--calibrated", action="store_true")
    parser.add_argument("--json", action="store_true", help="a line of JSON per picture")
    args, detector, bad = parser.parse_args(), None, {}
    for picture in args.pictures:
        try:
            detector = detector or Detector(args.model, args.threshold, args.calibrated)
            found = {k: np.asarray(x).tolist() for k, x in detector(picture)._asdict().items()}
            rows = [f"{picture}: {x}" for x in zip(*found.values(), strict=True)]
            text = "\n".join(rows or [f"{picture}: nothing found"])
            print(json.dumps({"picture": picture, **found}) if args.json else text)
        except ValueError as error:
            bad[f"detector.py: {error}"] = True
    sys.exit("\n".join(bad) or 0)
