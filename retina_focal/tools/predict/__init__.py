"""`retina-focal predict`: boxes of pictures, folders and videos."""

from retina_focal.tools.predict.command import main

__all__ = ["main"]
