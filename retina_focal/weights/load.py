"""The one place that loads weights."""

import pickle
from pathlib import Path

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.utils.file_io import PathManager
from torch import nn

from retina_focal.errors import UserError


def load_weights(model: nn.Module, path: str) -> None:
    """Load a checkpoint into a model: a `.pth` of ours, a file of detectron2's zoo, or a URL.

    Args:
        path: as ``MODEL.WEIGHTS`` has it; "" loads nothing.
    Raises:
        UserError: there is no such file, or it holds no weights.
    """
    check_weights_file(path)
    try:
        DetectionCheckpointer(model).load(path)
    except (EOFError, RuntimeError, pickle.UnpicklingError) as error:
        raise UserError(
            f"'{path}' is not a whole file of weights ({str(error).splitlines()[0]}); "
            "name another: MODEL.WEIGHTS output/model_final.pth"
        ) from error


def check_weights_file(path: str) -> None:
    """Look for a file of weights before a model is built.

    Raises:
        UserError: it is not there.
    """
    file = path.partition("?")[0]  # detectron2 takes options behind a question mark
    if file and "://" not in file and not PathManager.isfile(file):
        folder = Path(file).parent
        near = sorted(p.name for p in folder.glob("*.p[tk][hl]")) if folder.is_dir() else []
        raise UserError(
            f"the weights '{file}' do not exist (relative paths start from {Path.cwd()}"
            + (f"; beside it: {', '.join(near)})" if near else ")")
        )


def load_model(cfg: CfgNode) -> nn.Module:
    """The config's model with the trained weights that ``MODEL.WEIGHTS`` names.

    Raises:
        UserError: none are named or found, or they hold none of a dense head's.
    """
    if not cfg.MODEL.WEIGHTS:
        raise UserError("no weights are given; add: MODEL.WEIGHTS output/model_final.pth")
    check_weights_file(cfg.MODEL.WEIGHTS)
    model = build_model(cfg)
    head = getattr(model, "head", None)
    initial = {name: x.clone() for name, x in head.state_dict().items()} if head else {}
    load_weights(model, cfg.MODEL.WEIGHTS)
    if initial and all(torch.equal(x, initial[name]) for name, x in head.state_dict().items()):
        raise UserError(
            f"{cfg.MODEL.WEIGHTS} holds no weights of the head, so that all scores are the prior; "
            "name a trained model: MODEL.WEIGHTS output/model_final.pth"
        )
    return model
