"""What a checkpoint must hold for a run to go on from it, beside weights that fit the model."""

import math
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor
from torch.optim import Optimizer

from retina_focal.data.findings import is_class_name
from retina_focal.errors import UserError

RESUME_HOOK = "ExactResume"  # whose state a run reads before the others'
MOST = 10**9  # iterations; more than any run has
# What torch's optimizers keep per parameter in its shape.
SHAPED = (
    "momentum_buffer", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_inf", "square_avg",
    "grad_avg", "acc_delta", "sum", "ax", "mu_product_avg", "prev",
)  # fmt: skip


class _Fault(Exception):
    """Says what is wrong."""


def check_state(path: object, content: Mapping, optimizer: Optimizer | None = None) -> None:
    """Look through what a checkpoint holds beside "model"; tensors are not read.

    Args:
        path: of the checkpoint, for the message.
        optimizer: of the run that would go on from it; then there must be a trainer's state.
    Raises:
        UserError: something is missing, of another type, or outside its range.
    """
    check_labels(path, content)
    try:
        _check(content, optimizer)
    except (_Fault, RecursionError) as fault:
        raise UserError(f"a run can't go on from '{path}': {fault}") from fault


def check_labels(path: object, content: Mapping) -> None:
    """Look through what an evaluation reads of a checkpoint beside "model"; see `check_state`."""
    try:
        for name, (fits, wanted) in LABELS.items():
            if name in content:
                _expect(content, "", name, fits, wanted)
    except _Fault as fault:
        raise UserError(f"'{path}' can't be used: {fault}") from fault


def tensors_of(value: object, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """All tensors in dicts, lists and tuples, with their places: "model.head.cls_score.bias"."""
    if isinstance(value, Tensor):
        yield name, value
    items = enumerate(value) if isinstance(value, (list, tuple)) else ()
    for key, item in value.items() if isinstance(value, Mapping) else items:
        yield from tensors_of(item, f"{name}.{key}" if name else str(key))


def _check(content: Mapping, optimizer: Optimizer | None) -> None:
    if "trainer" not in content:
        if optimizer is not None:
            raise _Fault("it holds weights alone; to start from them: MODEL.WEIGHTS FILE")
        return
    _check_trainer(content["trainer"], "trainer", optimizer)


def _check_trainer(trainer: object, place: str, optimizer: Optimizer | None) -> None:
    """Of this package, or of detectron2's lazyconfig_train_net.py: one trainer less."""
    _expect({"": trainer}, place, "", _is_dict, "a trainer's state")
    _expect(trainer, place, "iteration", _is_count, "a number of iterations")
    hooks = trainer.get("hooks", {})
    _expect({"hooks": hooks}, place, "hooks", _is_dict, "the states of hooks")
    for name, fields in HOOKS.items():
        if name in hooks:
            where = f"{place}.hooks.{name}"
            _expect(hooks, f"{place}.hooks", name, _is_dict, "the state of a hook")
            for field, (fits, wanted) in fields.items():
                if field in hooks[name] or field not in OPTIONAL:
                    _expect(hooks[name], where, field, fits, wanted)
    if "LRScheduler" in hooks:
        done = trainer["iteration"]
        follows = (lambda epoch: done <= epoch <= done + 1, f"{done + 1} after iteration {done}")
        _expect(hooks["LRScheduler"], f"{place}.hooks.LRScheduler", "last_epoch", *follows)
    if "_trainer" in trainer:
        _check_trainer(trainer["_trainer"], f"{place}._trainer", optimizer)
        return
    _expect(trainer, place, "optimizer", _is_dict, "an optimizer's state")
    _check_optimizer(trainer["optimizer"], f"{place}.optimizer", optimizer)
    if "grad_scaler" in trainer:
        _expect(trainer, place, "grad_scaler", _is_dict, "a GradScaler's state")
        for field, (fits, wanted) in GRAD_SCALER.items():
            _expect(trainer["grad_scaler"], f"{place}.grad_scaler", field, fits, wanted)


def _check_optimizer(saved: Mapping, place: str, optimizer: Optimizer | None) -> None:
    _expect(saved, place, "param_groups", _list_of(_is_group), "groups of parameters")
    _expect(saved, place, "state", _is_dict_of(int, dict), "a dict of the parameters' states")
    if optimizer is None:
        return
    sizes = [len(group["params"]) for group in saved["param_groups"]]
    expected = [len(group["params"]) for group in optimizer.param_groups]
    if sizes != expected:
        raise _Fault(
            f"its optimizer has {sum(sizes)} parameters in {len(sizes)} groups, and the config's "
            f"{sum(expected)} in {len(expected)}; are other parts frozen (FREEZE_AT, TRAIN.FREEZE)?"
        )
    numbers = [number for group in saved["param_groups"] for number in group["params"]]
    parameters = [x for group in optimizer.param_groups for x in group["params"]]
    of_number = dict(zip(numbers, parameters, strict=True))
    for number, state in saved["state"].items():
        for name, value in state.items():
            where = f"{place}.state.{number}.{name}"
            if isinstance(value, str | bytes):
                raise _Fault(f"{where} is a {type(value).__name__}, expected numbers")
            if number in of_number and name in SHAPED and value is not None:
                _check_buffer(value, where, of_number[number])


def _check_buffer(value: object, where: str, parameter: Tensor) -> None:
    wanted = f"{parameter.dtype} of shape {tuple(parameter.shape)}"
    if not isinstance(value, Tensor):
        raise _Fault(f"{where} is a {type(value).__name__}, expected a tensor, {wanted}")
    is_fit = value.dtype in (parameter.dtype, torch.float32)
    if not (is_fit and value.shape == parameter.shape):
        raise _Fault(f"{where} is {value.dtype} of shape {tuple(value.shape)}, expected {wanted}")


def _expect(
    holder: Mapping, place: str, key: str, fits: Callable[[object], bool], wanted: str
) -> None:
    name = ".".join(filter(None, (place, key)))
    if key not in holder:
        raise _Fault(f"it has no {name}, expected {wanted}")
    value = holder[key]
    if not fits(value):
        is_plain = isinstance(value, str | int | float | None)
        found = f"{value!r:.60}" if is_plain else f"another {type(value).__name__}"
        raise _Fault(f"its {name} is {found}, expected {wanted}")


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value <= MOST


def _is_count_or_none(value: object) -> bool:
    """-1 stands for none yet."""
    return type(value) is int and -1 <= value <= MOST


def _is_64_bits(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _is_number(value: object) -> bool:
    return type(value) in (int, float)


def _is_text(value: object) -> bool:
    return type(value) is str


def _is_class(value: object) -> bool:
    return _is_text(value) and is_class_name(value)


def _is_dict(value: object) -> bool:
    return isinstance(value, Mapping)


def _list_of(fits: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: isinstance(value, list | tuple) and all(map(fits, value))


def _is_dict_of(key: type, item: type) -> Callable[[object], bool]:
    return lambda value: (
        isinstance(value, Mapping)
        and all(type(k) is key and isinstance(x, item) for k, x in value.items())
    )


def _is_group(value: object) -> bool:
    return isinstance(value, Mapping) and _list_of(_is_count)(value.get("params"))


def _is_history(value: object) -> bool:
    """{name: (is smoothed, [(value, iteration)])}, of the storage's scalars."""
    is_sample = _is_tuple_of(_is_number, _is_count)
    is_scalar = _is_tuple_of(lambda hint: type(hint) is bool, _list_of(is_sample))
    return _is_dict_of(str, tuple)(value) and all(map(is_scalar, value.values()))


def _is_tuple_of(*fits: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: (
        isinstance(value, tuple)
        and len(value) == len(fits)
        and all(fit(x) for fit, x in zip(fits, value, strict=True))
    )


def _is_between(low: float, high: float) -> Callable[[object], bool]:
    return lambda value: _is_number(value) and low < value < high


LABELS = {
    "classes": (_list_of(_is_class), "a list of names"),
    "raw_model": (_is_dict_of(str, Tensor), "names and tensors"),
    "iteration": (_is_count, "a number of iterations"),
}
COUNT = (_is_count, "a number from 0 on")
LAST = (_is_count_or_none, "an iteration, or -1")
OPTIONAL = ("seen", "images")  # of a loader of ours
OPTIONAL += ("optimizer", "trained", "run", "data")  # not in those of earlier versions
# Fields of each hook that reads them on resuming: whether a value fits, and what does.
HOOKS: dict[str, dict[str, tuple[Callable[[object], bool], str]]] = {
    "LRScheduler": {"last_epoch": COUNT},
    RESUME_HOOK: {
        "run": (_is_text, "an id"),
        "data": (_is_dict_of(str, str), "names of datasets and hashes"),
        "seed": (_is_64_bits, "a seed"),
        "processes": COUNT,
        "buffers": (_list_of(_is_dict_of(str, Tensor)), "the buffers of each process"),
        "evaluated": LAST,
        "metrics_begin": (_is_64_bits, "a number of bytes"),
        "scalars": (_is_history, "the last values of each scalar"),
        "seen": (_is_64_bits, "a number of images"),
        "images": COUNT,
        "optimizer": (_is_text, "a name"),
        "trained": (_list_of(_is_text), "names of parameters"),
    },
    "Trouble": {"bad": (_is_dict_of(str, str), "file names and reasons")},
    "WeightAverage": {"num_updates": COUNT},
    "BestCheckpoint": {
        "best": (_is_number, "a number"),
        "best_iteration": LAST,
        "num_worse": COUNT,
        "judged": LAST,
    },
}
GRAD_SCALER: dict[str, tuple[Callable[[object], bool], str]] = {
    "scale": (_is_between(0, math.inf), "a finite number above 0"),
    "growth_factor": (_is_between(1, math.inf), "a finite number above 1"),
    "backoff_factor": (_is_between(0, 1), "a number between 0 and 1"),
    "growth_interval": (_is_between(0, MOST), "a number of iterations"),
    "_growth_tracker": COUNT,
}
