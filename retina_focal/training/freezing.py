"""Parts of a model that a training leaves as they are, by ``MODEL.RETINA_FOCAL.TRAIN.FREEZE``."""

import difflib
from collections.abc import Sequence

from detectron2.engine import HookBase
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from retina_focal.errors import UserError

SHOWN = 5  # names that a message shows


class Frozen(HookBase):
    """Keeps the statistics of batch norms, in every step; the parameters are frozen already."""

    def __init__(self, norms: Sequence[nn.Module]):
        self.norms = list(norms)

    def before_step(self) -> None:
        for norm in self.norms:  # model.train() turns them on again
            norm.eval()


def freeze(model: nn.Module, names: Sequence[str]) -> Frozen | None:
    """Freeze modules or parameters: no gradient, and fixed statistics of batch norms.

    Args:
        model: neither distributed nor given to an optimizer yet.
        names: as in `model.named_modules()` or `named_parameters()`, such as "backbone.bottom_up".
    Returns:
        A hook that the training needs; None without names.
    Raises:
        UserError: an unknown name, or nothing is left to train.
    """
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    norms = []
    for name in names:
        if name in parameters:
            parameters[name].requires_grad_(False)
        elif name and name in modules:
            modules[name].requires_grad_(False)
            norms += [x for x in modules[name].modules() if isinstance(x, _BatchNorm)]
        else:
            known = [x for x in (*modules, *parameters) if x]
            near = difflib.get_close_matches(name, known, n=SHOWN) or list(
                dict(model.named_children())
            )
            raise UserError(
                f"MODEL.RETINA_FOCAL.TRAIN.FREEZE names '{name}', which the model does not "
                f"have; near it: {', '.join(near)}"
            )
    if names and not any(x.requires_grad for x in parameters.values()):
        raise UserError(
            f"MODEL.RETINA_FOCAL.TRAIN.FREEZE {list(names)} leaves nothing to train; leave out "
            "one of its names"
        )
    return Frozen(norms) if names else None
