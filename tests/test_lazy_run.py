"""A model of a LazyConfig predicts and measures as detectron2 does with that config."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.config import instantiate
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import inference_context
from PIL import Image
from torch import nn

from retina_focal.errors import UserError
from retina_focal.tools import anatomy, draw, evaluate, predict, report
from retina_focal.tools.common import load_lazy_cfg, read_lazy_cfg
from retina_focal.tools.runs import open_run
from retina_focal.training.lazy_run import build_lazy_model, values_of_test
from retina_focal.weights.load import load_weights

CLASSES = ["red", "blue"]
FILE = """
from pathlib import Path
import detectron2.data.transforms as T
from detectron2.config import LazyCall as L
from detectron2.data import MetadataCatalog
from test_assembly import lazy_cfg

MetadataCatalog.get("lazy_classes").thing_classes = ["red", "blue"]
_cfg = lazy_cfg(Path("{folder}"), "lazy_classes")
model, dataloader, train = _cfg.model, _cfg.dataloader, _cfg.train
optimizer, lr_multiplier = _cfg.optimizer, _cfg.lr_multiplier
dataloader.train.dataset.names = dataloader.test.dataset.names = "lazy_data"
dataloader.test.mapper.augmentations = [
    L(T.ResizeShortestEdge)(short_edge_length=64, max_size=107),
]
dataloader.test.mapper.image_format = "RGB"
model.postprocessor.nms_thresh = 0.6
train.retina_focal = dict(sources=[["lazy_data", "coco:{folder}/a.json?images={folder}"]])
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """The folder of a run of a LazyConfig, with the config, and pictures that it can measure."""
    folder = tmp_path_factory.mktemp("lazy")
    rng = np.random.default_rng(0)
    images, boxes = [], []
    for i in range(1, 4):
        Image.fromarray(rng.integers(0, 256, (90, 120, 3), np.uint8)).save(folder / f"{i}.png")
        images.append({"id": i, "file_name": f"{i}.png", "width": 120, "height": 90})
        row = {"id": i, "image_id": i, "category_id": i % 2 + 1, "bbox": [9, 9, 40, 30]}
        boxes.append({**row, "area": 1200, "iscrowd": 0})
    categories = [{"id": i, "name": name} for i, name in enumerate(CLASSES, start=1)]
    content = {"images": images, "annotations": boxes, "categories": categories}
    (folder / "a.json").write_text(json.dumps(content))
    (folder / "mine.py").write_text(FILE.format(folder=folder))
    torch.manual_seed(0)
    model = instantiate(read_lazy_cfg(str(folder / "mine.py")).model)
    nn.init.normal_(model.head.cls_score.weight, std=0.3)
    nn.init.zeros_(model.head.cls_score.bias)
    torch.save({"model": model.state_dict(), "classes": CLASSES}, folder / "model_final.pth")
    (folder / "config.yaml").write_text("dataloader: {}\n")
    yield folder
    for name in ("lazy_data", "lazy_classes"):
        if name in DatasetCatalog:
            DatasetCatalog.remove(name)
        if name in MetadataCatalog.list():
            MetadataCatalog.remove(name)


def expected(run: Path) -> dict[str, np.ndarray]:
    """Boxes and scores of each picture, by the loader and the model of the config alone."""
    cfg = load_lazy_cfg(str(run / "mine.py"))
    model, found = instantiate(cfg.model), {}
    load_weights(model, str(run / "model_final.pth"))
    with inference_context(model):
        for (record,) in instantiate(cfg.dataloader.test):
            instances = model([record])[0]["instances"]
            rows = [instances.pred_boxes.tensor, instances.scores[:, None]]
            found[Path(record["file_name"]).name] = torch.cat(rows, dim=1).numpy()
    return found


def test_predict_finds_what_the_configs_own_loader_and_model_find(run, tmp_path):
    weights = f"train.init_checkpoint={run}/model_final.pth"
    argv = ["--config-file", str(run / "mine.py"), str(run / "*.png"), "--format", "coco"]
    argv += ["--threshold", "0.4", "--output", str(tmp_path), "--opts", weights]
    predict.main(argv)
    names = {x["id"]: x["file_name"] for x in json.loads((tmp_path / "images.json").read_text())[
        "images"
    ]}  # fmt: skip
    results = json.loads((tmp_path / "results.json").read_text())
    for name, rows in expected(run).items():
        rows = rows[rows[:, 4] >= 0.4]
        found = np.array(
            [[*x["bbox"], x["score"]] for x in results if Path(names[x["image_id"]]).name == name]
        )
        found[:, 2:4] += found[:, :2]
        assert len(rows) > 5
        np.testing.assert_allclose(found, rows, rtol=0, atol=1e-3)


def test_evaluate_report_and_draw_take_the_config_beside_the_folder(run, tmp_path, capsys):
    config = ["--config-file", str(run / "mine.py")]
    evaluate.main([str(run), *config, "--json", "--draws", "3"])
    (measured,) = json.loads(capsys.readouterr().out)
    assert measured["detections"] == sum(map(len, expected(run).values()))
    pytest.importorskip("jinja2", reason="jinja2 is not installed: make setup")
    report.main([str(run), *config, "--output", str(tmp_path / "page.html")])
    assert "the config is a LazyConfig" in (tmp_path / "page.html").read_text()
    weights = f"train.init_checkpoint={run}/model_final.pth"
    draw.main([*config, "--output", str(tmp_path / "drawn.png"), weights])
    assert Image.open(tmp_path / "drawn.png").width > 900


def test_a_lazyconfig_is_run_only_where_it_is_named(run):
    (run / "config.yaml").write_text(f"dataloader: {{}}\n# {run}/mine.py\n")
    with pytest.raises(UserError, match=r"FILE\.py --opts train\.init_checkpoint=.*model_final"):
        open_run(run)
    with pytest.raises(SystemExit, match="is a LazyConfig; expected a YAML"):
        anatomy.main(["--config-file", str(run / "mine.py")])
    with pytest.raises(UserError, match="'NMS' changes nothing in a LazyConfig"):
        open_run(run, str(run / "mine.py"), ["NMS", "0.3"])


def test_what_the_command_sets_gives_way_to_what_is_typed(run):
    own, key = ["MODEL.RETINA_FOCAL.TEST.TILE", "500"], "train.retina_focal.test.tile"
    config = str(run / "mine.py")
    assert open_run(run, config, own=own).cfg.MODEL.RETINA_FOCAL.TEST.TILE == 500
    assert open_run(run, config, [f"{key}=600"], own=own).cfg.MODEL.RETINA_FOCAL.TEST.TILE == 600


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("dataloader.test.mapper.augmentations.0.short_edge_length=[64,80]", "one Resize"),
        ("dataloader.test.mapper.augmentations.0.interp=0", "one ResizeShortestEdge"),
        ("dataloader.test.mapper=null", "mapper is missing; expected detectron2's DatasetMapper"),
        ("dataloader.test.mapper._target_=builtins.dict", "mapper is dict; expected"),
        ("model._target_=builtins.dict", "model is a dict; expected FocalRetinaNet"),
    ],
)
def test_what_can_not_be_repeated_for_any_picture_is_refused(run, change, words):
    with pytest.raises(UserError, match=words):
        open_run(run, str(run / "mine.py"), [change])


def test_without_augmentations_pictures_keep_their_size(run):
    cfg = read_lazy_cfg(str(run / "mine.py"), ["dataloader.test.mapper.augmentations=[]"])
    values = values_of_test(cfg, build_lazy_model(cfg))
    assert values.INPUT.MIN_SIZE_TEST == 0 and values.MODEL.RETINANET.NMS_THRESH_TEST == 0.6
