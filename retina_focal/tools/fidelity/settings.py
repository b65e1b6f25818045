"""What the paper, the authors' code and detectron2's model zoo set, and what follows from it.

The values of the paper and of Detectron stand in ``settings.yaml`` with their source; detectron2's
are read from its own configs. A setting on which a reference is silent has no value for it.
"""

from collections.abc import Callable, Iterator
from functools import reduce
from pathlib import Path
from typing import NamedTuple

import yaml
from detectron2.config import CfgNode

from retina_focal.anchors import octave_sizes
from retina_focal.consistency import OCTAVE_ANCHORS

RESNET_BUILDERS = (
    "build_retina_focal_resnet_fpn_backbone",
    "build_retina_focal_resnet_single_backbone",
    "build_retinanet_resnet_fpn_backbone",
)
TIMM_BUILDERS = ("build_retina_focal_timm_fpn_backbone", "build_retina_focal_timm_single_backbone")


class Choice(NamedTuple):
    """What a reference does in one setting."""

    values: tuple  # each agrees with it; none: the reference does what no key here can say
    source: str
    text: str = ""  # printed in place of the values


class Setting(NamedTuple):
    """A line of the comparison."""

    name: str  # as printed and as headers declare it, without a comma
    consequence: str
    keys: tuple[str, ...] = ()  # what the value depends on
    paper: Choice | None = None
    detectron: Choice | None = None
    detectron2_source: str = ""  # where not a key of its own holds the value
    always: str | None = None  # the value that no key changes

    def read(self, cfg: CfgNode) -> object:
        """The comparable value in a config; None where the setting has no effect there."""
        if self.always:
            return self.always
        if self.name in READERS:
            return READERS[self.name](cfg)
        values = tuple(frozen(reduce(getattr, key.split("."), cfg)) for key in self.keys)
        return values[0] if len(values) == 1 else values


def frozen(value: object) -> object:
    """Lists as tuples, at every depth: a YAML writes one or the other."""
    return tuple(map(frozen, value)) if isinstance(value, list | tuple) else value


def _backbone(cfg: CfgNode) -> str:
    builder, resnets = cfg.MODEL.BACKBONE.NAME, cfg.MODEL.RESNETS
    if builder in TIMM_BUILDERS:
        return cfg.MODEL.RETINA_FOCAL.TIMM.NAME
    if builder not in RESNET_BUILDERS:
        return builder
    if resnets.NUM_GROUPS > 1 or resnets.WIDTH_PER_GROUP != 64:
        return f"X-{resnets.DEPTH}-{resnets.NUM_GROUPS}x{resnets.WIDTH_PER_GROUP}d"
    return f"R-{resnets.DEPTH}"


def _bottleneck_stride(cfg: CfgNode) -> str | None:
    if cfg.MODEL.BACKBONE.NAME not in RESNET_BUILDERS:
        return None
    convolution = "1x1" if cfg.MODEL.RESNETS.STRIDE_IN_1X1 else "3x3"
    return convolution + (" (ResNeXt)" if cfg.MODEL.RESNETS.NUM_GROUPS > 1 else "")


def _backbone_norm(cfg: CfgNode) -> str | None:
    builder = cfg.MODEL.BACKBONE.NAME
    if builder in TIMM_BUILDERS:
        return cfg.MODEL.RETINA_FOCAL.TIMM.NORM
    return cfg.MODEL.RESNETS.NORM if builder in RESNET_BUILDERS else None


def _initial_weights(cfg: CfgNode) -> str:
    """The last folder and the name: the same name exists from several sources."""
    path = Path(cfg.MODEL.WEIGHTS.partition("?")[0])
    return "/".join(path.parts[-2:]) or "none"


def _class_loss(cfg: CfgNode) -> str:
    node = cfg.MODEL.RETINA_FOCAL
    if node.CLS_LOSS == "focal_star":
        return f"focal_star, beta {node.FOCAL_STAR.BETA:g}"
    if node.CLS_LOSS == "hinge":
        return f"hinge, margin {node.HINGE.MARGIN:g}"
    if node.CLS_LOSS == "poly1":
        return f"poly1, epsilon {node.POLY1.EPSILON:g}"
    if node.CLS_LOSS == "asymmetric":
        gammas = f"gammas {node.ASYMMETRIC.GAMMA_POS:g} and {node.ASYMMETRIC.GAMMA_NEG:g}"
        return f"asymmetric, {gammas}, margin {node.ASYMMETRIC.MARGIN:g}"
    return node.CLS_LOSS


def _gamma(cfg: CfgNode) -> float | None:
    having = ("focal", "focal_star", "poly1", "quality_focal", "varifocal")
    has_gamma = cfg.MODEL.RETINA_FOCAL.CLS_LOSS in having
    return cfg.MODEL.RETINANET.FOCAL_LOSS_GAMMA if has_gamma else None


def _alpha(cfg: CfgNode) -> float | str | None:
    if cfg.MODEL.RETINA_FOCAL.CLS_LOSS not in ("focal", "poly1", "varifocal"):
        return None
    if cfg.MODEL.RETINA_FOCAL.ALPHA_FROM_DATA:
        return "inverse class frequency"
    return cfg.MODEL.RETINANET.FOCAL_LOSS_ALPHA


def _ohem(cfg: CfgNode) -> str:
    node = cfg.MODEL.RETINA_FOCAL.OHEM
    if not node.ENABLED:
        return "off"
    ratio = f", 1:{node.NEG_PER_POS}" if node.NEG_PER_POS else ""
    return f"{node.BATCH_SIZE} anchors, NMS {node.NMS_THRESH:g}{ratio}"


def _box_loss(cfg: CfgNode) -> str:
    node = cfg.MODEL.RETINANET
    if node.BBOX_REG_LOSS_TYPE != "smooth_l1":
        return node.BBOX_REG_LOSS_TYPE
    return f"smooth L1, beta {node.SMOOTH_L1_LOSS_BETA:g}"


def _levels(numbers: list) -> list[list[float]]:
    """detectron2 takes one list for all levels too."""
    return numbers if isinstance(numbers[0], list | tuple) else [numbers]


def _anchor_levels(cfg: CfgNode) -> list[list[float]]:
    if cfg.MODEL.ANCHOR_GENERATOR.NAME in OCTAVE_ANCHORS:
        node = cfg.MODEL.RETINA_FOCAL.ANCHORS
        return octave_sizes(node.BASE_SIZES, node.SCALES_PER_OCTAVE, len(node.BASE_SIZES))
    return _levels(cfg.MODEL.ANCHOR_GENERATOR.SIZES)


def _anchor_scales(cfg: CfgNode) -> tuple[float, ...]:
    sizes = _anchor_levels(cfg)[0]
    return tuple(size / sizes[0] for size in sizes)


def _aspect_ratios(cfg: CfgNode) -> tuple[float, ...]:
    levels = _levels(cfg.MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS)
    return tuple(sorted({ratio for level in levels for ratio in level}))


def _schedule(cfg: CfgNode) -> str:
    solver = cfg.SOLVER
    if solver.LR_SCHEDULER_NAME != "WarmupMultiStepLR":
        return f"{solver.MAX_ITER} it, {solver.LR_SCHEDULER_NAME}"
    return f"{solver.MAX_ITER} it, x {solver.GAMMA:g} at {', '.join(map(str, solver.STEPS))}"


def _warm_up(cfg: CfgNode) -> str:
    solver = cfg.SOLVER
    if not solver.WARMUP_ITERS:
        return "none"
    return f"{solver.WARMUP_METHOD}, {solver.WARMUP_ITERS} it from x {solver.WARMUP_FACTOR:.3g}"


def _bias_updates(cfg: CfgNode) -> str:
    decay = cfg.SOLVER.WEIGHT_DECAY_BIAS
    decay = "as weights" if decay is None else f"{decay:g}"
    return f"lr x {cfg.SOLVER.BIAS_LR_FACTOR:g}, decay {decay}"


def _gradient_clipping(cfg: CfgNode) -> str:
    node = cfg.SOLVER.CLIP_GRADIENTS
    return f"by {node.CLIP_TYPE} at {node.CLIP_VALUE:g}" if node.ENABLED else "off"


def _training_scales(cfg: CfgNode) -> tuple[int, ...] | str:
    sizes, sampling = frozen(cfg.INPUT.MIN_SIZE_TRAIN), cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING
    return sizes if sampling == "choice" else f"{sampling} of {sizes}"


# Where the keys alone are not the value. All take the config.
READERS: dict[str, Callable[[CfgNode], object]] = {
    "backbone": _backbone,
    "initial weights": _initial_weights,
    "bottleneck stride": _bottleneck_stride,
    "backbone norm": _backbone_norm,
    "pyramid": lambda cfg: frozen(cfg.MODEL.RETINANET.IN_FEATURES),
    "P6 source": lambda cfg: (
        cfg.MODEL.RETINA_FOCAL.TOP_BLOCK_IN_FEATURE
        if "p6" in cfg.MODEL.RETINANET.IN_FEATURES
        else None
    ),
    "anchor sizes": lambda cfg: tuple(sizes[0] for sizes in _anchor_levels(cfg)),
    "anchor scales": _anchor_scales,
    "aspect ratios": _aspect_ratios,
    "class loss": _class_loss,
    "gamma": _gamma,
    "alpha": _alpha,
    "OHEM": _ohem,
    "box loss": _box_loss,
    "images without boxes": lambda cfg: (
        "filtered" if cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS else "used"
    ),
    "training scales": _training_scales,
    "schedule": _schedule,
    "warm-up": _warm_up,
    "bias updates": _bias_updates,
    "gradient clipping": _gradient_clipping,
    "precision": lambda cfg: (
        "autocast" if cfg.SOLVER.AMP.ENABLED else cfg.MODEL.RETINA_FOCAL.PRECISION
    ),
}


def _read_settings() -> Iterator[Setting]:
    text = Path(__file__).with_name("settings.yaml").read_text(encoding="utf-8")
    for name, fields in yaml.safe_load(text).items():
        fields["keys"] = tuple(fields.get("keys", ()))
        for key, reference in (("paper", "paper"), ("detectron", "Detectron")):
            if key in fields:
                choice = fields[key]
                values = [choice["value"]] if "value" in choice else choice.get("values", ())
                source = f"{reference} {choice['source']}"
                fields[key] = Choice(frozen(values), source, choice.get("text", ""))
        yield Setting(name, **fields)


SETTINGS = tuple(_read_settings())
