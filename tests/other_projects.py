"""RetinaNets of other projects, small and random, with a forward of their own.

Detectron and mmdetection are not installed: their tensors, under the names that they publish, and
what they compute of a picture are written here anew, from their published description. Nothing of
the package is used.
"""

import math
from collections.abc import Callable, Iterator

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

BLOCKS = (3, 4, 6, 3)
STEM, WIDTH, RES2, FPN = 16, 8, 32, 32
ENDS = {5: "res5_2_sum", 4: "res4_5_sum", 3: "res3_3_sum"}  # Detectron's blobs of C5 to C3
RATIOS = (0.5, 1.0, 2.0)
NUM_ANCHORS = 9
Detections = list[tuple[int, float, np.ndarray]]  # class, score, XYXY in pixels of the picture


class Draws:
    """Random weights that keep activations about as large as the picture's."""

    def __init__(self, seed: int = 0):
        self.generator = torch.Generator().manual_seed(seed)

    def conv(self, out_channels: int, in_channels: int, side: int) -> Tensor:
        shape = (out_channels, in_channels, side, side)
        std = math.sqrt(2 / (in_channels * side * side))
        return std * torch.randn(shape, generator=self.generator)

    def near(self, value: float, channels: int) -> Tensor:
        return value + 0.1 * torch.randn(channels, generator=self.generator)


def resnet_layers() -> Iterator[tuple[int, int, dict[str, tuple[int, int, int]]]]:
    """Stage, block and (out, in, side) of its convolutions, the shortcut where it has one."""
    channels = STEM
    for stage, count in enumerate(BLOCKS):
        inside, outside = WIDTH * 2**stage, RES2 * 2**stage
        for block in range(count):
            layers = {
                "1": (inside, channels, 1),
                "2": (inside, inside, 3),
                "3": (outside, inside, 1),
            }
            if block == 0:
                layers["shortcut"] = (outside, channels, 1)
            yield stage, block, layers
            channels = outside


def resnet(
    x: Tensor, conv: Callable[[Tensor, tuple, int], Tensor], stride_in_1x1: bool
) -> list[Tensor]:
    """C3, C4 and C5.

    Args:
        conv: convolution and norm of a layer: (input, ("stem",) or (stage, block, name), stride).
    """
    x = F.max_pool2d(conv(x, ("stem",), 2).relu(), 3, 2, 1)
    ends = []
    for stage, block, layers in resnet_layers():
        stride = 2 if stage and not block else 1
        first, second = (stride, 1) if stride_in_1x1 else (1, stride)
        y = conv(x, (stage, block, "1"), first).relu()
        y = conv(y, (stage, block, "2"), second).relu()
        y = conv(y, (stage, block, "3"), 1)
        if "shortcut" in layers:
            x = conv(x, (stage, block, "shortcut"), stride)
        x = (x + y).relu()
        if block == BLOCKS[stage] - 1:
            ends.append(x)
    return ends[1:]


def pyramid(
    c: list[Tensor], conv: Callable[[str, Tensor, int], Tensor], relu: bool
) -> list[Tensor]:
    """P3 to P7, P6 of C5; `conv` computes lateral3, output3, ..., p6 and p7."""
    p5 = conv("lateral5", c[2], 1)
    p4 = conv("lateral4", c[1], 1) + F.interpolate(p5, scale_factor=2.0)
    p3 = conv("lateral3", c[0], 1) + F.interpolate(p4, scale_factor=2.0)
    levels = [conv(f"output{i}", x, 1) for i, x in ((3, p3), (4, p4), (5, p5))]
    p6 = conv("p6", c[2], 2)
    return [*levels, p6, conv("p7", p6.relu() if relu else p6, 2)]


def padded(image: Tensor) -> Tensor:
    height, width = image.shape[-2:]
    return F.pad(image, (0, -width % 32, 0, -height % 32))[None]


def best(found: Detections, threshold: float, limit: int) -> Detections:
    """What greedy NMS leaves of each class."""
    kept: Detections = []
    for label, score, box in sorted(found, key=lambda x: -x[1]):
        others = [x[2] for x in kept if x[0] == label]
        if all(iou(box, other) <= threshold for other in others):
            kept.append((label, score, box))
    return kept[:limit]


def iou(a: np.ndarray, b: np.ndarray) -> float:
    width, height = np.maximum(np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]), 0)
    areas = [(x[2] - x[0]) * (x[3] - x[1]) for x in (a, b)]
    return width * height / max(sum(areas) - width * height, 1e-9)


def candidates(
    logits: Tensor, deltas: Tensor, num_classes: int, threshold: float, limit: int = 1000
) -> Iterator[tuple[int, float, int, int, int, np.ndarray]]:
    """Class, score, anchor of the cell, row, column and deltas, of one level of one picture."""
    scores = logits[0].unflatten(0, (NUM_ANCHORS, num_classes)).sigmoid().numpy()
    boxes = deltas[0].unflatten(0, (NUM_ANCHORS, 4)).numpy()
    places = np.argwhere(scores > threshold)
    order = np.argsort(-scores[tuple(places.T)], kind="stable")[:limit]
    for anchor, label, row, column in places[order]:
        score = float(scores[anchor, label, row, column])
        yield int(label), score, anchor, row, column, boxes[anchor, :, row, column].astype(float)


def decoded(center: np.ndarray, size: np.ndarray, deltas: np.ndarray) -> np.ndarray:
    """XYXY of an anchor's center and size, and its deltas."""
    center = center + deltas[:2] * size
    size = size * np.exp(np.minimum(deltas[2:], math.log(1000 / 16)))
    return np.concatenate([center - size / 2, center + size / 2])


class Mmdetection:
    """mmdetection's RetinaNet: `state_dict`, and what it finds in an RGB picture."""

    def __init__(self, num_classes: int, seed: int = 0):
        self.num_classes = num_classes
        draws = Draws(seed)
        self.state: dict[str, Tensor] = {}
        self._add_conv_and_norm(draws, "backbone.conv1", "backbone.bn1", (STEM, 3, 7))
        for stage, block, layers in resnet_layers():
            for name, shape in layers.items():
                conv, norm = self._names(stage, block, name)
                self._add_conv_and_norm(draws, conv, norm, shape, 0.3 if name == "3" else 1.0)
        for i in range(3):
            self._add_conv(draws, f"neck.lateral_convs.{i}.conv", (FPN, RES2 * 2 ** (i + 1), 1))
            self._add_conv(draws, f"neck.fpn_convs.{i}.conv", (FPN, FPN, 3))
        self._add_conv(draws, "neck.fpn_convs.3.conv", (FPN, RES2 * 8, 3))
        self._add_conv(draws, "neck.fpn_convs.4.conv", (FPN, FPN, 3))
        for i in range(4):
            self._add_conv(draws, f"bbox_head.cls_convs.{i}.conv", (FPN, FPN, 3))
            self._add_conv(draws, f"bbox_head.reg_convs.{i}.conv", (FPN, FPN, 3))
        self._add_conv(draws, "bbox_head.retina_cls", (NUM_ANCHORS * num_classes, FPN, 3))
        self._add_conv(draws, "bbox_head.retina_reg", (NUM_ANCHORS * 4, FPN, 3))

    def detect(self, image: np.ndarray, shortest: int, longest: int) -> Detections:
        height, width = image.shape[:2]
        scale = min(shortest / min(height, width), longest / max(height, width))
        size = int(width * scale + 0.5), int(height * scale + 0.5)
        resized = cv2.resize(image, size, interpolation=cv2.INTER_LINEAR)
        mean, std = np.array([123.675, 116.28, 103.53]), np.array([58.395, 57.12, 57.375])
        x = torch.from_numpy((resized - mean) / std).permute(2, 0, 1).float()
        logits, deltas = self.network(padded(x))
        factor = np.array([size[0] / width, size[1] / height] * 2)
        found: Detections = []
        for level, (level_logits, level_deltas) in enumerate(zip(logits, deltas, strict=True)):
            stride = 8 * 2**level
            of_level = candidates(level_logits, level_deltas, self.num_classes, 0.05)
            for label, score, anchor, row, column, own in of_level:
                ratio, octave = RATIOS[anchor // 3], anchor % 3  # ratio by ratio
                side = stride * 4 * 2 ** (octave / 3)
                shape = np.array([side / math.sqrt(ratio), side * math.sqrt(ratio)])
                box = decoded(np.array([column * stride, row * stride]), shape, own)
                box = np.clip(box, 0, [*size, *size])
                if (box[2:] > box[:2]).all():
                    found.append((label, score, box / factor))
        return best(found, 0.5, 100)

    def network(self, images: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Logits and deltas per level."""

        def conv_and_norm(x: Tensor, layer: tuple, stride: int) -> Tensor:
            names = ("backbone.conv1", "backbone.bn1") if len(layer) == 1 else self._names(*layer)
            weight, norm = self.state[f"{names[0]}.weight"], names[1]
            x = F.conv2d(x, weight, None, stride, weight.shape[-1] // 2)
            keys = ("running_mean", "running_var", "weight", "bias")
            return F.batch_norm(x, *(self.state[f"{norm}.{key}"] for key in keys))

        def of_pyramid(name: str, x: Tensor, stride: int) -> Tensor:
            level = int(name[-1]) - 3
            kind = "lateral_convs" if name.startswith("lateral") else "fpn_convs"
            return self._conv(x, f"neck.{kind}.{level}.conv", stride)

        c = resnet(images, conv_and_norm, stride_in_1x1=False)
        levels = pyramid(c, of_pyramid, relu=False)
        return self._head("cls", levels), self._head("reg", levels)

    def _head(self, kind: str, levels: list[Tensor]) -> list[Tensor]:
        outputs = []
        for x in levels:
            for i in range(4):
                x = self._conv(x, f"bbox_head.{kind}_convs.{i}.conv").relu()
            outputs.append(self._conv(x, f"bbox_head.retina_{kind}"))
        return outputs

    def _conv(self, x: Tensor, name: str, stride: int = 1) -> Tensor:
        weight, bias = self.state[f"{name}.weight"], self.state[f"{name}.bias"]
        return F.conv2d(x, weight, bias, stride, weight.shape[-1] // 2)

    def _names(self, stage: int, block: int, name: str) -> tuple[str, str]:
        start = f"backbone.layer{stage + 1}.{block}."
        if name == "shortcut":
            return f"{start}downsample.0", f"{start}downsample.1"
        return f"{start}conv{name}", f"{start}bn{name}"

    def _add_conv(self, draws: Draws, name: str, shape: tuple[int, int, int]) -> None:
        self.state[f"{name}.weight"] = draws.conv(*shape)
        self.state[f"{name}.bias"] = draws.near(0, shape[0])

    def _add_conv_and_norm(
        self, draws: Draws, conv: str, norm: str, shape: tuple, scale: float = 1.0
    ) -> None:
        self.state[f"{conv}.weight"] = draws.conv(*shape)
        self.state[f"{norm}.weight"] = scale * draws.near(1, shape[0])
        self.state[f"{norm}.bias"] = draws.near(0, shape[0])
        self.state[f"{norm}.running_mean"] = draws.near(0, shape[0])
        self.state[f"{norm}.running_var"] = draws.near(1, shape[0]).abs()
        self.state[f"{norm}.num_batches_tracked"] = torch.tensor(7)


class Detectron:
    """Detectron's RetinaNet: blobs, and what it finds in a BGR picture."""

    def __init__(self, num_classes: int, seed: int = 0):
        self.num_classes = num_classes
        draws, blobs = Draws(seed), {}

        def affine(conv: str, norm: str, shape: tuple, scale: float = 1.0) -> None:
            blobs[f"{conv}_w"] = draws.conv(*shape)
            blobs[f"{norm}_s"], blobs[f"{norm}_b"] = (
                scale * draws.near(1, shape[0]),
                draws.near(0, shape[0]),
            )

        def conv(name: str, shape: tuple) -> None:
            blobs[f"{name}_w"], blobs[f"{name}_b"] = draws.conv(*shape), draws.near(0, shape[0])

        affine("conv1", "res_conv1_bn", (STEM, 3, 7))
        blobs["conv1_w"] /= 60  # of pixels that are not divided by their deviation
        for stage, block, layers in resnet_layers():
            for name, shape in layers.items():
                blob = self._name(stage, block, name)
                affine(blob, f"{blob}_bn", shape, 0.3 if name == "3" else 1.0)
        for stage, end in ENDS.items():
            lateral = "" if stage == 5 else "_lateral"
            conv(f"fpn_inner_{end}{lateral}", (FPN, RES2 * 2 ** (stage - 2), 1))
            conv(f"fpn_{end}", (FPN, FPN, 3))
        conv("fpn_6", (FPN, RES2 * 8, 3))
        conv("fpn_7", (FPN, FPN, 3))
        for i in range(4):
            conv(f"retnet_cls_conv_n{i}_fpn3", (FPN, FPN, 3))
            conv(f"retnet_bbox_conv_n{i}_fpn3", (FPN, FPN, 3))
        conv("retnet_cls_pred_fpn3", (NUM_ANCHORS * num_classes, FPN, 3))
        conv("retnet_bbox_pred_fpn3", (NUM_ANCHORS * 4, FPN, 3))
        self.blobs: dict[str, Tensor] = blobs

    def file(self) -> dict:
        """As it is pickled: with the momentum of what is trained, and what was there before."""
        blobs = {name: x.numpy() for name, x in self.blobs.items()}
        momentum = {f"{x}_momentum": np.zeros_like(y) for x, y in blobs.items() if "bn" not in x}
        before = {"conv1_b": np.zeros(STEM, "f4"), "fc1000_w": np.zeros((2, 2), "f4")}
        before |= {"fc1000_b": np.zeros(2, "f4"), "lr": np.float32(0.01)}
        return {"blobs": {**blobs, **momentum, **before}, "cfg": "MODEL: {TYPE: retinanet}\n"}

    def detect(self, image: np.ndarray, shortest: int, longest: int) -> Detections:
        """In pixels of the network's input, from an edge of a pixel to an edge.

        Detectron counts both pixels that a box ends in: its x1 and y1 are one less than here.
        """
        pixels = image.astype(np.float32) - np.array([102.9801, 115.9465, 122.7717], np.float32)
        scale = shortest / min(image.shape[:2])
        if round(scale * max(image.shape[:2])) > longest:
            scale = longest / max(image.shape[:2])
        pixels = cv2.resize(pixels, None, fx=scale, fy=scale, interpolation=cv2.INTER_LINEAR)
        height, width = pixels.shape[:2]
        logits, deltas = self.network(padded(torch.from_numpy(pixels).permute(2, 0, 1)))
        found: Detections = []
        for level, (level_logits, level_deltas) in enumerate(zip(logits, deltas, strict=True)):
            stride = 8 * 2**level
            threshold = 0.05 if level < 4 else 0.0
            of_level = candidates(level_logits, level_deltas, self.num_classes, threshold)
            for label, score, anchor, row, column, own in of_level:
                octave, ratio = anchor // 3, RATIOS[anchor % 3]  # size by size
                # Of a window from pixel 0 to pixel stride - 1.
                side = np.round(np.sqrt(stride * stride / ratio))
                shape = np.array([side, np.round(side * ratio)]) * 4 * 2 ** (octave / 3)
                middle = np.array([column, row]) * stride + (stride - 1) / 2
                x0, y0 = middle - (shape - 1) / 2
                x1, y1 = middle + (shape - 1) / 2
                size = np.array([x1 - x0 + 1, y1 - y0 + 1])
                box = decoded(np.array([x0, y0]) + size / 2, size, own)
                box -= np.array([0, 0, 1, 1])
                box = np.clip(box, 0, [width - 1, height - 1] * 2)
                found.append((label, score, box + np.array([0, 0, 1, 1])))
        return best(found, 0.5, 100)

    def network(self, images: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Logits and deltas per level."""

        def conv_and_affine(x: Tensor, layer: tuple, stride: int) -> Tensor:
            conv = "conv1" if len(layer) == 1 else self._name(*layer)
            norm = "res_conv1_bn" if len(layer) == 1 else f"{conv}_bn"
            weight = self.blobs[f"{conv}_w"]
            x = F.conv2d(x, weight, None, stride, weight.shape[-1] // 2)
            scale, shift = (self.blobs[f"{norm}_{x}"][:, None, None] for x in "sb")
            return x * scale + shift

        def of_pyramid(name: str, x: Tensor, stride: int) -> Tensor:
            level = int(name[-1])
            if name.startswith("p"):
                return self._conv(x, f"fpn_{level}", stride)
            inner = f"fpn_inner_{ENDS[level]}" + ("" if level == 5 else "_lateral")
            return self._conv(x, inner if "lateral" in name else f"fpn_{ENDS[level]}", stride)

        c = resnet(images, conv_and_affine, stride_in_1x1=True)
        levels = pyramid(c, of_pyramid, relu=True)
        return self._head("cls", levels), self._head("bbox", levels)

    def _head(self, kind: str, levels: list[Tensor]) -> list[Tensor]:
        outputs = []
        for x in levels:
            for i in range(4):
                x = self._conv(x, f"retnet_{kind}_conv_n{i}_fpn3").relu()
            outputs.append(self._conv(x, f"retnet_{kind}_pred_fpn3"))
        return outputs

    def _conv(self, x: Tensor, name: str, stride: int = 1) -> Tensor:
        weight, bias = self.blobs[f"{name}_w"], self.blobs[f"{name}_b"]
        return F.conv2d(x, weight, bias, stride, weight.shape[-1] // 2)

    def _name(self, stage: int, block: int, name: str) -> str:
        branch = "branch1" if name == "shortcut" else f"branch2{'abc'[int(name) - 1]}"
        return f"res{stage + 2}_{block}_{branch}"


def spread(weight: Tensor, bias: Tensor, outputs: list[Tensor], std: float, mean: float) -> None:
    """Scale an output layer, in place, so that its outputs have this spread and mean."""
    values = torch.cat([x.flatten() for x in outputs])
    factor = std / float(values.std())
    weight *= factor
    bias *= factor
    bias += mean - factor * float(values.mean())
