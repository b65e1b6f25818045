"""Figures of `summary.measure`: precision and recall, confusion, calibration, errors, points."""

import numpy as np
from matplotlib.axes import Axes

from retina_focal.evaluation.mistakes import KINDS

# Of Okabe and Ito: told apart by people who see fewer colours. The yellow is too light for a line.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
LINES = ("-", "--", ":")  # with the seven colours 21 classes are told apart
SHOWN = 21  # classes that have a line of their own, those with the most boxes
TEXTS = 15  # classes up to which the confusion has its numbers in it


def draw_precision_recall(axes: Axes, report: dict, iou: str = "0.5") -> None:
    """A line per class, with its AP, and a dot where its operating point is.

    Args:
        report: of `summary.measure`.
        iou: "0.5" or "0.75"; the dots are of the IoU 0.5 and drawn there alone.
    """
    recall = report["precision_recall"]["recall"]
    lines = report["precision_recall"]["classes"]
    rows = report["classes"]
    shown = sorted(lines, key=lambda name: -rows[name]["boxes"])[:SHOWN]
    for i, name in enumerate(shown):
        color, style = COLORS[i % len(COLORS)], LINES[i // len(COLORS) % len(LINES)]
        precision = np.array(lines[name][iou])
        # matplotlib leaves out labels that begin with "_"; a class may.
        text = f"AP{100 * float(iou):.0f} {100 * precision.mean():.1f}: {name}"
        reached = precision > 0
        x, y = np.array(recall)[reached], precision[reached]
        axes.plot(x, y, color=color, linestyle=style, linewidth=1.8, label=text)
        point = rows[name]["point"]
        if iou == "0.5" and point["precision"] is not None:
            place = (point["recall"], point["precision"])
            axes.plot(*place, "o", color=color, markersize=7, markeredgecolor="white")
    left_out = len(lines) - len(shown)
    title = f"precision and recall, IoU {iou}" + (f" ({left_out} classes more)" if left_out else "")
    axes.set(xlabel="recall", ylabel="precision", title=title)
    axes.set(xlim=(0, 1.02), ylim=(0, 1.02))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="lower left", title="dot: operating point", title_fontsize=8)


def draw_confusion(axes: Axes, report: dict) -> None:
    """What boxes of each class (rows) are taken for (columns), as shares of the row."""
    names = list(report["confusion"]["classes"])
    counts = np.array(report["confusion"]["counts"])
    total = counts.sum(axis=1, keepdims=True)
    total[-1] = 0  # what is no object has no number that a share could be of
    share = np.divide(counts, total, out=np.zeros(counts.shape), where=total > 0)
    axes.imshow(share, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    ticks = range(len(names))
    few = len(names) <= TEXTS + 1
    axes.set_xticks(ticks, [*names[:-1], "missed"], rotation=90 if len(names) > 5 else 0)
    axes.set_yticks(ticks, [*names[:-1], "no object"])
    axes.tick_params(labelsize=9 if few else 5, length=0)
    for row in ticks if few else ():
        for column in ticks:
            if row == column == len(names) - 1:  # what is not there and not found
                continue
            color = "white" if share[row, column] > 0.55 else "black"
            text = {"ha": "center", "va": "center", "fontsize": 9, "color": color}
            axes.text(column, row, f"{counts[row, column]}", **text)
    axes.set(xlabel="detected as", ylabel="labelled as", title="confusion at the operating points")


def draw_calibration(axes: Axes, report: dict) -> None:
    """The share of right detections against their score, before and after the maps."""
    found = report["calibration"]
    axes.plot([0, 1], [0, 1], color="grey", linewidth=1, linestyle=":", label="perfect")
    for key, color, marker in (("before", COLORS[1], "s"), ("after", COLORS[0], "o")):
        bins = found[key]
        count = np.array(bins["count"])
        some = count > 0
        size = 12 + 88 * count[some] / max(count.max(), 1)
        x, y = np.array(bins["mean"])[some], np.array(bins["right"])[some]
        error = "no detections" if bins["ece"] is None else f"error {100 * bins['ece']:.1f}%"
        axes.plot(x, y, color=color, linewidth=1.5)
        axes.scatter(x, y, s=size, color=color, marker=marker, label=f"{key}: {error}", zorder=3)
    axes.set(xlabel="score", ylabel="share that is right (IoU 0.5)")
    axes.set(xlim=(0, 1.02), ylim=(0, 1.02), title=f"calibration ({found['by']})")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="upper left")


def draw_errors(axes: Axes, report: dict) -> None:
    """What AP50 each kind of error costs; nothing where `report` has no errors."""
    errors = report["errors"] or {}
    names = list(reversed(errors))
    costs = [errors[name]["dAP"] for name in names]
    bars = axes.barh(names, costs, color=COLORS[0])
    texts = [f" {errors[name]['count']}: {KINDS[name]}" for name in names]
    axes.bar_label(bars, texts, fontsize=8)
    axes.set_xlim(0, 2.2 * max([*costs, 0.1]))
    axes.set(xlabel="AP50 that is lost, points", title="kinds of errors")
    axes.grid(alpha=0.3, axis="x")


FIGURES = {
    "precision_recall": draw_precision_recall,
    "confusion": draw_confusion,
    "calibration": draw_calibration,
    "errors": draw_errors,
}
