"""Finds objects in pictures with an exported model; needs onnxruntime and Pillow, not torch."""

import argparse
import json
import re
import warnings
from collections import namedtuple
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image

METADATA = {  # what this file knows, as Python writes it, and the names and types of the graph
    "version": "1", "classes": r"\[['\"].*['\"]\]", "format": "'(RGB|BGR)'", "min": r"\d{1,9}",
    "dtype": "'(float32|uint8)'", "kind": "'(shortest_edge|none)'", "max": r"[1-9]\d{,9}",
    "nms": "'inside'", "scores": "'(raw|calibrated)'",
    "graph": r"\['(float|uint8)(32)?', 'boxes float', 'classes int64', 'image \1', "
    r"'scores float'\]"}  # fmt: skip
Detections = namedtuple("Detections", "boxes scores classes names")


class Detector:
    """Detector("model.onnx")("picture.jpg"); ValueError: what can't be used. `threshold`: the least
    score, None: that of each class which `evaluate` chose; `calibrated`: as probabilities."""

    def __init__(self, path: str | Path, threshold: float | None = 0.0, calibrated: bool = False):
        options, cpu, self.path = onnxruntime.SessionOptions(), ["CPUExecutionProvider"], path
        options.log_severity_level = 4
        with using(path):
            expect(0 <= (threshold or 0) <= 1, f"the threshold is {threshold}, not from 0 to 1")
            self.session = onnxruntime.InferenceSession(Path(path).read_bytes(), options, cpu)
            text = self.session.get_modelmeta().custom_metadata_map.get("retina_focal")
            expect(text, "it has no metadata: `retina-focal export` did not write it")
            tensors = self.session.get_inputs() + self.session.get_outputs()
            types = sorted(f"{x.name} {x.type[7:-1]}" for x in tensors)
            with using("metadata", False):
                about = json.loads(text, parse_constant=int)  # int takes no NaN
                again = ("export it again", "use the detector.py beside it")[about["version"] > 1]
                about = {"min": 0, "max": 10**9, **about, **about["input"], **about["resize"]}
                about["graph"] = [about["dtype"], *types]
                for k, x in METADATA.items():
                    expect(re.fullmatch(x, v := repr(about.get(k))), f"{k} is {v:.99}; {again}")
                self.about, points = about, about["operating_points"] or {}
                maps = (about["scores"] == "raw" and about["calibration"]) or {}
            expect(maps or not calibrated, "no calibration: evaluate the run, then export it again")
            low = [points.get(x, 0.3) if threshold is None else threshold for x in about["classes"]]
            self.least = np.array(low, dtype=float)  # NaN for None, which nothing reaches
            self.maps = {k: (m["scores"], m["values"]) for k, m in maps.items() if calibrated}

    def __call__(self, image: str | Path | Image.Image | np.ndarray) -> Detections:
        """XYXY boxes in pixels as EXIF turns them; of a file, image or uint8 RGB (H, W, 3)."""
        with using(image):
            if not isinstance(image, Image.Image):
                expect(getattr(image, "dtype", "uint8") == "uint8", "its values are no uint8")
                image = (Image.fromarray if isinstance(image, np.ndarray) else Image.open)(image)
            is_plain = image.format != "EPS" and image.mode[0] not in "IF"  # a program, cut at 255
            expect(is_plain, f"it is {image.format} {image.mode}; convert it to PNG of 8 bits")
            x = image.convert("RGB")
            with suppress(Exception):  # without EXIF, or where it can't be read, nothing is turned
                x = x.transpose([None, None, 0, 3, 1, 5, 4, 6, 2][image.getexif()[274]])
            size, least = x.size, self.about["min"] or min(x.size)  # 0: as it is
            sides = [least if y == min(size) else least / min(size) * y for y in size]
            sides = [int(y * min(1.0, self.about["max"] / max(sides)) + 0.5) for y in sides]
            expect(all(sides), f"it is too thin: {size} pixels are {sides} to the model")
            x = np.asarray(x.resize(sides, Image.Resampling.BILINEAR))[None]
            x = x[..., ::-1] if self.about["format"] == "BGR" else x
            x = x.transpose(0, 3, 1, 2).astype("f4") if self.about["dtype"] == "float32" else x
        with using(self.path, False):
            found = self.session.run(Detections._fields[:3], {"image": np.ascontiguousarray(x)})
            boxes, scores, classes = (x[0][found[2][0] >= 0] for x in found)
            of_this = boxes.shape[1:] == (4,) and classes.max(initial=0) < len(self.least)
            expect(of_this, "its boxes or classes are of another model; export it again")
            size, sides = (np.tile(np.float32(x), 2) for x in (size, sides))
            boxes = (boxes * (size / sides)).clip(0, size)
            kept = (boxes[:, 2:] > boxes[:, :2]).all(axis=1) & (scores >= self.least[classes])
            names = [self.about["classes"][x] for x in classes[kept]]
            maps = [self.maps.get(x, ((0, 1), (0, 1))) for x in names]
            scores = [np.interp(x, *y) for x, y in zip(scores[kept], maps, strict=True)]
            return Detections(boxes[kept], np.float32(scores), classes[kept], names)


def expect(is_so: object, otherwise: str) -> None:
    if not is_so:
        raise ValueError(otherwise)


@contextmanager
def using(what: object, is_file: bool = True):
    """One ValueError that names what can't be used, for all that onnxruntime and Pillow raise."""
    name = repr(str(what)) if isinstance(what, str | Path) else f"the {type(what).__name__}"
    try:
        expect(not is_file or name[0] == "t" or Path(what).is_file(), "there is no such file")
        yield
    except Exception as error:
        raise ValueError(f"{name} can't be used: {str(error) or repr(error):.400}") from error


if __name__ == "__main__":
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pictures", nargs="+")
    parser.add_argument("--model", default=Path(__file__).with_name("model.onnx"))
    parser.add_argument("--threshold", type=float, default=0.0, help="the least score; default: 0")
    points = {"dest": "threshold", "action": "store_const", "const": None}
    parser.add_argument("--operating-points", **points, help="that which `evaluate` chose")
    parser.add_argument("--calibrated", action="store_true", help="scores are probabilities")
    parser.add_argument("--json", action="store_true", help="a line of JSON per picture")
    args, detector, bad = parser.parse_args(), None, {}
    for file in args.pictures:
        try:
            detector = detector or Detector(args.model, args.threshold, args.calibrated)
            found = {k: np.asarray(x).tolist() for k, x in detector(file)._asdict().items()}
            rows = [f"{file!r}: {x}" for x in zip(*found.values(), strict=True)]
            text = "\n".join(rows) or f"{file!r}: nothing found"
            print(json.dumps({"picture": file, **found}) if args.json else text)
        except ValueError as error:
            bad[f"detector.py: {error}"] = True
    parser.exit(bool(bad), "".join(f"{x}\n" for x in bad))
