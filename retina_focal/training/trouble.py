"""What stops a run, in words."""

from collections.abc import Mapping
from typing import NoReturn

from detectron2.engine import SimpleTrainer


def stop_for_bad_loss(step: SimpleTrainer, losses: Mapping[str, float], iteration: int) -> NoReturn:
    """End the training in every process, before the weights change.

    Args:
        step: what runs the steps.
        losses: by name, the mean over processes.
        iteration: the first is 0.
    Raises:
        FloatingPointError: always.
    """
    raise FloatingPointError(
        f"Loss became infinite or NaN at iteration={iteration}!\nloss_dict = {dict(losses)}"
    )
