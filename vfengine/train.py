"""Train a model: python -m vfengine.train --output run (vfengine/cli/train.py)."""

import sys

from vfengine.cli.start import begin
from vfengine.cli.train import main

if __name__ == "__main__":
    begin(briefly=False)
    sys.exit(main())
