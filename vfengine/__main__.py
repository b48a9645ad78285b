"""All commands under one name: python -m vfengine VERB (vfengine/cli/main.py)."""

import sys

from vfengine.cli.main import main

if __name__ == "__main__":
    sys.exit(main(program="python -m vfengine"))
