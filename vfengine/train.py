"""Train a model: python -m vfengine.train --output run (vfengine/cli/train.py)."""

import signal
import sys

from vfengine.cli.train import main

if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that temporary files are removed
    sys.exit(main())
