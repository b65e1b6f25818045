"""Weights of other projects detect here what they detect there."""

import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import yaml
from detectron2.modeling import build_model
from other_projects import Detections, Detectron, Mmdetection, iou, padded, spread
from torch import Tensor, nn
from torchvision.models.detection import (
    RetinaNet,
    retinanet_resnet50_fpn,
    retinanet_resnet50_fpn_v2,
)
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.models.resnet import Bottleneck, ResNet, resnet18
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from retina_focal.errors import UserError
from retina_focal.evaluation.inputs import find_inputs
from retina_focal.evaluation.prediction import Predictor
from retina_focal.export.metadata import Metadata
from retina_focal.tools.common import load_cfg
from retina_focal.tools.import_weights import main
from retina_focal.tools.runs import Run, open_run, run_model
from retina_focal.weights import imported
from retina_focal.weights.formats import read_weights, sha256_of
from retina_focal.weights.load import load_weights

SHORTEST, LONGEST = 128, 200
SIZES = "INPUT.MIN_SIZE_TEST", str(SHORTEST), "INPUT.MAX_SIZE_TEST", str(LONGEST)
# Pixels and scores, by the precision of the network.
TOLERANCE = {torch.float64: (1e-3, 1e-5), torch.float32: (1e-2, 5e-5)}


def draw_pictures(folder: Path, sizes: list[tuple[int, int]]) -> list[Path]:
    """Smooth colours with rectangles on them, as PNG."""
    generator, paths = np.random.default_rng(0), []
    for i, (height, width) in enumerate(sizes):
        coarse = generator.integers(0, 256, (8, 10, 3), dtype=np.uint8)
        image = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
        for _ in range(6):
            x, y, w, h = generator.integers(10, 60, 4)
            image[y : y + h, x : x + w] = generator.integers(0, 256, 3)
        paths.append(folder / f"{i}.png")
        cv2.imwrite(str(paths[-1]), image)
    return paths


def rgb(path: Path) -> np.ndarray:
    return cv2.imread(str(path))[:, :, ::-1].copy()


def small_torchvision(version: int, paths: list[Path], num_classes: int = 5) -> RetinaNet:
    """torchvision's network with fewer channels, random, whose scores and boxes spread."""
    torch.manual_seed(0)
    body = ResNet(Bottleneck, [3, 4, 6, 3], width_per_group=8)
    channels, c5 = 64, 2048
    extra = LastLevelP6P7(channels if version == 1 else c5, channels)
    layers = {f"layer{i}": str(i - 2) for i in (2, 3, 4)}
    backbone = BackboneWithFPN(body, layers, [512, 1024, c5], channels, extra)
    norm = None if version == 1 else lambda x: nn.GroupNorm(32, x)
    model = RetinaNet(
        backbone,
        num_classes,
        head=RetinaNetHead(channels, 9, num_classes, norm_layer=norm),
        min_size=SHORTEST,
        max_size=LONGEST,
    )
    settle(model, paths)
    return model


@torch.no_grad()
def settle(model: RetinaNet, paths: list[Path]) -> None:
    """Statistics of the norms from pictures, levels alike, and outputs that spread."""
    images = [torch.from_numpy(rgb(path)).permute(2, 0, 1) / 255 for path in paths]
    images = model.transform(images)[0].tensors
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the mean over all passes
        if isinstance(module, Bottleneck):
            module.bn3.weight.fill_(0.2)  # or 50 random layers make 1e-5 of 1e-7
    model.train()
    model.backbone(images)
    model.eval()
    fpn = model.backbone.fpn
    levels = [*(x[0] for x in fpn.layer_blocks), fpn.extra_blocks.p6, fpn.extra_blocks.p7]
    for i, conv in enumerate(levels):  # P6 before P7, which is made of it
        std = list(model.backbone(images).values())[i].std()
        conv.weight /= std
        conv.bias /= std
    outputs = model.head(list(model.backbone(images).values()))
    cls, box = model.head.classification_head.cls_logits, model.head.regression_head.bbox_reg
    spread(cls.weight, cls.bias, [outputs["cls_logits"]], std=1.0, mean=-5.5)
    spread(box.weight, box.bias, [outputs["bbox_regression"]], std=0.05, mean=0.0)
    box.bias[0::4] += 0.5  # to the right: some out of the picture


def detect_torchvision(model: RetinaNet, path: Path, dtype: torch.dtype) -> Detections:
    image = torch.from_numpy(rgb(path)).permute(2, 0, 1).to(dtype) / 255
    with torch.no_grad():
        found = model.to(dtype)([image])[0]
    rows = zip(found["labels"], found["scores"], found["boxes"], strict=True)
    return [(int(label), float(score), box.double().numpy()) for label, score, box in rows]


def import_file(path: Path, *arguments: str) -> Run:
    output = path.with_suffix("")
    main([str(path), "--output", str(output), *arguments])
    return open_run(output)


def detect(run: Run, paths: list[Path], dtype: torch.dtype = torch.float32) -> list[Detections]:
    """What `predict` finds."""
    predictor = Predictor(run.cfg, run_model(run).to(dtype))
    found = []
    for result in predictor(find_inputs([str(path) for path in paths])):
        boxes = result.instances.pred_boxes.tensor.double().numpy()
        scores, classes = result.instances.scores.tolist(), result.instances.pred_classes.tolist()
        found.append(list(zip(classes, scores, boxes, strict=True)))
    return found


def assert_equal(found: Detections, expected: Detections, pixels: float, score: float) -> None:
    """Each of one is one of the other: its class, its score, and the box next to it."""
    assert len(found) == len(expected)
    left = list(found)
    for label, own_score, box in expected:
        nearest = min(
            (i for i, x in enumerate(left) if x[0] == label),
            key=lambda i: np.abs(left[i][2] - box).max(),
            default=None,
        )
        assert nearest is not None
        _, other_score, other = left.pop(nearest)
        assert np.abs(other - box).max() < pixels
        assert abs(other_score - own_score) < score
        if (box[2:] > box[:2] + 1).all():
            assert iou(box, other) > 0.99


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> list[Path]:
    return draw_pictures(tmp_path_factory.mktemp("pictures"), [(97, 130), (150, 111)])


@pytest.mark.parametrize("version", [1, 2])
def test_torchvision_detects_the_same(tmp_path, pictures, version):
    model = small_torchvision(version, pictures)
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    run = import_file(tmp_path / "weights.pth", "--opts", *SIZES)
    assert ("p5" if version == 1 else "res5") == run.cfg.MODEL.RETINA_FOCAL.TOP_BLOCK_IN_FEATURE
    for dtype, tolerance in TOLERANCE.items():
        expected = [detect_torchvision(model, path, dtype) for path in pictures]
        assert min(map(len, expected)) > 30
        empty = [box for found in expected for _, _, box in found if is_empty(box)]
        assert version == 1 or empty
        for ours, theirs in zip(detect(run, pictures, dtype), expected, strict=True):
            assert_equal(ours, theirs, *tolerance)


def class_rows(names: list[str]) -> tuple[str, str]:
    return "--classes", ",".join(names)


def test_mmdetection_detects_the_same(tmp_path, pictures):
    model = Mmdetection(num_classes=4)
    spread_outputs(model.state, "bbox_head.retina_cls.", "bbox_head.retina_reg.", model, pictures)
    names = ["cat", "dog", "cow", "pig"]
    torch.save({"meta": {"CLASSES": tuple(names)}, "state_dict": model.state}, tmp_path / "mm.pth")
    run = import_file(tmp_path / "mm.pth", "--opts", *SIZES)
    assert list(run.classes) == names
    assert_same_logits_of_p7(model, run)
    for path, found in zip(pictures, detect(run, pictures), strict=True):
        expected = model.detect(rgb(path), SHORTEST, LONGEST)
        assert len(expected) > 50
        assert_equal(found, expected, *TOLERANCE[torch.float32])


def assert_same_logits_of_p7(model: Mmdetection, run: Run) -> None:
    """Few detections come from it; those of another P7 may be the same."""
    images = torch.randn(1, 3, 128, 256, generator=torch.Generator().manual_seed(0))
    ours = run_model(run).eval()
    with torch.no_grad():
        features = ours.backbone(images)
        found = ours.head([features[x] for x in ours.head_in_features])[0][-1]
    by_ratio = model.network(images)[0][-1].unflatten(1, (3, 3, -1))
    torch.testing.assert_close(found, by_ratio.transpose(1, 2).flatten(1, 3), rtol=1e-3, atol=1e-3)


def test_detectron_detects_the_same(tmp_path, pictures, capsys):
    model = Detectron(num_classes=4)
    spread_outputs(model.blobs, "retnet_cls_pred_fpn3_", "retnet_bbox_pred_fpn3_", model, pictures)
    path = tmp_path / "model_final.pkl"
    path.write_bytes(pickle.dumps(model.file(), protocol=2))
    run = import_file(path, "--opts", *SIZES)
    text = capsys.readouterr().out
    assert "momentum of the optimizer" in text and "left out 1 (lr): of the training" in text
    for picture, found in zip(pictures, detect(run, pictures), strict=True):
        image = cv2.imread(str(picture))
        expected = model.detect(image, SHORTEST, LONGEST)
        resized = np.array(network_size(image, round))
        factor = np.array([*image.shape[1::-1]] * 2) / [*resized[::-1], *resized[::-1]]
        # Above its threshold, which its last level does not have, and wider than its least box.
        expected = [(x, y, box * factor) for x, y, box in expected if y > 0.05]
        expected = [x for x in expected if not is_strip(x[2])]
        assert len(expected) > 50
        assert_equal([x for x in found if not is_strip(x[2])], expected, 1e-2, 5e-5)


def network_size(image: np.ndarray, rounding: Callable[[float], int]) -> tuple[int, int]:
    height, width = image.shape[:2]
    scale = min(SHORTEST / min(height, width), LONGEST / max(height, width))
    return rounding(height * scale), rounding(width * scale)


def is_empty(box: np.ndarray) -> bool:
    return bool((box[2:] <= box[:2]).any())


def is_strip(box: np.ndarray) -> bool:
    """Of what Detectron makes of a box outside the picture: one pixel at its edge."""
    return bool((box[2:] - box[:2] < 1.6).any())


def spread_outputs(
    state: dict[str, Tensor], cls: str, box: str, model: Mmdetection | Detectron, paths: list[Path]
) -> None:
    """Scores and deltas that spread, of each level alike."""
    suffixes = ("weight", "bias") if f"{cls}weight" in state else ("w", "b")
    image = torch.from_numpy(rgb(paths[0])).permute(2, 0, 1).float()
    mean, std = image.mean((1, 2)), image.std((1, 2))
    divisor = std if suffixes[0] == "weight" else torch.ones(3)
    image = (image - mean[:, None, None]) / divisor[:, None, None]
    for name, index, std, mean in ((cls, 0, 1.0, -5.0), (box, 1, 0.1, 0.0)):
        outputs = model.network(padded(image))[index]
        spread(state[f"{name}{suffixes[0]}"], state[f"{name}{suffixes[1]}"], outputs, std, mean)


def test_detectron2s_own_files_need_no_map(tmp_path, capsys):
    model = Mmdetection(num_classes=80)
    torch.save({"state_dict": model.state, "meta": {}}, tmp_path / "mm.pth")
    first = import_file(tmp_path / "mm.pth")
    checkpoint = read_weights(first.weights)
    weights = {name: x.numpy() for name, x in checkpoint["model"].items()}
    again = {"model": {**weights, "pixel_mean": np.zeros(3)}, "__author__": "Detectron2 Model Zoo"}
    (tmp_path / "zoo.pkl").write_bytes(pickle.dumps(again))
    capsys.readouterr()
    # Which pixels and which P7, the tensors don't tell.
    run = import_file(tmp_path / "zoo.pkl")
    assert "left out 1 (pixel_mean): of the config" in capsys.readouterr().out
    assert run.cfg.DATASETS.TEST == ("coco_2017_val",) and run.classes[0] == "person"
    loaded = run_model(run).state_dict()
    for name, tensor in checkpoint["model"].items():
        assert torch.equal(loaded[name], tensor)


@pytest.mark.parametrize(
    "kind, extra",
    [
        ("torchvision", "head.mask_head.weight"),
        ("mmdetection", "neck.fpn_convs.0.bn.weight"),
        ("detectron", "retnet_mask_fpn3_w"),
    ],
)
def test_what_nothing_explains_or_is_missing_is_refused(tmp_path, small_state, kind, extra):
    if kind == "torchvision":
        state = small_state
    else:
        model = Mmdetection(2) if kind == "mmdetection" else Detectron(2)
        state = model.state if kind == "mmdetection" else model.blobs
    path = tmp_path / "weights.pth"
    torch.save({**state, extra: torch.zeros(2)}, path)
    with pytest.raises(SystemExit, match=f"nothing of it is called '{extra}'"):
        main([str(path), "--output", str(tmp_path / "out")])
    convs = [x for x in state if re.search(r"conv2\.weight|branch2b_w|cls_(pred|logits|weight)", x)]
    for missing in convs[:2] + convs[-1:]:
        torch.save({name: x for name, x in state.items() if name != missing}, path)
        with pytest.raises(SystemExit, match=r"is missing in it|lacks"):
            main([str(path), "--output", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_what_would_change_or_break_the_network_is_refused(tmp_path, small_state):
    path, name = tmp_path / "weights.pth", "head.classification_head.cls_logits.bias"
    for value, message in [
        (torch.nan, "is not finite"),
        (1j, "is of torch.complex64"),
        (1, "is of torch.int64"),
    ]:
        torch.save({**small_state, name: torch.full((small_state[name].shape[0],), value)}, path)
        with pytest.raises(SystemExit, match=f"{name} {message}"):
            main([str(path), "--output", str(tmp_path / "out")])
    variance = "backbone.body.layer1.0.bn1.running_var"
    torch.save({**small_state, variance: -small_state[variance] - 1}, path)
    with pytest.raises(SystemExit, match=f"{variance} is below 0"):
        main([str(path), "--output", str(tmp_path / "out")])
    torch.save({}, path)
    with pytest.raises(SystemExit, match="holds no tensor"):
        main([str(path), "--output", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_no_name_of_a_file_or_a_class_gets_into_the_config(tmp_path, small_state, capsys):
    path = tmp_path / "w\nOUTPUT_DIR: evil\n\x1b[31m.pth"
    torch.save(small_state, path)
    main([str(path), "--output", str(tmp_path / "out")])
    assert r"w\nOUTPUT_DIR: evil\n\x1b[31m.pth: " in capsys.readouterr().out
    assert "OUTPUT_DIR" not in yaml.safe_load((tmp_path / "out/config.yaml").read_text())
    (tmp_path / "names.txt").write_bytes(b"\xff")
    for names, message in (
        ("a,b,a", "a is there more than once"),
        (str(tmp_path / "names.txt"), "UTF-8"),
    ):
        with pytest.raises(SystemExit):
            main([str(path), "--classes", names])
        assert message in capsys.readouterr().err


@pytest.fixture(scope="module")
def small_state() -> dict[str, Tensor]:
    """Of torchvision's names with 91 rows a cell, each numbered by its anchor and its row."""
    body = ResNet(Bottleneck, [3, 4, 6, 3], width_per_group=8)
    layers = {f"layer{i}": str(i - 2) for i in (2, 3, 4)}
    extra = LastLevelP6P7(32, 32)
    model = RetinaNet(BackboneWithFPN(body, layers, [512, 1024, 2048], 32, extra), 91)
    state = {name: x.detach().clone() for name, x in model.state_dict().items()}
    rows = torch.arange(9 * 91, dtype=torch.float32)
    state["head.classification_head.cls_logits.bias"] = rows
    state["head.regression_head.bbox_reg.bias"] = torch.arange(36, dtype=torch.float32)
    return state


@pytest.mark.parametrize("names, rows", [(None, 80), (90, 90), (91, 91)])
def test_rows_of_torchvisions_classes(tmp_path, small_state, names, rows):
    torch.save(small_state, tmp_path / "weights.pth")
    arguments = [] if names is None else class_rows([f"c{i}" for i in range(names)])
    run = import_file(tmp_path / "weights.pth", *arguments)
    checkpoint = read_weights(run.weights)
    bias = checkpoint["model"]["head.cls_score.bias"].view(3, 3, rows)
    # Of the anchor of size s and ratio r, which torchvision has ratio by ratio.
    size, ratio = torch.arange(3)[:, None, None], torch.arange(3)[None, :, None]
    if names is None:
        assert run.classes[:2] == ("person", "bicycle") and run.classes[-1] == "toothbrush"
        ids = torch.tensor([1, 2, 90])
        assert torch.equal(bias[..., [0, 1, -1]], ((ratio * 3 + size) * 91 + ids).float())
    else:
        first = 91 - names
        ids = torch.arange(first, 91)
        assert torch.equal(bias, ((ratio * 3 + size) * 91 + ids).float())
        assert run.classes == tuple(f"c{i}" for i in range(names))
    deltas = checkpoint["model"]["head.bbox_pred.bias"].view(3, 3, 4)
    assert torch.equal(deltas, ((ratio * 3 + size) * 4 + torch.arange(4)).float())


def test_another_number_of_names_is_refused(tmp_path, small_state):
    torch.save(small_state, tmp_path / "weights.pth")
    with pytest.raises(SystemExit, match="has 91 classes, and --classes names 2; give"):
        main([str(tmp_path / "weights.pth"), *class_rows(["a", "b"])])


def test_eps_of_the_norms_is_known_by_the_hash_or_given(tmp_path, small_state, monkeypatch):
    path = tmp_path / "weights.pth"
    torch.save(small_state, path)
    name = "backbone.bottom_up.stem.conv1.norm.running_var"
    before = small_state["backbone.body.bn1.running_var"]
    assert torch.equal(imported.read_import(path).model[name], before)
    assert torch.equal(imported.read_import(path, norm_eps=0.0).model[name], before - 1e-5)
    assert torch.equal(imported.read_import(path, norm_eps=1e-3).model[name], before + 9.9e-4)
    monkeypatch.setattr(imported, "WITHOUT_EPS", sha256_of(path)[:8])
    assert torch.equal(imported.read_import(path).model[name], before - 1e-5)


def test_torchvisions_older_names_are_the_same_tensors(tmp_path, small_state):
    torch.save(small_state, tmp_path / "new.pth")
    older = {}
    for name, tensor in small_state.items():
        parts = name.split(".")
        if parts[1:3] in (["fpn", "inner_blocks"], ["fpn", "layer_blocks"]):
            del parts[4]
        if len(parts) == 6 and parts[2] == "conv":
            parts[3:5] = [str(2 * int(parts[3]))]
        older[".".join(parts)] = tensor
    assert older.keys() != small_state.keys()
    torch.save(older, tmp_path / "old.pth")
    new, old = (imported.read_import(tmp_path / f"{x}.pth").model for x in ("new", "old"))
    assert new.keys() == old.keys() and all(torch.equal(x, old[name]) for name, x in new.items())


@pytest.mark.parametrize("name", ["resnet18", "tf_efficientnet_lite0"])
def test_backbones_compute_what_their_project_does(tmp_path, name, capsys):
    torch.manual_seed(0)
    options = ["--opts", "MODEL.FPN.OUT_CHANNELS", "32"]
    if name == "resnet18":
        theirs = resnet18(weights=None)
    else:
        timm = pytest.importorskip("timm", reason="timm is not installed: make setup")
        theirs = timm.create_model(name, pretrained=False)
        options += ["MODEL.RETINA_FOCAL.TIMM.NAME", name]
    torch.save(theirs.state_dict(), tmp_path / "weights.pth")
    output = tmp_path / "out"
    main([str(tmp_path / "weights.pth"), "--output", str(output), *options])
    assert "of the classifier of whole pictures" in capsys.readouterr().out
    cfg = load_cfg(str(output / "config.yaml"), ["MODEL.DEVICE", "cpu"])
    assert (
        [123.675, 116.28, 103.53] if name == "resnet18" else [127.5] * 3
    ) == cfg.MODEL.PIXEL_MEAN
    model = build_model(cfg).eval()
    load_weights(model, cfg.MODEL.WEIGHTS)
    images = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = model.backbone.bottom_up(images)["res5"]
        if name == "resnet18":
            stem = theirs.eval().maxpool(theirs.relu(theirs.bn1(theirs.conv1(images))))
            expected = theirs.layer4(theirs.layer3(theirs.layer2(theirs.layer1(stem))))
        else:
            features = timm.create_model(name, features_only=True).eval()
            features.load_state_dict(theirs.state_dict(), strict=False)
            expected = features(images)[-1]
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_a_config_in_mmdetections_file_tells_its_style(tmp_path):
    model = Mmdetection(2)
    config = "model = dict(backbone=dict(style='caffe'), neck=dict(relu_before_extra_convs=True))"
    torch.save({"state_dict": model.state, "meta": {"config": config}}, tmp_path / "mm.pth")
    settings = imported.read_import(tmp_path / "mm.pth").settings
    assert settings["MODEL.RESNETS.STRIDE_IN_1X1"] and settings["INPUT.FORMAT"] == "BGR"
    assert settings["MODEL.PIXEL_STD"] == [1.0] * 3
    assert settings["MODEL.RETINA_FOCAL.TOP_BLOCK_RELU"]
    for meta, words in (
        ({"mmdet_version": "1.2.0"}, "mmdetection 1 or older"),
        ({"CLASSES": ("a",)}, "has 2 classes, and the file names 1"),
    ):
        torch.save({"state_dict": model.state, "meta": meta}, tmp_path / "mm.pth")
        with pytest.raises(UserError, match=words):
            imported.read_import(tmp_path / "mm.pth")


def test_a_file_of_another_network_is_refused(tmp_path):
    torch.save({"features.0.weight": torch.zeros(3)}, tmp_path / "weights.pth")
    with pytest.raises(SystemExit, match="holds 1 tensors such as features"):
        main([str(tmp_path / "weights.pth")])


def test_the_config_is_plain_and_says_only_what_differs(tmp_path, small_state):
    torch.save(small_state, tmp_path / "weights.pth")
    run = import_file(tmp_path / "weights.pth", "--opts", "TEST.DETECTIONS_PER_IMAGE", "50")
    text = (tmp_path / "weights" / "config.yaml").read_text()
    assert text.startswith("# Of 'weights.pth', a RetinaNet of torchvision, SHA-256 ")
    keys = yaml.safe_load(text)
    assert keys["TEST"] == {"DETECTIONS_PER_IMAGE": 50}
    assert keys["MODEL"]["ANCHOR_GENERATOR"] == {"NAME": "TorchvisionAnchorGenerator"}
    assert str(run.weights.absolute()) == run.cfg.MODEL.WEIGHTS


def train_a_little(model: RetinaNet, paths: list[Path], steps: int) -> None:
    """Until it detects the rectangles in the middle of these pictures."""
    torch.manual_seed(0)
    images = [torch.from_numpy(rgb(path)).permute(2, 0, 1) / 255 for path in paths]
    boxes = [torch.tensor([[x.shape[2] * 0.25, x.shape[1] * 0.25, x.shape[2] * 0.75,
                            x.shape[1] * 0.75]]) for x in images]  # fmt: skip
    targets = [{"boxes": box, "labels": torch.tensor([1])} for box in boxes]
    optimizer = torch.optim.Adam(model.head.parameters(), 1e-3)
    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    for _ in range(steps):
        optimizer.zero_grad()
        sum(model(images, targets).values()).backward()
        optimizer.step()
    model.eval()


@pytest.mark.slow
@pytest.mark.parametrize("trained", [False, True], ids=["random", "trained"])
@pytest.mark.parametrize("build", [retinanet_resnet50_fpn, retinanet_resnet50_fpn_v2])
def test_torchvisions_own_networks_detect_the_same_on_bccd(tmp_path, build, trained):
    folder = Path(os.environ.get("DETECTRON2_DATASETS", "datasets"), "bccd", "JPEGImages")
    sources = sorted(folder.glob("*.jpg"))[:10]
    if not sources:
        pytest.skip(f"no pictures of BCCD in {folder}")
    paths = []
    for i, source in enumerate(sources):
        image = cv2.imread(str(source))[: 480 - 23 * i, : 300 + 37 * i]
        paths.append(tmp_path / f"{i}.png")
        cv2.imwrite(str(paths[-1]), image)
    torch.manual_seed(0)
    sides = {"min_size": 256, "max_size": 400}
    model = build(weights=None, weights_backbone=None, num_classes=6, **sides)
    settle(model, paths[:3])
    if trained:
        train_a_little(model, paths[:2], steps=30)
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    sizes = ["INPUT.MIN_SIZE_TEST", "256", "INPUT.MAX_SIZE_TEST", "400"]
    run = import_file(tmp_path / "weights.pth", "--opts", *sizes)
    for dtype, tolerance in TOLERANCE.items():
        expected = [detect_torchvision(model, path, dtype) for path in paths]
        assert min(map(len, expected)) > 0
        for ours, theirs in zip(detect(run, paths, dtype), expected, strict=True):
            assert_equal(ours, theirs, *tolerance)


def test_an_export_refuses_what_its_files_can_not_do(tmp_path, small_state):
    torch.save(small_state, tmp_path / "tv.pth")
    torch.save({"state_dict": Mmdetection(2).state, "meta": {}}, tmp_path / "mm.pth")
    for name, words in (
        ("tv", "TorchvisionAnchorGenerator, whose steps"),
        ("mm", r"TEST\.RESIZE is mmdetection, which exported files don't know; .* --opts MODEL"),
    ):
        run = import_file(tmp_path / f"{name}.pth")
        with pytest.raises(UserError, match=words):
            Metadata.of_run(run.cfg, run.classes, run.weights)
