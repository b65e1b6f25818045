"""The one place that loads weights."""

from pathlib import Path

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.utils.file_io import PathManager
from torch import nn

from retina_focal.errors import UserError

OTHER_FILE = "name another: MODEL.WEIGHTS FILE (in a LazyConfig: train.init_checkpoint=FILE)"


class Checkpointer(DetectionCheckpointer):
    """`DetectionCheckpointer` that says in words which file it can't read, and what to type.

    A `.pth` of ours, a file of detectron2's zoo, or the URL of one.
    """

    def load(self, path: str, *args, **kwargs) -> dict:
        """Of ``MODEL.WEIGHTS``, where "" loads nothing, or the last checkpoint.

        Raises:
            UserError: there is no such file, it can't be fetched, or it is not whole.
        """
        check_weights_file(path, self._remedy(path))
        try:
            return super().load(path, *args, **kwargs)
        except OSError as error:
            raise UserError(f"can't read '{path}' ({error}); {self._remedy(path)}") from error

    def _load_file(self, filename: str) -> dict:
        try:
            return super()._load_file(filename)
        except Exception as error:  # unpickling half a file may raise anything
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(
                f"'{filename}' is not a whole file of weights ({reason}); {self._remedy(filename)}"
            ) from error

    def _remedy(self, path: str) -> str:
        if self.save_dir and self.has_checkpoint() and path == self.get_checkpoint_file():
            return f"write the name of an earlier checkpoint into {self.save_dir}/last_checkpoint"
        return OTHER_FILE


def load_weights(model: nn.Module, path: str) -> None:
    """Load the weights that ``MODEL.WEIGHTS`` names into a model; see `Checkpointer.load`."""
    Checkpointer(model).load(path)


def check_weights_file(path: str, remedy: str = OTHER_FILE) -> None:
    """Look for a file of weights, which can be done before a model is built.

    Raises:
        UserError: it is not there.
    """
    file = path.partition("?")[0]  # detectron2 takes options behind a question mark
    if file and "://" not in file and not PathManager.isfile(file):
        folder = Path(file).parent
        near = sorted(p.name for p in folder.glob("*.p[tk][hl]")) if folder.is_dir() else []
        raise UserError(
            f"the weights '{file}' do not exist (relative paths start from {Path.cwd()}"
            + (f"; beside it: {', '.join(near)}); " if near else "); ")
            + remedy
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
