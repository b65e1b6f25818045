"""What `retina-focal benchmark` writes: rows of medians and ratios, as a table and a plot."""

import math
import statistics
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

import numpy as np

from retina_focal.tools.benchmark.models import Setting
from retina_focal.tools.reports import figure, table

WHOLE = "whole"


def rows_of(title: str, setting: Setting, records: list[dict[str, dict[str, float]]]) -> list[dict]:
    """Rows of the table, one for the whole and one for each part, from the rounds.

    Args:
        records: for each round what each model's probe gave.
    Returns:
        `values` and their `median` for each model, and the `ratio` of each other model to `base`:
        median, min and max of the quotients of values from the same round.
    """
    names = [name for name in records[0] if all(record[name] for record in records)]
    base = "convolutions" if "convolutions" in names else "ours"
    # A part that only some have is no row of its own: convolutions alone are not in three parts.
    parts = [p for p in records[0]["ours"] if all(p in records[0][name] for name in names)]
    unit = "bytes" if any("memory" in x for x in records[0].values()) else "s"
    rows = []
    for part in [WHOLE, *(parts if len(parts) > 1 else [])]:
        values = {
            name: [sum(r[name].values()) if part == WHOLE else r[name][part] for r in records]
            for name in names
        }
        ratio = {
            name: [x / y for x, y in zip(values[name], values[base], strict=True)]
            for name in names
            # Nothing is a multiple of no memory, or of a process that was killed.
            if name != base and all(values.get(base, [0]))
        }
        row = {"what": title, "part": part, "unit": unit, "image_size": list(setting.image_size)}
        row |= {key: getattr(setting, key) for key in ("batch", "classes", "boxes", "precision")}
        row |= {"base": base, "values": values}
        row["median"] = {name: statistics.median(v) for name, v in values.items()}
        row["ratio"] = {
            name: {"median": statistics.median(v), "min": min(v), "max": max(v)}
            for name, v in ratio.items()
        }
        rows.append(row)
    return rows


def markdown(report: dict) -> str:
    """What it ran on, and a table for each set of models."""
    first = report["rows"][0]
    height, width = first["image_size"]
    tables = [
        f"`{report['command']}`\n\n"
        f"{report['processor']}, {report['threads']} threads, {report['date']}; torch "
        f"{report['torch']}, torchvision {report['torchvision']}, detectron2 "
        f"{report['detectron2']}; {first['batch']} x {height}x{width} px. Medians of "
        f"{report['rounds']} rounds (memory: 1); ratios are medians (least to most) of the "
        "quotients within a round."
    ]
    for (names, base), rows in groupby(report["rows"], lambda row: ([*row["values"]], row["base"])):
        others = [name for name in names if name != base]
        heads = ["what", "classes", "boxes", "precision", *names]
        heads += [f"{name} / {base}" for name in others]
        tables.append(table(heads, [_cells(row, names, others) for row in rows]))
    return "\n\n".join(tables) + "\n"


def _cells(row: dict, names: Sequence[str], others: Sequence[str]) -> list[object]:
    """One line of a table: what, the setting, medians of `names` and ratios of `others`."""
    title = row["what"] if row["part"] == WHOLE else f"- {row['part']}"
    medians = [quantity(row["median"][name], row["unit"]) for name in names]
    ratios = [
        "{median:.2f} ({min:.2f} to {max:.2f})".format(**row["ratio"][name])
        if name in row["ratio"]
        else "-"
        for name in others
    ]
    return [title, row["classes"], row["boxes"], row["precision"], *medians, *ratios]


def plot(rows: Sequence[dict], path: Path) -> None:
    """The ratios as bars from 1, on a logarithmic axis; lines show the spread."""
    from matplotlib.ticker import LogLocator, NullFormatter

    title = "{what}, {classes} classes, {boxes} boxes, {precision}: {name} / {base}"
    bars = [
        (title.format(name=name, **row), ratio["median"], ratio["min"], ratio["max"])
        for row in rows
        if row["part"] == WHOLE
        for name, ratio in row["ratio"].items()
    ]
    if not bars:
        return
    labels, median, least, most = zip(*bars, strict=True)
    median = np.array(median)
    spread = np.abs([median - least, most - median])
    with figure(path, 9, 1.2 + 0.3 * len(bars)) as drawn:
        axes = drawn.add_subplot()
        axes.barh(labels, median - 1, left=1, xerr=spread)
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.axvline(1, color="black")
        axes.invert_yaxis()
        axes.set_xlabel("ratio of times, or of memory")


def quantity(value: float, unit: str) -> str:
    """Three digits of seconds ("s"), or megabytes ("bytes"), with a unit that fits."""
    if unit == "bytes":
        return f"{value / 1e6:,.0f} MB"
    scale, name = (1, "s") if value >= 1 else (1000, "ms")
    digits = 2 - math.floor(math.log10(value * scale)) if value > 0 else 0
    return f"{value * scale:.{max(digits, 0)}f} {name}"
