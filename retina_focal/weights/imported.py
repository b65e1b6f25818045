"""Weights of other projects as ours, with the config under which they detect what they did."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES
from torch import Tensor, nn

from retina_focal.config import config_path, get_cfg
from retina_focal.data.classes import listed
from retina_focal.errors import UserError
from retina_focal.limits import check_values
from retina_focal.merging import merge_file, merge_options
from retina_focal.weights.formats import read_weights, sha256_of
from retina_focal.weights.names import BOTTOM_UP, RGB, Layout, map_names, recognise
from retina_focal.weights.shapes import network_settings
from retina_focal.weights.timm_names import timm_layout

BASE = "Base-RetinaFocal.yaml"
REMEDY = "name another FILE"
EPS = 1e-5  # of the norms of this package, detectron2 and, as a rule, torchvision
# How the SHA-256 of torchvision's own RetinaNet begins, as its name tells: trained with norms
# whose eps was 0, which the file does not say.
WITHOUT_EPS = "eeacb38b"
THINGS = {x["id"]: x["name"] for x in COCO_CATEGORIES if x["isthing"]}
TORCHVISION_ROWS = 91  # COCO's ids to 90, which 11 of them don't have; row 0 is the background
NUM_RATIOS = 3
TIMM_KEY = "MODEL.RETINA_FOCAL.TIMM.NAME"


@dataclass
class Imported:
    """What a file holds, in this package's names."""

    path: str
    layout: Layout
    model: dict[str, Tensor]  # float32
    settings: dict[str, object]  # of the config, beyond `BASE`
    classes: list[str] | None
    sha256: str
    notes: list[str] = field(default_factory=list)  # what was done, and what was left out and why

    def checkpoint(self) -> dict:
        """As a training writes it."""
        classes = {} if self.classes is None else {"classes": self.classes}
        source = {"layout": self.layout.name, "sha256": self.sha256}
        return {"model": self.model, **classes, "imported": source}


def read_import(
    path: str | Path,
    options: Sequence[str] = (),
    classes: Sequence[str] | None = None,
    norm_eps: float | None = None,
) -> Imported:
    """The weights of another project, known by what is in the file.

    Args:
        options: KEY VALUE pairs of the config; a name of timm among them is the backbone's.
        classes: names, in the order of the scores; of torchvision's, where there is one name less
            than rows, row 0 is the background and left out.
        norm_eps: that the frozen norms were trained with; default: 1e-5, or what is known of the
            file.
    Raises:
        UserError: the file is no weights, of no known project, or holds what nothing explains.
    """
    path = str(path)
    checkpoint = read_weights(path, REMEDY)
    tensors = _without_prefix(checkpoint["model"])
    pairs = dict(zip(options[::2], options[1::2], strict=False))
    layout = timm_layout(pairs[TIMM_KEY]) if pairs.get(TIMM_KEY) else recognise(tensors)
    if layout is None:
        raise UserError(_unknown(path, tensors))
    mapping = map_names(layout, tensors, path)
    model = {ours: _tensor(path, name, tensors[name]) for ours, name in mapping.names.items()}
    found = Imported(path, layout, model, dict(layout.settings), None, sha256_of(path))
    _note_names(found, mapping.unused, checkpoint.get("momentum", []))
    _complete(found.model)
    _set_eps(found, norm_eps)
    if not layout.is_backbone:
        own = checkpoint.get("classes")  # of this package's checkpoints
        meta = {"CLASSES": own} if own else checkpoint.get("meta")
        _set_head(found, classes, meta if isinstance(meta, dict) else {})
    found.settings.update(network_settings(found.model, found.settings))
    return found


def import_config(found: Imported, options: Sequence[str] = ()) -> CfgNode:
    """The config that goes with the weights.

    Args:
        options: KEY VALUE pairs, which change it.
    Raises:
        UserError: see `merge_options` and `check_values`.
    """
    cfg = get_cfg()
    merge_file(cfg, config_path(BASE))
    merge_options(cfg, [x for pair in found.settings.items() for x in pair])
    merge_options(cfg, options)
    check_values(cfg)
    return cfg


def check_network(found: Imported, network: nn.Module) -> None:
    """Refuse (UserError) weights that are not exactly those of the network of their config."""
    inside = BOTTOM_UP if found.layout.is_backbone else ""
    expected = {
        name: tuple(x.shape)
        for name, x in network.state_dict().items()
        if name.startswith(inside) and not name.startswith("criterion.")
    }
    shapes = {name: tuple(x.shape) for name, x in found.model.items()}
    for name in sorted(expected.keys() | shapes.keys()):
        if shapes.get(name) != expected.get(name):
            own, wanted = (x.get(name, "missing") for x in (shapes, expected))
            raise UserError(
                f"'{found.path}' is {found.layout.name}, but {name} is {own} in it, and {wanted} "
                "in the network of its config; where it was built with other settings, add: "
                "--opts KEY VALUE"
            )


def _unknown(path: str, tensors: Mapping[str, object]) -> str:
    if not tensors:
        return f"'{path}' holds no tensor; {REMEDY}"
    return (
        f"'{path}' holds {len(tensors)} tensors such as {listed(list(tensors)[:3])}, which are of "
        "no RetinaNet of detectron2, Detectron, torchvision or mmdetection, and no ResNet of "
        f"torchvision, timm or Caffe2; of another backbone of timm's add: --opts {TIMM_KEY} NAME"
    )


def _without_prefix(tensors: Mapping[str, object]) -> dict[str, object]:
    """Without the "module." that a model on several GPUs was saved with."""
    is_wrapped = tensors and all(name.startswith("module.") for name in tensors)
    return {name.removeprefix("module.") if is_wrapped else name: x for name, x in tensors.items()}


def _tensor(path: str, name: str, value: Tensor | np.ndarray) -> Tensor:
    """In fp32; a UserError where that would not be what the file holds."""
    tensor = torch.as_tensor(value).detach().cpu()
    is_count = name.endswith("num_batches_tracked")
    if not (tensor.is_floating_point() or is_count):
        raise UserError(f"'{path}': {name} is of {tensor.dtype}; expected floating point: {REMEDY}")
    if not tensor.isfinite().all():
        raise UserError(f"'{path}': {name} is not finite, so nothing can be detected: {REMEDY}")
    if name.endswith("running_var") and tensor.min() < 0:
        raise UserError(f"'{path}': {name} is below 0, and no variance is: {REMEDY}")
    return (tensor if is_count else tensor.float()).clone().contiguous()


def _note_names(found: Imported, unused: dict[str, list[str]], momentum: list[str]) -> None:
    parts = {"backbone": BOTTOM_UP, "pyramid": "backbone.", "head": "head."}
    counts = dict.fromkeys(parts, 0)
    for name in found.model:
        counts[next(part for part, prefix in parts.items() if name.startswith(prefix))] += 1
    text = ", ".join(f"{count} of the {part}" for part, count in counts.items() if count)
    found.notes.append(f"mapped {len(found.model)} tensors: {text}")
    if momentum:
        unused = {**unused, "momentum of the optimizer": list(momentum)}
    for reason, names in unused.items():
        more = ", ..." if len(names) > 1 else ""
        found.notes.append(f"left out {len(names)} ({names[0]}{more}): {reason}")


def _complete(model: dict[str, Tensor]) -> None:
    """Add, in place, what a project's network does without and ours has."""
    for name, weight in list(model.items()):
        stem = name.removesuffix(".weight")
        # Detectron's scale and shift: statistics that change nothing.
        if name.startswith(BOTTOM_UP) and name.endswith(".norm.weight"):
            model.setdefault(f"{stem}.running_mean", torch.zeros_like(weight))
            model.setdefault(f"{stem}.running_var", torch.ones_like(weight) - EPS)
        # Convolutions before a norm have no bias in torchvision and mmdetection.
        if re.fullmatch(r"head\.(cls|bbox)_subnet\.\d+\.weight", name) and weight.dim() == 4:
            model.setdefault(f"{stem}.bias", weight.new_zeros(len(weight)))


def _set_eps(found: Imported, norm_eps: float | None) -> None:
    """Put the eps that the norms were trained with into their variances, where it is another."""
    is_known = found.sha256.startswith(WITHOUT_EPS) and "torchvision" in found.layout.name
    if norm_eps is None and is_known:
        norm_eps = 0.0
        found.notes.append("it is torchvision's own file, whose norms were trained with eps 0")
    if norm_eps is None or norm_eps == EPS:
        return
    variances = [x for x in found.model if x.startswith(BOTTOM_UP) and x.endswith("running_var")]
    for name in variances:
        found.model[name] += norm_eps - EPS
    found.notes.append(f"eps {norm_eps:g} of the norms is put into {len(variances)} variances")


def _set_head(found: Imported, names: Sequence[str] | None, meta: dict) -> None:
    """Order the outputs of the head by detectron2's order of anchors, and name its classes."""
    model, path = found.model, found.path
    outputs = ("head.cls_score.weight", "head.cls_score.bias", "head.bbox_pred.weight")
    missing = [name for name in (*outputs, "head.bbox_pred.bias") if name not in model]
    if missing:
        raise UserError(f"'{path}' is {found.layout.name}, but lacks {missing[0]}; {REMEDY}")
    num_anchors = len(model["head.bbox_pred.bias"]) // 4
    num_rows = len(model["head.cls_score.bias"])
    if not num_anchors or num_rows % num_anchors or num_anchors % NUM_RATIOS:
        raise UserError(
            f"'{path}' has {num_rows} scores and {4 * num_anchors} numbers of boxes per cell; "
            "expected both for as many anchors, of three ratios each"
        )
    num_classes = num_rows // num_anchors
    _set_style(found, str(meta.get("config") or meta.get("cfg") or ""), str(meta))
    rows, names = _classes(found, num_classes, names, meta)
    for name, own in (("cls_score", rows), ("bbox_pred", [0, 1, 2, 3])):
        for key in (f"head.{name}.weight", f"head.{name}.bias"):
            outputs = model[key].unflatten(0, (num_anchors, -1))
            if found.layout.is_ratio_major:
                by_ratio = outputs.unflatten(0, (NUM_RATIOS, -1))
                outputs = by_ratio.transpose(0, 1).flatten(0, 1)
            model[key] = outputs[:, own].flatten(0, 1).contiguous()
    found.classes = names
    found.settings["MODEL.RETINANET.NUM_CLASSES"] = len(rows)
    found.settings["MODEL.RETINA_FOCAL.ANCHORS.SCALES_PER_OCTAVE"] = num_anchors // NUM_RATIOS
    if names != list(THINGS.values()):
        found.settings["DATASETS.TRAIN"] = found.settings["DATASETS.TEST"] = ()


def _classes(
    found: Imported, num_classes: int, names: Sequence[str] | None, meta: dict
) -> tuple[list[int], list[str] | None]:
    """The rows of the classes that are kept, and the names of these, where they are known."""
    rows = list(range(num_classes))
    of_file = meta.get("CLASSES") or meta.get("dataset_meta")
    if isinstance(of_file, dict):
        of_file = of_file.get("classes") or of_file.get("CLASSES")
    if names is None and isinstance(of_file, list | tuple) and of_file:
        names, whose = list(map(str, of_file)), "the file"
    else:
        whose = "--classes"
    is_torchvision = "torchvision" in found.layout.name
    if names is not None:
        if is_torchvision and len(names) == num_classes - 1:
            rows = rows[1:]
            found.notes.append("row 0 of the scores is the background, and left out")
        if len(names) != len(rows):
            raise UserError(
                f"'{found.path}' has {num_classes} classes, and {whose} names {len(names)}; give "
                f"--classes with {num_classes} names"
            )
        return rows, list(names)
    if is_torchvision and num_classes == TORCHVISION_ROWS:
        left = num_classes - len(THINGS)
        found.notes.append(f"{left} of {num_classes} rows of scores are of no class of COCO's")
        return list(THINGS), list(THINGS.values())
    if num_classes == len(THINGS):
        found.notes.append(f"{num_classes} classes are taken for COCO's; --classes names others")
        return rows, list(THINGS.values())
    found.notes.append(f"{num_classes} classes without names; --classes gives them")
    return rows, None


def _set_style(found: Imported, config: str, meta: str) -> None:
    """Of mmdetection, whose config, as a text in the file, tells what the tensors do not."""
    if "mmdetection" not in found.layout.name:
        return
    if re.search(r"mmdet_version'?\W+[01]\.", meta):
        raise UserError(
            f"'{found.path}' is of mmdetection 1 or older, whose anchors were others; convert it "
            "with mmdetection's tools/model_converters, and import the result"
        )
    if not config:
        found.notes.append("the file holds no config: style 'pytorch' and RGB are assumed")
    if re.search(r"style'?\s*[=:]\s*'caffe'", config.replace('"', "'")):
        bgr = {"INPUT.FORMAT": "BGR", "MODEL.PIXEL_STD": [1.0, 1.0, 1.0]}
        mean = RGB["MODEL.PIXEL_MEAN"][::-1]
        found.settings.update(bgr, **{"MODEL.PIXEL_MEAN": mean})
        found.settings["MODEL.RESNETS.STRIDE_IN_1X1"] = True
    if re.search(r"relu_before_extra_convs'?\s*[=:]\s*True", config):
        found.settings["MODEL.RETINA_FOCAL.TOP_BLOCK_RELU"] = True
    if "on_lateral" in config:
        raise UserError(f"'{found.path}' has P6 on a lateral; expected it on C5 or P5")
