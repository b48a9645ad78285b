"""What the server's processes print on stderr."""

from __future__ import annotations

import contextlib
import sys
import traceback

from ..files import is_of_the_machine


def log(text: str) -> None:
    """Prints a line, which is lost where stderr cannot be written, as on a full disk."""
    with contextlib.suppress(OSError, ValueError):  # a closed one raises the latter
        print(text, file=sys.stderr, flush=True)


def log_error(error: BaseException) -> None:
    """Prints one line where a disk is to blame, and the traceback of a bug."""
    if is_of_the_machine(error):
        log(f"vfengine: {' '.join(str(error).split())}")
    else:
        log("".join(traceback.format_exception(error)).rstrip())
