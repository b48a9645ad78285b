"""Generate clips: python -m vfengine.generate --label cartwheel --output cartwheel.mp4

The command is vfengine/cli/generate.py.
"""

import sys

from vfengine.cli.generate import main
from vfengine.cli.start import begin

if __name__ == "__main__":
    sys.exit(main(started=begin()))
