"""The plugin equals detectron2's own RetinaNet, and torchvision's where the definitions agree."""

import copy
import os
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
import torchvision
from conftest import PLUGIN, STOCK, pictures, small_cfg
from detectron2.data.detection_utils import read_image
from detectron2.modeling import build_model
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.structures import Boxes, Instances
from detectron2.utils.analysis import FlopCountAnalysis
from detectron2.utils.events import EventStorage
from torch import nn
from torchvision.models.detection import _utils as torchvision_utils
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.retinanet import RetinaNetHead, _default_anchorgen

from retina_focal import Assigner, Criterion, OctaveAnchorGenerator, box_tower, sigmoid_focal_loss

# Depth, norm of the backbone, norm of the head.
VARIANTS = [(18, "BN", ""), (18, "GN", "GN"), (50, "BN", "BN"), (50, "GN", "GN")]
MIN_DETECTIONS = 50
BCCD_CLASSES = ("RBC", "WBC", "Platelets")
BCCD_CORNERS = ("xmin", "ymin", "xmax", "ymax")


@pytest.fixture(autouse=True)
def _boxes_at_cells_only(monkeypatch) -> None:
    """A head without a norm runs its box tower at cells, however many; the others on whole maps."""
    monkeypatch.setattr(box_tower, "COST_OF_A_CELL", 0)


def build_pair(depth: int, norm: str, head_norm: str) -> tuple[nn.Module, nn.Module]:
    """Stock and plugin with the same random weights, in training mode."""
    names = {"MODEL.RETINANET.NORM": head_norm}
    torch.manual_seed(0)
    stock = build_model(small_cfg(depth, norm, **STOCK, **names))
    plugin = build_model(small_cfg(depth, norm, **PLUGIN, **names))
    plugin.load_state_dict(stock.state_dict(), strict=True)
    return stock.train(), plugin.train()


@pytest.fixture(scope="module", params=VARIANTS, ids=lambda v: f"R{v[0]}-{v[1]}-head{v[2]}")
def pair(request) -> tuple[nn.Module, nn.Module]:
    return build_pair(*request.param)


@pytest.fixture(scope="module")
def batch() -> list[dict]:
    """Two images of different size, one of them without boxes; one box has low matches only."""
    records = pictures([(128, 160), (160, 96)], num_boxes=[6, 0])
    records[0]["instances"].gt_boxes.tensor[0] = torch.tensor([20.0, 30.0, 27.0, 36.0])
    return records


def sgd_steps(
    model: nn.Module,
    batches: list[list[dict]],
    lr: float,
    gradient_noise: float = 0.0,
    max_norm: float = float("inf"),
) -> nn.Module:
    """The model after an SGD step a batch; the noise is relative, element by element."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    generator = torch.Generator().manual_seed(1)
    with EventStorage():
        for batch in batches:
            optimizer.zero_grad()
            sum(model(batch).values()).backward()
            for p in model.parameters() if gradient_noise else ():
                noise = torch.randn(p.shape, generator=generator)
                p.grad.mul_(noise.mul_(gradient_noise).add_(1))
            if max_norm < float("inf"):
                nn.utils.clip_grad_norm_(model.parameters(), max_norm)
            optimizer.step()
    return model


@torch.no_grad()
def detect(model: nn.Module, batch: list[dict], score_thresh: float) -> list[Instances]:
    model.eval()
    model.test_score_thresh = score_thresh
    detections = [x["instances"] for x in model(batch)]
    model.train()
    return detections


def assert_same_detections(ours: Instances, theirs: Instances) -> None:
    """Each detection has its twin: tied scores may come in another order."""
    assert len(ours) == len(theirs)
    torch.testing.assert_close(ours.scores, theirs.scores, atol=1e-6, rtol=0)
    twin = ours.pred_classes[:, None] == theirs.pred_classes
    twin &= (ours.scores[:, None] - theirs.scores).abs() <= 1e-6
    distance = ours.pred_boxes.tensor[:, None] - theirs.pred_boxes.tensor
    twin &= distance.abs().amax(2) <= 1e-4
    assert twin.any(0).all() and twin.any(1).all()


def test_one_seed_gives_the_weights_of_stock():
    torch.manual_seed(0)
    stock = build_model(small_cfg(**STOCK)).state_dict()
    torch.manual_seed(0)
    plugin = build_model(small_cfg(**PLUGIN)).state_dict()
    assert set(plugin) - set(stock) == {"criterion.loss_normalizer"}
    assert set(stock) <= set(plugin)
    assert all(torch.equal(plugin[name], stock[name]) for name in stock)


def test_anchors_equal_stock_to_the_last_bit(pair, batch):
    features = [torch.zeros(1, 1, size, 2 * size) for size in (40, 20, 10, 5, 3)]
    stock, plugin = (model.anchor_generator(features) for model in pair)
    assert all(torch.equal(a.tensor, b.tensor) for a, b in zip(plugin, stock, strict=True))


def test_labels_equal_stock(pair, batch):
    stock, plugin = pair
    features = [torch.zeros(1, 1, 160 // 2**i + 1, 192 // 2**i) for i in range(3, 8)]
    anchors = stock.anchor_generator(features)
    gt_instances = [x["instances"] for x in batch + pictures([(160, 192)], [40], seed=3)]
    stock_labels, stock_boxes = stock.label_anchors(anchors, gt_instances)
    labels, matched_idxs = plugin.label_anchors(anchors, gt_instances)
    assert torch.equal(labels, torch.stack(stock_labels))
    for i, instances in enumerate(gt_instances):
        positive = (labels[i] >= 0) & (labels[i] < 3)
        assert positive.any() == (len(instances) > 0)
        matched = instances.gt_boxes.tensor[matched_idxs[i, positive]]
        assert torch.equal(matched, stock_boxes[i][positive])


def test_losses_equal_stock(pair, batch):
    stock, plugin = (copy.deepcopy(model) for model in pair)
    with EventStorage():
        for _ in range(2):  # the second step sees the first one's moving average
            expected, losses = stock(batch), plugin(batch)
            assert losses.keys() == expected.keys() == {"loss_cls", "loss_box_reg"}
            for name in losses:
                # 1e-6 is 8 roundings of fp32: the sums run in another order.
                assert losses[name].item() == pytest.approx(expected[name].item(), rel=1e-6)


def test_the_head_gradient_of_each_loss_equals_stock(pair, batch):
    # The weights after some steps would not show it: at first most gradients are tiny beside them.
    for name in ("loss_cls", "loss_box_reg"):
        gradients = []
        for model in pair:
            model = copy.deepcopy(model)
            with EventStorage():
                model(batch)[name].backward()
            gradients.append({n: p.grad for n, p in model.head.named_parameters()})
        expected, found = gradients
        largest = max(g.norm() for g in expected.values() if g is not None)
        for parameter, gradient in expected.items():
            if gradient is None:
                assert found[parameter] is None or not found[parameter].any()
                continue
            # A bias in front of BN has no gradient but rounding: that is compared with the largest.
            scale = torch.maximum(gradient.norm(), 0.01 * largest)
            assert (found[parameter] - gradient).norm() < 1e-5 * scale, (name, parameter)


def test_detections_equal_stock_without_a_score_threshold(pair, batch):
    stock, plugin = (copy.deepcopy(model) for model in pair)
    stock.eval()  # a forward in training mode would move the statistics of one of the two
    # A fresh head's scores are all close to pi, and tie by the hundred: spread them.
    with torch.no_grad():
        logits, _ = stock.head(list(stock.backbone(stock.preprocess_image(batch).tensor).values()))
    for model in (stock, plugin):
        model.head.cls_score.weight.data /= logits[0].std().clamp(min=1 / 30)
        model.max_detections_per_image = 2000  # to see the last of a level's 1,000 candidates
    for ours, theirs in zip(detect(plugin, batch, 0.0), detect(stock, batch, 0.0), strict=True):
        assert len(theirs) >= MIN_DETECTIONS
        assert_same_detections(ours, theirs)


@pytest.mark.parametrize("depth", [18, 50])
@pytest.mark.parametrize("norm", ["BN", "GN"])
def test_detections_equal_stock_after_training(depth, norm):
    stock, plugin = build_pair(depth, norm, norm)  # a head with norm learns in few steps
    train = pictures([(96, 128), (128, 96)], num_boxes=[10, 12], seed=1)
    for _ in range(10):
        sgd_steps(stock, [train] * 10, lr=0.02, max_norm=10.0)
        expected = detect(stock, train, 0.05)
        if min(len(x) for x in expected) >= MIN_DETECTIONS:
            break
    assert min(len(x) for x in expected) >= MIN_DETECTIONS
    plugin.load_state_dict(stock.state_dict(), strict=True)
    for ours, theirs in zip(detect(plugin, train, 0.05), expected, strict=True):
        assert_same_detections(ours, theirs)


def blood_cells(annotation: Path) -> dict:
    """64x64 px of a BCCD photograph at a quarter of its size, where a red cell is 25 px wide."""
    photograph = annotation.parents[1] / "JPEGImages" / f"{annotation.stem}.jpg"
    image = torch.from_numpy(read_image(photograph, "BGR")[:256:4, :256:4].copy())
    objects = ElementTree.parse(annotation).findall("object")
    corners = [[float(x.findtext(f"bndbox/{c}")) for c in BCCD_CORNERS] for x in objects]
    boxes = Boxes(torch.tensor(corners).view(-1, 4) / 4)
    boxes.clip((64, 64))
    classes = torch.tensor([BCCD_CLASSES.index(x.findtext("name")) for x in objects])
    kept = boxes.nonempty(threshold=2.0)
    instances = Instances((64, 64), gt_boxes=boxes[kept], gt_classes=classes[kept])
    return {"image": image.permute(2, 0, 1), "instances": instances}


def batches_of_two(count: int) -> list[list[dict]]:
    """BCCD's photographs and boxes; generated ones, half of them without boxes, where it lacks."""
    folder = Path(os.environ.get("DETECTRON2_DATASETS", "datasets")) / "bccd" / "Annotations"
    records = [blood_cells(path) for path in sorted(folder.glob("*.xml"))[: 2 * count]]
    records = records or pictures([(64, 64)] * 2 * count, num_boxes=[4, 0] * count, seed=2)
    return [records[i : i + 2] for i in range(0, 2 * count, 2)]


def drift(a: nn.Module, b: nn.Module) -> float:
    """Largest difference of a trained weight."""
    pairs = zip(a.parameters(), b.parameters(), strict=True)
    return max((p - q).abs().max().item() for p, q in pairs)


@pytest.mark.parametrize("norm", ["BN", "GN"])
def test_weights_equal_stock_after_20_steps_r18(norm):
    stock, plugin = build_pair(18, norm, "")
    batches = batches_of_two(20)
    start = copy.deepcopy(stock)
    sgd_steps(stock, batches, lr=1e-3)
    sgd_steps(plugin, batches, lr=1e-3)
    assert drift(stock, start) > 1e-3
    assert drift(plugin, stock) <= 1e-5


@pytest.mark.parametrize("norm", ["BN", pytest.param("GN", marks=pytest.mark.slow)])
def test_weights_drift_from_stock_as_rounding_does_r50(norm):
    """A deep network amplifies rounding: the scale is stock against itself with noisy gradients."""
    stock, plugin = build_pair(50, norm, "")
    noisy = copy.deepcopy(stock)
    batches = batches_of_two(8)
    sgd_steps(stock, batches, lr=1e-3)
    sgd_steps(noisy, batches, lr=1e-3, gradient_noise=1e-7)
    sgd_steps(plugin, batches, lr=1e-3)
    # 1e-5 where the network amplifies nothing, as for R-18: folded norms round differently.
    assert drift(plugin, stock) <= max(1e-5, 5 * drift(noisy, stock))


@pytest.mark.parametrize("depth", [18, 50])
def test_flops_equal_stock(depth, batch):
    stock, plugin = (model.eval() for model in build_pair(depth, "BN", ""))
    # Operations that follow the number of detections are not counted as flops by either.
    assert FlopCountAnalysis(plugin, batch[:1]).total() == pytest.approx(
        FlopCountAnalysis(stock, batch[:1]).total(), rel=0
    )


# torchvision


def test_torchvision_truncates_anchor_sizes():
    """int(32 * 2^(1/3)) is 40, not 40.3: the one reason why its default anchors are smaller."""
    torchvision_sizes = _default_anchorgen().sizes
    base_sizes = [sizes[0] for sizes in torchvision_sizes]
    generator = OctaveAnchorGenerator(
        base_sizes=base_sizes,
        scales_per_octave=3,
        aspect_ratios=[[1.0]],
        strides=[8, 16, 32, 64, 128],
    )
    for level, sizes in zip(generator.cell_anchors, torchvision_sizes, strict=True):
        widths = level[:, 2] - level[:, 0]
        assert widths.int().tolist() == list(sizes)
        assert (widths[1:] > torch.tensor(sizes[1:])).all()


def test_anchors_equal_torchvision_up_to_its_order_and_rounding():
    """torchvision rounds cell anchors to whole pixels, and lets the scale vary fastest."""
    sizes, ratios = [[32.0, 40.0, 51.0]], [[0.5, 1.0, 2.0]]
    theirs = AnchorGenerator(tuple(map(tuple, sizes)), tuple(map(tuple, ratios)))
    image = torchvision.models.detection.image_list.ImageList(torch.zeros(1, 3, 48, 64), [(48, 64)])
    expected = theirs(image, [torch.zeros(1, 1, 6, 8)])[0].view(6 * 8, 3, 3, 4)
    generator = OctaveAnchorGenerator(
        base_sizes=[32.0, 40.0, 51.0], scales_per_octave=1, aspect_ratios=ratios, strides=[8]
    )
    for cell in generator.cell_anchors:
        cell.round_()
    (ours,) = generator([torch.zeros(1, 1, 6, 8)])
    ours = ours.tensor.view(6 * 8, 3, 3, 4).transpose(1, 2)
    assert torch.equal(ours, expected)


def test_box_coding_equals_torchvision():
    generator = torch.Generator().manual_seed(0)
    corner = torch.rand(2, 200, 2, generator=generator) * 100
    anchors, boxes = torch.cat([corner, corner + 5 + corner.flip(1)], dim=2)
    ours = Box2BoxTransform(weights=(1.0, 1.0, 1.0, 1.0))
    theirs = torchvision_utils.BoxCoder(weights=(1.0, 1.0, 1.0, 1.0))
    deltas = ours.get_deltas(anchors, boxes)
    torch.testing.assert_close(deltas, theirs.encode_single(boxes, anchors))
    deltas[0, 2:] = 20.0  # both clamp dw and dh at log(1000 / 16)
    torch.testing.assert_close(
        ours.apply_deltas(deltas, anchors), theirs.decode_single(deltas, anchors)
    )


def test_labels_equal_torchvision(batch):
    anchors = OctaveAnchorGenerator(
        base_sizes=[32, 64], scales_per_octave=3, aspect_ratios=[[0.5, 1.0, 2.0]], strides=[8, 16]
    )([torch.zeros(1, 1, 20, 20), torch.zeros(1, 1, 10, 10)])
    matcher = torchvision_utils.Matcher(0.5, 0.4, allow_low_quality_matches=True)
    instances = batch[0]["instances"]
    ious = torchvision.ops.box_iou(instances.gt_boxes.tensor, Boxes.cat(anchors).tensor)
    matches = matcher(ious)
    labels, matched_idxs = Assigner(num_classes=3)(anchors, [instances])
    expected = instances.gt_classes[matches.clamp(min=0)]
    expected[matches == matcher.BELOW_LOW_THRESHOLD] = 3
    expected[matches == matcher.BETWEEN_THRESHOLDS] = -1
    assert torch.equal(labels[0], expected)
    assert torch.equal(matched_idxs[0][matches >= 0], matches[matches >= 0])


def test_torchvision_makes_every_anchor_positive_for_a_box_that_overlaps_none():
    anchors = Boxes(torch.tensor([[0.0, 0, 32, 32], [8, 0, 40, 32], [16, 0, 48, 32]]))
    outside = Instances(
        (64, 64),
        gt_boxes=Boxes(torch.tensor([[500.0, 500, 520, 520]])),
        gt_classes=torch.tensor([0]),
    )
    matcher = torchvision_utils.Matcher(0.5, 0.4, allow_low_quality_matches=True)
    matches = matcher(torchvision.ops.box_iou(outside.gt_boxes.tensor, anchors.tensor))
    labels, _ = Assigner(num_classes=3)([anchors], [outside])
    assert (matches == 0).all()
    assert (labels == 3).all()


def test_focal_loss_equals_torchvision():
    logits = torch.linspace(-8, 8, 101)
    for targets in (torch.zeros(101), torch.ones(101)):
        for alpha, gamma in ((0.25, 2.0), (-1.0, 0.0), (0.75, 0.5)):
            torch.testing.assert_close(
                sigmoid_focal_loss(logits, targets, alpha, gamma),
                torchvision.ops.sigmoid_focal_loss(logits, targets, alpha, gamma),
            )


def test_losses_equal_torchvision_with_the_normalizer_image(batch):
    """torchvision divides by each image's positives and takes L1, as "image" with beta 0."""
    generator = torch.Generator().manual_seed(0)
    anchors = OctaveAnchorGenerator(
        base_sizes=[32], scales_per_octave=3, aspect_ratios=[[0.5, 1.0, 2.0]], strides=[8]
    )([torch.zeros(1, 1, 20, 20)])
    gt_instances = [x["instances"] for x in batch]
    logits = torch.randn(2, 9 * 3, 20, 20, generator=generator)
    deltas = torch.randn(2, 9 * 4, 20, 20, generator=generator)
    labels, matched_idxs = Assigner(num_classes=3)(anchors, gt_instances)
    criterion = Criterion(
        num_classes=3,
        box2box_transform=Box2BoxTransform(weights=(1.0, 1.0, 1.0, 1.0)),
        normalizer="image",
    )
    losses, _ = criterion(anchors, [logits], [deltas], labels, matched_idxs, gt_instances)
    head = RetinaNetHead(in_channels=8, num_anchors=9, num_classes=3)
    matches = torch.where(labels < 3, matched_idxs, -1)  # -1 below, -2 between the thresholds
    matches[labels == -1] = -2
    targets = [{"boxes": x.gt_boxes.tensor, "labels": x.gt_classes} for x in gt_instances]
    outputs = {
        "cls_logits": logits.unflatten(1, (9, 3)).permute(0, 3, 4, 1, 2).reshape(2, -1, 3),
        "bbox_regression": deltas.unflatten(1, (9, 4)).permute(0, 3, 4, 1, 2).reshape(2, -1, 4),
    }
    expected = head.compute_loss(targets, outputs, [Boxes.cat(anchors).tensor] * 2, list(matches))
    torch.testing.assert_close(losses["loss_cls"], expected["classification"])
    torch.testing.assert_close(losses["loss_box_reg"], expected["bbox_regression"])
