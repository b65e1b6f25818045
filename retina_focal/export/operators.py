"""Operators that torch's graphs can't hold for every size, and their ONNX translation.

torch.export has to know of every length on what it depends. A padded length is a multiple of the
stride, which the arithmetic of padding does not tell it; how many boxes NMS keeps depends on
values. As operators of their own both have a shape that is known. torch's own choice between two
computations, `torch.cond`, doesn't reach ONNX.
"""

import torch
import torchvision
from torch import Tensor

# ONNX's NonMaxSuppression keeps none without a limit.
NO_LIMIT = 2**31 - 1
# Marks the translation of `either`.
EITHER = "retina_focal.either"


@torch.library.custom_op("retina_focal::pad_to_stride", mutates_args=())
def pad_to_stride(images: Tensor, stride: int) -> Tensor:
    """(N, C, H, W) with zeros to the right and below, up to the next multiples of `stride`."""
    height, width = images.shape[-2:]
    return torch.nn.functional.pad(images, (0, -width % stride, 0, -height % stride)).clone()


@pad_to_stride.register_fake
def _(images: Tensor, stride: int) -> Tensor:
    # Of the multiples all that is said is that none of the maps is a single cell, or the export
    # would look into it; the graph is right for those too.
    lengths = [torch.library.get_ctx().new_dynamic_size(min=8) * stride for _ in range(2)]
    return images.new_empty(*images.shape[:2], *lengths)


@torch.library.custom_op("retina_focal::nms", mutates_args=())
def nms(boxes: Tensor, scores: Tensor, groups: Tensor, num_groups: int, iou: float) -> Tensor:
    """Which boxes non-maximum suppression leaves.

    Args:
        boxes: (N, M, 4) XYXY.
        scores: (N, M); a box with a score below 0 takes no part.
        groups: (N, M) in {0, ..., num_groups - 1}; boxes of two groups never suppress each other.
        num_groups: 1: all boxes are of one group.
        iou: boxes with a higher IoU are the same object.
    Returns:
        (N, M) bool.
    """
    return nms_in_torch(boxes, scores, groups, num_groups, iou)


@nms.register_fake
def _(boxes: Tensor, scores: Tensor, groups: Tensor, num_groups: int, iou: float) -> Tensor:
    return torch.empty_like(scores, dtype=torch.bool)


@torch.library.custom_op("retina_focal::either", mutates_args=())
def either(condition: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """The first if the condition, a bool scalar, is true, else the second, of the same shape.

    In ONNX only the one is computed: see `onnx_format`.
    """
    return torch.where(condition, first, second)


@either.register_fake
def _(condition: Tensor, first: Tensor, second: Tensor) -> Tensor:
    return torch.empty_like(second)


def nms_in_torch(
    boxes: Tensor, scores: Tensor, groups: Tensor, num_groups: int, iou: float
) -> Tensor:
    """The same by one call of torchvision's, for graphs that know it."""
    num_images, num_boxes = scores.shape
    # Boxes of two images or groups are moved so far apart that none overlap. In fp64, which moves
    # them without rounding that matters.
    boxes = boxes.double()
    extent = boxes.amax() - boxes.amin() + 1
    images = torch.arange(num_images, device=scores.device)[:, None]
    offsets = (images * num_groups + groups) * extent
    # Those with a score below 0 come last, so that they suppress none of the others.
    ranked = scores.double().flatten()
    rows = torchvision.ops.nms((boxes + offsets[..., None]).flatten(0, 1), ranked, iou)
    kept = torch.zeros_like(ranked).index_fill(0, rows, 1.0).view(num_images, num_boxes)
    return (kept > 0) & (scores >= 0)


def translations() -> dict:
    """For `custom_translation_table` of `torch.onnx.export`: standard operators only."""
    from onnxscript import opset18 as op

    def int64(*values: int) -> object:
        return op.Constant(value_ints=list(values))

    def pad_to_stride_in_onnx(images, stride: int):
        size = op.Shape(images, start=2, end=4)
        pad = op.Mod(op.Neg(size), int64(stride))
        return op.Pad(images, op.Concat(int64(0, 0, 0, 0, 0, 0), pad, axis=0))

    def nms_in_onnx(boxes, scores, groups, num_groups: int, iou: float):
        of_groups = op.Unsqueeze(scores, int64(1))  # (N, G, M), one score per box
        if num_groups > 1:
            is_own = op.Equal(
                op.Unsqueeze(groups, int64(1)),
                op.Reshape(int64(*range(num_groups)), int64(1, -1, 1)),
            )
            nothing = op.Constant(value_float=-1.0)
            of_groups = op.Where(is_own, of_groups, nothing)
        selected = op.NonMaxSuppression(
            boxes,
            of_groups,
            int64(NO_LIMIT),
            op.Constant(value_floats=[iou]),
            op.Constant(value_floats=[-0.5]),
        )  # (selected, 3): image, group, box
        places = op.Gather(selected, int64(0, 2), axis=1)
        ones = op.Expand(int64(1), op.Shape(places, start=0, end=1))
        nowhere = op.ConstantOfShape(op.Shape(scores), value=_int64_zero())
        return op.Cast(op.ScatterND(nowhere, places, ones), to=9)  # BOOL

    def either_in_onnx(condition, first, second):
        chosen = op.Where(condition, first, second)
        chosen.producer().metadata_props[EITHER] = "1"
        return chosen

    def divided_in_onnx(dividend, divisor, rounding_mode: str):
        # torch's own translation divides in fp32, which is wrong from 2^24 on: a level of a
        # large image has more elements. Here both are integers, and not negative.
        return op.Div(dividend, divisor)

    library, aten = torch.ops.retina_focal, torch.ops.aten
    return {
        aten.div.Tensor_mode: divided_in_onnx,
        aten.div.Scalar_mode: divided_in_onnx,
        library.pad_to_stride.default: pad_to_stride_in_onnx,
        library.nms.default: nms_in_onnx,
        library.either.default: either_in_onnx,
    }


def _int64_zero() -> object:
    from onnx import TensorProto, helper

    return helper.make_tensor("zero", TensorProto.INT64, [1], [0])
