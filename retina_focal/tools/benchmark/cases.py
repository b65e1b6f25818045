"""What `retina-focal benchmark` times: work that is equal for all models.

A case is a function that takes a `Setting` and names of `MODELS`, and gives a run for each. A run
computes once and returns what it computed; what lies between `Stopwatch.start` and its last `mark`
is timed, and nothing else.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial

import torch
import torch.nn.functional as F
from detectron2.modeling.meta_arch.dense_detector import permute_to_N_HWA_K
from detectron2.structures import Boxes
from detectron2.utils.events import EventStorage
from fvcore.nn import sigmoid_focal_loss_jit
from torch import Tensor
from torch.utils._pytree import tree_map_only
from torchvision.models.detection.retinanet import RetinaNetClassificationHead
from torchvision.ops import box_iou

from retina_focal.assigner import Assigner
from retina_focal.config import retina_focal_node
from retina_focal.criterion import Criterion
from retina_focal.dense_sum import dense_loss_sum
from retina_focal.targets import level_targets
from retina_focal.tools.benchmark.inputs import (
    anchors_per_level,
    arguments,
    images_for,
    pictures,
    random_outputs,
    realistic_logits,
    torchvision_targets,
)
from retina_focal.tools.benchmark.instruments import (
    ConvolutionRecorder,
    Likeness,
    Run,
    Stopwatch,
    after_head,
    graph_of,
    replay_of,
)
from retina_focal.tools.benchmark.models import OURS_GRAPHED, Setting, build, calibrate

# Models that only the rows of a GPU have: the loss without finding the positives, launched by the
# host and by a CUDA graph, whose time is the GPU's own; and our step with CUDA_GRAPHS.
DENSE_SUM, DENSE_SUM_GRAPHED = "dense sum", "dense sum, graphed"


def classification_loss(setting: Setting, names: Sequence[str]) -> dict[str, Run]:
    """From the raw logits of each level to their gradients, over the number of positives.

    Ours includes what the box loss shares with it: finding and gathering the positives. `DENSE_SUM`
    is ours without that, `DENSE_SUM_GRAPHED` that in one launch.
    """
    cfg = setting.cfg.clone()
    cfg.defrost()
    retina_focal_node(cfg).NORMALIZER = "batch"
    criterion = Criterion(cfg)
    alpha, gamma = criterion.classification_loss.alpha, criterion.classification_loss.gamma
    gt_instances = [record["instances"] for record in pictures(setting)]
    anchors, sizes = anchors_per_level(setting)
    labels, matched_idxs = Assigner(cfg)(anchors, gt_instances)
    targets = torchvision_targets(gt_instances, setting.device)
    torchvision_head = RetinaNetClassificationHead(256, sizes[0][1], setting.classes)
    # torchvision's matcher says -1 for background and -2 for ignored.
    torchvision_idxs = matched_idxs.where(labels != setting.classes, -1).where(labels >= 0, -2)
    logits, deltas = random_outputs(setting, std=1.0)
    for level in logits:
        level.requires_grad_()
    dense_targets = level_targets(labels, logits, setting.classes)
    weights = torch.ones(setting.batch, device=setting.device)

    def flat_logits() -> Tensor:
        return torch.cat([permute_to_N_HWA_K(x, setting.classes) for x in logits], dim=1)

    def stock() -> Tensor:
        valid = labels >= 0
        num_positives = (valid & (labels != setting.classes)).sum().item()
        one_hot = F.one_hot(labels[valid], setting.classes + 1)[:, :-1]
        loss = sigmoid_focal_loss_jit(
            flat_logits()[valid], one_hot.to(logits[0].dtype), alpha, gamma, reduction="sum"
        )
        return loss / max(num_positives, 1)

    def torchvision() -> Tensor:
        outputs = {"cls_logits": flat_logits()}
        return torchvision_head.compute_loss(targets, outputs, list(torchvision_idxs))

    def ours() -> Tensor:
        losses, _ = criterion(anchors, logits, deltas, labels, matched_idxs, gt_instances)
        return losses["loss_cls"]

    def dense_sum() -> Tensor:
        loss = criterion.classification_loss
        return dense_loss_sum(loss, logits, dense_targets, setting.classes, weights)

    def with_gradient(loss: Callable[[], Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
        value = loss()
        return value.detach(), torch.autograd.grad(value, logits)

    losses = {"stock": stock, "torchvision": torchvision, "ours": ours, DENSE_SUM: dense_sum}
    losses |= {DENSE_SUM_GRAPHED: dense_sum}
    part, runs = "loss and gradient", {}
    for name in names:
        compute = partial(with_gradient, losses[name])
        if name == DENSE_SUM_GRAPHED and torch.device(setting.device).type == "cuda":
            runs[name] = graph_of(part, compute)
        else:
            runs[name] = _one_part(part, compute)
    return runs


def matching(setting: Setting, names: Sequence[str]) -> dict[str, Run]:
    """Anchors and boxes to labels (torchvision: to matched indices), without a network."""
    gt_instances = [record["instances"].to(setting.device) for record in pictures(setting)]
    anchors, _ = anchors_per_level(setting)
    assigner = Assigner(setting.cfg)
    others = {name: build(name, setting) for name in names if name != "ours"}

    def torchvision() -> list[Tensor]:
        boxes, matcher = Boxes.cat(anchors).tensor, others["torchvision"].proposal_matcher
        return [matcher(box_iou(x.gt_boxes.tensor, boxes)) for x in gt_instances]

    matchers = {
        "stock": lambda: others["stock"].label_anchors(anchors, gt_instances),
        "torchvision": torchvision,
        "ours": lambda: assigner(anchors, gt_instances),
    }
    return {name: _one_part("matching", matchers[name]) for name in names}


def _one_part(part: str, compute: Callable[[], object]) -> Run:
    def run(stopwatch: Stopwatch) -> object:
        stopwatch.start()
        result = compute()
        stopwatch.mark(part)
        return result

    return run


def training_step(setting: Setting, names: Sequence[str]) -> dict[str, Run]:
    """Forward and backward of the whole model; the optimizer's step is left out."""
    batch = pictures(setting)
    in_fp16 = setting.amp and setting.half == torch.float16
    scaler = torch.amp.GradScaler(torch.device(setting.device).type, enabled=in_fp16)

    def run_of(name: str) -> Run:
        model = build(name, setting).train()

        def run(stopwatch: Stopwatch) -> dict[str, Tensor]:
            after = after_head(model, lambda _: stopwatch.mark("network, forward"))
            # A graph would not call the hook.
            with EventStorage(), nullcontext() if name == OURS_GRAPHED else after:
                stopwatch.start()
                with setting.autocast:
                    losses = model(*arguments(name, batch, setting.device))
                stopwatch.mark("matching and loss")
                scaler.scale(sum(losses.values())).backward()
                stopwatch.mark("backward")
            model.zero_grad()
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
    calibrated = calibrate(build("stock", setting)).state_dict()

    def run_of(name: str) -> Run:
        model = build(name, setting)
        if name == "torchvision":
            calibrate(model)
        else:
            model.load_state_dict(calibrated)
        model.eval()

        @torch.no_grad()
        def run(stopwatch: Stopwatch) -> object:
            # A copy: stock takes the sigmoid in place.
            replacement = logits and [x.clone() for x in logits]
            if replacement and name == "torchvision":
                levels = [permute_to_N_HWA_K(x, setting.classes) for x in replacement]
                replacement = torch.cat(levels, dim=1)

            def replace(outputs: object) -> object:
                stopwatch.mark("network, forward")
                if replacement is None:
                    return None
                if name == "torchvision":
                    return {**outputs, "cls_logits": replacement}
                return replacement, outputs[1]

            with after_head(model, replace):
                stopwatch.start()
                with setting.autocast:
                    detections = model(images_for(name, batch, setting.device))
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
        for function, likenesses in recorder.calls:
            tensors = tree_map_only(Likeness, Likeness.make, likenesses)
            stopwatch.resume()
            function(*tensors)
            stopwatch.mark("convolutions")

    if torch.device(setting.device).type == "cuda":
        replay = replay_of(recorder.calls)
    return {"convolutions": replay, "ours": step}


# What can be measured: the rows of each choice, and what they depend on beside the image.
TIMED = {
    "loss": {"classification loss": classification_loss},
    "matching": {"matching": matching},
    "train": {"training step": training_step},
    "inference": {"inference, initialised": inference, "inference, realistic": inference_realistic},
    "convolutions": {"training step over its convolutions": convolutions},
}
MEMORY = ("loss", "matching", "train")
INDEPENDENT_OF = {
    "loss": {"precision"},
    "matching": {"classes", "precision"},
    "inference": {"boxes"},
}
