"""Laws of test-time augmentation: what changes nothing, and what mirrors with the picture."""

import pytest
import torch
import torchvision
from conftest import PLUGIN, pictures, small_cfg
from detectron2.engine import DefaultTrainer
from detectron2.modeling import build_model
from detectron2.structures import Boxes, pairwise_iou
from torch import nn

from retina_focal.errors import UserError
from retina_focal.evaluation.tested import build_test_mapper
from retina_focal.evaluation.tta import RetinaNetWithTTA, with_tta
from retina_focal.training.assembly import Trainer


@pytest.fixture(scope="module")
def model():
    """A random network whose scores are so spread that many boxes pass and overlap."""
    torch.manual_seed(0)
    cfg = small_cfg(**PLUGIN, **{"MODEL.RETINANET.PRIOR_PROB": 0.1})
    model = build_model(cfg).eval()
    nn.init.normal_(model.head.cls_score.weight, std=0.3)
    nn.init.normal_(model.head.bbox_pred.weight, std=0.05)
    return model


def augmented(min_sizes: tuple[int, ...], flip: bool, max_size: int = 1333):
    cfg = small_cfg()
    cfg.TEST.AUG.MIN_SIZES, cfg.TEST.AUG.MAX_SIZE, cfg.TEST.AUG.FLIP = min_sizes, max_size, flip
    return cfg


def detect(model: nn.Module, image: torch.Tensor, **size: int):
    with torch.no_grad():
        return model([{"image": image, **size}])[0]["instances"]


def assert_equal(found, expected):
    assert found.image_size == expected.image_size and len(found) == len(expected) > 20
    # 1e-4: convolutions of a mirrored picture add in another order.
    torch.testing.assert_close(found.scores, expected.scores, rtol=1e-4, atol=1e-6)
    iou = pairwise_iou(found.pred_boxes, expected.pred_boxes)
    same = found.pred_classes[:, None] == expected.pred_classes[None]
    assert ((iou * same).max(1).values > 0.999).all()


@pytest.mark.parametrize("size", [{}, {"height": 331, "width": 402}])
def test_the_identity_equals_plain_inference(model, size):
    image = pictures([(128, 155)], [4])[0]["image"]
    expected = detect(model, image, **size)
    found = detect(RetinaNetWithTTA(augmented((128,), False), model), image, **size)
    assert found.image_size == expected.image_size and len(found) > 20
    assert torch.equal(found.pred_boxes.tensor, expected.pred_boxes.tensor)
    assert torch.equal(found.scores, expected.scores)
    assert torch.equal(found.pred_classes, expected.pred_classes)
    edges = expected.pred_boxes.tensor
    assert (edges[:, :2] == 0).any()  # NMS comes before boxes are clipped


@pytest.mark.parametrize("min_sizes", [(128,), (100, 150)])
def test_a_mirrored_picture_has_mirrored_boxes(model, min_sizes):
    image = pictures([(128, 160)], [4])[0]["image"]
    tta = RetinaNetWithTTA(augmented(min_sizes, True), model)
    found, mirrored = detect(tta, image), detect(tta, image.flip(-1))
    boxes = mirrored.pred_boxes.tensor
    boxes[:, [0, 2]] = 160 - boxes[:, [2, 0]]
    assert_equal(mirrored, found)
    plain = detect(model, image.flip(-1))  # which the network alone does not do
    assert len(plain) != len(found) or not torch.allclose(plain.scores, found.scores)


def candidates(model: nn.Module, view: torch.Tensor, size: tuple[int, int]) -> list[tuple]:
    """(score, class, box in `size`) above the threshold, the top ones of each level, unclipped."""
    images = model.preprocess_image([{"image": view}])
    features = [model.backbone(images.tensor)[x] for x in model.head_in_features]
    scale = torch.tensor([size[1] / view.shape[2], size[0] / view.shape[1]] * 2)
    found, post = [], model.postprocessor
    for feature, anchors in zip(features, model.anchor_generator(features), strict=True):
        scores = model.head.cls_score(model.head.cls_subnet(feature))[0].sigmoid()
        deltas = model.head.bbox_pred(model.head.bbox_subnet(feature))[0]
        scores = scores.permute(1, 2, 0).reshape(len(anchors), -1)
        deltas = deltas.permute(1, 2, 0).reshape(len(anchors), 4)
        boxes = post.box2box_transform.apply_deltas(deltas, anchors.tensor) * scale
        passed = [(scores[i, k].item(), k, boxes[i]) for i, k in (scores > 0.05).nonzero().tolist()]
        found += sorted(passed, key=lambda x: -x[0])[: post.topk_candidates]
    return found


@torch.no_grad()
def test_views_meet_before_nms(model):
    image = pictures([(128, 160)], [4])[0]["image"]
    tta = RetinaNetWithTTA(augmented((100, 150), False), model)
    views = [view for view, _ in tta._views(image)]
    assert [tuple(x.shape) for x in views] == [(3, 100, 125), (3, 150, 188)]
    scores, classes, boxes = zip(
        *(x for view in views for x in candidates(model, view, (128, 160))), strict=True
    )
    boxes, scores, kept = torch.stack(boxes), torch.tensor(scores), []
    for k in range(3):
        own = torch.tensor([i for i, x in enumerate(classes) if x == k])
        kept += own[torchvision.ops.nms(boxes[own], scores[own], 0.5)].tolist()
    kept = sorted(kept, key=lambda i: -scores[i])[:100]
    expected = Boxes(boxes[kept])
    expected.clip((128, 160))
    found = detect(tta, image)
    assert len(found) == len(kept) > 20
    torch.testing.assert_close(found.scores, scores[kept], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.pred_boxes.tensor, expected.tensor, rtol=1e-4, atol=1e-3)
    assert found.pred_classes.tolist() == [classes[i] for i in kept]


def test_the_model_is_as_before(model):
    image = pictures([(128, 160)], [4])[0]["image"]
    before, postprocessor = detect(model, image), model.postprocessor
    tta = RetinaNetWithTTA(augmented((64, 96), True), model)
    detect(tta, image)
    with pytest.raises(RuntimeError):
        tta([{"image": torch.zeros(5, 64, 64)}])
    assert model.postprocessor is postprocessor
    assert torch.equal(detect(model, image).pred_boxes.tensor, before.pred_boxes.tensor)


def test_a_picture_without_a_detection(model):
    image = torch.zeros(3, 64, 64, dtype=torch.uint8)
    postprocessor, thresh = model.postprocessor, model.postprocessor.score_thresh
    postprocessor.score_thresh = 0.9999
    try:
        found = detect(RetinaNetWithTTA(augmented((64,), True), model), image)
    finally:
        postprocessor.score_thresh = thresh
    assert len(found) == 0 and found.pred_boxes.tensor.shape == (0, 4)


def test_only_the_key_turns_it_on_and_then_no_picture_is_resized_twice(model):
    cfg = augmented((64,), True)
    assert with_tta(cfg, model) is model
    assert len(build_test_mapper(cfg).augmentations.augs) == 1
    cfg.TEST.AUG.ENABLED = True
    assert isinstance(with_tta(cfg, model), RetinaNetWithTTA)
    mapper = build_test_mapper(cfg)
    assert not mapper.augmentations.augs and mapper.image_format == "BGR"


def test_another_model_is_refused_in_words():
    with pytest.raises(UserError, match=r"and not Linear; add: TEST\.AUG\.ENABLED False"):
        RetinaNetWithTTA(augmented((64,), True), nn.Linear(1, 1))


def test_a_training_is_tested_with_it(model, monkeypatch):
    tested = []
    monkeypatch.setattr(DefaultTrainer, "test", lambda cfg, model, _: tested.append(model) or {})
    cfg = augmented((64,), True)
    for enabled in (False, True):
        cfg.TEST.AUG.ENABLED = enabled
        Trainer.test(cfg, model)
    assert tested[0] is model and isinstance(tested[1], RetinaNetWithTTA)
