"""`retina-focal <tool> ...`: each tool is a module of this package."""

import importlib
import sys

TOOLS = {
    "check": "what is wrong with datasets, file by file and record by record",
    "anchors": "which boxes the anchors reach, and anchors that reach more",
    "configure": "write the config of a dataset and a time budget, with the reasons",
    "train": "train and evaluate a config (= train_net.py)",
    "quick-start": "sample data, training, evaluation and a picture, in minutes on a CPU",
    "sample-data": "fetch and prepare a small dataset and backbone weights",
    "predict": "boxes of pictures, folders and videos, by a trained run",
    "import-weights": "detectors and backbones of torchvision, Detectron, mmdetection, timm",
    "report": "all that is known of a run, on one page",
    "evaluate": "AP, errors, calibration and operating points of a run, or two runs compared",
    "export": "a trained run as a file for other runtimes, compared with the model",
    "draw": "detections beside ground truth, as one picture",
    "ablate": "tables of the paper, or any grid of keys, on your own data",
    "anatomy": "where a model's class loss comes from, and its hardest windows",
    "speed": "AP against time per image, of checkpoints and scales",
    "fidelity": "how a config differs from the paper, Detectron and detectron2",
    "benchmark": "time and memory beside detectron2's and torchvision's RetinaNet",
}


def main(argv: list[str] | None = None) -> None:
    """Run the tool that the first argument names with the rest."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        width = max(map(len, TOOLS))
        rows = "\n".join(f"  {name:{width}}  {text}" for name, text in TOOLS.items())
        print(f"usage: retina-focal TOOL ...\n\n{rows}\n\nretina-focal TOOL --help tells more")
        return
    name, *rest = argv
    if name not in TOOLS:
        sys.exit(f"retina-focal has no tool '{name}'; it has {', '.join(TOOLS)}")
    sys.argv = [f"retina-focal {name}", *rest]  # what usage lines call the program
    importlib.import_module(f"retina_focal.tools.{name.replace('-', '_')}").main(rest)


if __name__ == "__main__":
    main()
