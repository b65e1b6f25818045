"""What is wrong with datasets, before a training: `retina-focal check`."""

from retina_focal.tools.check.command import main

__all__ = ["main"]
