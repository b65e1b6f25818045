"""Anchors that reach more boxes, positives of each rule, and the command that tells of both."""

import json

import cv2
import numpy as np
import pytest
import torch
import yaml
from detectron2.modeling.matcher import Matcher
from detectron2.structures import Boxes, pairwise_iou

from retina_focal.assigner import ASSIGNER_REGISTRY
from retina_focal.data.anchor_search import Octaves, search
from retina_focal.data.coverage import BoxTable, anchors_of, cover, resize
from retina_focal.data.positives import count_positives
from retina_focal.tools import anchors as tool
from retina_focal.tools.common import load_cfg
from retina_focal.tools.reports import yaml_lines

CONFIG = "quick_start/lite0.yaml"


def table_of(width: float, height: float, num_boxes: int = 200) -> BoxTable:
    """Boxes of about one size, in pictures of 400 x 300 px."""
    generator = np.random.default_rng(0)
    side = generator.uniform(0.8, 1.25, (num_boxes, 1)) * [width, height]
    low = generator.random((num_boxes, 2)) * ([400, 300] - side)
    pictures = np.arange(num_boxes) // 4
    sizes = np.tile([[300, 400]], (pictures.max() + 1, 1))
    classes = np.zeros(num_boxes, np.int64)
    return BoxTable(np.hstack([low, low + side]), classes, pictures, sizes, ("",) * len(sizes))


@pytest.mark.parametrize("width, height", [(18, 18), (20, 100), (200, 30), (90, 90)])
def test_the_search_finds_anchors_that_reach_boxes_of_one_shape(width, height):
    _, layout = anchors_of(load_cfg(CONFIG))
    table = table_of(width, height)
    found = search(table, layout, [300], 1000, upper=0.5, max_per_cell=9)
    assert found.num_per_cell <= 9
    shares = [
        cover(table, x, [300], 1000).shares((0.4, 0.5)) for x in (layout, found.layout(layout))
    ]
    before, after = (x["at_least_upper"] for x in shares)
    assert after >= max(before, 0.9)
    assert shares[1]["mean_best_iou"] > shares[0]["mean_best_iou"]
    assert found == search(table, layout, [300], 1000, upper=0.5, max_per_cell=9)


def test_a_search_without_boxes_keeps_the_paper_s_base_sizes():
    _, layout = anchors_of(load_cfg(CONFIG))
    found = search(table_of(9, 9, 1).of_pictures(np.array([], int)), layout, [300], 1000, 0.5, 9)
    assert found == Octaves((32.0, 64.0, 128.0, 256.0, 512.0), 3, (1.0,))


def test_the_settings_of_the_search_build_the_anchors_that_it_measured(tmp_path):
    _, layout = anchors_of(load_cfg(CONFIG))
    octaves = Octaves((17.5, 33.0, 70.0, 140.0, 280.0), 2, (0.4, 1.1))
    path = tmp_path / "a.yaml"
    path.write_text(yaml_lines({"_BASE_": CONFIG, **octaves.settings()}))
    _, built = anchors_of(load_cfg(str(path)))
    pairs = zip(built.cells, octaves.layout(layout).cells, strict=True)
    assert all((a == b).all() for a, b in pairs)
    assert built.num_per_cell == octaves.num_per_cell == 4


def test_positives_are_those_of_detectron2_s_matcher():
    cfg = load_cfg(CONFIG)
    generator, layout = anchors_of(cfg)
    table = table_of(12, 14, 24)
    rules = {rule: ASSIGNER_REGISTRY.get(rule)(cfg) for rule, _ in ASSIGNER_REGISTRY}
    found = count_positives(table, generator, layout, rules, 300, 1000)
    boxes, kept, sizes = resize(table, 300, 1000)
    expected = {rule: np.zeros_like(found[rule]) for rule in ("detectron2", "paper")}
    for picture in range(len(sizes)):
        mine = (table.pictures[kept] == picture).nonzero()[0]
        grids = [x[picture].tolist() for x in layout.grids(sizes)]
        levels = generator([torch.empty(1, 0, *x) for x in grids])
        level = np.repeat(np.arange(5), [len(x) for x in levels])
        ious = pairwise_iou(Boxes(torch.tensor(boxes[mine])), Boxes.cat(levels))
        for rule, low_quality in (("detectron2", True), ("paper", False)):
            match, label = Matcher([0.4, 0.5], [0, -1, 1], low_quality)(ious)
            for anchor in (label == 1).nonzero()[:, 0].tolist():
                expected[rule][mine[match[anchor]], level[anchor]] += 1
    for rule, counts in expected.items():
        assert (found[rule] == counts).all(), rule
    # Each of these small boxes has its best anchor; not each reaches 0.5.
    assert found["detectron2"].sum(1).min() > 0 == found["paper"].sum(1).min()
    totals = [found[rule].sum() for rule in ("paper", "detectron", "detectron2")]
    assert totals == sorted(totals)
    assert found["atss"].sum() > 0


def test_the_command_reports_what_it_measured(data, tmp_path, capsys):
    arguments = [f"coco:{data}/a.json?images={data}", "--config-file", CONFIG]
    arguments += ["--output", str(tmp_path), "INPUT.MIN_SIZE_TRAIN", "[16, 64]"]
    tool.main([*arguments, "--json"])
    report = json.loads(capsys.readouterr().out)
    assert (report["boxes"], report["pictures"]) == (12, 6)
    assert report["all"]["boxes"] == 24 == sum(x["boxes"] for x in report["by_class"])
    assert sum(x["boxes"] for x in report["by_size"]) == 24
    assert sum(x["boxes"] for x in report["by_class_and_size"]) == 24
    # 36 x 28 px becomes 9 x 7 at a shorter side of 16 px, which the 19.2 px anchors don't reach.
    small, large = report["by_shorter_side"]
    assert (small["below_lower"], large["below_lower"]) == (1.0, 0.0)
    assert set(report["positives"]["rules"]) >= {"detectron2", "detectron", "paper", "atss"}
    sheet = cv2.imread(report["picture"])
    assert sheet.shape == (40 + 3 * 280, 4 * 240, 3)  # 12 boxes
    assert (sheet[40:, :, :] == 255).all(2).any()

    # What is to be pasted gives what is told.
    better = report["suggestion"]
    pasted = tmp_path / "pasted.yaml"
    pasted.write_text(yaml_lines({"_BASE_": CONFIG, **better["settings"]}))
    arguments[2] = str(pasted)
    tool.main([*arguments, "--json"])
    again = json.loads(capsys.readouterr().out)
    assert again["all"] == {key: better[key] for key in again["all"]}
    assert again["anchors_per_cell"] == better["anchors_per_cell"] <= 9

    tool.main(arguments)
    text = capsys.readouterr().out
    assert "12 boxes in 6 pictures" in text and "detectron2 *" in text


def test_tiles_are_told_of(data, tmp_path, capsys):
    crop = {"ENABLED": True, "TYPE": "absolute", "SIZE": [64, 64]}
    cfg = {"_BASE_": CONFIG, "INPUT": {"CROP": crop, "MIN_SIZE_TRAIN": [64]}}
    (tmp_path / "tiles.yaml").write_text(yaml.safe_dump(cfg))
    arguments = [f"coco:{data}/a.json?images={data}", "--output", str(tmp_path)]
    tool.main([*arguments, "--config-file", str(tmp_path / "tiles.yaml")])
    text = capsys.readouterr().out
    assert "6 pictures, not resized;" in text and "6 pictures, of each the 64 px in the mid" in text


def test_boxes_without_area_are_told_of(data, tmp_path):
    content = json.loads((data / "a.json").read_text())
    for row in content["annotations"]:
        row["bbox"][2:] = [0, 0]
    (tmp_path / "zero.json").write_text(json.dumps(content))
    uri = f"coco:{tmp_path / 'zero.json'}?images={data}"
    with pytest.raises(SystemExit, match="none has an area inside its picture"):
        tool.main([uri, "--config-file", CONFIG])


def test_settings_are_written_as_yaml_that_reads_back():
    settings = {"B.C.D": [1, 2.5], "A": "x", "B.C.E": 1e-05, "B.F": True, "B.G": "a: b # c"}
    reasons = dict.fromkeys(settings, "why")
    for lines in (yaml_lines(settings), yaml_lines(settings, reasons)):
        loaded = yaml.safe_load(lines)
        node = {"C": {"D": [1, 2.5], "E": 1e-05}, "F": True, "G": "a: b # c"}
        assert loaded == {"A": "x", "B": node}
    assert all(x.endswith((":", "  # why")) for x in lines.splitlines())
