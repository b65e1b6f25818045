"""What is wrong with datasets, before a training: `retina-focal check DATA...`."""

import fnmatch
import json
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from retina_focal.data.findings import KINDS, Finding
from retina_focal.data.images import MAX_PIXELS
from retina_focal.data.inspection import (
    DONE,
    PICTURES,
    REFUSED,
    SPLITS,
    Inspected,
    compare,
    inspect,
)
from retina_focal.data.sources import splits
from retina_focal.errors import UserError
from retina_focal.tools.arguments import listed, number, tool_parser
from retina_focal.tools.check.page import ranked, write_page
from retina_focal.tools.common import command

GROUPS = ("annotations", "pictures", "splits")
INTERRUPTED = 130  # 128 + SIGINT, as of a shell
STRICT = (*REFUSED, "warning")
EPILOG = """
DATA is a URI (voc:, yolo:, csv:, coco:), a path, or a registered dataset. A folder is checked with
all its splits. The first is taken to be trained on.

Examples:
  %(prog)s datasets/bccd
  %(prog)s 'voc:datasets/bccd?split=train' 'voc:datasets/bccd?split=val'
  %(prog)s coco:train.json?images=photos coco:val.json?images=photos --json
  %(prog)s data.yaml --skip pictures,duplicate --strict
  %(prog)s boxes.csv --only picture-broken,picture-missing --page check.html

KINDS are annotations, pictures, splits, or kinds of findings as they are printed; * stands for
anything. Exit status: 0; 1 where something is refused, with --strict also after a warning; 130
after Ctrl-C, with what was found until then.
"""


@command
def main(argv: list[str]) -> None:
    """``retina-focal check``: look at every file and record, and print what is found."""
    parser = tool_parser("check", __doc__, EPILOG)
    parser.add_argument("data", nargs="+", metavar="DATA")
    kinds = {"type": listed(str), "default": [], "metavar": "KINDS"}
    parser.add_argument("--only", **kinds, help="report these alone, with commas between them")
    parser.add_argument("--skip", **kinds, help="do not report these")
    parser.add_argument("--strict", action="store_true", help="a warning gives exit status 1 too")
    parser.add_argument("--json", action="store_true", help="print JSON with every record")
    parser.add_argument("--page", type=Path, metavar="FILE", help="write a page with pictures too")
    pixels = {"type": number(), "default": MAX_PIXELS, "metavar": "N"}
    parser.add_argument("--max-pixels", **pixels, help="of a picture; default: %(default)s")
    parser.add_argument(
        "--allow-outside", action="store_true", help="look at pictures outside of their folder"
    )
    args = parser.parse_args(argv)
    for patterns in (args.only, args.skip):
        _expect_known(patterns)
    wanted = {name for name in GROUPS if _may_report(name, args.only, args.skip)}
    names = list(dict.fromkeys(x for data in args.data for x in _all_splits(data)))
    looks = bool(wanted & {"pictures", "splits"}), args.max_pixels, args.allow_outside
    datasets, is_whole = _inspected(names, *looks)
    for dataset in datasets:
        dataset.findings = _chosen(dataset.findings, args.only, args.skip)
    between = _chosen(compare(datasets), args.only, args.skip)
    found = _severities(datasets, between)
    if args.page:
        write_page(args.page, datasets, between, found)
    if args.json:
        print(json.dumps(as_json(datasets, between), indent=1))
    else:
        print(as_text(datasets, between))
    if not is_whole:
        last = f"in '{names[max(len(datasets) - 1, 0)]}', {len(datasets)} of {len(names)} datasets"
        print(f"retina-focal check: interrupted {last}; there may be more", file=sys.stderr)
        sys.exit(INTERRUPTED)
    if any(found[x] for x in (STRICT if args.strict else REFUSED)):
        sys.exit(1)


def _inspected(names: Sequence[str], *how: object) -> tuple[list[Inspected], bool]:
    """The datasets, up to where Ctrl-C was typed, and whether it was not."""
    datasets: list[Inspected] = []
    try:
        for name in names:
            datasets.append(inspect(name, *how))
            if datasets[-1].is_interrupted:
                return datasets, False
    except KeyboardInterrupt:  # while annotations are read
        return datasets, False
    return datasets, True


def as_text(datasets: Sequence[Inspected], between: Sequence[Finding]) -> str:
    """For people: a block per dataset, and what is between them."""
    lines = []
    for dataset in datasets:
        lines.append(f"{dataset.data}: {dataset.check.summary()}")
        if dataset.looks:
            counts = ", ".join(f"{n} {what}" for what, n in dataset.picture_counts.items())
            of_all = f" of {len(dataset.images)}" if dataset.is_interrupted else ""
            lines.append(f"  {len(dataset.looks)}{of_all} pictures: {counts}")
        lines += _lines(dataset.findings)
    if between:
        lines += ["between them:", *_lines(between)]
    counts = _severities(datasets, between)
    total = ", ".join(f"{counts[x]} {x}" for x in DONE if counts[x]) or "nothing"
    return "\n".join([*lines, f"found: {total}"])


def _lines(findings: Sequence[Finding]) -> list[str]:
    return [f"  {x.severity:8} {x.kind}: {x} -> {DONE[x.severity]}" for x in ranked(findings)]


def as_json(datasets: Sequence[Inspected], between: Sequence[Finding]) -> dict:
    """For machines: every finding with all its records.

    In each dataset `counts` add up to `annotations`, and `picture_counts` to `images` or, where no
    picture was looked at, to 0; where Ctrl-C was typed, `is_interrupted`, to those until then.
    """
    counts = _severities(datasets, between)
    return {
        "datasets": [
            {
                "data": dataset.data,
                "images": dataset.check.num_images,
                "annotations": dataset.check.num_annotations,
                "classes": dataset.check.classes,
                "boxes_per_class": dataset.boxes_per_class,
                "counts": dataset.check.counts,
                "picture_counts": dataset.picture_counts,
                "is_interrupted": dataset.is_interrupted,
                "findings": [_finding_as_json(x) for x in dataset.findings],
            }
            for dataset in datasets
        ],
        "between": [_finding_as_json(x) for x in between],
        "severities": {x: counts[x] for x in DONE},
        "refused": any(counts[x] for x in REFUSED),
    }


def _finding_as_json(finding: Finding) -> dict:
    return {
        "kind": finding.kind,
        "severity": finding.severity,
        "text": finding.text,
        "done": DONE[finding.severity],
        "records": list(finding.records),
    }


def _severities(datasets: Sequence[Inspected], between: Sequence[Finding]) -> Counter[str]:
    """The number of findings of each severity."""
    return Counter(x.severity for x in (*(y for d in datasets for y in d.findings), *between))


def _all_splits(data: str) -> list[str]:
    """A folder's splits; a dataset that can't be read stays, to become a finding."""
    try:
        return splits(data)
    except UserError:
        return [data]


def _group(kind: str) -> str:
    return "pictures" if kind in PICTURES else "splits" if kind in SPLITS else "annotations"


def _expect_known(patterns: Sequence[str]) -> None:
    names = (*GROUPS, *KINDS, *PICTURES, *SPLITS)
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise UserError(f"there is no kind '{pattern}'; expected one of {', '.join(names)}")


def _matches(kind: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatch(x, y) for x in (kind, _group(kind)) for y in patterns)


def _chosen(findings: Iterable[Finding], only: Sequence[str], skip: Sequence[str]) -> list[Finding]:
    return [
        x for x in findings if (not only or _matches(x.kind, only)) and not _matches(x.kind, skip)
    ]


def _may_report(group: str, only: Sequence[str], skip: Sequence[str]) -> bool:
    """Whether a finding of the group could be chosen."""
    kinds = [x for x in (*KINDS, *PICTURES, *SPLITS) if _group(x) == group]
    return any((not only or _matches(x, only)) and not _matches(x, skip) for x in kinds)
