"""The settings of a network that the names and shapes of its tensors tell."""

import re
from collections.abc import Mapping

from torch import Tensor

from retina_focal.consistency import BLOCKS
from retina_focal.errors import UserError
from retina_focal.weights.names import BOTTOM_UP

BOTTLENECK = 50  # the least depth of a ResNet whose blocks have three convolutions


def network_settings(model: Mapping[str, Tensor], settings: Mapping[str, object]) -> dict:
    """Keys of a config and their values.

    Args:
        model: tensors by this package's names; what is missing of them tells nothing.
        settings: that are known already.
    Raises:
        UserError: a ResNet with other numbers of blocks than the published ones.
    """
    found: dict[str, object] = {}
    if f"{BOTTOM_UP}stem.conv1.weight" in model:
        found |= _resnet(model)
        if found["MODEL.RESNETS.NUM_GROUPS"] > 1:
            found["MODEL.RESNETS.STRIDE_IN_1X1"] = False  # as all published ones
    lateral, p6 = (
        model.get("backbone.fpn_lateral3.weight"),
        model.get("backbone.top_block.p6.weight"),
    )
    if lateral is not None and p6 is not None:
        channels = len(lateral)
        found["MODEL.FPN.OUT_CHANNELS"] = channels
        on_p5 = p6.shape[1] == channels
        found["MODEL.RETINA_FOCAL.TOP_BLOCK_IN_FEATURE"] = "p5" if on_p5 else "res5"
    tower = [x for name, x in model.items() if re.fullmatch(r"head\.cls_subnet\.\d+\.weight", name)]
    if "head.cls_score.weight" in model:
        found["MODEL.RETINANET.NUM_CONVS"] = sum(x.dim() == 4 for x in tower)
        found["MODEL.RETINANET.NORM"] = "GN" if any(x.dim() == 1 for x in tower) else ""
    return {key: x for key, x in found.items() if settings.get(key) != x}


def _resnet(model: Mapping[str, Tensor]) -> dict[str, object]:
    blocks = [{0}, {0}, {0}, {0}]
    for name in model:
        if match := re.match(rf"{BOTTOM_UP}res([2345])\.(\d+)\.", name):
            blocks[int(match[1]) - 2].add(int(match[2]))
    counts = tuple(max(stage) + 1 for stage in blocks)
    has_bottlenecks = f"{BOTTOM_UP}res2.0.conv3.weight" in model
    depths = [x for x, y in BLOCKS.items() if y == counts and (x >= BOTTLENECK) == has_bottlenecks]
    if not depths:
        raise UserError(
            f"the backbone is a ResNet of {counts} blocks; expected one of {sorted(BLOCKS)} layers"
        )
    names = [f"{BOTTOM_UP}res2.0.conv{i}.weight" for i in (2, 3 if has_bottlenecks else 2)]
    missing = [name for name in names if name not in model]
    if missing:
        raise UserError(f"the file lacks what is here {missing[0]}; name another FILE")
    second, last = (model[name] for name in names)
    return {
        "MODEL.RESNETS.DEPTH": depths[0],
        "MODEL.RESNETS.STEM_OUT_CHANNELS": len(model[f"{BOTTOM_UP}stem.conv1.weight"]),
        "MODEL.RESNETS.RES2_OUT_CHANNELS": len(last),
        "MODEL.RESNETS.NUM_GROUPS": len(second) // second.shape[1],
        "MODEL.RESNETS.WIDTH_PER_GROUP": second.shape[1] if has_bottlenecks else 64,
    }
