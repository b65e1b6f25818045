"""Small datasets of real photographs in COCO format: tree crowns (MIT) and blood cells (MIT).

Both are written as ``<output>/{train,val,test}.json`` and ``<output>/images``. What is complete
already is left alone.
"""

import io
import json
import os
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from xml.etree import ElementTree

import cv2
import numpy as np

from retina_focal.errors import UserError
from retina_focal.files import Wheel, cached_wheel, write_whole

SPLITS = ("train", "val", "test")

TREES_WHEEL = Wheel(
    "deepforest==2.1.0", "8c2798d8e9be7f0004b194fe207b76c1d9fff6e711b3db67b9508dcd5d00ae54"
)
TREES_FOLDER = "deepforest/data"
TREES_HELD_OUT = "2019_YELL_2_528000_4978000_image_crop2"
TREES_PHOTOGRAPHS = (
    TREES_HELD_OUT,
    "2019_YELL_2_541000_4977000_image_crop",
    "OSBS_029",
    "SOAP_061",
)
TILE = 400  # px of a side, and the stride
MIN_TILE = 200  # px that a last row or column has at least
TEST_FROM = 0.65  # of the held-out photograph's height; the row of tiles above is val
MIN_SIDE, MIN_AREA = 2.0, 0.3  # a clipped box is larger: px of a side, part of its own area

BCCD_CLASSES = ("RBC", "WBC", "Platelets")
BCCD_INFO = {"description": "BCCD: blood cells", "url": "https://github.com/Shenggan/BCCD_Dataset"}


def prepare_trees(output: Path) -> None:
    """Tiles of four aerial photographs with boxes around tree crowns, one class.

    The two larger photographs are NEON's of Yellowstone (Wyoming), as packed by DeepForest
    (Weinstein et al. 2020). Test and val are rows of one photograph that share no pixel with train.

    Raises:
        UserError: the wheel can't be had.
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
            png = np.frombuffer(archive.read(f"{TREES_FOLDER}/{name}.png"), np.uint8)
            photograph = cv2.imdecode(png, cv2.IMREAD_COLOR)
            _, boxes = read_voc(io.BytesIO(archive.read(f"{TREES_FOLDER}/{name}.xml")))
            height, width = photograph.shape[:2]
            for x0, y0 in tile_corners(width, height):
                tile = photograph[y0 : y0 + TILE, x0 : x0 + TILE]
                file_name = f"{name}_{y0:04d}_{x0:04d}.png"
                png = cv2.imencode(".png", tile)[1].tobytes()
                write_whole(output / "images" / file_name, png)
                size = (tile.shape[1], tile.shape[0])
                clipped = clip_boxes([box for _, box in boxes], x0, y0, *size)
                split = "train"
                if name == TREES_HELD_OUT and y0 + TILE >= TEST_FROM * height:
                    split = "test" if y0 >= TEST_FROM * height else "val"
                records[split].append(_record(file_name, size, [(1, box) for box in clipped]))
    _write_splits(output, records, ("tree",), info)


def prepare_bccd(output: Path) -> None:
    """Blood smears with red cells, white cells and platelets, from ``$DETECTRON2_DATASETS/bccd``.

    Corners are taken as they stand, not shifted by VOC's 1 px; boxes without area are dropped.

    Raises:
        UserError: the folder or a file in it is missing, or a class is unknown.
    """
    source = Path(os.environ.get("DETECTRON2_DATASETS", "datasets"), "bccd")
    expected = [source / name for name in ("Annotations", "ImageSets/Main", "JPEGImages")]
    missing = [str(path) for path in expected if not path.is_dir()]
    if missing and _is_complete(output, BCCD_INFO):
        print(f"{output}: complete")
        return
    if missing:
        raise UserError(
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
                raise UserError(f"{annotation} isn't PASCAL VOC ({error})") from error
            unknown = {label for label, _ in boxes} - set(BCCD_CLASSES)
            if unknown:
                raise UserError(
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


PREPARE = {"trees": prepare_trees, "bccd": prepare_bccd}


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
        The boxes of which more than `MIN_SIDE` px of each side and more than `MIN_AREA` of the
        area are inside.
    """
    xyxy = np.asarray(boxes, float).reshape(-1, 4)
    origin = np.array([x0, y0, x0, y0], float)
    clipped = np.clip(xyxy - origin, 0, [width, height, width, height])
    sides = clipped[:, 2:] - clipped[:, :2]
    areas = (xyxy[:, 2:] - xyxy[:, :2]).prod(1)
    kept = (sides > MIN_SIDE).all(1) & (sides.prod(1) > MIN_AREA * areas)
    return clipped[kept].tolist()


def _record(file_name: str, size: tuple[int, int], boxes: list[tuple[int, list[float]]]) -> dict:
    """One image: (width, height), and (category id, XYXY) boxes."""
    return {"file_name": file_name, "width": size[0], "height": size[1], "boxes": boxes}


def _write_splits(
    output: Path, records: dict[str, list[dict]], classes: Sequence[str], info: dict
) -> None:
    """One COCO file per split; written after the images, so that a JSON means its images exist."""
    for split, images in records.items():
        coco = to_coco(images, classes, info)
        write_whole(output / f"{split}.json", json.dumps(coco))
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
        fields = {key: image[key] for key in ("file_name", "width", "height")}
        coco["images"].append({"id": image_id, **fields})
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
        isinstance(coco, dict)
        and coco.get("info") == info
        and all((output / "images" / image["file_name"]).is_file() for image in coco["images"])
        for coco in splits
    )


def _copy(source: Path, target: Path) -> None:
    if target.is_file() and source.is_file() and target.stat().st_size == source.stat().st_size:
        return
    write_whole(target, _read(source))


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"can't read {path} ({error.strerror}); get BCCD again") from error
