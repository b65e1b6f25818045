"""`retina-focal export`: a trained model as a file for other runtimes."""

from retina_focal.tools.export.command import main

__all__ = ["main"]
