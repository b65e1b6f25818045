"""`retina-focal check`: every file and record is looked at, and what is found adds up."""

import base64
import io
import json
import os
import re
import time

import numpy as np
import pytest
from detectron2.data.detection_utils import read_image
from PIL import Image
from test_sources import CLASSES, scene_of, write_coco, write_voc

from retina_focal.data import inspection, pictures
from retina_focal.data.duplicates import near_pairs
from retina_focal.data.inspection import DONE, PICTURES, SPLITS, compare, inspect
from retina_focal.tools.check.command import as_json, main

pytestmark = pytest.mark.usefixtures("own_cache")

BCCD = os.path.join(os.environ.get("DETECTRON2_DATASETS", "datasets"), "bccd")


def smooth(seed: int, size=(64, 48)) -> Image.Image:
    """A picture that no other looks like."""
    noise = np.random.default_rng(seed).integers(0, 255, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)


def dataset(tmp_path, n=4, first=0) -> str:
    """A COCO dataset of n pictures that are all different."""
    boxes = [(label, (1, 2, 30, 40)) for label in CLASSES]
    uri = write_coco(tmp_path, [(f"{i}.jpg", (64, 48), boxes) for i in range(first, first + n)])
    for i in range(first, first + n):
        smooth(i).save(tmp_path / "images" / f"{i}.jpg")
    return uri


def run(capsys, *argv: str) -> tuple[int, dict]:
    """Exit status and what `--json` prints."""
    try:
        main([*argv, "--json"])
        status = 0
    except SystemExit as end:
        status = end.code
    return status, json.loads(capsys.readouterr().out)


def kinds_of(content: dict) -> list[str]:
    return [x["kind"] for d in content["datasets"] for x in d["findings"]] + [
        x["kind"] for x in content["between"]
    ]


def truncate(path) -> None:
    path.write_bytes(path.read_bytes()[:-200])


def turn(path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    smooth(9).save(path, exif=exif)


BAD = {
    "missing": (lambda path: path.unlink(), ["picture-missing"]),
    "folder": (lambda path: (path.unlink(), path.mkdir()), ["picture-missing"]),
    "empty": (lambda path: path.write_bytes(b""), ["picture-broken"]),
    "text": (lambda path: path.write_text("no picture"), ["picture-broken"]),
    "truncated": (truncate, ["picture-broken"]),
    "other size": (lambda path: smooth(9, (60, 48)).save(path), ["picture-size"]),
    "turned": (turn, ["picture-size", "picture-turned"]),
    "16 bits": (
        lambda path: Image.fromarray(np.full((48, 64), 999, np.uint16)).save(path, "PNG"),
        ["picture-wide"],
    ),
    "float": (
        lambda path: Image.fromarray(np.ones((48, 64), np.float32)).save(path, "TIFF"),
        ["picture-wide"],
    ),
    "bomb": (lambda path: Image.new("1", (9000, 9000)).save(path, "PNG"), ["picture-too-large"]),
}


@pytest.mark.parametrize("name", BAD)
def test_a_picture_that_can_not_be_used_is_a_finding_with_its_file(name, tmp_path, capsys):
    uri = dataset(tmp_path)
    damage, kinds = BAD[name]
    damage(tmp_path / "images" / "2.jpg")
    status, content = run(capsys, uri)
    (seen,) = content["datasets"]
    assert (status, kinds_of(content)) == (1, kinds)
    assert all(record.startswith("2.jpg") for x in seen["findings"] for record in x["records"])
    assert seen["picture_counts"] == {"usable": 3, kinds[0].removeprefix("picture-"): 1}


def test_a_sound_dataset_has_no_finding_and_status_0(tmp_path, capsys):
    status, content = run(capsys, dataset(tmp_path))
    assert (status, kinds_of(content), content["refused"]) == (0, [], False)
    assert content["datasets"][0]["boxes_per_class"] == {"RBC": 4, "WBC": 4, "Platelets": 4}


def test_a_warning_is_status_1_only_with_strict(tmp_path, capsys):
    uri = dataset(tmp_path)
    (tmp_path / "images" / "3.jpg").write_bytes((tmp_path / "images" / "0.jpg").read_bytes())
    assert run(capsys, uri)[0] == 0
    status, content = run(capsys, uri, "--strict")
    assert (status, kinds_of(content)) == (1, ["picture-twice"])
    assert run(capsys, uri, "--strict", "--skip", "picture-*")[0] == 0
    assert kinds_of(run(capsys, uri, "--only", "pictures")[1]) == ["picture-twice"]
    assert main([uri, "--only", "annotations"]) is None


def test_pictures_are_not_looked_at_where_nothing_of_them_is_reported(tmp_path, capsys):
    uri = dataset(tmp_path)
    (tmp_path / "images" / "2.jpg").unlink()
    status, content = run(capsys, uri, "--skip", "pictures,splits")
    assert (status, content["datasets"][0]["picture_counts"]) == (0, {})


@pytest.mark.parametrize("typed_at", ["a picture", "annotations"])
def test_ctrl_c_ends_it_with_what_was_found_until_then(typed_at, tmp_path, capsys, monkeypatch):
    uris = [dataset(tmp_path / name, first=4 * i) for i, name in enumerate("abc")]
    truncate(tmp_path / "a/images/0.jpg")
    truncate(tmp_path / "b/images/4.jpg")
    look_at, find = pictures.look_at, inspection.find

    def looking(path: str, max_pixels: int) -> pictures.Look:
        if typed_at == "a picture" and path.endswith("b/images/6.jpg"):
            raise KeyboardInterrupt
        return look_at(path, max_pixels)

    def finding(data: str, allow_outside: bool) -> tuple:
        if typed_at == "annotations" and data == uris[2]:
            raise KeyboardInterrupt
        return find(data, allow_outside)

    monkeypatch.setattr(pictures, "look_at", looking)
    monkeypatch.setattr(inspection, "find", finding)
    status, content = run(capsys, *uris)
    first, second = content["datasets"]
    seen = 2 if typed_at == "a picture" else 4
    assert status == 130 and content["refused"]
    assert first["picture_counts"] == {"usable": 3, "broken": 1} and not first["is_interrupted"]
    assert second["picture_counts"] == {"usable": seen - 1, "broken": 1}
    with pytest.raises(SystemExit):
        main([*uris, "--page", str(tmp_path / "page.html")])
    printed = capsys.readouterr()
    assert f"interrupted in '{uris[1]}', 2 of 3 datasets" in printed.err
    assert ("2 of 4 pictures: 1 usable" in printed.out) == (seen == 2)


def test_an_unknown_kind_is_refused(tmp_path):
    with pytest.raises(SystemExit, match=r"no kind 'pictuers'.*picture-broken"):
        main([dataset(tmp_path), "--skip", "pictuers"])


def test_pictures_in_two_splits_are_found_by_bytes_and_by_look(tmp_path, capsys):
    train, val = dataset(tmp_path / "train"), dataset(tmp_path / "val", 4, first=4)
    assert kinds_of(run(capsys, train, val, "--only", "splits")[1]) == []
    folders = tmp_path / "train/images", tmp_path / "val/images"
    (folders[1] / "5.jpg").write_bytes((folders[0] / "1.jpg").read_bytes())
    copy = smooth(2).point(lambda x: min(255, x + 6)).resize((70, 50)).resize((64, 48))
    copy.save(folders[1] / "6.jpg", quality=40)
    _, content = run(capsys, train, val, "--only", "splits")
    assert kinds_of(content) == ["split-equal", "split-near"]
    assert [x["records"] for x in content["between"]] == [["1.jpg = 5.jpg"], ["2.jpg = 6.jpg"]]


def test_classes_that_only_val_has_are_found(tmp_path):
    uri, other = write_coco(tmp_path / "a", scene_of(["1.jpg"])), tmp_path / "b"
    scene = [("7.jpg", (64, 48), [("WBC", (1, 2, 30, 40))])]
    (finding,) = compare([inspect(uri, False), inspect(write_coco(other, scene), False)])
    assert (finding.kind, finding.records) == ("split-class-unseen", ("'WBC'",))
    voc = write_voc(tmp_path / "c", scene).partition("&")[0]  # has only the classes that it names
    (finding,) = compare([inspect(uri, False), inspect(voc, False)])
    assert (finding.kind, finding.severity) == ("split-classes", "error")
    assert "missing: RBC, Platelets" in finding.text


def test_a_dataset_that_can_not_be_read_is_a_finding_beside_the_others(tmp_path, capsys):
    status, content = run(capsys, dataset(tmp_path), str(tmp_path / "nowhere"))
    assert (status, kinds_of(content)) == (1, ["split-unreadable"])
    assert "nowhere" in content["datasets"][1]["findings"][0]["text"]


def test_every_finding_says_what_will_be_done(tmp_path):
    uri = dataset(tmp_path)
    (tmp_path / "images" / "2.jpg").unlink()
    content = as_json([inspect(uri)], [])
    findings = content["datasets"][0]["findings"]
    assert findings and all(x["done"] == DONE[x["severity"]] for x in findings)
    assert content["severities"]["picture"] == 1 and content["refused"]


def test_flat_pictures_of_other_brightness_are_not_near():
    flat = np.stack([np.full((8, 9), value, np.uint8) for value in (0, 100, 103, 255)])
    assert near_pairs(flat).tolist() == [[1, 2]]


def test_near_pairs_are_those_of_all_pairs():
    rng = np.random.default_rng(0)
    base = rng.integers(0, 255, (60, 8, 9))
    noisy = np.clip(base[rng.integers(0, 60, 90)] + rng.integers(-3, 4, (90, 8, 9)), 0, 255)
    thumbs = np.concatenate((base, noisy)).astype(np.uint8)
    bits = (thumbs[:, :, :-1] > thumbs[:, :, 1:]).reshape(len(thumbs), -1)
    expected = [
        [i, j]
        for i in range(len(thumbs))
        for j in range(i + 1, len(thumbs))
        if (bits[i] != bits[j]).sum() <= 3
        and np.abs(thumbs[i].astype(int) - thumbs[j]).mean() <= 12
    ]
    assert near_pairs(thumbs).tolist() == expected and len(expected) > 50


@pytest.mark.skipif(not os.path.isdir(BCCD), reason="needs $DETECTRON2_DATASETS/bccd")
def test_bccd_has_two_boxes_without_area_that_are_named(capsys):
    status, content = run(capsys, BCCD, "--skip", "pictures,splits")
    assert status == 0
    assert sum(x["annotations"] for x in content["datasets"]) == 4888
    empty = [x for d in content["datasets"] for x in d["findings"] if x["kind"] == "empty"]
    records = sorted(record for x in empty for record in x["records"])
    assert [re.search(r"BloodImage_\d+\.xml, object\[\d+\]", x)[0] for x in records] == [
        "BloodImage_00338.xml, object[12]",
        "BloodImage_00343.xml, object[3]",
    ]


def test_the_kinds_of_pictures_and_splits_have_names_of_their_own():
    assert all(x.startswith("picture-") for x in PICTURES)
    assert all(x.startswith("split-") for x in SPLITS)


def test_the_page_shows_the_pictures_of_findings_and_needs_nothing_beside_it(tmp_path):
    uri = dataset(tmp_path)
    path = tmp_path / "train.json"
    content = json.loads(path.read_text())
    content["annotations"][4]["bbox"] = [5, 5, 0, 9]
    content["images"][3]["file_name"] = "<script>alert(1)</script>.jpg"
    path.write_text(json.dumps(content))
    smooth(9, (60, 48)).save(tmp_path / "images" / "2.jpg")
    with pytest.raises(SystemExit):
        main([uri, "--page", str(tmp_path / "page.html")])
    page = (tmp_path / "page.html").read_text()
    assert "&lt;script&gt;" in page and "<script" not in page
    assert not re.search(r"(src|href)=\"(?!data:)|https?://|@import|url\(", page)
    found = [base64.b64decode(x) for x in re.findall(r"base64,([^\"]+)", page)]
    sizes = [Image.open(io.BytesIO(x)).size for x in found]  # of the other size, and of the box
    assert len(sizes) == 2 and all(max(size) <= 160 for size in sizes)
    red = np.asarray(Image.open(io.BytesIO(found[1])), int)
    assert ((red[..., 0] > 200) & (red[..., 1] < 80)).any()


@pytest.mark.parametrize("same", range(4))
def test_three_bits_that_differ_are_near_whichever_quarter_is_the_same(same):
    """Each quarter of the 64 bits is two rows of the thumbnail."""
    rising = np.arange(100, 109, dtype=np.uint8)  # no bit is set
    thumb = np.tile(rising, (8, 1))
    other = thumb.copy()
    for quarter in {0, 1, 2, 3} - {same}:
        other[2 * quarter, 8] = other[2 * quarter, 7] - 1  # one bit
    assert near_pairs(np.stack((thumb, other))).tolist() == [[0, 1]]
    other[2 * same, 8] = other[2 * same, 7] - 1
    assert near_pairs(np.stack((thumb, other))).tolist() == []


@pytest.mark.slow
def test_a_check_takes_a_third_of_the_time_of_decoding_one_by_one(tmp_path):
    """On two cores and more. `pytest -s -m slow tests/test_inspection.py` prints the seconds."""
    boxes, names = [("WBC", (1, 2, 300, 400))], [f"{i}.jpg" for i in range(300)]
    uri = write_coco(tmp_path, [(name, (1280, 960), boxes) for name in names])
    noise = np.random.default_rng(0).normal(0, 8, (960, 1280, 3)).astype(np.float32)
    for i, name in enumerate(names):
        pixels = np.asarray(smooth(i, (1280, 960)), np.float32) + noise  # as of a camera
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(tmp_path / "images" / name)
    ratios = []
    for _ in range(3):  # one after the other, as machines are not even
        start = time.perf_counter()
        assert inspect(uri).picture_counts == {"usable": len(names)}
        middle = time.perf_counter()
        for name in names:
            read_image(str(tmp_path / "images" / name), "BGR")
        ratios.append((time.perf_counter() - middle) / (middle - start))
        print(f"check {middle - start:.2f} s, one by one {time.perf_counter() - middle:.2f} s")
    assert sorted(ratios)[1] >= 3
