"""Finds objects in pictures with an exported model; needs onnxruntime and Pillow, not torch."""

import argparse
import json
import re
import signal
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
    "nms": "'inside'", "scores": "'(raw|calibrated)'", "graph": r"\['(float|uint8)(32)?', "
    r"'boxes float', 'classes int64', 'image \1', 'scores float'\]"}  # fmt: skip
WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"
Detections = namedtuple("Detections", "boxes scores classes names")


class Detector:
    """Detector("model.onnx")("a.jpg"), or a ValueError; threshold None: those `evaluate` chose."""

    def __init__(self, path: str | Path, threshold: float | None = 0.0, calibrated: bool = False):
        options, cpu, self.path = onnxruntime.SessionOptions(), ["CPUExecutionProvider"], path
        options.log_severity_level = 4
        options.add_session_config_entry(WEIGHTS_FOLDER, str(path))  # below a file lies nothing
        with using(path):
            expect(0 <= (threshold or 0) <= 1, f"the threshold is {threshold}, not from 0 to 1")
            s = self.session = onnxruntime.InferenceSession(Path(path).read_bytes(), options, cpu)
            text = s.get_modelmeta().custom_metadata_map.get("retina_focal")
            types = sorted(f"{x.name} {x.type[7:-1]}" for x in s.get_inputs() + s.get_outputs())
        with using(path, False, "its metadata was not written by retina-focal export"):
            about = json.loads(text, parse_constant=int)  # int takes no NaN
            again = ("export it again", "use the detector.py beside it")[about["version"] > 1]
            about = {"min": 0, "max": 10**9, **about, **about["input"], **about["resize"]}
            about["graph"] = [about["dtype"], *types]
            for k, x in METADATA.items():
                expect(re.fullmatch(x, v := repr(about.get(k))), f"{k} is {v:.99}; {again}")
            self.about, points = about, about["operating_points"] or {}
            maps = (calibrated and about["scores"] == "raw" and about["calibration"]) or {}
            expect(maps or not calibrated, "no calibration: evaluate the run, then export it again")
            low = [points.get(x, 0.3) if threshold is None else threshold for x in about["classes"]]
            self.least = np.array(low, dtype=float)  # NaN for None, which nothing reaches
            self.maps = {k: np.float64([x["scores"], x["values"]]) for k, x in maps.items()}

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
            boxes = (boxes * ((wh := np.float32(size * 2)) / np.float32(sides * 2))).clip(0, wh)
            kept = (boxes[:, 2:] > boxes[:, :2]).all(axis=1) & (scores >= self.least[classes])
            names = [self.about["classes"][x] for x in classes[kept]]
            maps = [self.maps.get(x, ((0, 1), (0, 1))) for x in names]
            scores = [np.interp(x, *y) for x, y in zip(scores[kept], maps, strict=True)]
            return Detections(boxes[kept], np.float32(scores), classes[kept], names)


def expect(is_so: object, otherwise: str) -> None:
    if not is_so:
        raise AssertionError(otherwise)


@contextmanager
def using(what: object, is_file: bool = True, words: str = ""):  # one ValueError for all errors
    name = repr(str(what)) if isinstance(what, str | Path) else f"the {type(what).__name__}"
    try:
        if is_file and name[0] != "t" and not Path(what).is_file():
            expect(False, "it is a folder" if Path(what).is_dir() else "there is no such file")
        yield
    except Exception as e:
        why = re.sub(".*External data.*", "its weights are in another file", str(e) or repr(e))
        why = words if words and not isinstance(e, AssertionError) else why
        raise ValueError(f"{name} can't be used: {why:.400}") from e


if __name__ == "__main__":
    signal.signal(getattr(signal, "SIGPIPE", signal.SIGTERM), signal.SIG_DFL)  # `| head` ends it
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
            seen = Detections(*(np.asarray(x).tolist() for x in detector(file)))
            rows = [f"{file!r}: {x}" for x in [*zip(*seen, strict=True)] or ["nothing found"]]
            print(json.dumps({"picture": file, **seen._asdict()}) if args.json else "\n".join(rows))
        except ValueError as error:
            bad[f"detector.py: {error}"] = True
    parser.exit(bool(bad), "".join(f"{x}\n" for x in bad))
