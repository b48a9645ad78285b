"""What the server's processes print on stderr. A line that is lost there, is lost."""

from __future__ import annotations

import contextlib
import sys
import traceback

from ..files import is_of_the_machine


def log(text: str) -> None:
    """Prints a line, unless the log's disk is full, say."""
    with contextlib.suppress(OSError, ValueError):  # the latter: it is closed
        print(text, file=sys.stderr, flush=True)


def log_error(error: BaseException) -> None:
    """Prints one line where a disk is to blame, and the traceback of a bug."""
    if is_of_the_machine(error):
        log(f"vfengine: {' '.join(str(error).split())}")
    else:
        log("".join(traceback.format_exception(error)).rstrip())
