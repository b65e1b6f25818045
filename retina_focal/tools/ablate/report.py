"""What an ablation measured, beside the paper: Markdown, CSV and a plot."""

import csv
import statistics
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

from retina_focal.files import whole_file
from retina_focal.tools.ablate.runs import METRICS, Row, Run


def write(
    rows: Sequence[Row], planned: dict[str, list[Run]], results: Sequence[dict], folder: Path
) -> None:
    """Write ``table.md``, ``table.csv`` and, where something was measured, ``plot.png``."""
    with whole_file(folder / "table.md") as temporary:
        temporary.write_text(markdown(rows, planned, results))
    with whole_file(folder / "table.csv") as temporary, open(temporary, "w", newline="") as file:
        writer = csv.writer(file)
        paper = ["paper_AP", "paper_AP50", "paper_AP75"]
        writer.writerow(["row", "seed", "outcome", "seconds", *METRICS, *paper])
        for row in rows:
            for result in of_row(planned[row.name], results):
                measured = [result.get(metric, "") for metric in METRICS]
                head = [row.name, result["seed"], result["outcome"], result["seconds"]]
                writer.writerow([*head, *measured, *row.paper])
    if any(of_row(planned[row.name], results) for row in rows):
        plot(rows, planned, results, folder / "plot.png")


def of_row(runs: Sequence[Run], results: Sequence[dict]) -> list[dict]:
    """Results with the settings of a row, every seed that was ever run."""
    return [result for result in results if result["settings"] == runs[0].settings]


def markdown(rows: Sequence[Row], planned: dict[str, list[Run]], results: Sequence[dict]) -> str:
    """A line a row: the mean over the seeds (least to most), and the paper's numbers."""
    by_row = {row.name: of_row(planned[row.name], results) for row in rows}
    metrics = [
        m for m in METRICS if any(m in result for found in by_row.values() for result in found)
    ]
    heads = ["row", *metrics, "seeds", "min a run", "paper: AP, AP50, AP75"]
    lines = [_line(heads), _line(["---"] * len(heads))]
    for row in rows:
        found = by_row[row.name]
        minutes = statistics.mean(r["seconds"] for r in found) / 60 if found else None
        lines.append(
            _line(
                [
                    row.name,
                    *(_measured(found, metric) for metric in metrics),
                    _outcomes(found),
                    f"{minutes:.1f}" if found else "",
                    ", ".join(f"{ap:.1f}" for ap in row.paper) or "-",
                ]
            )
        )
    sentence = grid_sentence(rows, planned, results)
    return "\n".join(lines) + "\n" + (f"\n{sentence}\n" if sentence else "")


def grid_sentence(
    rows: Sequence[Row], planned: dict[str, list[Run]], results: Sequence[dict]
) -> str:
    """How far the AP moves when one key of a grid changes and the others stand still."""
    aps = {}
    for row in rows:
        found = of_row(planned[row.name], results)
        if found and all("AP" in result for result in found):
            aps[row.name] = statistics.mean(result["AP"] for result in found)
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


def plot(
    rows: Sequence[Row], planned: dict[str, list[Run]], results: Sequence[dict], path: Path
) -> None:
    """AP of each seed and their mean; the paper's AP in a panel of its own: other data."""
    from matplotlib.figure import Figure

    has_paper = any(row.paper for row in rows)
    figure = Figure(figsize=(9, 1.5 + 0.26 * len(rows)), layout="constrained")
    panels = figure.subplots(1, 1 + has_paper, sharey=True, squeeze=False)[0]
    panels[0].set_yticks(range(len(rows)), [row.name for row in rows])
    panels[0].invert_yaxis()
    for y, row in enumerate(rows):
        found = of_row(planned[row.name], results)
        aps = [result["AP"] for result in found if "AP" in result]
        if aps:
            panels[0].scatter(aps, [y] * len(aps), s=14, color="tab:blue", alpha=0.5)
            panels[0].scatter(statistics.mean(aps), y, s=80, marker="|", color="tab:blue")
        unstable = [result for result in found if result["outcome"] != "ok"]
        if unstable:
            panels[0].annotate(
                unstable[0]["outcome"], (0, y), (4, 0), textcoords="offset points", va="center"
            )
        if row.paper:
            panels[1].scatter(row.paper[0], y, s=30, marker="D", color="tab:orange")
    panels[0].set_xlabel("AP measured: seeds, and their mean")
    if has_paper:
        panels[1].set_xlabel("AP in the paper (COCO)")
    for panel in panels:
        panel.grid(alpha=0.3)
    with whole_file(path) as temporary:
        figure.savefig(temporary, dpi=120)


def _measured(found: Sequence[dict], metric: str) -> str:
    values = [result[metric] for result in found if metric in result]
    if not values:
        return ""
    spread = f" ({min(values):.1f} to {max(values):.1f})" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}"


def _outcomes(found: Sequence[dict]) -> str:
    """How many seeds there are, and how many of them did not end well."""
    counts = Counter(result["outcome"] for result in found if result["outcome"] != "ok")
    return ", ".join([str(len(found)), *(f"{n} {outcome}" for outcome, n in counts.items())])


def _line(cells: Sequence[object]) -> str:
    return f"| {' | '.join(map(str, cells))} |"
