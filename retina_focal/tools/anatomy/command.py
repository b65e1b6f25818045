"""Where a model's class loss comes from (Fig. 4 of the paper): `retina-focal anatomy`."""

import argparse
import json
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from detectron2.config import CfgNode
from detectron2.data import (
    DatasetCatalog,
    MetadataCatalog,
    build_detection_test_loader,
)
from detectron2.evaluation import inference_context
from detectron2.modeling.meta_arch.dense_detector import permute_to_N_HWA_K
from torch import Tensor
from tqdm import tqdm

from retina_focal.config import retina_focal_node
from retina_focal.data.images import naming
from retina_focal.data.registration import use_datasets
from retina_focal.data.resizing import mapper_with_boxes
from retina_focal.errors import UserError
from retina_focal.files import write_whole
from retina_focal.retinanet import FocalRetinaNet
from retina_focal.tools.anatomy import report as anatomy_report
from retina_focal.tools.anatomy.windows import Anatomy
from retina_focal.tools.arguments import add_config_arguments, listed, number, tool_parser
from retina_focal.tools.common import command, expect_focal_retinanet, load_cfg
from retina_focal.tools.reports import origin
from retina_focal.weights.formats import sha256_of
from retina_focal.weights.load import load_model

GAMMAS = (0.0, 0.5, 1.0, 2.0)  # Fig. 4
CURVE_GAMMAS = (*GAMMAS, 5.0)  # Fig. 1
SEED = 0  # of the order of the images

EPILOG = """
A window is one class of one anchor; anchors that are ignored have none. The images are those of
the config's first test set, in a random order fixed by a seed, at the size of the evaluation. It
ends with the image after which both numbers of windows are reached, or with the dataset. Memory
does not grow with the windows. Ctrl-C ends with the images seen so far.

Written: anatomy.png (cumulative distribution of the loss, a line for each gamma), anatomy.md and
.json (the numbers), hardest_negatives.png and hardest_positives.png (often missing and wrong
labels).

Examples:
  %(prog)s --config-file quick_start/bccd.yaml MODEL.WEIGHTS output/bccd/model_final.pth
  %(prog)s --curves
"""


@command
def main(argv: list[str]) -> None:
    """``retina-focal anatomy``: run the model over images, write figures and numbers."""
    args = parse_args(argv)
    if args.curves:
        path = args.output / "curves.png"
        anatomy_report.plot_curves(args.gammas or CURVE_GAMMAS, path)
        print(f"curves of the losses: {path}")
    if not args.config_file:
        return
    cfg = load_cfg(args.config_file, args.opts, args.dataset)
    expect_focal_retinanet(cfg, "which loads the weights of detectron2's RetinaNet too")
    use_datasets(cfg, cfg.DATASETS.TEST[:1])
    model = load_model(cfg)
    anatomy = dissect(cfg, model, args.gammas or GAMMAS, args.num_negatives, args.num_positives)
    _check(anatomy)
    report = {
        **origin("anatomy", argv, cfg.MODEL.DEVICE),
        "weights": cfg.MODEL.WEIGHTS,
        "sha256": sha256_of(weights) if (weights := Path(cfg.MODEL.WEIGHTS)).is_file() else "",
        "dataset": cfg.DATASETS.TEST[0],
        **anatomy_report.numbers(anatomy),
    }
    write(report, anatomy, args.output)


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = tool_parser("anatomy", __doc__, EPILOG, has_folder=True)
    add_config_arguments(parser, required=False)
    add = partial(parser.add_argument, metavar="X")
    count = number(float, 0)
    add("--gammas", type=listed(number(float, 0)), help="default: 0,0.5,1,2; for --curves also 5")
    add("--num-negatives", type=count, default=1e7, help="at least; default: 1e7, the paper's")
    add("--num-positives", type=count, default=1e5, help="at least; default: 1e5, the paper's")
    curves = "draw the losses themselves (Fig. 1 and appendix A); alone it needs no config"
    parser.add_argument("--curves", action="store_true", help=curves)
    args = parser.parse_args(argv)
    if not args.config_file and not args.curves:
        parser.error("--config-file is missing; for example: --config-file quick_start/bccd.yaml")
    args.gammas = args.gammas and sorted(set(args.gammas))
    return args


@torch.no_grad()
def dissect(
    cfg: CfgNode,
    model: FocalRetinaNet,
    gammas: Sequence[float] = GAMMAS,
    num_negatives: float = 1e7,
    num_positives: float = 1e5,
) -> Anatomy:
    """Run the model over images of the config's first test set, in a random order.

    Args:
        gammas: to compute the focal loss for; alpha is the config's.
        num_negatives, num_positives: windows at which to stop, once both are reached.
    Returns:
        The anatomy of the images that were seen; Ctrl-C makes them fewer.
    Raises:
        UserError: the dataset has no images or no ground truth, an image can't be read, or logits
            are not finite.
    """
    records = DatasetCatalog.get(cfg.DATASETS.TEST[0])
    if not records:
        raise UserError(f"dataset '{cfg.DATASETS.TEST[0]}' has no images; expected at least one")
    loader = build_detection_test_loader(
        random.Random(SEED).sample(records, len(records)),
        mapper=naming(mapper_with_boxes(cfg), retina_focal_node(cfg).DATA.MAX_PIXELS),
        num_workers=cfg.DATALOADER.NUM_WORKERS,
    )
    node = cfg.MODEL.RETINANET
    names = MetadataCatalog.get(cfg.DATASETS.TEST[0]).get("thing_classes")
    names = names or [str(label) for label in range(node.NUM_CLASSES)]
    tile = retina_focal_node(cfg).TEST.TILE
    anatomy = Anatomy(node.IN_FEATURES, names, gammas, node.FOCAL_LOSS_ALPHA, tile)
    count = anatomy.tally.num_windows
    with (
        inference_context(model),
        _outputs(model, "head", "anchor_generator") as outputs,
        tqdm(total=len(records), unit="image", dynamic_ncols=True) as progress,
    ):
        try:
            for (record,) in loader:
                anatomy.add_image(record, *_look(model, record, outputs))
                progress.update()
                progress.set_postfix_str(f"{count(False):,} negatives, {count(True):,} positives")
                if count(False) >= num_negatives and count(True) >= num_positives:
                    break
        except KeyboardInterrupt:
            tqdm.write(f"interrupted; the figures are of {anatomy.num_images} images")
    return anatomy


@contextmanager
def _outputs(model: FocalRetinaNet, *parts: str) -> Iterator[dict]:
    """What the parts returned in the last call of the model, by name.

    Through hooks, so that precision and memory format are those of any inference.
    """
    outputs = {}
    handles = [
        getattr(model, part).register_forward_hook(
            lambda module, inputs, output, part=part: outputs.update({part: output})
        )
        for part in parts
    ]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def _look(
    model: FocalRetinaNet, record: dict, outputs: dict
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Anchors (Ri, 4), logits (Ri, K) and labels (Ri,) of one image, a tensor per level."""
    if "instances" not in record:
        raise UserError(
            f"image '{record['file_name']}' has no 'annotations'; expected a dataset with ground "
            "truth: --dataset NAME JSON IMAGES DATASETS.TEST \"('NAME',)\""
        )
    model([record])
    anchors = outputs["anchor_generator"]
    labels, _ = model.label_anchors(anchors, [record["instances"]])
    logits = [permute_to_N_HWA_K(x, model.num_classes)[0] for x in outputs["head"][0]]
    return [x.tensor for x in anchors], logits, labels[0].split([len(x) for x in anchors])


def _check(anatomy: Anatomy) -> None:
    if not anatomy.num_images:
        raise UserError("interrupted before the first image; there is nothing to write")
    for name, is_positive in (("positive", True), ("negative", False)):
        if not anatomy.tally.num_windows(is_positive):
            raise UserError(
                f"there is no {name} window in {anatomy.num_images} images; expected images with "
                "boxes of the model's classes: see DATASETS.TEST and MODEL.RETINANET.IOU_THRESHOLDS"
            )


def write(report: dict, anatomy: Anatomy, output: Path) -> None:
    """All files, each whole."""
    for is_positive, name in enumerate(("negatives", "positives")):
        path = output / f"hardest_{name}.png"
        hardest = anatomy.hardest[is_positive].windows
        anatomy_report.contact_sheet(hardest, anatomy.class_names, bool(is_positive), path)
    anatomy_report.plot(anatomy.tally, report["sentence"], output / "anatomy.png")
    text = anatomy_report.markdown(report)
    write_whole(output / "anatomy.json", json.dumps(report))
    write_whole(output / "anatomy.md", text)
    print(f"{text}\nwritten to {output}")
