"""JSON in which an object has a key twice: Python keeps the last value, in silence."""

import json
from typing import NamedTuple


class Repeated(NamedTuple):
    """An object that had keys twice, with different values."""

    record: dict  # with the last values
    keys: tuple[str, ...]


def loads(text: bytes) -> tuple[object, list[Repeated]]:
    """`json.loads`, and the objects of which it lost a value; for a seventh more time."""
    repeated = []

    def keep(pairs: list[tuple[str, object]]) -> dict:
        record = dict(pairs)
        if len(record) < len(pairs):
            lost = {key: None for key, value in pairs if record[key] != value}
            if lost:
                repeated.append(Repeated(record, tuple(lost)))
        return record

    return json.loads(text, object_pairs_hook=keep), repeated
