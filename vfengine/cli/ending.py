"""How every command ends: its exit status, and one line on stderr about what went wrong.

    0    done, and all results printed
    1    trouble: a disk, memory, a stream, or anything else once the work had begun
    2    bad input
    130  Ctrl-C

An error of any other kind is a bug. Its traceback is printed, and the status is 1.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from ..files import is_of_the_machine
from ..training.team import FailedElsewhere
from .flags import Failure, one_line
from .streams import Unsaid, tell


class Verdict(NamedTuple):
    """What an error comes to: the exit status, and one line."""

    status: int
    reason: str


def verdict(error: Exception, less_memory: str = "") -> Verdict | None:
    """What an error comes to; None for a bug.

    less_memory: what to try where memory is short
    """
    if _is_out_of_memory(error):
        return Verdict(1, "not enough memory" + (f": try {less_memory}" if less_memory else ""))
    if isinstance(error, (Failure, Unsaid, FloatingPointError)):
        return Verdict(1, one_line(error))
    if isinstance(error, OSError):
        named = error.filename is not None and error.strerror
        reason = f"{error.filename}: {error.strerror}" if named else one_line(error)
        return Verdict(1 if is_of_the_machine(error) else 2, reason)
    if is_of_the_machine(error):  # SQLite's own
        return Verdict(1, one_line(error))
    if isinstance(error, (ValueError, ImportError)):
        return Verdict(2, one_line(error))
    return None


def ended(
    run: Callable[[], int | None],
    name: str,
    files: Sequence[Path] = (),
    less_memory: str = "",
    interrupted: str = "interrupted",
    speaks: Callable[[], bool] = lambda: True,
) -> int:
    """Runs a command; returns its exit status, and tells in one line what went wrong.

    run:   returns the exit status, None for 0
    name:  of the command, in front of the line
    files: those that are complete are named behind it
    speaks: whether it is this process that tells, of several

    Raises what is a bug. A pipe that nobody reads is no news unless files were written.
    """
    try:
        return run() or 0
    except KeyboardInterrupt:
        status, reason = 130, interrupted
    except FailedElsewhere as error:
        return error.status
    except Exception as error:
        found = verdict(error, less_memory)
        if found is None:
            raise
        status, reason = found.status, f"error: {found.reason}"
        if isinstance(error, Unsaid) and error.unread and not files:
            return status
    if not speaks():
        return status
    complete = f" (complete: {', '.join(map(str, files))})" if files else ""
    tell(f"{name}: {reason}{complete}")
    return status


@contextmanager
def begun() -> Iterator[None]:
    """Work, during which a ValueError or OSError is no longer one of the input: Failure."""
    try:
        yield
    except (ValueError, OSError) as error:
        found = verdict(error)
        raise Failure(found.reason) from error


def _is_out_of_memory(error: Exception) -> bool:
    if isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM:
        return True
    if not isinstance(error, RuntimeError) or isinstance(error, (Failure, Unsaid)):
        return False
    from ..devices import is_out_of_memory  # with torch, which raised it

    return is_out_of_memory(error)
