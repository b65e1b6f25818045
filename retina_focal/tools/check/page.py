"""What `check` found as one page that needs nothing beside it, with pictures of the worst."""

import base64
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from PIL import Image, ImageDraw

from retina_focal.data.findings import Finding
from retina_focal.data.inspection import DONE, PICTURES, REFUSED, Inspected
from retina_focal.errors import UserError
from retina_focal.files import write_whole

SIDE = 160  # px of a thumbnail
SHOWN = 8  # pictures of a finding
LISTED = 50  # records of a finding
MARGIN, MIN_MARGIN = 1.0, 60.0  # around a box: of its larger side, and px
# What can't be shown.
HIDDEN = set(PICTURES) - {"picture-size"}


def write_page(
    path: Path,
    datasets: Sequence[Inspected],
    between: Sequence[Finding],
    counts: Mapping[str, int],
) -> None:
    """Write the page.

    Args:
        between: what was found between the datasets.
        counts: of the findings, by severity.
    Raises:
        UserError: jinja2 is not installed, or the file can't be written.
    """
    try:
        import jinja2
    except ImportError as error:
        raise UserError(
            "--page needs jinja2, which is not installed; type: pip install 'retina_focal[report]'"
        ) from error
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(Path(__file__).with_name("page.html").read_text())
    text = template.render(
        counts=counts,
        refused=any(counts.get(x) for x in REFUSED),
        between=[_described(x, None) for x in between],
        datasets=[
            {
                "data": x.data,
                "summary": x.check.summary(),
                "pictures": ", ".join(f"{n} {kind}" for kind, n in x.picture_counts.items()),
                "boxes_per_class": x.boxes_per_class,
                "findings": [_described(finding, x) for finding in ranked(x.findings)],
            }
            for x in datasets
        ],
    )
    write_whole(path, text)


def ranked(findings: Sequence[Finding]) -> list[Finding]:
    """The findings, the gravest first."""
    order = list(DONE)
    return sorted(findings, key=lambda x: order.index(x.severity))


def _described(finding: Finding, dataset: Inspected | None) -> dict:
    style = "refused" if finding.severity in REFUSED else "other"
    return {
        "kind": finding.kind,
        "severity": finding.severity,
        "style": "warning" if finding.severity == "warning" else style,
        "text": finding.text,
        "done": DONE[finding.severity],
        "number": len(finding.records),
        "records": finding.records[:LISTED],
        "pictures": list(_pictures(finding, dataset)) if dataset and dataset.looks else [],
    }


def _pictures(finding: Finding, dataset: Inspected) -> Iterator[dict]:
    """The pictures of the first records, or what is around the boxes of annotations."""
    places = {image.get("id"): i for i, image in enumerate(dataset.images)}
    for record, index in list(zip(finding.records, finding.indices, strict=False))[:SHOWN]:
        box = None
        if finding.section == "annotations":
            annotation = dataset.annotations[index]
            index, box = places.get(annotation.get("image_id"), -1), annotation.get("bbox")
        if finding.section == "categories" or not 0 <= index < len(dataset.looks):
            continue
        if dataset.looks[index].kind in HIDDEN:
            continue
        try:
            thumbnail = _thumbnail(dataset.paths[index], box)
        except Exception:  # Pillow may raise anything; the record is listed without its picture
            continue
        jpeg = io.BytesIO()
        thumbnail.save(jpeg, "JPEG", quality=80)
        yield {
            "record": record,
            "jpeg": base64.b64encode(jpeg.getvalue()).decode(),
            "width": thumbnail.width,
            "height": thumbnail.height,
        }


def _thumbnail(path: str, box: object) -> Image.Image:
    """At most SIDE px per side; `box`: XYWH in px, drawn with what is around it."""
    with Image.open(path) as image:
        if not _is_box(box):
            image.draft("RGB", (SIDE, SIDE))
            picture = image.convert("RGB")
            picture.thumbnail((SIDE, SIDE))
            return picture
        picture = image.convert("RGB")
    x, y, width, height = box
    margin = max(MARGIN * max(width, height), MIN_MARGIN)
    left, top = max(0, x - margin), max(0, y - margin)
    right, bottom = min(picture.width, x + width + margin), min(picture.height, y + height + margin)
    if right - left < 1 or bottom - top < 1:  # outside: the whole picture
        left, top, right, bottom = 0, 0, picture.width, picture.height
    scale = SIDE / max(right - left, bottom - top)
    size = (max(1, round((right - left) * scale)), max(1, round((bottom - top) * scale)))
    crop = picture.resize(size, box=(left, top, right, bottom))
    corners = [
        (v - o) * scale for v, o in ((x, left), (y, top), (x + width, left), (y + height, top))
    ]
    ImageDraw.Draw(crop).rectangle(corners, outline=(255, 0, 0), width=2)
    return crop


def _is_box(box: object) -> bool:
    if not isinstance(box, list) or len(box) != 4 or {*map(type, box)} - {int, float}:
        return False
    return all(abs(x) < 1e6 for x in box) and min(box[2:]) >= 0
