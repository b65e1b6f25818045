"""Measure a finished run, or a file of results, or compare two."""

from retina_focal.tools.evaluate.command import main

__all__ = ["main"]
