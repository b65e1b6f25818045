"""What the rows of a GPU are written as, and read again: JSON, a table and a plot."""

import hashlib
import json
import statistics
from collections.abc import Iterator
from pathlib import Path

import retina_focal
from retina_focal.files import write_whole
from retina_focal.tools.benchmark.gpu import COUNTED, PROFILE, has_failed
from retina_focal.tools.benchmark.report import WHOLE, quantity
from retina_focal.tools.reports import table

IN_FP32 = "ieee-fp32"
HEADS = ["what", "batch", "boxes", "precision", "model", "step", "latency", "host", "memory"]
# Of a report: what may change where an interrupted run goes on.
MAY_DIFFER = ("date", "rows", "left_out", "finished")
HEADS += ["stock / it", f"stock in {IN_FP32} / it", "memory, stock / it", "it / floor"]


def source_digest() -> str:
    """Of the package's code: rows of other code are not continued."""
    root = Path(retina_focal.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def started(path: Path, report: dict) -> dict:
    """`report`, or the one that an interrupted run of the same on the same has left."""
    try:
        found = json.loads(path.read_text())
        same = all(found[key] == value for key, value in report.items() if key not in MAY_DIFFER)
    except (OSError, ValueError, TypeError, KeyError):
        return report
    return found if same and not found["finished"] else report


def write(report: dict, folder: Path) -> str:
    """The JSON alone knows everything. Returns the table."""
    text = markdown(report)
    write_whole(folder / "results.json", json.dumps(report, indent=1))
    write_whole(folder / "results.md", text)
    return text


def markdown(report: dict) -> str:
    """What it ran on, a table of times and one of what the host asks for."""
    rows = report["rows"]
    height, width = rows[0]["image_size"]
    left_out = report["left_out"]
    header = (
        f"`{report['command']}`\n\n"
        f"{report['processor']}, {report['date']}; torch {report['torch']}, torchvision "
        f"{report['torchvision']}, detectron2 {report['detectron2']}; images of {height}x{width} "
        f"px. Medians of {report['rounds']} rounds: a step with several between two "
        "synchronisations, the latency of one alone, and how long the host takes to launch it. "
        f"Ratios are of steps, medians of the quotients within a round. A copy moves "
        f"{report['copied'] / 1e12:.3g} TB/s."
        + (f" There was no time for {left_out} jobs." if left_out else "")
    )
    times = [_cells(row, rows, report["copied"]) for row in rows if "step" in row]
    counts = [_counts(row) for row in rows if row["what"] == PROFILE]
    titles = ("training step", "inference, realistic")
    heads = ["profile", "batch", "precision", *(f"{t}: {c}" for t in titles for c in COUNTED)]
    tables = [table(h, cells) for h, cells in ((HEADS, times), (heads, counts)) if cells]
    return "\n\n".join([header, *tables]) + "\n"


def _cells(row: dict, rows: list[dict], copied: float) -> list[object]:
    """One line of the table of times."""
    names = [row[key] for key in ("what", "batch", "boxes", "precision", "model")]
    if not row["step"]:
        return [*names, "failed" if has_failed(row) else "no memory", *["-"] * 7]
    own, in_fp32 = (
        _same(rows, row, model="stock", precision=x) for x in (row["precision"], IN_FP32)
    )
    floor = None
    if row["floor_bytes"] is not None:
        floor = [row["floor_bytes"] / copied] * len(row["step"])
    elif row["what"] == "training step":
        convolutions = {"what": "training step over its convolutions", "model": "convolutions"}
        floor = (_same(rows, row, **convolutions) or {}).get("step")
    memory = row["memory"]
    memory_ratio = own["memory"] / memory if memory and own and own["memory"] else None
    seconds = [quantity(statistics.median(row[key]), "s") for key in ("step", "latency", "host")]
    return [
        *names,
        *seconds,
        "-" if memory is None else quantity(memory, "bytes"),
        _ratio(own and own["step"], row["step"]),
        _ratio(in_fp32 and in_fp32["step"], row["step"]),
        "-" if memory_ratio is None else f"{memory_ratio:.2f}",
        _ratio(row["step"], floor),
    ]


def _counts(row: dict) -> list[object]:
    """One line of the table of profiles."""
    cells = [row["model"], row["batch"], row["precision"]]
    for title in ("training step", "inference, realistic"):
        cells += [row.get(title, {}).get(count, "-") for count in COUNTED]
    return cells


def _same(rows: list[dict], row: dict, **other: str) -> dict | None:
    """The row that differs from this one in `other` alone, if there is one with numbers."""
    keys = ("what", "batch", "classes", "boxes", "precision", "model")
    wanted = {key: row[key] for key in keys} | other
    found = (x for x in rows if wanted.items() <= x.items() and x.get("step"))
    return next(found, None)


def _quotients(one: list[float], other: list[float]) -> list[float]:
    return [x / y for x, y in zip(one, other, strict=False)]


def _ratio(one: list[float] | None, other: list[float] | None) -> str:
    if not one or not other or one is other:
        return "-"
    return f"{statistics.median(_quotients(one, other)):.2f}"


def bars(rows: list[dict]) -> Iterator[dict]:
    """Rows as `report.plot` takes them: the steps of others over ours, in the same precision.

    A precision that ours alone has is compared with theirs in fp32.
    """
    for row in rows:
        if row["model"] != "ours" or not row.get("step"):
            continue
        same = _same(rows, row, model="stock") is not None
        precision = row["precision"] if same else IN_FP32
        ratio = {}
        for name in ("stock", "torchvision"):
            other = _same(rows, row, model=name, precision=precision)
            if other is not None:
                quotients = _quotients(other["step"], row["step"])
                median = statistics.median(quotients)
                ratio[name] = {"median": median, "min": min(quotients), "max": max(quotients)}
        precision = precision if same else f"{precision} / {row['precision']}"
        what = f"{row['what']}, batch {row['batch']}"
        names = {"what": what, "part": WHOLE, "precision": precision, "base": "ours"}
        yield row | names | {"ratio": ratio}
