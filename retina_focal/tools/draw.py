"""Detections beside ground truth, as one picture: `retina-focal draw`."""

import argparse

from retina_focal.data.registration import use_datasets
from retina_focal.evaluation.drawing import check_output, draw_detections
from retina_focal.tools.common import add_config_arguments, command, load_cfg
from retina_focal.weights.load import load_model


@command
def main(argv: list[str]) -> None:
    """``retina-focal draw``: images of a config's test set, with the weights that it names."""
    parser = argparse.ArgumentParser(prog="retina-focal draw", description=__doc__.splitlines()[0])
    add_config_arguments(parser)
    parser.add_argument("--output", default="detections.png", help="default: %(default)s")
    parser.add_argument("--num-images", type=int, default=4, help="default: %(default)s")
    parser.add_argument("--score-thresh", type=float, default=0.3, help="default: %(default)s")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE pairs for the config")
    args = parser.parse_args(argv)
    check_output(args.output)
    cfg = load_cfg(args.config_file, args.opts, args.dataset)
    use_datasets(cfg, cfg.DATASETS.TEST[:1])
    draw_detections(cfg, load_model(cfg), args.output, args.num_images, args.score_thresh)
