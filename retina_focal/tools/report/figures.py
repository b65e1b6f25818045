"""Figures and pictures of the page, as data URIs: nothing is fetched."""

import base64
import io
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator
from PIL import Image

from retina_focal.evaluation.charts import COLORS, FIGURES
from retina_focal.tools.report.content import SIZES
from retina_focal.tools.reports import texts_stay

BARS = 21  # classes that have a bar, those with the most boxes
WIDTH = 5.5  # inches of a figure: its texts can be read on a phone
LOSSES = ("total_loss", "loss_cls", "loss_box_reg")


def svg(draw: Callable[[Figure], None], width: float, height: float) -> str:
    """A figure in inches; see `texts_stay`."""
    with texts_stay():
        drawn = Figure(figsize=(width, height), layout="constrained")
        draw(drawn)
        file = io.BytesIO()
        drawn.savefig(file, format="svg", metadata={"Date": None})
    return _uri("image/svg+xml", file.getvalue())


def jpeg(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=80)
    return _uri("image/jpeg", file.getvalue())


def png(path: Path) -> str:
    return _uri("image/png", path.read_bytes())


def _uri(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def evaluation_figures(report: dict) -> dict[str, str]:
    """The figures of `evaluation.charts` by name, and "ap"; without those that lack numbers."""
    made = {"ap": svg(lambda figure: _draw_ap(figure.subplots(), report), WIDTH, _height(report))}
    for name, draw in FIGURES.items():
        if name != "errors" or report["errors"]:
            made[name] = svg(lambda figure, draw=draw: draw(figure.subplots(), report), WIDTH, 4.4)
    return made


def _height(report: dict) -> float:
    return 1.2 + 0.28 * (len(SIZES) + 3 + min(len(report["classes"]), BARS))


def _draw_ap(axes: Axes, report: dict) -> None:
    """AP of all, by size and by class, with the intervals of what has one."""
    classes = sorted(report["classes"], key=lambda x: -report["classes"][x]["boxes"])[:BARS]
    rows = [(name, name, COLORS[0]) for name in ("AP", "AP50", "AP75")]
    rows += [(f"{name}: {text}", name, COLORS[2]) for name, text in SIZES.items()]
    rows += [(name, f"AP-{name}", COLORS[4]) for name in classes]
    values = [report["metrics"].get(key) for _, key, _ in rows]
    for place, ((_, key, color), value) in enumerate(zip(rows, values, strict=True)):
        if value is None:
            axes.text(0.5, place, "no box", va="center", fontsize=8)
            continue
        axes.barh(place, value, color=color)
        interval = report["intervals"].get(key)
        if interval is not None:
            axes.plot(interval, (place, place), color="black", linewidth=1)
        axes.text(
            max(value, *(interval or [0])) + 1, place, f"{value:.1f}", va="center", fontsize=8
        )
    axes.set_yticks(range(len(rows)), [name for name, _, _ in rows])
    axes.invert_yaxis()
    more = ", with the 95% interval over images" if report["images"] > 1 else ""
    axes.set(xlabel=f"AP{more}", xlim=(0, 108))
    axes.grid(alpha=0.3, axis="x")


def curves(path: Path) -> str | None:
    """Losses and AP of ``metrics.json`` over the iterations; None where it has none."""
    if not path.is_file():
        return None
    rows = [row for row in map(_row, path.read_text(errors="replace").splitlines()) if row]
    scores = ("bbox/AP", "bbox/AP50")
    # With several test sets the names have theirs in front.
    names = sorted({x for row in rows for x in row if x.endswith(scores)})[:6]
    if not any(name in row for row in rows for name in (*LOSSES, *names)):
        return None

    def draw(figure: Figure) -> None:
        parts = figure.subplots(2 if names else 1, squeeze=False, sharex=True)[:, 0]
        _draw_lines(parts[0], rows, LOSSES)
        parts[0].set(ylabel="loss", yscale="log")
        parts[0].yaxis.set_major_formatter("{x:g}")  # the usual one needs math
        parts[0].yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
        parts[0].yaxis.set_minor_formatter("{x:g}")
        for axes in parts[1:]:
            _draw_lines(axes, rows, names, "o-")
            axes.set(ylabel="AP", ylim=(0, None))
        parts[-1].set(xlabel="iteration")

    return svg(draw, WIDTH, 5 if names else 3)


def _row(line: str) -> dict | None:
    """A line of the file; an interruption may have left a part of one."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and "iteration" in row else None


def _draw_lines(axes: Axes, rows: list[dict], names: list[str], style: str = "-") -> None:
    for name, color in zip(names, COLORS, strict=False):
        points = [(row["iteration"], row[name]) for row in rows if name in row]
        points = [(x, y) for x, y in points if isinstance(y, (int, float)) and math.isfinite(y)]
        if points:
            axes.plot(
                *np.array(points, dtype=float).T, style, color=color, label=name, markersize=4
            )
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
