"""What the models of `retina-focal benchmark` are given: images, head outputs, anchors."""

import math

import torch
from detectron2.modeling import build_anchor_generator, build_backbone
from detectron2.structures import Boxes, Instances
from torch import Tensor

from retina_focal.head import prior_bias
from retina_focal.postprocess import logit
from retina_focal.tools.benchmark.models import SEED, Setting

MIN_SIDE = 8  # pixels, of a box
# Of the (anchor, class) pairs on P3 to P5, in `realistic_logits`.
PASSING_FRACTION = 0.01


def pictures(setting: Setting) -> list[dict]:
    """A batch as `DatasetMapper` gives it: noise with boxes on it.

    Sides are drawn log-uniformly from 8 pixels to half of the image's side, width and height on
    their own; places are uniform among those inside the image, classes uniform.
    """
    generator = torch.Generator().manual_seed(SEED)
    height, width = setting.image_size
    size = torch.tensor([width, height])
    batch = []
    for _ in range(setting.batch):
        image = torch.randint(256, (3, height, width), dtype=torch.uint8, generator=generator)
        exponent = torch.rand(setting.boxes, 2, generator=generator)
        side = MIN_SIDE * (size / (2 * MIN_SIDE)) ** exponent
        corner = torch.rand(setting.boxes, 2, generator=generator) * (size - side)
        classes = torch.randint(setting.classes, (setting.boxes,), generator=generator)
        boxes = Boxes(torch.cat([corner, corner + side], dim=1))
        instances = Instances((height, width), gt_boxes=boxes, gt_classes=classes)
        batch.append({"image": image, "instances": instances})
    return batch


def arguments(name: str, batch: list[dict], device: str) -> tuple:
    """The batch as the model wants it, which `pictures` made."""
    if name != "torchvision":
        return (batch,)
    images = [record["image"].to(device) / 255 for record in batch]
    return images, torchvision_targets([record["instances"] for record in batch], device)


def torchvision_targets(gt_instances: list[Instances], device: str) -> list[dict[str, Tensor]]:
    """Ground truth as torchvision's RetinaNet wants it: `boxes` (M, 4) and `labels` (M,)."""
    return [
        {"boxes": x.gt_boxes.tensor.to(device), "labels": x.gt_classes.to(device)}
        for x in gt_instances
    ]


def anchors_per_level(setting: Setting) -> tuple[list[Boxes], list[torch.Size]]:
    """Anchors of our config, and (N, A, Hi, Wi) of each level, without running a network."""
    cfg = setting.cfg
    with torch.device("meta"):  # in shape only: `memory` must not count a network here
        backbone = build_backbone(cfg)
    shapes = [backbone.output_shape()[name] for name in cfg.MODEL.RETINANET.IN_FEATURES]
    multiple = max(backbone.size_divisibility, 1)
    padded = [math.ceil(side / multiple) * multiple for side in setting.image_size]
    cells = [[math.ceil(side / shape.stride) for side in padded] for shape in shapes]
    features = [torch.empty(1, 1, *size, device=setting.device) for size in cells]
    anchors = build_anchor_generator(cfg, shapes).to(setting.device)(features)
    sizes = [
        torch.Size((setting.batch, len(level) // (height * width), height, width))
        for level, (height, width) in zip(anchors, cells, strict=True)
    ]
    return anchors, sizes


def random_outputs(setting: Setting, std: float) -> tuple[list[Tensor], list[Tensor]]:
    """Logits N(prior, std) and deltas N(0, 0.1) as a head gives them."""
    torch.manual_seed(SEED)
    bias = prior_bias(setting.cfg.MODEL.RETINANET.PRIOR_PROB)
    logits, deltas = [], []
    for n, a, height, width in anchors_per_level(setting)[1]:
        size = (n, a * setting.classes, height, width)
        logits.append(torch.empty(size, device=setting.device).normal_(bias, std))
        size = (n, a * 4, height, width)
        deltas.append(torch.empty(size, device=setting.device).normal_(0, 0.1))
    return logits, deltas


def realistic_logits(setting: Setting) -> list[Tensor]:
    """Logits of which one pair in a hundred passes the score threshold on P3 to P5.

    Those are scattered over the image, as on a picture full of small objects.
    """
    logits, _ = random_outputs(setting, std=0.0)
    threshold = logit(setting.cfg.MODEL.RETINANET.SCORE_THRESH_TEST)
    for level in logits:
        level.clamp_(max=threshold - 1)
    for level in logits[:3]:
        passing = torch.rand_like(level) < PASSING_FRACTION
        level[passing] = threshold + 6 * torch.rand(int(passing.sum()), device=level.device) + 0.01
    return logits
