"""The anatomy of the loss counts every window once, and says how far its curves may be off."""

import json
import math
import pickle

import cv2
import numpy as np
import pytest
import torch
from conftest import pictures, small_cfg
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog
from detectron2.data.detection_utils import build_augmentation
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from hypothesis import given
from hypothesis import strategies as st
from torchvision.ops import box_iou

from retina_focal import add_retina_focal_config
from retina_focal.data.registration import register_coco_json
from retina_focal.evaluation.drawing import class_color
from retina_focal.tools.anatomy import command as anatomy
from retina_focal.tools.anatomy import report as anatomy_report
from retina_focal.tools.anatomy import windows as anatomy_windows
from retina_focal.tools.anatomy.windows import (
    Anatomy,
    HardestWindows,
    HardWindow,
    LossTally,
    Windows,
    windows,
)

GAMMAS = (0.0, 0.5, 1.0, 2.0, 5.0)
SIZE = (96, 128)  # pixels


def draw_windows(seed: int, num_anchors: int, num_classes: int, spread: float):
    """Logits (R, K) and labels (R,), among them positives, negatives and ignored anchors."""
    generator = torch.Generator().manual_seed(seed)
    logits = spread * torch.randn(num_anchors, num_classes, generator=generator) - 2
    labels = torch.randint(-1, num_classes + 1, (num_anchors,), generator=generator)
    labels[:3] = torch.tensor([-1, 0, num_classes])
    return logits, labels


def tally_of(levels: list, gammas=GAMMAS, alpha: float = 0.25) -> LossTally:
    tally = LossTally(gammas, alpha, len(levels), levels[0][0].shape[1])
    for level, (logits, labels) in enumerate(levels):
        for found in windows(logits, labels):
            tally.add(level, found)
    return tally


def plain_losses(logits, labels, gamma: float, alpha: float = 0.25):
    """Eq. 5 in fp64, (R, K), and which windows are positive and which are not ignored."""
    own_class = labels[:, None] == torch.arange(logits.shape[1])
    s = torch.where(own_class, logits, -logits).double().numpy()
    complement = 1 / (1 + np.exp(s))  # 1 - p_t
    losses = complement**gamma * np.log1p(np.exp(-s))  # -log p_t
    if alpha >= 0:
        losses *= np.where(own_class.numpy(), alpha, 1 - alpha)
    valid = (labels >= 0)[:, None].expand_as(own_class)
    return torch.from_numpy(losses), own_class, valid


@given(
    seed=st.integers(0, 10**6),
    num_anchors=st.integers(3, 400),
    num_classes=st.integers(1, 5),
    spread=st.sampled_from([0.0, 0.1, 3.0, 30.0]),
)
def test_curves_are_within_their_error_of_the_sorted_windows(
    seed, num_anchors, num_classes, spread
):
    logits, labels = draw_windows(seed, num_anchors, num_classes, spread)
    tally = tally_of([(logits, labels)])
    for gamma in GAMMAS:
        losses, positive, valid = plain_losses(logits, labels, gamma)
        for is_positive, chosen in ((True, positive), (False, valid & ~positive)):
            expected = losses[chosen].sort(descending=True).values.cumsum(0).numpy()
            expected /= expected[-1]
            curve = tally.cumulative(is_positive, gamma)
            shares = np.arange(1, len(expected) + 1) / len(expected)
            found = [curve.loss_of_hardest(share) for share in shares]
            assert np.abs(found - expected).max() <= curve.error + 1e-9  # sums in fp64
            # Inner bins 1/64 wide: tanh((5 + 1) / 64 / 4), unless the open ends matter.
            if logits.abs().max() < anatomy_windows.MAX_LOGIT - 1:
                assert curve.error <= 0.0235


def test_curves_are_exact_where_each_window_has_a_bin():
    x_t = torch.tensor([-3.0, 0.5, 2.0, 4.0])
    tally = LossTally([0.0], -1, 1, 1)
    tally.add(0, Windows(True, x_t, torch.arange(4), torch.zeros(4, dtype=torch.long)))
    curve = tally.cumulative(True, 0.0)
    losses = np.log1p(np.exp(-x_t.double().numpy()))
    assert curve.loss == pytest.approx(np.append(0, losses.cumsum() / losses.sum()), rel=1e-12)
    assert curve.windows.tolist() == [0, 0.25, 0.5, 0.75, 1]
    assert curve.hardest_with(curve.loss[1]) == pytest.approx(0.25)
    assert curve.loss_of_hardest(0.25) == pytest.approx(curve.loss[1])


@pytest.mark.parametrize("alpha", [0.25, 0.9, -1])
@pytest.mark.parametrize("chunk_size", [1, 7, 1 << 20])
def test_sums_are_the_plain_ones_by_level_and_by_class(monkeypatch, alpha, chunk_size):
    monkeypatch.setattr(anatomy_windows, "CHUNK_SIZE", chunk_size)
    levels = [draw_windows(level, 50 + level, 3, spread=4.0) for level in range(2)]
    levels[0][0][1] = 0.0  # p_t = 0.5 is not above it
    levels[0][0][2] = -0.001  # of background: p_t just above 0.5
    tally = tally_of(levels, GAMMAS, alpha)
    for i, gamma in enumerate(GAMMAS, start=1):
        by_class = np.zeros((2, 3, 2))
        for level, (logits, labels) in enumerate(levels):
            losses, positive, valid = plain_losses(logits, labels, gamma, alpha)
            well = torch.where(positive, logits > 0, logits < 0)
            for side, chosen in enumerate((valid & ~positive, positive)):
                found = tally.by_level[side, level]
                assert found[0].sum() == chosen.sum()
                assert found[0, anatomy_windows.HALF :].sum() == (chosen & well).sum()
                assert found[i].sum() == pytest.approx(losses[chosen].sum().item(), rel=1e-9)
                for column, part in enumerate((chosen & ~well, chosen & well)):
                    by_class[side, :, column] += (losses * part).sum(0).numpy()
        assert tally.by_class[:, :, i] == pytest.approx(by_class, rel=1e-9)
    assert tally.by_class[:, :, 0].sum() == tally.by_level[:, :, 0].sum()


def record_of(name: str, boxes: list, classes: list, scale: float = 1.0) -> dict:
    """A `DatasetMapper` dict of an image that was made smaller by `scale`."""
    height, width = SIZE
    instances = Instances(SIZE, gt_boxes=Boxes(torch.tensor(boxes).float().reshape(-1, 4)))
    instances.gt_classes = torch.tensor(classes, dtype=torch.long)
    size = {"height": int(height * scale), "width": int(width * scale)}
    return {"file_name": name, "instances": instances, **size}


def test_hardest_windows_are_those_of_a_plain_search_one_a_place(monkeypatch):
    monkeypatch.setattr(anatomy_windows, "CHUNK_SIZE", 100)
    generator = torch.Generator().manual_seed(0)
    hardest = HardestWindows(size=20)
    every = []
    for name in "abc":
        kept = []
        corners = 40 * torch.rand(200, 2, generator=generator)
        anchors = torch.cat(
            [corners, corners + 8 + 20 * torch.rand(200, 2, generator=generator)], dim=1
        )
        logits = torch.randn(200, 3, generator=generator)
        found = [x for x in windows(logits, torch.full((200,), 3)) if not x.is_positive]
        for part in found:
            hardest.add(anchors, part)
        hardest.end_image(record_of(name, [], []))
        for flat in logits.flatten().argsort(descending=True).tolist():
            box = anchors[flat // 3, None]
            if all(box_iou(box, other) <= anatomy_windows.SAME_PLACE_IOU for other, _ in kept):
                kept.append((box, (-logits.flatten()[flat].item(), name, flat % 3)))
        every += [window for _, window in kept]
    assert [(w.x_t, w.file_name, w.label) for w in hardest.windows] == sorted(every)[:20]


def test_hardest_windows_are_in_pixels_of_the_picture():
    hardest = HardestWindows(size=1)
    anchors = torch.tensor([[10.0, 20, 30, 40]])
    hardest.add(anchors, Windows(True, torch.zeros(1), torch.tensor([0]), torch.tensor([1])))
    hardest.end_image(record_of("a", [[1, 2, 3, 4]], [1], scale=2.5))
    (window,) = hardest.windows
    assert window.anchor.tolist() == [25, 50, 75, 100]
    assert window.gt_boxes.tolist() == [[2.5, 5, 7.5, 10]]


def test_hardest_windows_of_a_tile_are_where_they_are_in_the_picture():
    hardest = HardestWindows(size=1, tile=200)
    anchors = torch.tensor([[10.0, 20, 30, 40]])
    hardest.add(anchors, Windows(True, torch.zeros(1), torch.tensor([0]), torch.tensor([1])))
    record = record_of("a", [[1, 2, 3, 4]], [1])
    hardest.end_image({**record, "height": 300, "width": 700})  # the tile begins at (250, 50)
    (window,) = hardest.windows
    height, width = SIZE
    scale = np.array([200 / width, 200 / height] * 2)
    corner = np.array([250, 50] * 2)
    assert window.anchor == pytest.approx(anchors[0].numpy() * scale + corner)
    assert window.gt_boxes[0] == pytest.approx(np.array([1, 2, 3, 4]) * scale + corner)


def test_memory_does_not_grow_with_the_images():
    seen = Anatomy(["p3"], ["a", "b"], GAMMAS, 0.25)
    boxes = 90 * torch.rand(500, 4, generator=torch.Generator().manual_seed(0))
    boxes[:, 2:] += boxes[:, :2]
    sizes = []
    for i in range(30):
        logits, labels = draw_windows(i, 500, 2, spread=3.0)
        seen.add_image(record_of("a", [[1, 2, 3, 4]], [1]), [boxes], [logits], [labels])
        sizes.append(len(pickle.dumps(seen)))
    # How many of the 40 windows kept share a record varies; twenty images have 20,000 windows.
    assert seen.num_images == 30 and max(sizes[10:]) <= 1.1 * sizes[9]


def test_sentence_says_which_share_of_the_loss_comes_from_which_share_of_the_windows():
    tally = LossTally([0.0], -1, 1, 1)

    def add(is_positive: bool, x_t: list[float]) -> None:
        zeros = torch.zeros(len(x_t), dtype=torch.long)
        tally.add(0, Windows(is_positive, torch.tensor(x_t), zeros, zeros))

    add(True, [-1.0, 2.0, 2.0, 2.0, 2.0])
    add(False, [-9.0] + [9.0] * 99)
    hard, easy = math.log1p(math.e), 4 * math.log1p(math.exp(-2))
    # Of the negatives' loss 99.9% is one of a hundred: 90% is nine tenths of it.
    assert anatomy_report.sentence(tally) == (
        f"Of the positives' loss, the hardest 20% of them make {hard / (hard + easy):.0%} at gamma "
        "0; 90% of the negatives' loss comes from their hardest 0.90% at gamma 0."
    )


@pytest.fixture
def cfg(tmp_path) -> CfgNode:
    """A small model, its random weights, and a test set of four pictures twice its size."""
    cfg = small_cfg(norm="GN", **{"MODEL.META_ARCHITECTURE": "FocalRetinaNet"})
    add_retina_focal_config(cfg)
    cfg.MODEL.RETINA_FOCAL.NORMALIZER = "batch"
    cfg.INPUT.MIN_SIZE_TEST = SIZE[0]
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.DATASETS.TEST = ("to_dissect",)
    images, annotations = [], []
    for i, record in enumerate(pictures([(2 * SIZE[0], 2 * SIZE[1])] * 4, [3, 1, 0, 5])):
        picture = record["image"].permute(1, 2, 0).numpy()
        cv2.imwrite(str(tmp_path / f"{i}.png"), picture)
        images.append({"id": i, "file_name": f"{i}.png", "height": 192, "width": 256})
        instances = record["instances"]
        for (x0, y0, x1, y1), label in zip(
            instances.gt_boxes.tensor.tolist(), instances.gt_classes.tolist(), strict=True
        ):
            box = {"bbox": [x0, y0, x1 - x0, y1 - y0], "area": 1, "iscrowd": 0}
            box |= {"id": len(annotations) + 1, "image_id": i, "category_id": label + 1}
            annotations.append(box)
    categories = [{"id": i + 1, "name": name} for i, name in enumerate(("red", "green", "blue"))]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (tmp_path / "a.json").write_text(json.dumps(content))
    register_coco_json("to_dissect", str(tmp_path / "a.json"), str(tmp_path))
    cfg.DATASETS.COCO_JSON = [["to_dissect", str(tmp_path / "a.json"), str(tmp_path)]]
    yield cfg
    DatasetCatalog.remove("to_dissect")
    MetadataCatalog.remove("to_dissect")


@pytest.fixture
def model(cfg) -> torch.nn.Module:
    torch.manual_seed(0)
    model = build_model(cfg)
    # The prior makes all scores alike.
    torch.nn.init.normal_(model.head.cls_score.weight, std=1.0)
    return model


def command(cfg: CfgNode, tmp_path, *opts: str) -> list[str]:
    (tmp_path / "c.yaml").write_text(cfg.dump())
    output = ["--output", str(tmp_path / "out")]
    return ["--config-file", str(tmp_path / "c.yaml"), *output, *opts]


def test_its_loss_is_the_loss_of_training(cfg, model):
    seen = anatomy.dissect(cfg, model, [2.0])
    assert not model.head._forward_hooks and not model.anchor_generator._forward_hooks
    expected = positives = 0
    model.train()
    for record in DatasetCatalog.get("to_dissect"):
        batch = DatasetMapper(
            is_train=True,
            augmentations=[build_augmentation(cfg, False)[0]],
            image_format=cfg.INPUT.FORMAT,
        )(record)
        assert batch["image"].shape[1:] == SIZE
        count = int(model.count_positives([batch]))
        expected += model([batch])["loss_cls"].item() * max(count, 1)
        positives += count
    tally = seen.tally
    assert tally.by_level[:, :, 1].sum() == pytest.approx(expected, rel=1e-5)  # fp32 sums
    assert tally.num_windows(True) == positives > 0
    num_windows = 3 * (seen.num_anchors - seen.num_ignored)
    assert tally.num_windows(False) == num_windows - positives


def test_it_ends_with_the_image_that_brings_both_numbers_up(cfg, model):
    whole = anatomy.dissect(cfg, model, [0.0])
    assert whole.num_images == 4
    one = anatomy.dissect(cfg, model, [0.0], num_negatives=1, num_positives=0)
    assert one.num_images == 1
    positives = whole.tally.num_windows(True)
    assert anatomy.dissect(cfg, model, [0.0], 1, positives + 1).num_images == 4
    assert anatomy.dissect(cfg, model, [0.0], 1e9, 1).num_images == 4


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_missing_image_ends_it_in_one_line(cfg, model, tmp_path, num_workers):
    torch.save({"model": model.state_dict()}, tmp_path / "w.pth")
    (tmp_path / "3.png").unlink()
    opts = ["MODEL.WEIGHTS", str(tmp_path / "w.pth"), "DATALOADER.NUM_WORKERS", str(num_workers)]
    with pytest.raises(SystemExit) as stop:
        anatomy.main(command(cfg, tmp_path, *opts))
    assert "3.png' can't be used" in stop.value.code and "\n" not in stop.value.code


def test_interrupted_it_keeps_the_images_seen(cfg, model):
    calls = []

    def interrupt(*args) -> None:
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt

    model.register_forward_hook(interrupt)
    assert anatomy.dissect(cfg, model, [0.0]).num_images == 2


def test_it_writes_the_figure_the_numbers_and_the_sheets(cfg, model, tmp_path, capsys):
    torch.save({"model": model.state_dict()}, tmp_path / "w.pth")
    weights = ["MODEL.WEIGHTS", str(tmp_path / "w.pth")]
    anatomy.main(command(cfg, tmp_path, "--gammas", "2,0", *weights))
    names = {path.name for path in (tmp_path / "out").iterdir()}
    pictures = {"anatomy.png", "hardest_negatives.png", "hardest_positives.png"}
    assert names == pictures | {"anatomy.md", "anatomy.json"}
    for name in pictures:
        assert cv2.imread(str(tmp_path / "out" / name)).std() > 1
    report = json.loads((tmp_path / "out" / "anatomy.json").read_text())
    assert report["gammas"] == [0, 2] and report["images"] == 4
    assert [row["name"] for row in report["by_class"][::2]] == ["red", "green", "blue"]
    by_class = anatomy.dissect(cfg, model, [0, 2]).tally.by_class.sum(1)
    for side, name in enumerate(("negatives", "positives")):
        share = by_class[side, 2, 1] / by_class[side, 2].sum()
        assert report["total"][1][name]["well_classified"] == pytest.approx(share, rel=1e-9)
    for key in ("by_level", "by_class"):
        for side in ("positives", "negatives"):
            parts = sum(row[side]["loss"] for row in report[key] if row["gamma"] == 2)
            assert parts == pytest.approx(report["total"][1][side]["loss"], rel=1e-9)
    text = (tmp_path / "out" / "anatomy.md").read_text()
    assert report["sentence"] in text and text in capsys.readouterr().out


def test_curves_need_no_config(tmp_path):
    anatomy.main(["--curves", "--output", str(tmp_path / "new")])
    assert cv2.imread(str(tmp_path / "new" / "curves.png")).std() > 1


def test_a_crop_shows_the_anchor_in_its_middle_and_the_ground_truth_where_it_is(tmp_path):
    cv2.imwrite(str(tmp_path / "a.png"), np.full((100, 200, 3), 40, np.uint8))
    anchor, box = np.array([150.0, 30, 190, 70]), np.array([[160.0, 20, 198, 60]])
    window = HardWindow(-3.0, anchor, 0, str(tmp_path / "a.png"), box, np.array([1]))
    tile = anatomy_report._tile(window, ["a", "b"], is_positive=False)
    tile = tile[: anatomy_report.TILE, : anatomy_report.TILE]
    scale = anatomy_report.TILE / (anatomy_report.CONTEXT * 40)
    origin = np.array([170, 50]) - anatomy_report.TILE / 2 / scale
    for corners, color in ((anchor, (255, 255, 255)), (box[0], class_color(1))):
        ys, xs = np.nonzero((tile == color).all(2))
        found = np.array([xs.min(), ys.min(), xs.max(), ys.max()])
        # A line is two pixels wide, with dark edges; each box hides a bit of the other.
        assert found / scale + np.tile(origin, 2) == pytest.approx(corners, abs=3 / scale)
    assert (tile[:, int((200 - origin[0]) * scale) + 3 :] == anatomy_report.GREY).all()
    assert anatomy_report._truth(window, ["a", "b"]) == f"IoU {900 / 2220:.2f} with b"


@pytest.mark.parametrize(
    "change, message",
    [
        (["MODEL.WEIGHTS", ""], r"add: MODEL\.WEIGHTS output/model_final\.pth"),
        (["MODEL.META_ARCHITECTURE", "RetinaNet"], "add: MODEL.META_ARCHITECTURE FocalRetinaNet"),
        (["MODEL.RETINANET.NUM_CLASSES", "4"], "add: MODEL.RETINANET.NUM_CLASSES 3"),
        (["DATASETS.TEST", "()"], "names no dataset; add: DATASETS.TEST"),
        (["MODEL.WEIGHTS", "backbone.pth"], "holds no weights of the head"),
        (["MODEL.WEIGHTS", "nan.pth"], "nan.pth is not finite: 1 of its weights"),
        (["MODEL.WEIGHTS", "large.pth"], "logits of p3 are not finite"),
        (["MODEL.RETINANET.IOU_LABELS", "(0, -1, 0)"], "no positive window in 4 images"),
    ],
)
def test_what_cannot_be_dissected_is_refused_in_words(
    cfg, model, tmp_path, monkeypatch, change, message
):
    monkeypatch.chdir(tmp_path)
    state = model.state_dict()
    torch.save({"model": state}, "w.pth")
    backbone = {name: x for name, x in state.items() if name.startswith("backbone")}
    torch.save({"model": backbone}, "backbone.pth")
    state["head.cls_score.bias"] = torch.full_like(state["head.cls_score.bias"], math.nan)
    torch.save({"model": state}, "nan.pth")
    state["head.cls_score.bias"] = torch.full_like(state["head.cls_score.bias"], 3e38)
    state["head.cls_score.weight"] = torch.full_like(state["head.cls_score.weight"], 3e38)
    torch.save({"model": state}, "large.pth")
    cfg.MODEL.RETINA_FOCAL.ASSIGNMENT = "paper"  # no low-quality matches
    with pytest.raises(SystemExit, match=message):
        anatomy.main(command(cfg, tmp_path, "MODEL.WEIGHTS", "w.pth", *change))


@pytest.mark.parametrize("text", ["-1", "two", "0,,2", "nan", "inf"])
def test_gammas_that_are_none_are_refused(text, capsys):
    with pytest.raises(SystemExit):
        anatomy.main(["--curves", "--gammas", text])
    assert "is not a number of at least 0" in capsys.readouterr().err
