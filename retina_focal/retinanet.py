"""FocalRetinaNet: the meta-architecture, and the surface that detectron2 scripts rely on."""

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, Backbone, build_backbone
from detectron2.modeling.anchor_generator import build_anchor_generator
from detectron2.structures import Boxes, ImageList, Instances
from detectron2.utils.events import get_event_storage, has_event_storage
from torch import Tensor, nn

from retina_focal.assigner import Assigner, build_assigner
from retina_focal.box_tower import PendingDeltas, first_image
from retina_focal.config import check_choice, retina_focal_node
from retina_focal.criterion import Criterion
from retina_focal.drawing import draw_training
from retina_focal.errors import UserError
from retina_focal.folding import FoldedWeights, fold_frozen_norms
from retina_focal.graphs import GraphedNetwork
from retina_focal.ground_truth import ground_truth
from retina_focal.head import build_dense_head
from retina_focal.network import run_network
from retina_focal.padding import size_of_step
from retina_focal.postprocess import Postprocessor
from retina_focal.precision import PRECISIONS, computation, weights_layout
from retina_focal.targets import find_targets
from retina_focal.transfer import to_device


def _forwarded(part: str, name: str) -> property:
    """An attribute that one part owns and scripts set on the model."""
    return property(
        lambda model: getattr(getattr(model, part), name),
        lambda model, value: setattr(getattr(model, part), name, value),
        doc=f"`{part}.{name}`.",
    )


@META_ARCH_REGISTRY.register()
class FocalRetinaNet(nn.Module):
    """RetinaNet (arXiv:1708.02002): backbone, head, and what makes losses or boxes of them."""

    test_score_thresh = _forwarded("postprocessor", "score_thresh")
    test_topk_candidates = _forwarded("postprocessor", "topk_candidates")
    test_nms_thresh = _forwarded("postprocessor", "nms_thresh")
    max_detections_per_image = _forwarded("postprocessor", "max_detections_per_image")

    @configurable
    def __init__(
        self,
        *,
        backbone: Backbone,
        head: nn.Module,
        head_in_features: list[str],
        anchor_generator: nn.Module,
        assigner: Assigner,
        criterion: Criterion,
        postprocessor: Postprocessor,
        pixel_mean: list[float],
        pixel_std: list[float],
        precision: str = "fp32",
        weights_layout: torch.memory_format = torch.preserve_format,
        cuda_graphs: bool = False,
        vis_period: int = 0,
        input_format: str = "BGR",
        num_classes: int | None = None,
    ):
        """
        Args:
            backbone: images to named feature maps; its frozen norms are folded, in place.
            head: (N, C, Hi, Wi) features to raw logits and deltas, see `FocalRetinaNetHead`.
            head_in_features: names of the backbone's outputs that the head sees, P3 first.
            anchor_generator: features to one Boxes per level.
            assigner: anchors and ground truth to labels.
            criterion: predictions and labels to losses.
            postprocessor: predictions to detections.
            pixel_mean, pixel_std: per channel, in `input_format` order, 0 to 255.
            precision: of backbone and head, see `precision.computation`.
            weights_layout: of the weights of convolutions, see `precision.weights_layout`.
            cuda_graphs: whether training launches backbone and head as `GraphedNetwork`.
            vis_period: iterations between training pictures in the event storage; 0: none.
            input_format: channel order of the images, for those pictures.
            num_classes: K; only checked against the parts: a LazyConfig's one place for it.
        Raises:
            UserError: an unknown precision, or the parts disagree on the number of classes.
        """
        super().__init__()
        check_choice("MODEL.RETINA_FOCAL.PRECISION", precision, PRECISIONS)
        fold_frozen_norms(backbone)
        self.backbone = backbone
        self.folded_weights = FoldedWeights(backbone)
        self.padding = {
            "size_divisibility": backbone.size_divisibility,
            "padding_constraints": backbone.padding_constraints,
        }
        self.head = head
        self.head_in_features = head_in_features
        self.strides = {name: shape.stride for name, shape in backbone.output_shape().items()}
        self.anchor_generator = anchor_generator
        self.assigner = assigner
        self.criterion = criterion
        self.postprocessor = postprocessor
        self.precision = precision
        self.graphed = GraphedNetwork() if cuda_graphs else None
        self.vis_period = vis_period
        self.input_format = input_format
        self.to(memory_format=weights_layout)
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(-1, 1, 1), False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(-1, 1, 1), False)
        self._check_num_classes(num_classes)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        backbone = build_backbone(cfg)
        shapes = backbone.output_shape()
        _check_in_features(cfg.MODEL.RETINANET.IN_FEATURES, list(shapes))
        feature_shapes = [shapes[f] for f in cfg.MODEL.RETINANET.IN_FEATURES]
        return {
            "backbone": backbone,
            "head": build_dense_head(cfg, feature_shapes),
            "head_in_features": cfg.MODEL.RETINANET.IN_FEATURES,
            "anchor_generator": build_anchor_generator(cfg, feature_shapes),
            "assigner": build_assigner(cfg),
            "criterion": Criterion(cfg),
            "postprocessor": Postprocessor(cfg),
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            "precision": retina_focal_node(cfg).PRECISION,
            "weights_layout": weights_layout(cfg),
            "cuda_graphs": retina_focal_node(cfg).CUDA_GRAPHS,
            "vis_period": cfg.VIS_PERIOD,
            "input_format": cfg.INPUT.FORMAT,
        }

    @property
    def device(self) -> torch.device:
        return self.pixel_mean.device

    @property
    def num_classes(self) -> int:
        return self.criterion.num_classes

    def forward(
        self,
        batched_inputs: list[dict],
        normalizers: Tensor | None = None,
        padded_size: tuple[int, int] | None = None,
    ) -> dict[str, Tensor] | list[dict]:
        """
        Args:
            batched_inputs: from `DatasetMapper`: `image` (C, H, W), `instances` in training, and
                for inference optionally the `height` and `width` to return boxes in.
            normalizers, padded_size: only in training, where these images are a part of a step;
                see `Criterion.forward` and `padded_size`.
        Returns:
            In training {"loss_cls", "loss_box_reg"}; otherwise {"instances"} for each image.
        """
        if self.training:
            return self._losses(batched_inputs, normalizers, padded_size)
        images = self.preprocess_image(batched_inputs)
        features, logits, deltas = self._run_network(images.tensor)
        anchors, sizes = self.anchor_generator(features), images.image_sizes
        detections = self.postprocessor(
            anchors, logits, deltas, sizes, _output_sizes(batched_inputs, sizes)
        )
        return [{"instances": instances} for instances in detections]

    def _losses(
        self,
        batched_inputs: list[dict],
        normalizers: Tensor | None,
        padded_size: tuple[int, int] | None,
    ) -> dict[str, Tensor]:
        """`forward` in training."""
        padded_size = padded_size or self.padded_size(batched_inputs)
        images = self.preprocess_image(batched_inputs, padded_size)
        # Labels before the network: the host of a device waits for them, and not for the network.
        expected = self._empty_features(images.tensor)
        anchors = self.anchor_generator(expected)
        num_classes = self.criterion.num_classes
        gt_instances = ground_truth(batched_inputs, num_classes, images.tensor.device)
        matching = self.assigner(anchors, gt_instances)
        targets = find_targets(anchors, *matching, gt_instances, expected, num_classes)
        features, logits, deltas = self._run_network(images.tensor)
        if any(x.shape[-2:] != y.shape[-2:] for x, y in zip(features, expected, strict=True)):
            # A backbone that rounds otherwise.
            anchors = self.anchor_generator(features)
            matching, targets = self.assigner(anchors, gt_instances), None
        losses, statistics = self.criterion(
            anchors, logits, deltas, *matching, gt_instances, normalizers, targets
        )
        if has_event_storage():
            storage = get_event_storage()
            for name, value in statistics.items():
                storage.put_scalar(name, value)
            if self.vis_period > 0 and storage.iter % self.vis_period == 0:
                first = [x[:1] for x in logits], first_image(deltas), images.image_sizes[:1]
                result = self.postprocessor(anchors, *first, images.image_sizes[:1])[0]
                storage.put_image(*draw_training(batched_inputs[0], result, self.input_format))
        return losses

    def _run_network(
        self, images: Tensor
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor] | PendingDeltas]:
        """(N, C, H, W) to features, logits and deltas per level."""
        autocast, layout = computation(self.precision, images.device.type, self.training)
        images = images.to(memory_format=layout)
        network = self.backbone, self.head, self.head_in_features, self.folded_weights
        with autocast:
            if self.training and self.graphed:
                logits, deltas = self.graphed(*network, images)
                return logits, logits, deltas  # the features have the sizes of the logits
            return run_network(*network, images)

    def padded_size(self, batched_inputs: list[dict]) -> tuple[int, int]:
        """(H, W) that a step pads its images to; `batched_inputs` is this process's part of it."""
        normalizer = getattr(self.criterion, "normalizer", None)
        exchange = getattr(normalizer, "one_step_of_all_processes", False)
        sizes = [tuple(x["image"].shape[-2:]) for x in batched_inputs]
        return size_of_step(sizes, **self.padding, of_all_processes=exchange)

    def preprocess_image(
        self, batched_inputs: list[dict], padded_size: tuple[int, int] | None = None
    ) -> ImageList:
        """Normalise, pad and batch the images: (N, C, H, W), zero-padded.

        Args:
            padded_size: (H, W) of the result; default: detectron2's, of the largest image.
        """
        images = [x["image"] for x in batched_inputs]
        if torch.jit.is_tracing():
            # To the tensor, not to its device: a trace would keep that as a constant.
            images = [(x.to(self.pixel_mean) - self.pixel_mean) / self.pixel_std for x in images]
            return ImageList.from_tensors(images, **self.padding)
        sizes = [tuple(x.shape[-2:]) for x in images]
        size = padded_size or size_of_step(sizes, **self.padding, of_all_processes=False)
        # They are copied as they are, uint8 from a loader. The mean around them becomes zeros.
        batch = self.pixel_mean.expand(len(images), -1, *size).contiguous()
        for own, image in zip(batch, to_device(images, batch.device), strict=True):
            own[:, : image.shape[-2], : image.shape[-1]].copy_(image)
        return ImageList(batch.sub_(self.pixel_mean).div_(self.pixel_std), sizes)

    def label_anchors(
        self, anchors: list[Boxes], gt_instances: list[Instances]
    ) -> tuple[Tensor, Tensor]:
        """Labels and matched indices, (N, R) each; see `Assigner.__call__`."""
        return self.assigner(anchors, gt_instances)

    @torch.no_grad()
    def count_positives(
        self, batched_inputs: list[dict], padded_size: tuple[int, int] | None = None
    ) -> Tensor:
        """(N,) positive anchors of each image, as a training step finds them; runs no network."""
        height, width = padded_size or self.padded_size(batched_inputs)
        images = self.pixel_mean.new_empty(0, height, width)
        gt_instances = ground_truth(batched_inputs, self.num_classes, self.device)
        anchors = self.anchor_generator(self._empty_features(images))
        labels, _ = self.assigner(anchors, gt_instances)
        return ((labels >= 0) & (labels < self.num_classes)).sum(1)

    def _empty_features(self, images: Tensor) -> list[Tensor]:
        """(1, 0, Hi, Wi) per level: the sizes that the features of these images will have."""
        strides = [self.strides[name] for name in self.head_in_features]
        sizes = [[-(-length // stride) for length in images.shape[-2:]] for stride in strides]
        return [self.pixel_mean.new_empty(1, 0, *size) for size in sizes]

    def _check_num_classes(self, num_classes: int | None) -> None:
        found = {
            "assigner": self.assigner.num_classes,
            "criterion": self.criterion.num_classes,
            "postprocessor": self.postprocessor.num_classes,
        }
        if hasattr(self.head, "num_classes"):
            found["head"] = self.head.num_classes
        if num_classes is not None:
            found["model"] = num_classes
        if len(set(found.values())) != 1:
            raise UserError(
                f"the parts disagree on the number of classes: {found}; give all of them the same "
                "num_classes (in a LazyConfig: num_classes='${..num_classes}')"
            )


def _check_in_features(in_features: list[str], available: list[str]) -> None:
    missing = [feature for feature in in_features if feature not in available]
    if missing:
        raise UserError(
            f"MODEL.RETINANET.IN_FEATURES names {missing}, but MODEL.BACKBONE.NAME makes "
            f"{available}; set IN_FEATURES to (a part of) these, or the backbone to "
            "build_retina_focal_resnet_fpn_backbone"
        )


def _output_sizes(
    batched_inputs: list[dict], image_sizes: list[tuple[int, int]]
) -> list[tuple[int, int]]:
    """(height, width) of each image that its boxes are to be in, in pixels."""
    return [
        (x.get("height", height), x.get("width", width))
        for x, (height, width) in zip(batched_inputs, image_sizes, strict=True)
    ]
