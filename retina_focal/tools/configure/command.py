"""Write the config of a dataset and a time budget, each line with its reason."""

import argparse
import os
import shlex
import tempfile
from importlib.util import find_spec
from pathlib import Path

import torch
from detectron2.data import DatasetCatalog

from retina_focal.config import config_path, flatten, get_cfg, package_config
from retina_focal.data.anchor_search import search
from retina_focal.data.coverage import BoxTable, anchors_of, box_table, cover
from retina_focal.data.decisions import (
    STRICTER,
    THRESHOLDS,
    Setting,
    Settings,
    anchor_settings,
    data_settings,
    input_settings,
    machine_settings,
    method_settings,
    threshold_settings,
)
from retina_focal.data.fingerprint import (
    GRAIN,
    Fingerprint,
    Machine,
    Pace,
    affordable_shorter,
    fingerprint,
    is_tiled,
    wanted_shorter,
)
from retina_focal.data.schedule import schedule_settings
from retina_focal.errors import UserError
from retina_focal.files import cache_folder, check_regular, write_whole
from retina_focal.merging import merge_file
from retina_focal.safe_yaml import read_text, read_yaml_with_bases
from retina_focal.tools.arguments import number, tool_parser
from retina_focal.tools.common import command, sigterm_interrupts
from retina_focal.tools.configure.pace import measured_pace, text_of
from retina_focal.tools.configure.splits import (
    dataset_settings,
    expect_choices,
    find_splits,
    register_splits,
)
from retina_focal.tools.reports import processor
from retina_focal.weights.lite0 import prepare_weights

CPU_BASE = "quick_start/lite0.yaml"
GPU_BASE = "COCO-Detection/retinanet_R_50_FPN_1x.yaml"
BATCH, GPU_BATCH = 4, 16  # a GPU's is halved until its memory holds it
BUSY = 0.5  # of the cores
TOLERATED = 0.02  # of the boxes, that no anchor reaches
WRITTEN_BY = "# Written by: retina-focal configure"

# Why the base has what it has; other keys are as there.
REASONS = {
    "VERSION": "of detectron2's keys",
    "MODEL.META_ARCHITECTURE": "RetinaNet of this package",
    "MODEL.WEIGHTS": "trained on ImageNet; fetched once, SHA-256 checked",
    "MODEL.PIXEL_MEAN": "what the weights were trained with",
    "MODEL.PIXEL_STD": "what the weights were trained with",
    "INPUT.FORMAT": "what the weights were trained with",
    "MODEL.RETINA_FOCAL.TIMM.NAME": "without a GPU: trains on two cores",
    "MODEL.BACKBONE.FREEZE_AT": "early features are general, and their gradients costly",
    "MODEL.RETINANET.NUM_CONVS": "two learn more than four in minutes (lite0.yaml)",
    "MODEL.RETINANET.BBOX_REG_LOSS_TYPE": "learns more than L1 in minutes (lite0.yaml)",
}

EPILOG = """
It looks at the boxes of the train split and at the number of pictures of val, never at test. It
runs a few steps of the training and evaluation, so that the minutes are those of `train` on this
machine, with start and evaluation. Without val, a fifth of the pictures is held out.

Examples:
  %(prog)s voc:VOC2012 --minutes 60 --output mine.yaml
  %(prog)s train.json --val val.json --minutes 8 --output mine.yaml
then:
  retina-focal train --config-file mine.yaml
"""


@command
def main(argv: list[str]) -> None:
    """``retina-focal configure``: look at the data, measure the machine, decide, write."""
    parser = tool_parser("configure", __doc__, EPILOG)
    parser.add_argument("data", metavar="DATA", help="URI, path or name of a dataset")
    parser.add_argument("--val", metavar="DATA", help="default: DATA's val split, or a part of it")
    parser.add_argument("--minutes", type=number(float, 1), required=True, metavar="M")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="a .yaml file")
    args = parser.parse_args(argv)
    if args.output.suffix not in (".yaml", ".yml"):
        parser.error(f"--output is '{args.output}'; expected a name that ends in .yaml")
    if any(not x.isprintable() for x in argv):
        parser.error(f"{argv!r} has a line break; YAML has lines: rename the file or folder")
    _expect_own(args.output)
    with sigterm_interrupts():
        _configure(args, argv)


def _expect_own(output: Path) -> None:
    """Refuse to write over what `configure` has not written, before minutes are spent.

    Raises:
        UserError: something else lies there.
    """
    if not output.exists():
        return
    check_regular(output)
    if not read_text(output).startswith(WRITTEN_BY):
        raise UserError(
            f"'{output}' is there, and `retina-focal configure` has not written it; name another "
            "file: --output FILE"
        )


def _configure(args: argparse.Namespace, argv: list[str]) -> None:
    stem = args.output.stem
    train, val = find_splits(args.data, args.val, stem)
    classes = register_splits(train, val)
    table = box_table(DatasetCatalog.get(train[0]))
    val_records = DatasetCatalog.get(val[0])
    expect_choices(val, val_records, table)
    try:
        found = fingerprint(table, classes, len(val_records))
    except UserError as error:
        checked = f"retina-focal check {shlex.quote(train[1])}"
        raise UserError(f"'{train[1]}': {error}; what is wrong: {checked}") from error
    cores, has_hotcoco = len(os.sched_getaffinity(0)), find_spec("hotcoco") is not None
    machine = Machine(torch.cuda.is_available(), cores, has_hotcoco)
    _expect_idle(machine)
    _expect_hotcoco(machine, found)
    settings = {
        **base_settings(machine),
        **data_settings(found),
        **machine_settings(machine, found),
    }
    settings |= method_settings()
    settings |= dataset_settings(train, val, args.val)
    settings["OUTPUT_DIR"] = Setting(f"output/{stem}", "named as this file")
    settings |= decide(settings, table, found, machine, args.minutes, val_records)
    config_of(settings)
    write_whole(args.output, _header(argv, found, machine) + text_of(settings) + "\n")
    written = shlex.quote(str(args.output))
    print(f"wrote {written}; type: retina-focal train --config-file {written}")


def _expect_idle(machine: Machine) -> None:
    """Say where something else runs: a step may then take longer than in the training."""
    load = os.getloadavg()[0]  # processes that run or would, over the last minute
    if load > BUSY * machine.cores:
        print(
            f"in the last minute {load:.1f} processes ran on {machine.cores} cores; should they "
            "end before the training does, its steps are faster than those that are measured now, "
            "and it gets fewer than it could: measure on a machine that is otherwise idle",
            flush=True,
        )


def _expect_hotcoco(machine: Machine, found: Fingerprint) -> None:
    """Say what measures the many boxes of large pictures in less time."""
    if is_tiled(found) and not machine.has_hotcoco:
        print(
            "val is measured in tiles, where pycocotools takes a good part of the minutes; for the "
            "same numbers in seconds: pip install 'retina_focal[evaluation]', and type this again",
            flush=True,
        )


def base_settings(machine: Machine) -> Settings:
    """The network: what the base config says, written out, so that the file stands alone."""
    base = GPU_BASE if machine.has_gpu else CPU_BASE
    read = read_yaml_with_bases(config_path(base), package_config)
    settings = {
        key: Setting(value, REASONS.get(key, f"as in {base}"))
        for key, value in flatten(read).items()
    }
    if not machine.has_gpu:
        weights = cache_folder() / "tf_efficientnet_lite0.pth"
        prepare_weights(weights)
        settings["MODEL.WEIGHTS"] = Setting(str(weights), REASONS["MODEL.WEIGHTS"])
    return settings


def decide(
    settings: Settings,
    table: BoxTable,
    found: Fingerprint,
    machine: Machine,
    minutes: float,
    val_records: list[dict],
) -> Settings:
    """Input size, anchors and schedule, with the seconds of a step measured at that size."""
    pace, shorter = None, wanted_shorter(found)
    for _ in range(2):
        batch = pace.batch if pace else (GPU_BATCH if machine.has_gpu else BATCH)
        fixed = Pace(shorter, batch, 0, 1e9, 0)  # one size of pictures
        sized = {**settings, **input_settings(found, fixed, minutes, shorter)[0]}
        pace = measured_pace(sized, val_records, shorter, batch, machine)
        print(
            f"{pace.step:.3g} s per step of {pace.batch} pictures at {shorter} px, "
            f"{pace.picture:.3g} s per evaluated picture, {pace.start:.0f} s of start",
            flush=True,
        )
        affordable = affordable_shorter(found, pace, minutes)
        if abs(affordable - shorter) < 2 * GRAIN:
            break
        shorter = affordable
    inputs, sides, longer = input_settings(found, pace, minutes, affordable)
    _, layout = anchors_of(config_of({**settings, **inputs}))
    most = layout.num_per_cell
    octaves = search(table, layout, sides, longer, upper=STRICTER[1], max_per_cell=most)
    before, after = (cover(table, x, sides, longer) for x in (layout, octaves.layout(layout)))
    reached = after.shares(STRICTER)
    _tell_unreached(after.shares(THRESHOLDS)["below_lower"])
    anchors = anchor_settings(octaves, before.shares(STRICTER), reached)
    anchors |= threshold_settings(reached["at_least_upper"])
    return {**inputs, **anchors, **schedule_settings(found, machine, pace, minutes, sides)}


def _tell_unreached(share: float) -> None:
    if share > TOLERATED:
        print(
            f"{share:.1%} of the boxes reach an anchor at an IoU below {THRESHOLDS[0]} alone, at "
            "these sizes: they will hardly be learned; which ones: retina-focal anchors",
            flush=True,
        )


def config_of(settings: Settings):
    """The config that settings make."""
    with tempfile.TemporaryDirectory(prefix="retina_focal-") as folder:
        path = Path(folder, "config.yaml")
        path.write_text(text_of(settings))
        cfg = get_cfg()
        merge_file(cfg, str(path))
        return cfg


def _header(argv: list[str], found: Fingerprint, machine: Machine) -> str:
    """What the file is, and what it was made from."""
    name = processor("cuda" if machine.has_gpu else "cpu")
    threads = f", {torch.get_num_threads()} threads" if not machine.has_gpu else ""
    return (
        f"{WRITTEN_BY} {shlex.join(argv)}\n"
        f"# For {found.num_pictures:,} pictures with {sum(found.boxes_of_class):,} boxes, "
        f"{found.num_val:,} pictures of val. Times are of {name}{threads}.\n"
        "# Train with: retina-focal train --config-file THIS_FILE\n"
    )
