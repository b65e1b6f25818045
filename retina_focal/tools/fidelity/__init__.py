"""Where a config differs from the paper, Detectron and detectron2."""

from retina_focal.tools.fidelity.command import main

__all__ = ["main"]
