"""Tables of the paper, or any grid of keys, on your own data."""

from retina_focal.tools.ablate.command import main

__all__ = ["main"]
