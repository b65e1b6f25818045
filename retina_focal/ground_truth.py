"""The ground truth of a batch: checked, and moved to where it is needed."""

import torch
from detectron2.structures import Boxes, Instances

from retina_focal.errors import UserError
from retina_focal.transfer import to_device


def ground_truth(
    batched_inputs: list[dict], num_classes: int, device: torch.device
) -> list[Instances]:
    """Boxes and classes of a batch, checked before the loss turns into NaN or crashes.

    Args:
        batched_inputs: N records with `instances`.
        num_classes: K.
        device: where to; what lies on the host crosses in one copy, without a wait.
    Returns:
        N Instances with `gt_boxes` and `gt_classes` on the device; other fields stay where they
        are. The `ignore_regions` of a record, `Boxes`, come last, as boxes of class -1
        (`IgnoreRegions`).
    Raises:
        UserError: a record without instances, a box or a class that can't be one.
    """
    for index, record in enumerate(batched_inputs):
        if "instances" not in record:
            raise UserError(
                f"{_record_name(record, index)} has no 'instances', but the model is in training "
                "mode; for inference call model.eval() first"
            )
        instances = record["instances"]
        boxes, classes = instances.gt_boxes.tensor, instances.gt_classes
        bad = ~boxes.isfinite().all(1) | (boxes[:, 2:] < boxes[:, :2]).any(1)
        if bad.any():
            box = int(bad.nonzero()[0])
            raise UserError(
                f"{_record_name(record, index)}: box {box} is {boxes[box].tolist()}; expected "
                "finite XYXY pixels with x0 <= x1 and y0 <= y1: correct or remove that annotation"
            )
        bad = (classes < 0) | (classes >= num_classes)
        if bad.any():
            box = int(bad.nonzero()[0])
            raise UserError(
                f"{_record_name(record, index)}: box {box} has class {int(classes[box])}, but the "
                f"model has {num_classes} classes, 0 to {num_classes - 1}; set "
                "MODEL.RETINANET.NUM_CLASSES to the dataset's"
            )
    targets = [
        _with_regions(record) if "ignore_regions" in record else record["instances"]
        for record in batched_inputs
    ]
    if all(x.gt_boxes.tensor.device == x.gt_classes.device == device for x in targets):
        return targets
    boxes = to_device(
        [x.gt_boxes.tensor for x in targets] + [x.gt_classes for x in targets], device
    )
    return [
        Instances(x.image_size, **{**x.get_fields(), "gt_boxes": Boxes(own), "gt_classes": classes})
        for x, own, classes in zip(targets, boxes, boxes[len(targets) :], strict=False)
    ]


def _with_regions(record: dict) -> Instances:
    instances, regions = record["instances"], record["ignore_regions"]
    classes = instances.gt_classes
    return Instances(
        instances.image_size,
        gt_boxes=Boxes(torch.cat([instances.gt_boxes.tensor, regions.tensor.to(classes.device)])),
        gt_classes=torch.cat([classes, classes.new_full((len(regions),), -1)]),
    )


def _record_name(record: dict, index: int) -> str:
    """What an error message calls one element of a batch."""
    return (
        f"image '{record['file_name']}'" if "file_name" in record else f"image {index} of the batch"
    )
