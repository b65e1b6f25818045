"""Annotation files that are damaged at random: words that name file and record, and counts add up.

All 2,000 of each format: pytest -m slow tests/test_malformed.py
"""

import random
import re
from pathlib import Path

import pytest
from test_sources import WRITERS

from retina_focal.data.inspection import Inspected, inspect

pytestmark = pytest.mark.usefixtures("own_cache")

# What is damaged, of what `WRITERS` writes.
FILES = {
    "voc": ["Annotations/a.xml", "Annotations/b.xml", "ImageSets/Main/train.txt"],
    "yolo": ["labels/train/a.txt", "labels/train/b.txt", "data.yaml"],
    "csv": ["boxes.csv"],
    "csv without header": ["boxes.csv"],
    "coco": ["train.json"],
}
SECTION = re.compile(r"(images|annotations|categories)\[\d+\]")
VALUES = [
    *("", " ", "-1", "0", "nan", "inf", "-inf", "1e400", "9" * 400, "1_0", "0x10", "½", "٣", "\0"),
    *("a", "<", ">", "&", '"', "'", ",", "\n", "\r", "\t", "{", "}", "[", "]", "null", "true"),
    *("../../etc/passwd", "/etc/passwd", "<!DOCTYPE a [<!ENTITY b 'c'>]>", "&b;", "é", "\ufeff"),
    *("*a", "!!python/object/apply:os.system [ls]", "x" * 200_000, "RBC", "1 2 3", "0 0 0 0 0"),
]


def damaged(content: bytes, rng: random.Random) -> bytes:
    """With one to three faults."""
    for _ in range(rng.randint(1, 3)):
        i, j = sorted(rng.randrange(len(content) + 1) for _ in range(2))
        spans = [m.span() for m in re.finditer(rb"[\w.+-]+", content)] or [(i, j)]
        start, end = rng.choice(spans)
        value = rng.choice(VALUES).encode()
        content = rng.choice(
            [
                content[:start] + value + content[end:],  # another value
                content[:start] + content[end:],  # no value
                content[:i] + value + content[i:],
                content[:i] + content[j:],
                content[:i] + content[i:j] * 2 + content[j:],
                content[:i],  # truncated
                content[:i] + bytes([rng.randrange(256)]) + content[i + 1 :],
            ]
        )
    return content


def expect_told(seen: Inspected, file: str) -> None:
    """Whatever is refused names the file, and its record where it is one of several."""
    assert sum(seen.check.counts.values()) == seen.check.num_annotations
    for finding in seen.findings:
        assert str(finding) and len(str(finding)) < 3000
        if finding.severity == "error":
            name = Path(file).name
            if file.endswith(".json") and finding.kind not in ("structure", "split-unreadable"):
                assert all(SECTION.match(x) for x in finding.records) and finding.records
            elif not file.endswith(".json"):
                assert name in finding.text or all(name in x for x in finding.records), finding
                assert name in str(finding)


def attack(format: str, number: int, folder: Path) -> int:
    """Returns how many of the damaged files are refused."""
    uri, refused = WRITERS[format](folder), 0
    sound = {name: (folder / name).read_bytes() for name in FILES[format]}
    for seed in range(number):
        rng = random.Random(f"{format} {seed}")
        name = rng.choice(FILES[format])
        (folder / name).write_bytes(damaged(sound[name], rng))
        seen = inspect(uri, with_pictures=False)
        expect_told(seen, name)
        refused += any(x.severity == "error" for x in seen.findings)
        (folder / name).write_bytes(sound[name])
    assert not any(x.severity == "error" for x in inspect(uri, with_pictures=False).findings)
    return refused


@pytest.mark.parametrize("format", WRITERS)
def test_a_damaged_file_ends_in_words_and_counts(format, tmp_path):
    assert attack(format, 60, tmp_path) > 20


@pytest.mark.slow
@pytest.mark.parametrize("format", WRITERS)
def test_2000_damaged_files_end_in_words_and_counts(format, tmp_path):
    assert attack(format, 2000, tmp_path) > 700
