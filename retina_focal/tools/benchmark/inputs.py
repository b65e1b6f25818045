"""What the models of `retina-focal benchmark` are given: images, head outputs, anchors."""

import math

import torch
from detectron2.modeling import build_anchor_generator, build_backbone
from detectron2.structures import Boxes, Instances
from torch import Tensor

from retina_focal.candidates import logit
from retina_focal.head import prior_bias
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
    """The batch of `pictures` as the model wants it in training."""
    images = images_for(name, batch, device)
    if name != "torchvision":
        return (images,)
    return images, torchvision_targets([record["instances"] for record in batch], device)


def images_for(name: str, batch: list[dict], device: str) -> list[dict] | list[Tensor]:
    """The same in inference. torchvision's model leaves it to others to copy the images."""
    if name != "torchvision":
        return batch
    return [record["image"].to(device, non_blocking=True) / 255 for record in batch]


def torchvision_targets(gt_instances: list[Instances], device: str) -> list[dict[str, Tensor]]:
    """Ground truth as torchvision's RetinaNet wants it: `boxes` (M, 4) and `labels` (M,)."""
    return [
        {
            "boxes": x.gt_boxes.tensor.to(device, non_blocking=True),
            "labels": x.gt_classes.to(device, non_blocking=True),
        }
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
    """Logits N(prior, std) and deltas N(0, 0.1) as a head gives them.

    In half precision they are in channels_last, as our head's are.
    """
    torch.manual_seed(SEED)
    bias = prior_bias(setting.cfg.MODEL.RETINANET.PRIOR_PROB)
    logits, deltas = [], []
    for n, a, height, width in anchors_per_level(setting)[1]:
        size = (n, a * setting.classes, height, width)
        logits.append(
            _as_head(torch.empty(size, device=setting.device).normal_(bias, std), setting)
        )
        size = (n, a * 4, height, width)
        deltas.append(_as_head(torch.empty(size, device=setting.device).normal_(0, 0.1), setting))
    return logits, deltas


def _as_head(outputs: Tensor, setting: Setting) -> Tensor:
    if setting.half is None:
        return outputs
    return outputs.to(setting.half, memory_format=torch.channels_last)


def realistic_logits(setting: Setting) -> list[Tensor]:
    """Logits of which one pair in a hundred passes the score threshold on P3 to P5.

    Those are scattered over the image, as on a picture full of small objects.
    """
    logits, _ = random_outputs(setting, std=0.0)
    threshold = logit(setting.cfg.MODEL.RETINANET.SCORE_THRESH_TEST)
    for level in logits:
        level.clamp_(max=threshold - 1)
    for level in logits[:3]:
        passing = torch.rand_like(level, dtype=torch.float32) < PASSING_FRACTION
        scores = threshold + 6 * torch.rand(int(passing.sum()), device=level.device) + 0.01
        level[passing] = scores.to(level.dtype)
    return logits
