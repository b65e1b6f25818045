"""The config of a dataset and a time budget."""

from retina_focal.tools.configure.command import main

__all__ = ["main"]
