"""The page: one file, no network, Pillow's resize exactly, boxes of the runtime's."""

import base64
import html
import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import PIL
import pytest
import torch
from browser import CHROMIUM, Page, browser
from detectron2.data.transforms import ResizeShortestEdge
from PIL import Image

from retina_focal.errors import UserError

pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: make setup")
pytest.importorskip("onnx", reason="onnx is not installed: make setup")
from made_exports import METADATA, made_onnx
from real_exports import exported_network, photographs

from retina_focal.export import page as page_module
from retina_focal.export.page import cached_package, write_page
from retina_focal.export.runtime import Detector
from retina_focal.postprocess import suppress

HOSTILE = '</script><img src=x onerror="document.title=1">'
needs_chromium = pytest.mark.skipif(
    CHROMIUM is None, reason="Chromium is not installed: apt-get install chromium"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model without a network, and its page."""
    folder = tmp_path_factory.mktemp("page")
    try:
        cached_package()
    except UserError as error:
        pytest.skip(f"offline and not cached: {error}")
    metadata = METADATA | {"classes": ["red", HOSTILE]}
    write_page(made_onnx(folder, metadata=metadata), folder / "page.html")
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (6, 9, 3), dtype=np.uint8)
    turned = Image.Exif()
    turned[274] = 6
    picture = Image.fromarray(pixels).resize((640, 427), Image.Resampling.BICUBIC)
    picture.save(folder / "a picture.jpg", quality=90, exif=turned)
    picture.save(folder / "a.png")
    (folder / "broken.jpg").write_bytes((folder / "a picture.jpg").read_bytes()[:300])
    return folder


@pytest.fixture(scope="module")
def opened(folder, tmp_path_factory) -> Iterator[Page]:
    """The page on a phone, once it is ready."""
    with browser(tmp_path_factory.mktemp("profile")) as page:
        page.open(folder / "page.html", width=390)
        page.until("document.readyState == 'complete' && opened.then(() => true)", 120)
        yield page


def look_at(page: Page, path: Path) -> str:
    """What the page says of a picture that is chosen."""
    before = page.evaluate("state.number")
    page.choose("#file", path)
    page.until(f"state.number > {before}")
    return page.evaluate("document.getElementById('status').textContent")


def test_it_is_one_file_that_asks_for_nothing(folder):
    text = (folder / "page.html").read_text(encoding="utf-8")
    assert not re.search(r"""(src|href)=["'](?!data:,)""", text.replace(HOSTILE, ""))
    assert "{{" not in re.sub(r"<script.*?</script>", "", text, flags=re.DOTALL)
    policy = html.unescape(re.search(r'Policy" content="([^"]*)"', text)[1])
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "connect-src" not in policy and text.count("</script>") == 5
    assert (folder / "page.html").stat().st_size < 6_000_000


@needs_chromium
def test_it_finds_what_the_runtime_finds_and_asks_for_nothing(folder, opened):
    detector = Detector(folder / "model.onnx")
    for name in ("a picture.jpg", "a.png"):
        assert "of 3 boxes" in look_at(opened, folder / name)
        found, expected = opened.evaluate("state.found"), detector(folder / name)
        np.testing.assert_allclose([x["box"] for x in found], expected.boxes, atol=1e-3)
        np.testing.assert_allclose([x["score"] for x in found], expected.scores, atol=1e-6)
        assert [x["label"] for x in found] == expected.classes.tolist()
    assert opened.evaluate("document.title") == "Find objects"
    assert HOSTILE in opened.evaluate("document.querySelector('#found').textContent")
    assert not opened.errors
    assert {x.partition(":")[0] for x in opened.requests} <= {"file", "blob", "data"}
    assert len([x for x in opened.requests if x.startswith("file")]) == 1
    wide = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
    assert opened.evaluate(wide) <= 0


@needs_chromium
def test_its_resize_is_pillows(opened):
    generator = np.random.default_rng(0)
    sizes = [(30, 40, 47, 63), (40, 31, 17, 31), (40, 31, 40, 8), (5, 200, 120, 70), (9, 9, 9, 9)]
    if int(PIL.__version__.split(".")[0]) >= 13:  # which resizes tall pictures downwards first
        sizes += [(7, 5, 3, 9), (106, 44, 37, 16), (93, 45, 75, 36), (50, 20, 30, 10)]
    for height, width, new_height, new_width in sizes:
        pixels = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
        new = (new_width, new_height)
        expected = np.asarray(Image.fromarray(pixels).resize(new, Image.Resampling.BILINEAR))
        content = base64.b64encode(pixels.tobytes()).decode()
        script = (
            f"Array.from(resize(Uint8Array.from(atob('{content}'), x => x.charCodeAt(0)),"
            f"{width}, {height}, {new_width}, {new_height}))"
        )
        assert np.array_equal(opened.evaluate(script), expected.ravel()), (height, width, new)
        metadata = "Object.assign(metadata.resize, {min: 33, max: 50})"
        size = opened.evaluate(f"({metadata}, modelSize({width}, {height}))")
        assert ResizeShortestEdge.get_output_shape(height, width, 33, 50) == tuple(size[::-1])
    opened.evaluate(f"Object.assign(metadata.resize, {json.dumps(METADATA['resize'])})")


@needs_chromium
@pytest.mark.parametrize("channels", ["RGB", "BGR"])
@pytest.mark.parametrize("dtype", ["float32", "uint8"])
def test_the_model_reads_what_the_runtime_gives_it(folder, opened, channels, dtype):
    """Of a PNG, which browser and Pillow decode alike."""
    kind = {"format": channels, "dtype": dtype}
    opened.evaluate(f"Object.assign(metadata.input, {json.dumps(kind)})")
    content = base64.b64encode((folder / "a.png").read_bytes()).decode()
    script = f"""(async () => {{
      const bytes = Uint8Array.from(atob("{content}"), x => x.charCodeAt(0));
      const {{ rgb, bitmap }} = await read(new Blob([bytes]));
      const size = modelSize(bitmap.width, bitmap.height);
      const small = resize(rgb, bitmap.width, bitmap.height, ...size);
      return Array.from(tensor((await opened).ort, small, ...size).data);
    }})()"""
    detector, seen = Detector(folder / "model.onnx"), {}
    detector.about |= kind
    detector.session = type("Session", (), {"run": lambda *x: seen.update(x[2]) or 1 / 0})()
    with pytest.raises(ValueError, match="division by zero"):
        detector(folder / "a.png")
    assert np.array_equal(opened.evaluate(script), seen["image"].ravel())
    opened.evaluate(f"Object.assign(metadata.input, {json.dumps(METADATA['input'])})")


@needs_chromium
def test_suppression_outside_of_the_model_is_the_products(folder, opened):
    generator = np.random.default_rng(0)
    corner = generator.uniform(0, 60, (80, 2))
    boxes = np.concatenate([corner, corner + generator.uniform(5, 40, (80, 2))], axis=1)
    scores, classes = generator.uniform(0, 1, 80), generator.integers(0, 2, 80)
    rows = [
        {"box": box, "score": score, "label": label}
        for box, score, label in zip(boxes.tolist(), scores, classes.tolist(), strict=True)
    ]
    for agnostic in (False, True):
        change = {"class_agnostic_nms": agnostic, "detections_per_image": 30}
        script = f"(Object.assign(metadata, {json.dumps(change)}), suppress({json.dumps(rows)}))"
        kept = [x["score"] for x in opened.evaluate(script)]
        found = (torch.tensor(x).float() for x in (boxes, scores, classes))
        expected = suppress(*found, METADATA["nms_thresh"], agnostic)[:30]
        assert kept == scores[expected].tolist()
        assert 5 < len(kept) <= 30


@needs_chromium
def test_the_slider_hides_boxes_and_a_broken_picture_is_named(folder, opened):
    assert look_at(opened, folder / "a.png").startswith("3 of 3 boxes, found in ")
    slide = "(e => (e.value = 0.85, e.dispatchEvent(new Event('input'))))"
    opened.evaluate(f"{slide}(document.getElementById('score'))")
    status = "document.getElementById('status').textContent"
    assert opened.evaluate(status).startswith("1 of 3 boxes, found in ")
    assert look_at(opened, folder / "broken.jpg").startswith("broken.jpg can't be used: ")
    opened.evaluate(f"{slide}(document.getElementById('score'))")
    assert opened.evaluate(status).startswith("broken.jpg can't be used: ")
    assert opened.evaluate("document.getElementById('found').hidden")
    assert "of 3 boxes" in look_at(opened, folder / "a.png")


@needs_chromium
def test_a_dropped_picture_is_taken(folder, opened):
    content = base64.b64encode((folder / "a.png").read_bytes()).decode()
    before = opened.evaluate("state.number")
    opened.evaluate(f"""(() => {{
      const dropped = new DataTransfer();
      const bytes = Uint8Array.from(atob("{content}"), x => x.charCodeAt(0));
      dropped.items.add(new File([bytes], "dropped.png", {{ type: "image/png" }}));
      const event = new DragEvent("drop", {{ dataTransfer: dropped, bubbles: true }});
      document.body.dispatchEvent(event);
    }})()""")
    opened.until(f"state.number > {before}")
    assert "boxes" in opened.evaluate("document.getElementById('status').textContent")


def test_no_npm_is_said_in_words(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(page_module.shutil, "which", lambda name: None)
    with pytest.raises(UserError, match=r"npm is not installed; install Node.js, or put the file"):
        cached_package()


@pytest.mark.parametrize(
    "script, message",
    [
        ("echo npm error no network >&2; exit 1", r"couldn't fetch .*\(npm error no network\)"),
        ("exit 0", "it said nothing"),
        ("echo spoilt > a.tgz", "whose SHA-256 is [0-9a-f]{64}, expected d2228df7"),
    ],
)
def test_what_npm_can_not_fetch_is_not_used(tmp_path, monkeypatch, script, message):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    npm = tmp_path / "npm"
    npm.write_text(f"#!/bin/sh\n{script}\n")
    npm.chmod(0o755)
    monkeypatch.setattr(page_module.shutil, "which", lambda name: str(npm))
    with pytest.raises(UserError, match=message):
        cached_package()
    assert not list((tmp_path / "cache").rglob("*.tgz"))


@needs_chromium
@pytest.mark.slow
def test_boxes_of_photographs_are_the_runtimes(folder, tmp_path):
    """JPEGs, which browser and Pillow decode alike, through a network in WebAssembly."""
    files = photographs(3)
    exported_network(tmp_path)
    detector = Detector(tmp_path / "model.onnx")
    write_page(tmp_path / "model.onnx", tmp_path / "page.html")
    with browser(tmp_path / "profile") as page:
        page.open(tmp_path / "page.html")
        page.until("document.readyState == 'complete' && opened.then(() => true)", 120)
        for file in files:
            look_at(page, file)
            found, expected = page.evaluate("state.found"), detector(file)
            assert len(found) > 20
            assert [x["label"] for x in found] == expected.classes.tolist()
            np.testing.assert_allclose([x["box"] for x in found], expected.boxes, atol=0.1)
            np.testing.assert_allclose([x["score"] for x in found], expected.scores, atol=1e-5)
