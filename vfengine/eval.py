"""Distances between sets of clips: python -m vfengine.eval frechet (vfengine/cli/evaluate.py)."""

import sys

from vfengine.cli.evaluate import main
from vfengine.cli.start import begin

if __name__ == "__main__":
    begin()
    sys.exit(main())
