"""Generate clips: python -m vfengine.generate --label cartwheel --output cartwheel.mp4

The command is vfengine/cli/generate.py; here its clock starts, before anything else is imported.
"""

import os
import signal
import sys
import time
from collections.abc import MutableMapping
from pathlib import Path
from typing import NoReturn


def _seconds_since_process_start() -> float:
    """The age of this process on Linux. Elsewhere 0: times then count from this module's import."""
    try:
        started = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        uptime = float(Path("/proc/uptime").read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return 0.0
    return uptime - started / os.sysconf("SC_CLK_TCK")


def _terminate(signum: int, frame: object) -> NoReturn:
    raise SystemExit(128 + signum)  # unwinds the stack, so that temporary files are removed


def wait_briefly(environ: MutableMapping[str, str]) -> None:
    """Lets OpenMP's threads sleep after 0.1 ms without work, not after some 10 ms.

    Threads that spin take a busy machine's cores from those that they wait for. GNU's OpenMP reads
    the variable when torch is loaded; what the user has set is left alone.
    """
    if "OMP_WAIT_POLICY" not in environ:
        environ.setdefault("GOMP_SPINCOUNT", "5000")


if __name__ == "__main__":
    wait_briefly(os.environ)
    process_start = time.perf_counter() - _seconds_since_process_start()
    signal.signal(signal.SIGTERM, _terminate)

from vfengine.cli.generate import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main(started=process_start))
