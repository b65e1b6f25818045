"""What `retina-focal benchmark` times: three RetinaNets that do the same work.

A case is a function that takes a `Setting` and names of `MODELS`, and gives a run a model. A run
computes once and returns what it computed; what lies between `Stopwatch.start` and its last `mark`
is timed, and nothing else.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.modeling import build_anchor_generator, build_backbone, build_model
from detectron2.modeling.meta_arch.dense_detector import permute_to_N_HWA_K
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from fvcore.nn import sigmoid_focal_loss_jit
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torchvision.models.detection import RetinaNet as TorchvisionRetinaNet
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.detection.retinanet import RetinaNetClassificationHead
from torchvision.ops import FrozenBatchNorm2d, box_iou
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from retina_focal.assigner import Assigner
from retina_focal.backbone import PYRAMID_INPUTS, TimmBackbone
from retina_focal.config import retina_focal_node
from retina_focal.criterion import Criterion
from retina_focal.head import prior_bias
from retina_focal.postprocess import logit

MODELS = ("stock", "torchvision", "ours")
SEED = 0
MIN_SIDE = 8  # pixels, of a box
# Of the (anchor, class) pairs on P3 to P5, in `inference_realistic`.
PASSING_FRACTION = 0.01
# The products of a network, forward and backward; matrices are what our box tower runs on.
CONVOLUTIONS = (torch.ops.aten.convolution.default, torch.ops.aten.convolution_backward.default)
MATRIX_PRODUCTS = (torch.ops.aten.addmm.default, torch.ops.aten.mm.default)


class Stopwatch:
    """Seconds of each part of a run, by the host's clock or, on a GPU, by the GPU's."""

    def __init__(self, device: str):
        self.on_gpu = torch.device(device).type == "cuda"

    def start(self) -> None:
        self.times = []
        if self.on_gpu:
            torch.cuda.synchronize()
        self.resume()

    def resume(self) -> None:
        """What has passed since the mark before is not timed."""
        self.mark(None)

    def mark(self, part: str | None) -> None:
        """End of a part that began with the mark before."""
        if self.on_gpu:
            now = torch.cuda.Event(enable_timing=True)
            now.record()
        else:
            now = time.perf_counter()
        self.times.append((part, now))

    def seconds(self) -> dict[str, float]:
        """Of each part; a part marked several times is summed."""
        if self.on_gpu:
            torch.cuda.synchronize()
        parts = {}
        for (_, begin), (part, end) in zip(self.times, self.times[1:], strict=False):
            if part is not None:
                elapsed = begin.elapsed_time(end) / 1000 if self.on_gpu else end - begin
                parts[part] = parts.get(part, 0.0) + elapsed
        return parts


Run = Callable[[Stopwatch], object]


@dataclass(frozen=True)
class Setting:
    """What two rows of the table may differ in."""

    cfg: CfgNode  # of our model; number of classes, precision and device are in it
    image_size: tuple[int, int]  # height, width in pixels
    batch: int  # images
    boxes: int  # an image

    @property
    def classes(self) -> int:
        return self.cfg.MODEL.RETINANET.NUM_CLASSES

    @property
    def precision(self) -> str:
        """Of our model; the others compute in fp32."""
        return retina_focal_node(self.cfg).PRECISION

    @property
    def device(self) -> str:
        return self.cfg.MODEL.DEVICE


# The models


def build(name: str, setting: Setting) -> nn.Module:
    """One of `MODELS` with random weights; those of "stock" and "ours" are equal."""
    torch.manual_seed(SEED)
    if name == "torchvision":
        return _torchvision_model(setting)
    if name == "ours":
        return build_model(setting.cfg)
    model = build_model(stock_cfg(setting.cfg))
    if isinstance(getattr(model.backbone, "bottom_up", None), TimmBackbone):
        model.backbone.bottom_up = PlainTimm(setting.cfg, model.backbone.bottom_up)
    return model


class PlainTimm(nn.Module):
    """A timm model as timm makes it, for stock: norms not folded, in the image's memory format."""

    def __init__(self, cfg: CfgNode, ours: TimmBackbone):
        import timm
        from timm.layers import freeze_batch_norm_2d

        super().__init__()
        node = retina_focal_node(cfg).TIMM
        body = timm.create_model(node.NAME, features_only=True, feature_cls="getter")
        self.body = freeze_batch_norm_2d(body) if node.NORM == "FrozenBN" else body
        self.body.load_state_dict(ours.body.state_dict())
        self.body.to(cfg.MODEL.DEVICE)
        trained = {name for name, p in ours.body.named_parameters() if p.requires_grad}
        for name, parameter in self.body.named_parameters():
            parameter.requires_grad = name in trained
        strides = self.body.feature_info.reduction()
        self._outputs = {f: strides.index(s) for f, s in PYRAMID_INPUTS.items()}

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        features = self.body(images)
        return {name: features[index] for name, index in self._outputs.items()}


def stock_cfg(cfg: CfgNode) -> CfgNode:
    """The config with detectron2's parts in place of ours, as far as detectron2 has them."""
    cfg = cfg.clone()
    cfg.defrost()
    node = retina_focal_node(cfg)
    cfg.MODEL.META_ARCHITECTURE = "RetinaNet"
    is_resnet = cfg.MODEL.BACKBONE.NAME == "build_retina_focal_resnet_fpn_backbone"
    if is_resnet and node.TOP_BLOCK_IN_FEATURE == "res5":
        cfg.MODEL.BACKBONE.NAME = "build_retinanet_resnet_fpn_backbone"
    if cfg.MODEL.ANCHOR_GENERATOR.NAME == "OctaveAnchorGenerator":
        cfg.MODEL.ANCHOR_GENERATOR.NAME = "DefaultAnchorGenerator"
        count = node.ANCHORS.SCALES_PER_OCTAVE
        cfg.MODEL.ANCHOR_GENERATOR.SIZES = [
            [size * 2 ** (i / count) for i in range(count)] for size in node.ANCHORS.BASE_SIZES
        ]
    return cfg


def torchvision_has(cfg: CfgNode) -> bool:
    """Whether torchvision can build this network: a plain ResNet, pyramid and head as published."""
    return (
        "resnet_fpn" in cfg.MODEL.BACKBONE.NAME
        and cfg.MODEL.RESNETS.NORM in ("FrozenBN", "BN")
        and cfg.MODEL.RESNETS.NUM_GROUPS == 1
        and cfg.MODEL.FPN.OUT_CHANNELS == 256
        and cfg.MODEL.RETINANET.NUM_CONVS == 4
        and not cfg.MODEL.RETINANET.NORM
    )


def _torchvision_model(setting: Setting) -> nn.Module:
    model = setting.cfg.MODEL
    backbone = resnet_fpn_backbone(
        backbone_name=f"resnet{model.RESNETS.DEPTH}",
        weights=None,
        norm_layer=FrozenBatchNorm2d if model.RESNETS.NORM == "FrozenBN" else nn.BatchNorm2d,
        trainable_layers=5 - model.BACKBONE.FREEZE_AT,
        returned_layers=[2, 3, 4],
        extra_blocks=LastLevelP6P7(8 * model.RESNETS.RES2_OUT_CHANNELS, 256),
    )
    return TorchvisionRetinaNet(
        backbone,
        setting.classes,
        # Its transform scales the sides to these: an image of this size stays as it is.
        min_size=min(setting.image_size),
        max_size=max(setting.image_size),
        score_thresh=model.RETINANET.SCORE_THRESH_TEST,
        nms_thresh=model.RETINANET.NMS_THRESH_TEST,
        topk_candidates=model.RETINANET.TOPK_CANDIDATES_TEST,
        detections_per_img=setting.cfg.TEST.DETECTIONS_PER_IMAGE,
    ).to(setting.device)


# Their inputs


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
        instances = Instances(
            (height, width),
            gt_boxes=Boxes(torch.cat([corner, corner + side], dim=1)),
            gt_classes=classes,
        )
        batch.append({"image": image, "instances": instances})
    return batch


def _arguments(name: str, batch: list[dict], device: str) -> tuple:
    """The batch as a model wants it."""
    if name != "torchvision":
        return (batch,)
    images = [record["image"].to(device) / 255 for record in batch]
    return images, _torchvision_targets([record["instances"] for record in batch], device)


def _torchvision_targets(gt_instances: list[Instances], device: str) -> list[dict[str, Tensor]]:
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


def _random_outputs(setting: Setting, std: float) -> tuple[list[Tensor], list[Tensor]]:
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
    logits, _ = _random_outputs(setting, std=0.0)
    threshold = logit(setting.cfg.MODEL.RETINANET.SCORE_THRESH_TEST)
    for level in logits:
        level.clamp_(max=threshold - 1)
    for level in logits[:3]:
        passing = torch.rand_like(level) < PASSING_FRACTION
        level[passing] = threshold + 6 * torch.rand(int(passing.sum()), device=level.device) + 0.01
    return logits


# The cases


def classification_loss(setting: Setting, names: Sequence[str]) -> dict[str, Run]:
    """From raw logits a level to their gradients, over the number of positives.

    Ours includes what the box loss shares with it: finding and gathering the positives.
    """
    cfg = setting.cfg.clone()
    cfg.defrost()
    retina_focal_node(cfg).NORMALIZER = "batch"
    criterion = Criterion(cfg)
    alpha, gamma = criterion.classification_loss.alpha, criterion.classification_loss.gamma
    gt_instances = [record["instances"] for record in pictures(setting)]
    anchors, sizes = anchors_per_level(setting)
    labels, matched_idxs = Assigner(cfg)(anchors, gt_instances)
    targets = _torchvision_targets(gt_instances, setting.device)
    torchvision_head = RetinaNetClassificationHead(256, sizes[0][1], setting.classes)
    # torchvision's matcher says -1 for background and -2 for ignored.
    torchvision_idxs = matched_idxs.where(labels != setting.classes, -1).where(labels >= 0, -2)
    logits, deltas = _random_outputs(setting, std=1.0)
    for level in logits:
        level.requires_grad_()

    def flat_logits() -> Tensor:
        return torch.cat([permute_to_N_HWA_K(x, setting.classes) for x in logits], dim=1)

    def stock() -> Tensor:
        valid = labels >= 0
        num_positives = (valid & (labels != setting.classes)).sum().item()
        one_hot = F.one_hot(labels[valid], setting.classes + 1)[:, :-1]
        loss = sigmoid_focal_loss_jit(
            flat_logits()[valid], one_hot.to(torch.float32), alpha, gamma, reduction="sum"
        )
        return loss / max(num_positives, 1)

    def torchvision() -> Tensor:
        outputs = {"cls_logits": flat_logits()}
        return torchvision_head.compute_loss(targets, outputs, list(torchvision_idxs))

    def ours() -> Tensor:
        losses, _ = criterion(anchors, logits, deltas, labels, matched_idxs, gt_instances)
        return losses["loss_cls"]

    def run_of(loss: Callable[[], Tensor]) -> Run:
        def run(stopwatch: Stopwatch) -> tuple[Tensor, tuple[Tensor, ...]]:
            stopwatch.start()
            value = loss()
            gradients = torch.autograd.grad(value, logits)
            stopwatch.mark("loss and gradient")
            return value.detach(), gradients

        return run

    losses = {"stock": stock, "torchvision": torchvision, "ours": ours}
    return {name: run_of(losses[name]) for name in names}


def matching(setting: Setting, names: Sequence[str]) -> dict[str, Run]:
    """Anchors and boxes to labels (torchvision: to matched indices), without a network."""
    gt_instances = [record["instances"].to(setting.device) for record in pictures(setting)]
    anchors, _ = anchors_per_level(setting)
    assigner = Assigner(setting.cfg)
    others = {name: build(name, setting) for name in names if name != "ours"}

    def torchvision() -> list[Tensor]:
        boxes, matcher = Boxes.cat(anchors).tensor, others["torchvision"].proposal_matcher
        return [matcher(box_iou(x.gt_boxes.tensor, boxes)) for x in gt_instances]

    def run_of(match: Callable[[], object]) -> Run:
        def run(stopwatch: Stopwatch) -> object:
            stopwatch.start()
            matches = match()
            stopwatch.mark("matching")
            return matches

        return run

    matchers = {
        "stock": lambda: others["stock"].label_anchors(anchors, gt_instances),
        "torchvision": torchvision,
        "ours": lambda: assigner(anchors, gt_instances),
    }
    return {name: run_of(matchers[name]) for name in names}


def training_step(setting: Setting, names: Sequence[str]) -> dict[str, Run]:
    """Forward and backward of the whole model; the optimizer's step is left out."""
    batch = pictures(setting)

    def run_of(name: str) -> Run:
        model = build(name, setting).train()
        arguments = _arguments(name, batch, setting.device)

        def run(stopwatch: Stopwatch) -> dict[str, Tensor]:
            model.zero_grad()
            with EventStorage(), _after_head(model, lambda _: stopwatch.mark("network, forward")):
                stopwatch.start()
                losses = model(*arguments)
                stopwatch.mark("matching and loss")
                sum(losses.values()).backward()
                stopwatch.mark("backward")
            return losses

        return run

    return {name: run_of(name) for name in names}


def inference(setting: Setting, names: Sequence[str], realistic: bool = False) -> dict[str, Run]:
    """Image to detections.

    Args:
        realistic: `realistic_logits` take the place of the head's; otherwise, with the scores of
            an initialised model, next to nothing passes the threshold. The boxes are the head's.
    """
    batch = pictures(setting)
    logits = realistic_logits(setting) if realistic else None
    calibrated = _calibrate(build("stock", setting)).state_dict()

    def run_of(name: str) -> Run:
        model = build(name, setting)
        if name == "torchvision":
            _calibrate(model)
        else:
            model.load_state_dict(calibrated)
        model.eval()
        arguments = _arguments(name, batch, setting.device)[:1]

        @torch.no_grad()
        def run(stopwatch: Stopwatch) -> object:
            # A copy: stock takes the sigmoid in place.
            replacement = logits and [x.clone() for x in logits]
            if replacement and name == "torchvision":
                replacement = torch.cat(
                    [permute_to_N_HWA_K(x, setting.classes) for x in replacement], dim=1
                )

            def after_head(outputs: object) -> object:
                stopwatch.mark("network, forward")
                if replacement is None:
                    return None
                if name == "torchvision":
                    return {**outputs, "cls_logits": replacement}
                return replacement, outputs[1]

            with _after_head(model, after_head):
                stopwatch.start()
                detections = model(*arguments)
                stopwatch.mark("postprocessing")
            return detections

        return run

    return {name: run_of(name) for name in names}


def inference_realistic(setting: Setting, names: Sequence[str]) -> dict[str, Run]:
    """`inference` with head outputs as a trained model has them."""
    return inference(setting, names, realistic=True)


def convolutions(setting: Setting, names: Sequence[str]) -> dict[str, Run]:
    """Our training step, and its convolutions alone: what a step can't be faster than.

    The matrix products of the box tower, which are its convolutions at chosen cells, count as such.
    """
    step = training_step(setting, ["ours"])["ours"]
    with ConvolutionRecorder() as recorder:
        step(Stopwatch(setting.device))

    def replay(stopwatch: Stopwatch) -> None:
        stopwatch.start()
        for function, arguments in recorder.calls:
            arguments = tree_map_only(_Likeness, _Likeness.make, arguments)
            stopwatch.resume()
            function(*arguments)
            stopwatch.mark("convolutions")

    return {"convolutions": replay, "ours": step}


@dataclass(frozen=True)
class _Likeness:
    """What a tensor's part in a convolution depends on, without its memory."""

    shape: torch.Size
    stride: tuple[int, ...]  # the memory format
    dtype: torch.dtype
    device: torch.device

    def make(self) -> Tensor:
        empty = torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=self.device)
        return empty.uniform_()


class ConvolutionRecorder(TorchDispatchMode):
    """Notes the arguments of each convolution and matrix product, forward and backward, inside it.

    A frozen convolution has no call for its backward, one with frozen weights only that for its
    input: the calls are what the step needs.
    """

    def __init__(self):
        super().__init__()
        self.calls: list[tuple[Callable, tuple]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in CONVOLUTIONS + MATRIX_PRODUCTS:
            likenesses = tree_map_only(
                Tensor, lambda x: _Likeness(x.shape, x.stride(), x.dtype, x.device), args
            )
            self.calls.append((func, likenesses))
        return func(*args, **(kwargs or {}))


@contextmanager
def _after_head(model: nn.Module, call: Callable[[object], object]) -> Iterator[None]:
    """Call on the head's outputs; what that returns, unless None, takes their place."""
    hook = model.head.register_forward_hook(lambda module, inputs, outputs: call(outputs))
    try:
        yield
    finally:
        hook.remove()


@torch.no_grad()
def _calibrate(model: nn.Module) -> nn.Module:
    """Give each norm the statistics of noise, as pretrained weights have those of images.

    Without them, activations of a random network grow from block to block, and a model whose
    scores should start at 0.01 has high ones.
    """

    def take_statistics(norm: nn.Module, inputs: tuple[Tensor]) -> None:
        norm.running_mean.copy_(inputs[0].mean((0, 2, 3)))
        norm.running_var.copy_(inputs[0].var((0, 2, 3), correction=0))

    norms = [m for m in model.modules() if getattr(m, "running_var", None) is not None]
    hooks = [norm.register_forward_pre_hook(take_statistics) for norm in norms]
    image = torch.rand(3, 256, 256, device=next(model.parameters()).device)
    model.eval()
    if isinstance(model, TorchvisionRetinaNet):
        model.backbone(model.transform.normalize(image)[None])
    else:
        model.backbone(model.preprocess_image([{"image": 255 * image}]).tensor)
    for hook in hooks:
        hook.remove()
    return model
