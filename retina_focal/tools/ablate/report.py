"""What an ablation measured, beside the paper: Markdown, CSV and a plot."""

import csv
import io
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from retina_focal.files import write_whole
from retina_focal.tools.ablate.runs import METRICS, Row, Run
from retina_focal.tools.reports import figure, table

Found = dict[str, list[dict]]  # results by the name of their row


def by_row(planned: dict[str, list[Run]], results: Iterable[dict]) -> Found:
    """Results with the settings of each row, every seed that was ever run."""
    by_settings = defaultdict(list)
    for result in results:
        by_settings[result["settings"]].append(result)
    return {name: by_settings[runs[0].settings] for name, runs in planned.items()}


def write(rows: Sequence[Row], found: Found, folder: Path) -> str:
    """Write ``table.md``, ``table.csv`` and, where something was measured, ``plot.png``.

    Returns:
        The text of ``table.md``.
    """
    text = markdown(rows, found)
    write_whole(folder / "table.md", text)
    lines = io.StringIO(newline="")
    writer = csv.writer(lines)
    paper = ["paper_AP", "paper_AP50", "paper_AP75"]
    writer.writerow(["row", "seed", "outcome", "seconds", *METRICS, *paper])
    for row in rows:
        for result in found[row.name]:
            measured = [result.get(metric, "") for metric in METRICS]
            head = [row.name, result["seed"], result["outcome"], result["seconds"]]
            writer.writerow([*head, *measured, *row.paper])
    write_whole(folder / "table.csv", lines.getvalue())
    if any(found.values()):
        plot(rows, found, folder / "plot.png")
    return text


def markdown(rows: Sequence[Row], found: Found) -> str:
    """A line for each row: the mean over the seeds (least to most), and the paper's numbers."""
    metrics = [m for m in METRICS if any(m in x for results in found.values() for x in results)]
    lines = []
    for row in rows:
        results = found[row.name]
        minutes = f"{statistics.mean(x['seconds'] for x in results) / 60:.1f}" if results else ""
        measured = (_measured(results, metric) for metric in metrics)
        paper = ", ".join(f"{ap:.1f}" for ap in row.paper) or "-"
        lines.append([row.name, *measured, _outcomes(results), minutes, paper])
    heads = ["row", *metrics, "seeds", "min per run", "paper: AP, AP50, AP75"]
    sentence = grid_sentence(rows, found)
    return f"{table(heads, lines)}\n" + (f"\n{sentence}\n" if sentence else "")


def grid_sentence(rows: Sequence[Row], found: Found) -> str:
    """How far the AP moves when one key of a grid changes and the others stand still."""
    aps = {
        name: statistics.mean(result["AP"] for result in results)
        for name, results in found.items()
        if results and all("AP" in result for result in results)
    }
    keys = list(rows[-1].keys)
    grid = [row for row in rows if list(row.keys) == keys and row.name in aps]
    spreads = {}
    for key in keys:
        groups = defaultdict(list)  # AP of the rows that differ in this key alone
        for row in grid:
            groups[str([row.keys[k] for k in keys if k != key])].append(aps[row.name])
        ranges = [max(group) - min(group) for group in groups.values() if len(group) > 1]
        if ranges:
            spreads[key] = statistics.mean(ranges)
    if len(spreads) < 2:
        return ""
    parts = [f"by {spread:.1f} with {key}" for key, spread in spreads.items()]
    return f"AP moves, from least to most and on average over the other keys, {', '.join(parts)}."


def plot(rows: Sequence[Row], found: Found, path: Path) -> None:
    """AP of each seed and their mean; the paper's AP in a panel of its own: other data."""
    has_paper = any(row.paper for row in rows)
    with figure(path, 9, 1.5 + 0.26 * len(rows)) as drawn:
        panels = drawn.subplots(1, 1 + has_paper, sharey=True, squeeze=False)[0]
        panels[0].set_yticks(range(len(rows)), [row.name for row in rows])
        panels[0].invert_yaxis()
        for y, row in enumerate(rows):
            aps = [result["AP"] for result in found[row.name] if "AP" in result]
            if aps:
                panels[0].scatter(aps, [y] * len(aps), s=14, color="tab:blue", alpha=0.5)
                panels[0].scatter(statistics.mean(aps), y, s=80, marker="|", color="tab:blue")
            unstable = [x["outcome"] for x in found[row.name] if x["outcome"] != "ok"]
            if unstable:
                place = {"textcoords": "offset points", "va": "center"}
                panels[0].annotate(unstable[0], (0, y), (4, 0), **place)
            if row.paper:
                panels[1].scatter(row.paper[0], y, s=30, marker="D", color="tab:orange")
        panels[0].set_xlabel("AP measured: seeds, and their mean")
        if has_paper:
            panels[1].set_xlabel("AP in the paper (COCO)")
        for panel in panels:
            panel.grid(alpha=0.3)


def _measured(results: Sequence[dict], metric: str) -> str:
    values = [result[metric] for result in results if metric in result]
    if not values:
        return ""
    spread = f" ({min(values):.1f} to {max(values):.1f})" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}"


def _outcomes(results: Sequence[dict]) -> str:
    """How many seeds there are, and how many of them did not end well."""
    counts = Counter(result["outcome"] for result in results if result["outcome"] != "ok")
    return ", ".join([str(len(results)), *(f"{n} {outcome}" for outcome, n in counts.items())])
