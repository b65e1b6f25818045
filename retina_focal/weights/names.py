"""What other projects call the tensors of a RetinaNet, and of a ResNet that a backbone starts from.

A layout is known by the names in it. Each name of a file must be explained: by a rule that gives it
ours, or by a reason to leave it out.
"""

import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field

from retina_focal.errors import UserError

BOTTOM_UP = "backbone.bottom_up."
PARAMETER = "(weight|bias)"
NORM = "(weight|bias|running_mean|running_var)"
COUNTERS = (r".*num_batches_tracked", "counters of batches, which nothing reads")
CLASSIFIER = "of the classifier of whole pictures"
# Means and deviations of ImageNet, of pixels from 0 to 255.
RGB = {
    "INPUT.FORMAT": "RGB",
    "MODEL.PIXEL_MEAN": [123.675, 116.28, 103.53],
    "MODEL.PIXEL_STD": [58.395, 57.12, 57.375],
}
# A pattern that a whole name matches, and ours: a template of `re`, or what makes it.
Rule = tuple[str, str | Callable[[re.Match], str]]


@dataclass(frozen=True)
class Layout:
    """The names of a project, and how its detections differ from detectron2's."""

    name: str  # as in: this is ...
    marks: tuple[str, ...]  # patterns, each of which some name matches
    rules: Callable[[Collection[str]], list[Rule]]  # of the names in a file
    unused: tuple[tuple[str, str], ...]  # patterns, and why what they match is left out
    settings: dict[str, object] = field(default_factory=dict)  # of the config
    is_ratio_major: bool = False  # whether a cell's anchors go ratio by ratio, not size by size
    is_backbone: bool = False  # without pyramid and head


@dataclass(frozen=True)
class Mapping:
    """Names of a file by ours, and those that are left out by the reason."""

    names: dict[str, str]
    unused: dict[str, list[str]]


def recognise(names: Collection[str]) -> Layout | None:
    """The layout whose marks are all among the names."""

    def is_marked(layout: Layout) -> bool:
        return all(any(re.fullmatch(x, name) for name in names) for x in layout.marks)

    return next(filter(is_marked, LAYOUTS), None)


def map_names(layout: Layout, names: Collection[str], path: str) -> Mapping:
    """Ours for each name of a file.

    Args:
        path: of the file, for errors.
    Raises:
        UserError: no rule of the layout explains a name, or two names are the same tensor.
    """
    rules = layout.rules(names)
    mapped: dict[str, str] = {}
    unused: dict[str, list[str]] = {}
    for name in names:
        reason = next((why for x, why in layout.unused if re.fullmatch(x, name)), None)
        if reason is not None:
            unused.setdefault(reason, []).append(name)
            continue
        ours = next(_matching(rules, name), None)
        if ours is None:
            raise UserError(
                f"'{path}' is {layout.name}, but nothing of it is called '{name[:100]}'; nothing "
                "is written, as a network without this tensor would be another one"
            )
        if ours in mapped:
            raise UserError(f"'{path}' holds '{mapped[ours]}' and '{name}', which are both {ours}")
        mapped[ours] = name
    return Mapping(mapped, unused)


def _matching(rules: list[Rule], name: str) -> Iterator[str]:
    for pattern, ours in rules:
        if match := re.fullmatch(pattern, name):
            yield match.expand(ours) if isinstance(ours, str) else ours(match)


def _resnet(prefix: str) -> list[Rule]:
    """Names of torchvision, which timm and mmdetection have taken over."""
    rules: list[Rule] = [
        (rf"{prefix}conv1\.weight", rf"{BOTTOM_UP}stem.conv1.weight"),
        (rf"{prefix}bn1\.{NORM}", rf"{BOTTOM_UP}stem.conv1.norm.\1"),
    ]
    for stage in range(1, 5):
        old, ours = rf"{prefix}layer{stage}\.(\d+)\.", rf"{BOTTOM_UP}res{stage + 1}.\1."
        rules += [
            (rf"{old}conv([123])\.weight", rf"{ours}conv\2.weight"),
            (rf"{old}bn([123])\.{NORM}", rf"{ours}conv\2.norm.\3"),
            (rf"{old}downsample\.0\.weight", rf"{ours}shortcut.weight"),
            (rf"{old}downsample\.1\.{NORM}", rf"{ours}shortcut.norm.\2"),
        ]
    return rules


def _levels(pattern: str, ours: str, first: int = 3) -> Rule:
    """The pattern's first group is a level's number, from 0; its second the parameter."""
    return pattern, lambda match: f"backbone.{ours}{int(match[1]) + first}.{match[2]}"


def _tower(pattern: str, ours: str, step: int, shift: int = 0) -> Rule:
    """The pattern's first group is a layer's number; its second the parameter."""
    return pattern, lambda match: f"head.{ours}.{int(match[1]) * step + shift}.{match[2]}"


def _any(names: Collection[str], pattern: str) -> bool:
    return any(re.fullmatch(pattern, name) for name in names)


def _torchvision(names: Collection[str]) -> list[Rule]:
    # With norms, towers are convolution, norm, ReLU; without, convolution, ReLU.
    step = 3 if _any(names, r"head\.\w+\.conv\.0\.1\.weight") else 2
    rules = [
        *_resnet(r"backbone\.body\."),
        _levels(rf"backbone\.fpn\.inner_blocks\.([012])\.(?:0\.)?{PARAMETER}", "fpn_lateral"),
        _levels(rf"backbone\.fpn\.layer_blocks\.([012])\.(?:0\.)?{PARAMETER}", "fpn_output"),
        (rf"backbone\.fpn\.extra_blocks\.p([67])\.{PARAMETER}", r"backbone.top_block.p\1.\2"),
        (rf"head\.classification_head\.cls_logits\.{PARAMETER}", r"head.cls_score.\1"),
        (rf"head\.regression_head\.bbox_reg\.{PARAMETER}", r"head.bbox_pred.\1"),
    ]
    for old, ours in (("classification", "cls"), ("regression", "bbox")):
        conv, ours = rf"head\.{old}_head\.conv\.(\d)\.", f"{ours}_subnet"
        rules += [
            _tower(rf"{conv}0\.{PARAMETER}", ours, step),
            _tower(rf"{conv}1\.{PARAMETER}", ours, step, shift=1),
            _tower(rf"{conv}{PARAMETER}", ours, 1),  # before its version 0.13
        ]
    return rules


def _mmdetection(names: Collection[str]) -> list[Rule]:
    step = 3 if _any(names, r"bbox_head\.cls_convs\.0\.gn\.weight") else 2
    rules = [
        *_resnet(r"backbone\."),
        _levels(rf"neck\.lateral_convs\.([012])\.conv\.{PARAMETER}", "fpn_lateral"),
        _levels(rf"neck\.fpn_convs\.([012])\.conv\.{PARAMETER}", "fpn_output"),
        _levels(rf"neck\.fpn_convs\.([34])\.conv\.{PARAMETER}", "top_block.p"),
        (rf"bbox_head\.retina_cls\.{PARAMETER}", r"head.cls_score.\1"),
        (rf"bbox_head\.retina_reg\.{PARAMETER}", r"head.bbox_pred.\1"),
    ]
    for old, ours in (("cls", "cls_subnet"), ("reg", "bbox_subnet")):
        convs = rf"bbox_head\.{old}_convs\.(\d+)\."
        rules.append(_tower(rf"{convs}conv\.{PARAMETER}", ours, step))
        rules.append(_tower(rf"{convs}gn\.{PARAMETER}", ours, step, shift=1))
    return rules


def _detectron(_: Collection[str]) -> list[Rule]:
    # Letters of blobs.
    parameters = {"w": "weight", "s": "weight", "b": "bias"}
    convs = {"branch1": "shortcut", "branch2a": "conv1", "branch2b": "conv2", "branch2c": "conv3"}
    layer = r"([a-z0-9]+)_(\d+)_(branch1|branch2[abc])"

    def of_block(match: re.Match, norm: str = "") -> str:
        stage, block, conv, letter = match.groups()
        return f"{BOTTOM_UP}{stage}.{block}.{convs[conv]}.{norm}{parameters[letter]}"

    def named(template: str) -> Callable[[re.Match], str]:
        return lambda match: match.expand(template) + parameters[match[match.lastindex]]

    return [
        ("conv1_w", f"{BOTTOM_UP}stem.conv1.weight"),
        ("res_conv1_bn_([sb])", named(f"{BOTTOM_UP}stem.conv1.norm.")),
        (rf"{layer}_(w)", of_block),
        (rf"{layer}_bn_([sb])", lambda match: of_block(match, "norm.")),
        # The topmost has no path from above, and so no "lateral" in its name.
        (r"fpn_inner_res([345])_\d+_sum(?:_lateral)?_([wb])", named(r"backbone.fpn_lateral\1.")),
        (r"fpn_res([345])_\d+_sum_([wb])", named(r"backbone.fpn_output\1.")),
        (r"fpn_([67])_([wb])", named(r"backbone.top_block.p\1.")),
        (r"retnet_cls_pred_fpn3_([wb])", named("head.cls_score.")),
        (r"retnet_bbox_pred_fpn3_([wb])", named("head.bbox_pred.")),
        (
            r"retnet_(cls|bbox)_conv_n(\d)_fpn3_([wb])",
            lambda match: f"head.{match[1]}_subnet.{2 * int(match[2])}.{parameters[match[3]]}",
        ),
    ]


def _own(_: Collection[str]) -> list[Rule]:
    return [(r"((?:backbone|head)\..*)", r"\1")]


DETECTRON_UNUSED = (
    ("conv1_b", "a bias that Detectron's first convolution does not read"),
    ("(fc1000|pred)_[wb]", CLASSIFIER),
    ("lr|model_iter|weight_order", "of the training: learning rate and counters"),
)
# The first that fits.
LAYOUTS = (
    Layout(
        "a RetinaNet of detectron2",
        (r"head\.cls_score\.weight", r"head\.bbox_pred\.weight", r"backbone\.fpn_lateral3\.weight"),
        _own,
        (
            COUNTERS,
            (r"pixel_(mean|std)", "of the config: MODEL.PIXEL_MEAN and MODEL.PIXEL_STD"),
            (r"anchor_generator\.cell_anchors\.\d+", "of the config: MODEL.ANCHOR_GENERATOR"),
            (r"criterion\..*", "of the training: the state of its loss"),
        ),
    ),
    Layout(
        "a RetinaNet of torchvision",
        (r"head\.classification_head\.cls_logits\.weight", r"backbone\.body\.conv1\.weight"),
        _torchvision,
        (COUNTERS,),
        {
            **RGB,
            "MODEL.RESNETS.STRIDE_IN_1X1": False,
            "MODEL.ANCHOR_GENERATOR.NAME": "TorchvisionAnchorGenerator",
            "MODEL.RETINA_FOCAL.TEST.RESIZE": "torchvision",
            "MODEL.RETINA_FOCAL.TEST.CLIP_BEFORE_NMS": True,
            "MODEL.RETINA_FOCAL.TEST.KEEP_EMPTY_BOXES": True,
            "TEST.DETECTIONS_PER_IMAGE": 300,
        },
        is_ratio_major=True,
    ),
    Layout(
        "a RetinaNet of mmdetection",
        (r"bbox_head\.retina_cls\.weight", r"neck\.fpn_convs\.0\.conv\.weight"),
        _mmdetection,
        (COUNTERS,),
        {
            **RGB,
            "MODEL.RESNETS.STRIDE_IN_1X1": False,
            "MODEL.RETINA_FOCAL.TOP_BLOCK_RELU": False,
            "MODEL.RETINA_FOCAL.TEST.RESIZE": "mmdetection",
            "MODEL.RETINA_FOCAL.TEST.CLIP_BEFORE_NMS": True,
        },
        is_ratio_major=True,
    ),
    Layout(
        "a RetinaNet of Detectron",
        (r"retnet_cls_pred_fpn3_w", r"retnet_bbox_pred_fpn3_w"),
        _detectron,
        DETECTRON_UNUSED,
        {
            "MODEL.PIXEL_MEAN": [102.9801, 115.9465, 122.7717],
            "MODEL.ANCHOR_GENERATOR.NAME": "DetectronAnchorGenerator",
            "MODEL.ANCHOR_GENERATOR.OFFSET": 0.5,
            "MODEL.RETINA_FOCAL.TEST.RESIZE": "detectron",
            "MODEL.RETINA_FOCAL.TEST.CLIP_BEFORE_NMS": True,
            "MODEL.RETINA_FOCAL.TEST.KEEP_EMPTY_BOXES": True,
        },
    ),
    Layout(
        "a classifier of torchvision or timm",
        (r"conv1\.weight", r"bn1\.running_mean", r"layer1\.0\.conv1\.weight"),
        lambda _: _resnet(""),
        (COUNTERS, (r"fc\.(weight|bias)", CLASSIFIER)),
        {**RGB, "MODEL.RESNETS.STRIDE_IN_1X1": False},
        is_backbone=True,
    ),
    Layout(
        "a classifier of Caffe2",
        (r"conv1_w", r"res_conv1_bn_s", r"res2_0_branch2a_w"),
        _detectron,
        DETECTRON_UNUSED,
        is_backbone=True,
    ),
)
