#!/usr/bin/env python3
"""Train and evaluate a config; the same as `retina-focal train`."""

from retina_focal.tools.train import main

if __name__ == "__main__":
    main()
