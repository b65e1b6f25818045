"""Whether a checkpoint is of the model and the training that would go on from it."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor, nn
from torch.optim import Optimizer

from retina_focal.errors import UserError

SHOWN = 3  # names that a message shows
# A criterion's buffers come and go with the normaliser, the others with the version of a library.
NEGLIGIBLE = ("criterion.", "pixel_mean", "pixel_std", "anchor_generator.")


class AnotherRun(UserError):
    """A checkpoint that is whole, but not of this model or training."""


def expect_same_classes(path: str | Path, saved: Sequence | None, classes: Sequence | None) -> None:
    """Refuse (AnotherRun) to go on with other classes; None: not known."""
    if None not in (saved, classes) and saved != classes:
        raise _another_model(
            path, f"has the classes {_counted(saved)}, and the config {_counted(classes)}"
        )


def expect_same_weights(path: str | Path, saved: Mapping[str, Tensor], model: nn.Module) -> None:
    """Refuse (AnotherRun) to go on with another architecture.

    Args:
        path: of the checkpoint.
        saved: its weights.
        model: of the config, not distributed.
    """
    there, here = (
        {name: tuple(x.shape) for name, x in weights.items() if _counts(name)}
        for weights in (saved, model.state_dict())
    )
    more, fewer = (list(x) for x in (there.keys() - here.keys(), here.keys() - there.keys()))
    reasons = []
    if more:
        reasons.append(f"has {_counted(sorted(more))} weights that the config's model lacks")
    if fewer:
        reasons.append(f"lacks {_counted(sorted(fewer))} of the weights of the config's model")
    other = [name for name in here.keys() & there.keys() if here[name] != there[name]]
    if other:
        first = min(other)
        reasons.append(
            f"has {len(other)} weights of another shape ('{first}' is {there[first]}, and the "
            f"config's {here[first]})"
        )
    if reasons:
        raise _another_model(path, f"is of another architecture: it {', '.join(reasons)}")


def expect_same_training(path: str | Path, saved: Mapping, now: Mapping) -> None:
    """Refuse (AnotherRun) to go on with another optimizer, or with other parts frozen.

    Args:
        path: of the checkpoint.
        saved: of `training_of`, from the checkpoint; {} where it doesn't tell.
        now: the same of the run that would go on.
    """
    if not saved.keys() >= {"optimizer", "trained"}:
        return
    reasons = []
    if saved["optimizer"] != now["optimizer"]:
        reasons.append(f"{saved['optimizer']} trained it, and the config has {now['optimizer']}")
    for one, other, words in (
        (saved, now, "trained there and frozen by the config"),
        (now, saved, "frozen there and trained by the config"),
    ):
        names = [name for name in one["trained"] if name not in other["trained"]]
        if names:
            reasons.append(f"{_counted(names)} parameters are {words} (FREEZE_AT, TRAIN.FREEZE)")
    if reasons:
        raise AnotherRun(
            f"{path} is of another training: {', '.join(reasons)}; --resume goes on with the same "
            f"one. To begin another {_from_its_weights(path)}"
        )


def training_of(model: nn.Module, optimizer: Optimizer) -> dict[str, str | list[str]]:
    """What must stay when a run is gone on with: the optimizer's name, and what it trains.

    Args:
        model: not distributed.
    """
    kinds = [x for x in type(optimizer).__mro__ if not x.__module__.startswith("detectron2.")]
    trained = [name for name, x in model.named_parameters() if x.requires_grad]
    # Not the class that detectron2 derives to clip gradients.
    return {"optimizer": kinds[0].__name__, "trained": trained}


def _counts(name: str) -> bool:
    return not name.startswith(NEGLIGIBLE) and not name.endswith("num_batches_tracked")


def _another_model(path: str | Path, reason: str) -> AnotherRun:
    return AnotherRun(
        f"{path} {reason}; --resume goes on with the same model. To start another "
        f"{_from_its_weights(path)}"
    )


def _from_its_weights(path: str | Path) -> str:
    return (
        f"from its weights, leave out --resume and type: MODEL.WEIGHTS {path} OUTPUT_DIR ANOTHER "
        "(in a LazyConfig: train.init_checkpoint=... train.output_dir=...)"
    )


def _counted(names: Sequence) -> str:
    more = ", ..." if len(names) > SHOWN else ""
    return f"{len(names)} ({', '.join(map(str, names[:SHOWN]))}{more})"
