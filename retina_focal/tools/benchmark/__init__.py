"""Time and memory beside detectron2's and torchvision's RetinaNet."""

from retina_focal.tools.benchmark.command import main

__all__ = ["main"]
