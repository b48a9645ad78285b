"""Answer requests over HTTP: python -m vfengine.serve --model DIR (vfengine/cli/serve.py)."""

import sys

from vfengine.cli.serve import main
from vfengine.cli.start import begin

if __name__ == "__main__":
    begin()
    sys.exit(main())
