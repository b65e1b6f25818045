"""The file metrics.json of a run that is resumed."""

import json
import os
from pathlib import Path


def cut_metrics(path: Path, iteration: int, begin: int = 0) -> int:
    """Cut `metrics.json` off before the first line from `iteration` on, and a torn one.

    Args:
        begin: bytes of earlier runs in the same folder, which stay.
    Returns:
        The last iteration of this run that stays; -1 where none does.
    """
    if not path.is_file():
        return -1
    last, end, content = -1, begin, path.read_bytes()
    for line in content[begin:].splitlines(keepends=True):
        try:
            current = json.loads(line)["iteration"]
        except (ValueError, KeyError, TypeError):
            break
        if current >= iteration or not line.endswith(b"\n"):
            break
        # What is written at once is in no order.
        last, end = max(last, current), end + len(line)
    if end < len(content):
        os.truncate(path, end)
    return last


def results_in_metrics(path: Path, iteration: int) -> dict | None:
    """The results, {"bbox": {"AP": ...}}, that were written at an iteration; None: none were."""
    try:
        line = json.loads(path.read_text().splitlines()[-1])
    except (OSError, ValueError, IndexError):
        return None
    if not isinstance(line, dict) or line.pop("iteration", None) != iteration:
        return None
    results: dict = {}
    for name, value in line.items():
        *groups, metric = name.split("/")
        node = results
        for group in groups:
            node = node.setdefault(group, {})
        node[metric] = value
    return results
