"""Measure a model on this machine: python -m vfengine.bench (vfengine/cli/bench.py)."""

import sys

from vfengine.cli.bench import main
from vfengine.cli.start import begin

if __name__ == "__main__":
    sys.exit(main(started=begin()))
