"""Where the class loss of a model comes from."""

from retina_focal.tools.anatomy.command import main

__all__ = ["main"]
