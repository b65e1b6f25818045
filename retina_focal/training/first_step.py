"""The first training step against its closed form (Sec. 3.3, "Class Imbalance and Initialization").

A new head gives every anchor the score pi, so the first class loss is known before the run. Another
loss shows a fault that would otherwise cost a training. The check reads what the step computes
anyway, and the parts that often do not fit: prior, number of classes, frozen norms and pixels.
"""

import inspect
import logging
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from detectron2.data import MetadataCatalog
from detectron2.engine import HookBase
from detectron2.modeling import Backbone
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from retina_focal.criterion import Criterion
from retina_focal.dense_sum import dense_loss_sum
from retina_focal.head import prior_bias
from retina_focal.retinanet import FocalRetinaNet
from retina_focal.targets import level_targets
from retina_focal.training.first_batches import blank_pictures, unreached_boxes, warn_unreached

# Pretrained backbones came within 3% of the closed form. Group norm over 256 channels, which
# spreads the first logits most, moved the loss by 7% and, with one class, the mean score by 21%.
FACTOR = 2.0
# A prior is wrong beyond this difference of the logits; bf16 rounds them by 0.02.
BIAS_TOLERANCE = 0.05
# Standard deviation of the first convolution's outputs over that of its norm's statistics: 0.33 for
# blood cells under a microscope to 0.78 for aerial photographs. A division by PIXEL_STD that is
# forgotten, or one too many, changes it 57 times or more.
RESPONSES = (0.04, 10.0)

# After so many batches of background alone a warning says so.
BATCHES_WITHOUT_BOXES = 20

logger = logging.getLogger(__name__)


class FirstStepCheck(HookBase):
    """Logs the first class loss and mean score of a `FocalRetinaNet` beside their closed forms.

    One line where they agree and all parts fit; otherwise a warning that names the cause and what
    to type: boxes that reach no anchor and blank pictures are causes too. It works in the main
    process, only in a run that starts from iteration 0, and stops no run. The numbers go into the
    event storage as ``retina_focal/first_step/...``.
    """

    def __init__(self, datasets: str | Sequence[str] = ()):
        """
        Args:
            datasets: names of the training datasets, whose metadata tell the number of classes.
        """
        self.datasets = [datasets] if isinstance(datasets, str) else list(datasets)
        self._detach()

    def before_train(self) -> None:
        model = self.trainer.model
        model = model.module if isinstance(model, DistributedDataParallel) else model
        is_start = self.trainer.start_iter == 0 and comm.is_main_process()
        if is_start and isinstance(model, FocalRetinaNet):
            warn_unreached(model, self.trainer)
            self._model = model
            self._handles = [
                model.register_forward_pre_hook(self._keep_batch),
                model.backbone.register_forward_pre_hook(self._keep_images),
                model.criterion.register_forward_pre_hook(self._check, with_kwargs=True),
            ]

    def after_train(self) -> None:
        self._detach()

    def _keep_batch(self, model: nn.Module, inputs: tuple[list[dict]]) -> None:
        self._batch = inputs[0]

    def _keep_images(self, backbone: Backbone, inputs: tuple[Tensor]) -> None:
        self._images = inputs[0].detach()

    def _check(self, criterion: nn.Module, args: tuple, kwargs: dict) -> None:
        """As a forward hook, before the step changes any parameter."""
        if not isinstance(criterion, Criterion):
            name = type(criterion).__name__
            logger.info("first step: not checked, as the criterion is a %s", name)
            self._detach()
            return
        inputs = inspect.signature(criterion.forward).bind(*args, **kwargs).arguments
        labels, self._num_batches = inputs["labels"], self._num_batches + 1
        positive = (labels >= 0) & (labels < criterion.num_classes)
        unreached = None
        if not positive.any():
            unreached = unreached_boxes(inputs["anchors"], inputs["gt_instances"])
        if self._num_batches == 1:
            self._report(criterion, inputs["logits"], labels, [unreached])
        elif unreached:
            logger.warning("batch %d is the first with boxes. %s", self._num_batches, unreached)
        if positive.any() or unreached:
            self._detach()
        elif self._num_batches == BATCHES_WITHOUT_BOXES:
            logger.warning("none of the first %d batches has a box", BATCHES_WITHOUT_BOXES)
            self._detach()

    def _detach(self) -> None:
        for handle in getattr(self, "_handles", ()):
            handle.remove()
        self._handles, self._num_batches = [], 0
        self._model, self._batch, self._images = None, None, None

    @torch.no_grad()
    def _report(
        self, criterion: Criterion, logits: list[Tensor], labels: Tensor, causes: list[str | None]
    ) -> None:
        model, head = self._model, self._model.head
        bottom_up = list(getattr(model.backbone, "bottom_up", model.backbone).modules())
        num_classes = _num_classes_of(self.datasets) or criterion.num_classes
        causes = [
            *causes,
            blank_pictures(self._batch),
            _wrong_num_classes(criterion.num_classes, num_classes),
            _random_frozen_norms(bottom_up) or _foreign_pixels(bottom_up, self._images, model),
        ]
        loss, score = loss_per_positive(criterion, logits, labels), mean_score(logits)
        numbers = {"per_positive": loss, "mean_score": score}
        has_positives = ((labels >= 0) & (labels < criterion.num_classes)).any()
        of = "per positive anchor" if has_positives else "without a positive anchor"
        line = f"first step: loss_cls {of} {loss:.4g}"
        if is_new(head):
            prior = head.prior_prob
            expected = closed_form(criterion, labels, prior, num_classes)
            numbers |= {"per_positive_closed_form": expected, "prior": prior}
            causes.append(_wrong_prior(head))
            if not any(causes) and (_is_off(loss, expected) or _is_off(score, prior)):
                causes.append(_unknown(logits))
            line += f", closed form {expected:.4g}; mean score {score:.4g}, prior {prior:.4g}"
        else:
            line += f"; mean score {score:.4g}; no closed form, as the head is not a new one"
        for name, value in numbers.items():
            get_event_storage().put_scalar(f"retina_focal/first_step/{name}", value)
        causes = [cause for cause in causes if cause]
        logger.log(logging.WARNING if causes else logging.INFO, ". ".join([line, *causes]))


def loss_per_positive(criterion: Criterion, logits: list[Tensor], labels: Tensor) -> float:
    """Sum of the class loss over all anchors that are not ignored, divided by max(positives, 1).

    It is that of this process, whatever `criterion` divides by and whichever anchors its sampler
    would keep; soft targets are 1.

    Args:
        logits, labels: as of `Criterion.forward`.
    """
    targets = level_targets(labels, logits, criterion.num_classes)
    if getattr(criterion.classification_loss, "soft_targets", False):
        targets = [x._replace(quality=torch.ones_like(x.classes).float()) for x in targets]
    weights = torch.ones(len(labels), device=labels.device)
    loss = criterion.class_loss_of(labels)
    total = dense_loss_sum(loss, logits, targets, criterion.num_classes, weights)
    return total.item() / max(sum(len(x.classes) for x in targets), 1)


def closed_form(criterion: Criterion, labels: Tensor, prior_prob: float, num_classes: int) -> float:
    """`loss_per_positive` where every score is pi: [(RK - P) L_neg(pi) + P L_pos(pi)] / max(P, 1).

    Args:
        criterion: owns the loss.
        labels: (N, R) in {-1, 0, ..., K of `criterion`}, from `Assigner`.
        prior_prob: pi.
        num_classes: K.
    """
    loss = criterion.class_loss_of(labels)
    logit = torch.tensor([prior_bias(prior_prob)], dtype=torch.float64)
    soft = (torch.ones(1),) if getattr(loss, "soft_targets", False) else ()
    negative, positive = loss(logit, False)[0].item(), loss(logit, True, *soft)[0].item()
    num_positives = ((labels >= 0) & (labels < criterion.num_classes)).sum().item()
    num_negatives = (labels >= 0).sum().item() * num_classes - num_positives
    return (num_negatives * negative + num_positives * positive) / max(num_positives, 1)


def mean_score(logits: Sequence[Tensor]) -> float:
    """Over all anchors and classes; `logits` as of `FocalRetinaNetHead.forward`."""
    total = sum(x.float().sigmoid().sum(dtype=torch.float64) for x in logits)
    return total.item() / sum(x.numel() for x in logits)


def is_new(head: nn.Module) -> bool:
    """Whether nothing of the head was trained, so that its prior determines the scores.

    Biases are what tells: a new head has one value in those of `cls_score`, and zeros elsewhere.
    """
    if not (hasattr(head, "prior_prob") and hasattr(head, "cls_score")):
        return False
    if head.cls_score.bias.unique().numel() > 1:
        return False
    convs = [m for m in head.modules() if isinstance(m, nn.Conv2d) and m is not head.cls_score]
    return not any(conv.bias.any() for conv in convs if conv.bias is not None)


def _is_off(found: float, expected: float) -> bool:
    return not expected / FACTOR <= found <= expected * FACTOR  # NaN is off


def _wrong_prior(head: nn.Module) -> str | None:
    found = head.cls_score.bias[0].item()
    if abs(found - prior_bias(head.prior_prob)) < BIAS_TOLERANCE:
        return None
    prior = 1 / (1 + math.exp(-found))
    return (
        f"The bias of head.cls_score is {found:.4g}, a prior of {prior:.4g}; expected is "
        f"{prior_bias(head.prior_prob):.4g}, that of {head.prior_prob:.4g}. If the weights mean "
        f"theirs, type MODEL.RETINANET.PRIOR_PROB {prior:.4g} (in a LazyConfig: "
        f"model.head.prior_prob={prior:.4g}); otherwise take the head out of the file that "
        "MODEL.WEIGHTS names, or what initialises the model anew out of the script"
    )


def _num_classes_of(datasets: Sequence[str]) -> int | None:
    """Of the first dataset that tells its classes."""
    classes = (MetadataCatalog.get(name).get("thing_classes") for name in datasets)
    return next((len(names) for names in classes if names is not None), None)


def _wrong_num_classes(of_model: int, of_data: int) -> str | None:
    if of_model == of_data:
        return None
    return (
        f"The model has {of_model} classes and the training data {of_data}, which the closed form "
        f"assumes; type MODEL.RETINANET.NUM_CLASSES {of_data} (in a LazyConfig: "
        f"model.num_classes={of_data})"
    )


def _frozen_norms(modules: Sequence[nn.Module]) -> list[nn.Module]:
    """Batch norms, detectron2's and timm's, whose statistics and affine parameters stay."""
    # The scale of a norm that is trained is a parameter, not a buffer.
    needed = {"weight", "running_mean"}
    return [x for x in modules if needed <= dict(x.named_buffers(recurse=False)).keys()]


def _random_frozen_norms(modules: Sequence[nn.Module]) -> str | None:
    norms = _frozen_norms(modules)
    # Statistics that are merged into scale and shift, as in the files of detectron2's zoo, shift.
    empty = [norm for norm in norms if not (norm.running_mean.any() or norm.bias.any())]
    if not empty:
        return None
    return (
        f"{len(empty)} of the backbone's {len(norms)} frozen norms are without statistics: the "
        "weights before them are random, and what comes out is of any size. Type MODEL.WEIGHTS "
        "FILE (in a LazyConfig: train.init_checkpoint=FILE), and see that the log has its names; "
        "to train from random weights type MODEL.RESNETS.NORM BN, or MODEL.RETINA_FOCAL.TIMM.NORM "
        "BN, and MODEL.BACKBONE.FREEZE_AT 0"
    )


def _foreign_pixels(
    modules: Sequence[nn.Module], images: Tensor, model: FocalRetinaNet
) -> str | None:
    """Compare the first convolution's outputs with the statistics in the norm after it.

    Args:
        modules: of the bottom-up network, in order.
        images: (N, 3, H, W), normalised.
    """
    convs = [module for module in modules if isinstance(module, nn.Conv2d)]
    norms = _frozen_norms(modules)
    # Statistics that are merged into scale and shift tell nothing.
    if not (convs and norms and norms[0].running_mean.any()):
        return None
    conv, mean, variance = convs[0], norms[0].running_mean, norms[0].running_var
    if len(mean) != conv.out_channels:
        return None
    responses = F.conv2d(images[:1], conv.weight, conv.bias, conv.stride, groups=conv.groups)
    ratio = (responses[0].flatten(1).float().var(1) / variance).nanmedian().sqrt().item()
    if RESPONSES[0] < ratio < RESPONSES[1]:
        return None
    pixels = (model.pixel_mean, model.pixel_std)
    mean, std = ([round(x, 3) for x in y.flatten().tolist()] for y in pixels)
    return (
        f"The first convolution's outputs vary {ratio:.2g} times as much as on the images that the "
        f"backbone was trained on. MODEL.PIXEL_MEAN is {mean} and MODEL.PIXEL_STD {std}, for "
        f"{model.input_format} pixels from 0 to 255; type those of the weights (in a LazyConfig: "
        "model.pixel_mean and model.pixel_std). Of torchvision's ImageNet weights they are "
        "[103.53, 116.28, 123.675] and [57.375, 57.12, 58.395] in BGR"
    )


def _unknown(logits: Sequence[Tensor]) -> str:
    spread = ", ".join(f"{x.float().std().item():.2g}" for x in logits)
    return (
        "Prior, number of classes, frozen norms and pixels fit: this is none of the known causes. "
        f"The logits' standard deviation by level, {spread}, is usually below 0.5: look at the "
        "features that reach the head"
    )
