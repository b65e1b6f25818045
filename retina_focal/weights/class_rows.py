"""Fine-tuning from weights of other classes: what was learned of a class is kept by its name."""

import logging
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from retina_focal.data.classes import listed

SCORES = ("head.cls_score.weight", "head.cls_score.bias")

logger = logging.getLogger(__name__)


def match_class_rows(
    model: nn.Module, checkpoint: dict, classes: Sequence[str], path: str = "the weights"
) -> None:
    """Order the rows of ``head.cls_score`` in a checkpoint as the model's classes, in place.

    A class that the checkpoint lacks keeps the rows of the model: in a new head, random weights and
    the prior. One line of the log says which are which. Nothing is done where the checkpoint does
    not name its classes, names the same, or has other anchors or channels.

    Args:
        model: not distributed.
        checkpoint: "model", and "classes" with the names of its own.
        classes: names of the model's, K of them; a name that occurs twice means the first.
        path: of the checkpoint, for the line.
    """
    saved, own = checkpoint.get("classes"), model.state_dict()
    if not isinstance(saved, list) or not saved or saved == list(classes):
        return
    found = {name: checkpoint["model"][name] for name in SCORES if name in checkpoint["model"]}
    if len(found) < len(SCORES) or not all(name in own for name in SCORES):
        return
    index = {name: i for i, name in reversed(list(enumerate(saved)))}
    kept = [(new, index[name]) for new, name in enumerate(classes) if name in index]
    for name, weights in found.items():
        rows = _rows(torch.as_tensor(weights), len(saved))
        target = _rows(own[name].detach().clone(), len(classes))
        if rows is None or target is None or rows[:, 0].shape != target[:, 0].shape:
            return
        for new, old in kept:
            target[:, new] = rows[:, old]
        found[name] = target.flatten(0, 1)
    checkpoint["model"] = {**checkpoint["model"], **found}
    names = [classes[new] for new, _ in kept]
    parts = [f"{len(kept)} of {len(classes)} classes keep what '{path}' has of them"]
    if kept:
        parts[0] += f" ({listed(names)})"
    for text, others in (
        ("start from the prior", [x for x in classes if x not in index]),
        ("of the file are dropped", [x for x in saved if x not in classes]),
    ):
        if others:
            parts.append(f"{len(others)} {text} ({listed(others)})")
    logger.info("fine-tuning: %s", "; ".join(parts))


def _rows(weights: Tensor, num_classes: int) -> Tensor | None:
    """(A x K, ...) as (A, K, ...); None where it is no multiple of K."""
    if not num_classes or len(weights) % num_classes:
        return None
    return weights.unflatten(0, (-1, num_classes))
