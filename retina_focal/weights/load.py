"""The one place that loads weights."""

import os
from pathlib import Path
from urllib.parse import parse_qs

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from torch import nn

from retina_focal.data.classes import match_checkpoint
from retina_focal.errors import UserError
from retina_focal.files import check_regular
from retina_focal.weights.fetch import fetch
from retina_focal.weights.formats import OTHER_FILE, check_sha256, read_weights
from retina_focal.weights.trained import expect_trained, missing_parameters

# What begins so is fetched by https; `detectron2` and `catalog` stand for detectron2's own server.
SCHEMES = ("https", "detectron2", "catalog")


class Checkpointer(DetectionCheckpointer):
    """`DetectionCheckpointer` that runs nothing of a file, and says in words what is wrong with it.

    A path may end in options: `?matching_heuristics=True` (names are matched by their ends) and
    `?sha256=HASH` (another file is refused).
    """

    def load(self, path: str, *args, **kwargs) -> dict:
        """Of ``MODEL.WEIGHTS``, where "" loads nothing, or the last checkpoint; see `read_weights`.

        Raises:
            UserError: there is no such file, it can't be fetched, it is not whole, or it holds more
                than weights.
        """
        remedy = self._remedy(path)
        check_weights_file(path, remedy)
        file, mark, options = path.partition("?")
        local = fetch(file, remedy) if "://" in file else file
        try:
            return super().load(local + mark + options, *args, **kwargs)
        finally:
            self._parsed_url_during_load = None  # detectron2 leaves it behind an error

    def _load_file(self, filename: str) -> dict:
        remedy = self._remedy(filename)
        options = parse_qs(self._parsed_url_during_load.query)
        for expected in options.pop("sha256", []):
            check_sha256(filename, expected)
        is_matched = options.pop("matching_heuristics", ["False"]) == ["True"]
        if options:
            raise UserError(
                f"'{filename}' has the option {min(options)}; expected ?matching_heuristics=True "
                "or ?sha256=HASH behind its name"
            )
        checkpoint = read_weights(filename, remedy)
        if is_matched:
            checkpoint["matching_heuristics"] = True
        return checkpoint

    def _load_model(self, checkpoint: dict):
        own = self.model.state_dict()
        for name, value in checkpoint["model"].items():
            if name in own and own[name].is_floating_point():
                kind = torch.as_tensor(value).dtype
                if not kind.is_floating_point:  # torch would drop an imaginary part, or a scale
                    raise UserError(
                        f"the weights have '{name}' as {kind}, expected floating point numbers; "
                        f"{OTHER_FILE}"
                    )
        theirs = next(iter(checkpoint["model"]), "nothing")
        incompatible = super()._load_model(checkpoint)
        names = [name for name, _ in self.model.named_parameters()]
        if names and set(names) <= set(incompatible.missing_keys):
            raise UserError(
                f"none of the weights fit the config's model: they have '{theirs}', and the model "
                f"'{names[0]}'; {OTHER_FILE}, or let names be matched by their ends: "
                "FILE?matching_heuristics=True"
            )
        return incompatible

    def _remedy(self, path: str) -> str:
        if self.save_dir and self.has_checkpoint() and path == self.get_checkpoint_file():
            return f"write the name of an earlier checkpoint into {self.save_dir}/last_checkpoint"
        return OTHER_FILE


def load_weights(model: nn.Module, path: str) -> None:
    """Load the weights that ``MODEL.WEIGHTS`` names into a model; see `Checkpointer.load`."""
    Checkpointer(model).load(path)


def check_weights_file(path: str, remedy: str = OTHER_FILE) -> None:
    """Check before a model is built that a file of weights is there.

    Raises:
        UserError: it is not there or no regular file, or a URL is none that is fetched.
    """
    file = path.partition("?")[0]
    scheme, is_url, _ = file.partition("://")
    if is_url:
        # iopath takes a ".." of the URL for one of its folder: it would write anywhere.
        if scheme not in SCHEMES or os.pardir in file.split("/"):
            raise UserError(
                f"the weights '{file}' are not fetched: expected a URL of https:// or "
                f"detectron2://, without '..'; {remedy}"
            )
    elif file:
        if not os.path.lexists(file):
            folder = Path(file).parent
            files = folder.iterdir() if folder.is_dir() else []
            near = sorted(x.name for x in files if x.suffix in (".pth", ".pkl", ".safetensors"))
            raise UserError(
                f"the weights '{file}' do not exist (relative paths start from {Path.cwd()}"
                + (f"; beside it: {', '.join(near)}); " if near else "); ")
                + remedy
            )
        check_regular(file)


def local_weights(path: str) -> Path:
    """The file that ``MODEL.WEIGHTS`` names; a URL is fetched. See `check_weights_file`."""
    check_weights_file(path)
    file = path.partition("?")[0]
    return Path(fetch(file, OTHER_FILE) if "://" in file else file)


def load_model(cfg: CfgNode, model: nn.Module | None = None) -> nn.Module:
    """The config's model with the trained weights that ``MODEL.WEIGHTS`` names.

    Before the records of the first test set are read: its classes are numbered as the checkpoint's.

    Args:
        model: in place of what the config builds.
    Raises:
        UserError: none are named or found, some are missing, or they are of other classes.
    """
    if not cfg.MODEL.WEIGHTS:
        raise UserError("no weights are given; add: MODEL.WEIGHTS output/model_final.pth")
    check_weights_file(cfg.MODEL.WEIGHTS)
    model = model or build_model(cfg)
    with missing_parameters(model) as missing:
        checkpoint = Checkpointer(model).load(cfg.MODEL.WEIGHTS)
    expect_trained(model, missing, cfg.MODEL.WEIGHTS)
    match_checkpoint(cfg.DATASETS.TEST[:1], checkpoint, cfg.MODEL.WEIGHTS)
    return model
