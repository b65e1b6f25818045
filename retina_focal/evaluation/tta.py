"""Test-time augmentation: what ``TEST.AUG`` means for this model.

detectron2's `GeneralizedRCNNWithTTA` asserts a two-stage model, and merges final detections.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from detectron2.config import CfgNode
from detectron2.modeling import detector_postprocess
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from retina_focal.data.resizing import resizing_of_test
from retina_focal.errors import UserError
from retina_focal.postprocess import Postprocessor, suppress
from retina_focal.retinanet import FocalRetinaNet

NO_NMS = 2.0  # an IoU that no two boxes reach


class RetinaNetWithTTA(nn.Module):
    """A model that sees each picture at the scales of ``TEST.AUG.MIN_SIZES``, flipped too.

    The top candidates of each level of each view go through one NMS, as the levels of one view do.
    Final detections of each view are not merged: in a view a box may have been removed by one that
    a better box of another view removes, and the limit of detections would count for each view.
    Nor is the mean of logits taken level by level: padding and strides of 2 shift the cells of a
    mirrored picture by a part of a cell.
    """

    def __init__(self, cfg: CfgNode, model: nn.Module):
        """
        Args:
            cfg: its ``TEST.AUG`` counts; ``ENABLED`` does not.
            model: a `FocalRetinaNet`, which shares its weights.
        Raises:
            UserError: a model of another class.
        """
        super().__init__()
        self.model = model.module if isinstance(model, DistributedDataParallel) else model
        if not isinstance(self.model, FocalRetinaNet):
            raise UserError(
                f"TEST.AUG.ENABLED is True, which needs MODEL.META_ARCHITECTURE FocalRetinaNet, "
                f"and not {type(self.model).__name__}; add: TEST.AUG.ENABLED False"
            )
        self.training = self.model.training  # which a user of it in evaluation sets back
        aug = cfg.TEST.AUG
        self.resizings = [resizing_of_test(cfg, x, aug.MAX_SIZE)[0] for x in aug.MIN_SIZES]
        self.flips = (False, True) if aug.FLIP else (False,)

    @torch.no_grad()
    def forward(self, batched_inputs: list[dict]) -> list[dict]:
        """As `FocalRetinaNet.forward` in evaluation.

        Args:
            batched_inputs: `image` (C, H, W), best as decoded, see
                `tested.build_test_mapper`; optionally `height` and `width` to return boxes in.
        """
        return [{"instances": self._detect(x)} for x in batched_inputs]

    def _detect(self, record: dict) -> Instances:
        height, width = record["image"].shape[-2:]
        candidates, frame = [], None
        with _candidates_alone(self.model):
            for image, is_flipped in self._views(record["image"]):
                own_frame = image.shape[-2:]
                frame = frame or own_frame  # that of the first view: alone it changes nothing
                boxes, scores, classes = self.model([{"image": image}])[0]["instances"]
                if is_flipped:
                    x0, y0, x1, y1 = boxes.unbind(1)
                    boxes = torch.stack([own_frame[1] - x1, y0, own_frame[1] - x0, y1], dim=1)
                scale = [frame[1] / own_frame[1], frame[0] / own_frame[0]] * 2
                candidates.append((boxes * boxes.new_tensor(scale), scores, classes))
        boxes, scores, classes = (torch.cat(x) for x in zip(*candidates, strict=True))
        post = self.model.postprocessor
        rows = suppress(boxes, scores, classes, post.nms_thresh, post.class_agnostic_nms)
        rows = rows[: post.max_detections_per_image]
        result = Instances(
            tuple(frame),
            pred_boxes=Boxes(boxes[rows]),
            scores=scores[rows],
            pred_classes=classes[rows],
        )
        return detector_postprocess(
            result, record.get("height", height), record.get("width", width)
        )

    def _views(self, image: Tensor) -> Iterator[tuple[Tensor, bool]]:
        """Each scale of a (C, H, W) image, and whether it is flipped."""
        array = image.permute(1, 2, 0).cpu().numpy()
        for resizing in self.resizings:
            resized = resizing.get_transform(array).apply_image(array)
            view = torch.as_tensor(resized.transpose(2, 0, 1).copy())
            for is_flipped in self.flips:
                yield view.flip(-1) if is_flipped else view, is_flipped


def with_tta(cfg: CfgNode, model: nn.Module) -> nn.Module:
    """The model with the augmentations of ``TEST.AUG``, where they are enabled."""
    return RetinaNetWithTTA(cfg, model) if cfg.TEST.AUG.ENABLED else model


class _Candidates:
    """In place of a postprocessor: what it would see before NMS and before boxes are clipped."""

    def __init__(self, postprocessor: Postprocessor):
        self.postprocessor = Postprocessor(
            num_classes=postprocessor.num_classes,
            box2box_transform=postprocessor.box2box_transform,
            score_thresh=postprocessor.score_thresh,
            topk_candidates=postprocessor.topk_candidates,
            nms_thresh=NO_NMS,
            max_detections_per_image=2**31,
        )

    def __call__(self, anchors, logits, deltas, image_sizes, output_sizes) -> list[tuple]:
        """(boxes, scores, classes) of each image, in pixels of the network's input."""
        anchors = [level.tensor for level in anchors]
        return [tuple(x)[1:] for x in self.postprocessor.detect(anchors, logits, deltas)]


@contextmanager
def _candidates_alone(model: FocalRetinaNet) -> Iterator[None]:
    """In the block the model returns candidates; see `_Candidates`."""
    postprocessor = model.postprocessor
    model.postprocessor = _Candidates(postprocessor)
    try:
        yield
    finally:
        model.postprocessor = postprocessor
