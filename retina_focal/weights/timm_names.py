"""The names of a backbone of timm, which is the layout of its file of weights."""

import re

import torch

from retina_focal.backbone import TimmBackbone
from retina_focal.errors import UserError
from retina_focal.weights.names import BOTTOM_UP, CLASSIFIER, COUNTERS, Layout

PIXELS = 255.0


def timm_layout(name: str) -> Layout:
    """The layout of timm's file for a model.

    Args:
        name: of the model in timm: the tensors of several models look alike.
    Raises:
        UserError: timm is not installed, or has no such model.
    """
    with torch.device("meta"):
        body = TimmBackbone(name).body.state_dict()
    import timm

    with torch.device("meta"):
        whole = timm.create_model(name, pretrained=False).state_dict()
    # The body is timm's model without what comes after its last feature.
    ours = {x.removeprefix("model."): f"{BOTTOM_UP}body.{x}" for x in body}
    left = [re.escape(x) for x in whole if x not in ours and not re.fullmatch(COUNTERS[0], x)]
    data = timm.get_pretrained_cfg(name)
    if data is None:
        raise UserError(f"timm {timm.__version__} does not tell what pixels {name} wants")
    return Layout(
        f"timm's {name}",
        (),
        lambda _: [(re.escape(x), y.replace("\\", r"\\")) for x, y in ours.items()],
        (COUNTERS, ("|".join(left) or "(?!)", CLASSIFIER)),
        {
            "INPUT.FORMAT": "RGB",
            "MODEL.PIXEL_MEAN": [round(PIXELS * x, 4) for x in data.mean],
            "MODEL.PIXEL_STD": [round(PIXELS * x, 4) for x in data.std],
            "MODEL.BACKBONE.NAME": "build_retina_focal_timm_fpn_backbone",
            "MODEL.RETINA_FOCAL.TIMM.NAME": name,
        },
        is_backbone=True,
    )
