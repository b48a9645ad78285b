"""Answer requests over HTTP: python -m vfengine.serve --model DIR (vfengine/cli/serve.py)."""

import sys

from vfengine.cli.serve import main

if __name__ == "__main__":
    sys.exit(main())
