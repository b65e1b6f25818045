"""Detections beside ground truth, as one picture: `retina-focal draw`."""

from retina_focal.errors import UserError
from retina_focal.evaluation.drawing import check_output, draw_detections
from retina_focal.tools.arguments import add_config_arguments, number, tool_parser
from retina_focal.tools.common import command
from retina_focal.tools.runs import open_run, run_model, use_data


@command
def main(argv: list[str]) -> None:
    """``retina-focal draw``: images of a config's test set, with the weights that it names."""
    parser = tool_parser("draw", __doc__)
    add_config_arguments(parser)
    parser.add_argument("--output", default="detections.png", help="default: %(default)s")
    parser.add_argument("--num-images", type=number(), default=4, help="default: %(default)s")
    parser.add_argument(
        "--score-thresh", type=number(float, 0, 1), default=0.3, help="default: %(default)s"
    )
    args = parser.parse_args(argv)
    check_output(args.output)
    run = open_run(None, args.config_file, args.opts, args.dataset)
    if not run.cfg.DATASETS.TEST:
        raise UserError("the config names no dataset; add: DATASETS.TEST \"('name',)\"")
    use_data(run, run.cfg.DATASETS.TEST[0], measured=False)
    draw_detections(run.cfg, run_model(run), args.output, args.num_images, args.score_thresh)
    print(f"detections beside ground truth: {args.output}")
