"""Whether a file of weights held all that a model has learned."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from retina_focal.errors import UserError

SHOWN = 3  # names that a message shows


@contextmanager
def missing_parameters(model: nn.Module) -> Iterator[list[str]]:
    """The names of the parameters that a loading in the block left as they were.

    Those that the file lacks, and those that have another shape in it.
    """
    missing: list[str] = []
    parameters = {name for name, _ in model.named_parameters()}

    def keep(_: nn.Module, keys) -> None:
        missing.extend(name for name in keys.missing_keys if name in parameters)

    handle = model.register_load_state_dict_post_hook(keep)
    try:
        yield missing
    finally:
        handle.remove()


def expect_trained(model: nn.Module, missing: list[str], path: str) -> None:
    """Refuse to measure or draw with parameters that are random or not finite.

    Args:
        missing: of `missing_parameters`.
        path: of the weights.
    Raises:
        UserError: something is missing, or is NaN or infinite.
    """
    wrong = [name for name, x in model.state_dict().items() if not x.isfinite().all()]
    if wrong:
        raise UserError(
            f"{path} is not finite: {len(wrong)} of its weights are NaN or infinite "
            f"({', '.join(wrong[:SHOWN])}{', ...' if len(wrong) > SHOWN else ''}); name an earlier "
            "checkpoint: MODEL.WEIGHTS output/model_0004999.pth"
        )
    if not missing:
        return
    names = [name for name, _ in model.named_parameters()]
    head = [name for name in names if name.startswith("head.")]
    remedy = "name a trained model: MODEL.WEIGHTS output/model_final.pth"
    if head and set(head) <= set(missing):
        raise UserError(
            f"{path} holds no weights of the head, so that all scores are the prior; {remedy}"
        )
    shown = ", ".join(missing[:SHOWN]) + (", ..." if len(missing) > SHOWN else "")
    raise UserError(
        f"{path} lacks {len(missing)} of the model's {len(names)} parameters, or has them in "
        f"another shape ({shown}), so that they are random; {remedy}, with its own config.yaml"
    )
