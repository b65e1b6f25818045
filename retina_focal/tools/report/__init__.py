"""`retina-focal report`: all that is known of a run, on one page."""

from retina_focal.tools.report.command import main

__all__ = ["main"]
