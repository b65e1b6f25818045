"""Reports of `evaluation.summary` as text."""

from retina_focal.evaluation.mistakes import KINDS, SUSPECTS
from retina_focal.evaluation.operating_points import describe
from retina_focal.tools.reports import table

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
SHOWN = 5  # suspected labels


def report_text(report: dict) -> str:
    """Of `summary.measure`: a line of AP, the classes, the errors, and what to look at."""
    counted = report["detections_counted"]
    note = "" if counted == 100 else f" (AP counts {counted} per image and class, COCO counts 100)"
    head = (
        f"{report['label']} on {report['dataset']}: {report['images']} images, {report['boxes']} "
        f"boxes, {report['detections']} detections{note}\n"
        + ", ".join(f"{name} {_with_interval(report, name)}" for name in METRICS)
        + (" (95% intervals over images)" if report["images"] > 1 else "")
    )
    parts = [head, _classes(report)]
    if report["errors"] is not None:
        errors = report["errors"].items()
        rows = [[f"{x}: {KINDS[x]}", y["count"], f"{y['dAP']:.1f}"] for x, y in errors]
        parts.append(table(["error", "count", "AP50 it costs"], rows))
    return "\n\n".join([*parts, _foot(report)])


def comparison_text(report: dict) -> str:
    """Of `summary.compare`."""
    rows = []
    for name, row in report["metrics"].items():
        interval, better = row["interval"], row["better"]
        rows.append(
            [
                name,
                _percent(row["first"]),
                _percent(row["second"]),
                "" if row["difference"] is None else f"{row['difference']:+.1f}",
                "" if interval is None else "{:+.1f} to {:+.1f}".format(*interval),
                "" if better is None else f"{100 * better:.0f}%",
            ]
        )
    heads = ["", "first", "second", "difference", "95% interval", "second higher in"]
    return (
        f"first: {report['first']}\nsecond: {report['second']}\n{report['images']} images of "
        f"{report['dataset']}, drawn {report['draws']} times with replacement, the same for both\n"
        f"\n{table(heads, rows)}\n"
    )


def _classes(report: dict) -> str:
    heads = ["class", "boxes", "AP", "AP50", "AP75", "score from", "precision", "recall", "F1"]
    heads += ["false per image", "calibration error"]
    rows = []
    for name, row in report["classes"].items():
        point, ece = row["point"], row["ece"]
        threshold, false = point["threshold"], point["false_positives_per_image"]
        rows.append(
            [
                name,
                row["boxes"],
                *(_percent(row[x]) for x in ("AP", "AP50", "AP75")),
                "none" if threshold is None else f"{threshold:.2f}",
                *(_share(point[x]) for x in ("precision", "recall", "f1")),
                "" if false is None else f"{false:.2f}",
                f"{_share(ece['before'])} to {_share(ece['after'])}",
            ]
        )
    return table(heads, rows)


def _foot(report: dict) -> str:
    """Where the operating points come from, and the suspected labels."""
    points, calibration, lines = report["operating_points"], report["calibration"], []
    if points is None:
        lines.append(
            "no operating points: a score of 0.50 counts; they are chosen for a RUN with a dataset "
            "for it: --opts MODEL.RETINA_FOCAL.DATA.VAL NAME"
        )
    elif points["rule"] is None:
        lines.append(f"operating points: those of {points['dataset']}")
    else:
        lines.append(f"operating points: {describe(points['rule'])} on {points['dataset']}")
    if report["detections"]:
        before, after = (_share(calibration[x]["ece"]) for x in ("before", "after"))
        by = calibration["by"]
        lines.append(f"calibration error, %: {before}, after calibration {after} ({by})")
    if report["errors"] is None and report["detections"]:
        lines.append("kinds of errors need hotcoco: pip install 'retina_focal[evaluation]'")
    suspects = report["suspected_labels"]
    if suspects:
        lines.append("suspected labels, the strongest first (more with --json):")
    for row in suspects[:SHOWN]:
        box = ", ".join(f"{x:.0f}" for x in row["bbox"])
        text = SUSPECTS[row["kind"]].format(**row)
        lines.append(f"  {row['suspicion']:.2f}  {row['file_name']}  [{box}]  {text}")
    return "\n".join(lines) + "\n"


def _with_interval(report: dict, name: str) -> str:
    interval = report["intervals"].get(name)
    more = "" if interval is None else " ({:.1f} to {:.1f})".format(*interval)
    return _percent(report["metrics"][name]) + more


def _percent(value: float | None) -> str:
    return "none" if value is None else f"{value:.1f}"


def _share(value: float | None) -> str:
    """A share in [0, 1] in percent."""
    return _percent(None if value is None else 100 * value)
