"""Which boxes of a dataset the anchors of a config reach: `retina-focal anchors`."""

import json
import shlex

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog

from retina_focal.assigner import ASSIGNER_REGISTRY
from retina_focal.data.anchor_search import search
from retina_focal.data.coverage import (
    AnchorLayout,
    BoxTable,
    anchors_of,
    box_table,
    cover,
    policy_of,
    size_classes,
    tile_of,
)
from retina_focal.data.positives import count_positives
from retina_focal.data.registration import register, register_datasets
from retina_focal.data.sources import splits
from retina_focal.errors import UserError
from retina_focal.evaluation.unreached import UnreachedBox, draw_unreached, unreached
from retina_focal.tools.arguments import add_dataset_argument, number, tool_parser
from retina_focal.tools.common import command, expect_focal_retinanet, load_cfg
from retina_focal.tools.reports import table, yaml_lines

# Where the search gains less, the anchors are left as they are.
MIN_GAIN = {"at_least_upper": 0.001, "mean_best_iou": 0.005}

EPILOG = """
Boxes are taken as a training takes them: without crowds, resized by INPUT.MIN_SIZE_TRAIN and
MAX_SIZE_TRAIN, or not where INPUT.CROP cuts tiles that keep their size; other crops are not counted
in. Several shorter sides count equally; a range is stood for by five. The best IoU of every box is
computed; positives are counted on some pictures, or on their middle tiles. Written where a box is
below the lower threshold: unreached.png, the worst of them.

Examples:
  %(prog)s voc:VOC2012?split=train --config-file quick_start/lite0.yaml
  %(prog)s train.json --config-file cfg.yaml --json INPUT.MIN_SIZE_TRAIN "[640]"
"""


@command
def main(argv: list[str]) -> None:
    """``retina-focal anchors``: tables, keys that reach more boxes, and a picture."""
    parser = tool_parser("anchors", __doc__, EPILOG, has_folder=True)
    parser.add_argument("data", metavar="DATA", help="URI, path or name of a dataset")
    parser.add_argument("--json", action="store_true", help="print JSON in place of tables")
    images = "pictures, evenly spread, to count positives on; default: %(default)s"
    parser.add_argument("--num-images", type=number(), default=200, metavar="N", help=images)
    parser.add_argument("--config-file", required=True, metavar="FILE", help="as of train")
    add_dataset_argument(parser)
    parser.add_argument("opts", nargs="*", help="KEY VALUE pairs for the config")
    args = parser.parse_intermixed_args(argv)
    cfg = load_cfg(args.config_file, args.opts, args.dataset)
    expect_focal_retinanet(cfg, "whose anchors these are")
    name = registered_name(cfg, args.data)
    report, found = examine(cfg, name, args.num_images)
    if found:
        path = args.output / "unreached.png"
        draw_unreached(found, report["classes"], path)
        report["picture"] = str(path)
    print(json.dumps(report, indent=1) if args.json else text_of(report))


def registered_name(cfg: CfgNode, data: str) -> str:
    """The name under which DATA is registered: its own, or its URI (of its train split)."""
    register_datasets(cfg, [data])
    if data in DatasetCatalog:
        return data
    uri = splits(data)[0]
    register(uri, uri)
    return uri


def examine(cfg: CfgNode, name: str, num_images: int) -> tuple[dict, list[UnreachedBox]]:
    """The report on a registered dataset, and the boxes that no anchor reaches.

    Args:
        num_images: pictures to count positives on.
    Raises:
        UserError: the dataset has no box.
    """
    boxes = box_table(DatasetCatalog.get(name))
    if not len(boxes):
        raise UserError(f"dataset '{name}' has no boxes; expected at least one")
    generator, layout = anchors_of(cfg)
    sides, longer = policy_of(cfg)
    thresholds = cfg.MODEL.RETINANET.IOU_THRESHOLDS
    bounds = thresholds[0], thresholds[-1]
    coverage = cover(boxes, layout, sides, longer)
    if not len(coverage.ious):
        raise UserError(
            f"dataset '{name}' has {len(boxes):,} boxes, and none has an area inside its picture; "
            f"what is wrong with each: retina-focal check {shlex.quote(name)}"
        )
    names = MetadataCatalog.get(name).get("thing_classes")
    names = list(names or map(str, range(boxes.classes.max() + 1)))
    of_class = [coverage.classes == index for index in range(len(names))]
    of_size = size_classes(coverage.sides)
    report = {
        "dataset": name,
        "pictures": len(boxes.sizes),
        "boxes": len(boxes.with_area()),
        "classes": names,
        "shorter_sides": sides,
        "longer_side": longer,
        "tile": tile_of(cfg),
        "iou_thresholds": bounds,
        "anchors_per_cell": layout.num_per_cell,
        "all": coverage.shares(bounds),
        "by_class": [
            {"name": x, **coverage.shares(bounds, mask)}
            for x, mask in zip(names, of_class, strict=True)
        ],
        "by_size": [
            {"name": x, **coverage.shares(bounds, mask)} for x, mask in of_size if mask.any()
        ],
        "by_class_and_size": [
            {"name": x, "size": size, **coverage.shares(bounds, mask & own)}
            for x, own in zip(names, of_class, strict=True)
            for size, mask in of_size
            if (mask & own).any()
        ],
        "by_shorter_side": [
            {"name": side, **coverage.shares(bounds, coverage.shorter == side)} for side in sides
        ],
    }
    chosen = np.unique(np.linspace(0, len(boxes.sizes) - 1, num_images).round().astype(int))
    assigners = {rule: ASSIGNER_REGISTRY.get(rule)(cfg) for rule, _ in ASSIGNER_REGISTRY}
    middle = sides[len(sides) // 2]
    some, tile = boxes.of_pictures(chosen), tile_of(cfg)
    some = some.middle_tiles(tile) if tile else some
    counts = count_positives(some, generator, layout, assigners, middle, longer)
    report["positives"] = {
        "pictures": len(chosen),
        "shorter_side": middle,
        "levels": list(cfg.MODEL.RETINANET.IN_FEATURES),
        "rules": {rule: _positives(count) for rule, count in counts.items()},
        "rule_of_the_config": cfg.MODEL.RETINA_FOCAL.ASSIGNMENT,
    }
    report["suggestion"] = _suggestion(boxes, layout, (sides, longer), bounds, report["all"])
    return report, unreached(boxes, layout, coverage, longer, bounds[0])


def _positives(count: np.ndarray) -> dict:
    """Of (P, L) positives."""
    each, of = count.sum(1), max(len(count), 1)
    return {
        "per_box": float(each.sum() / of),
        "boxes_without": float((each == 0).sum() / of),
        "per_box_and_level": (count.sum(0) / of).tolist(),
    }


def _suggestion(
    boxes: BoxTable, layout: AnchorLayout, policy: tuple, bounds: tuple, now: dict
) -> dict | None:
    """Anchors that reach more at no more per cell, with what they gain on all boxes."""
    if len(layout.strides) == 1:
        return None
    octaves = search(boxes, layout, *policy, bounds[1], layout.num_per_cell)
    after = cover(boxes, octaves.layout(layout), *policy).shares(bounds)
    gain = {key: after[key] - now[key] for key in MIN_GAIN}
    worse = gain["at_least_upper"] < -MIN_GAIN["at_least_upper"]
    if worse or all(gain[key] < least for key, least in MIN_GAIN.items()):
        return None
    return {"settings": octaves.settings(), "anchors_per_cell": octaves.num_per_cell, **after}


def text_of(report: dict) -> str:
    """The report for people."""
    lower, upper = report["iou_thresholds"]
    resized = _resized(report["shorter_sides"], report["longer_side"])
    heads = [
        "",
        "boxes",
        "mean best IoU",
        f">= {upper:g}",
        f"{lower:g} to {upper:g}",
        f"< {lower:g}",
    ]
    lines = [
        f"{report['dataset']}: {report['boxes']:,} boxes in {report['pictures']:,} pictures, "
        f"{resized}; {report['anchors_per_cell']} anchors per cell"
        + ("; a box counts once for each shorter side" if len(report["shorter_sides"]) > 1 else ""),
        "",
    ]
    by_side = report["by_shorter_side"]
    rows = [{"name": "all", **report["all"]}, *report["by_class"], *report["by_size"]]
    rows += [{**x, "name": f"at {x['name']} px"} for x in by_side if len(by_side) > 1]
    lines += [table(heads, [[row["name"], *_cells(row)] for row in rows]), ""]
    positives = report["positives"]
    lines += [
        f"Positive anchors per box ({_counted(report)}; * is the config's rule):",
        "",
        table(
            ["ASSIGNMENT", "all levels", *positives["levels"], "boxes without"],
            [
                [
                    rule + " *" * (rule == positives["rule_of_the_config"]),
                    f"{x['per_box']:.2f}",
                    *(f"{level:.2f}" for level in x["per_box_and_level"]),
                    f"{x['boxes_without']:.1%}",
                ]
                for rule, x in positives["rules"].items()
            ],
        ),
        "",
    ]
    better = report["suggestion"]
    if better:
        lines += [
            f"These anchors reach more at the IoU {upper:g}, computed on all boxes; in the config",
            "they replace the keys of the same names. More reached is not always more learned:",
            "measure it. `retina-focal configure` searches at the IoU 0.6.",
            "",
        ]
        lines += [yaml_lines(better["settings"]), ""]
        rows = [["now", *_cells(report["all"])], ["with these", *_cells(better)]]
        lines += [table(heads, rows)]
    else:
        lines += ["No other anchors, at as many per cell, were found to reach more."]
    if "picture" in report:
        lines += ["", f"boxes below {lower:g}, worst first: {report['picture']}"]
    return "\n".join(lines)


def _resized(sides: list[int], longer: int) -> str:
    if sides == [0]:
        return "not resized"
    return f"shorter side {', '.join(map(str, sides))} px, longer side at most {longer} px"


def _counted(report: dict) -> str:
    number, side = report["positives"]["pictures"], report["positives"]["shorter_side"]
    if report["tile"]:
        return f"{number} pictures, of each the {report['tile']} px in the middle"
    return f"{number} pictures, " + (f"shorter side {side} px" if side else "not resized")


def _cells(row: dict) -> list[str]:
    shares = (f"{row[key]:.1%}" for key in ("at_least_upper", "between", "below_lower"))
    if not row["boxes"]:
        return ["0", "-", "-", "-", "-"]
    return [f"{row['boxes']:,}", f"{row['mean_best_iou']:.3f}", *shares]
