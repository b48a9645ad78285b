"""The standard streams, which may be closed, full, or a pipe that nobody reads.

Results go to stdout, and one that is lost is trouble: `say` raises Unsaid. All else goes to stderr,
and is left unsaid where that is lost: `tell`. Nothing here imports torch.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Iterator
from typing import TextIO

_own: list[TextIO | None] = []  # stdout, while libraries are to print elsewhere


class Unsaid(RuntimeError):
    """A result that could not be written to stdout.

    unread: whether stdout is a pipe that nobody reads any more
    """

    def __init__(self, error: Exception) -> None:
        super().__init__(f"stdout cannot be written ({getattr(error, 'strerror', None) or error})")
        self.unread = isinstance(error, BrokenPipeError)


def say(text: str, end: str = "\n") -> None:
    """Writes a result to stdout at once; raises Unsaid where it cannot, and drops what follows."""
    stdout = _own[-1] if _own else sys.stdout
    try:
        _write(stdout, text + end)
    except (OSError, ValueError) as error:
        _drop(stdout)
        raise Unsaid(error) from error


@contextlib.contextmanager
def only_results() -> Iterator[None]:
    """Keeps stdout for what is said: what a library prints there meanwhile is dropped."""
    with open(os.devnull, "w") as nowhere, contextlib.ExitStack() as stack:
        _own.append(sys.stdout)
        stack.callback(_own.pop)
        stack.enter_context(contextlib.redirect_stdout(nowhere))
        yield


def tell(text: str) -> None:
    """Writes a line to stderr, unless that is lost."""
    try:
        _write(sys.stderr, text + "\n")
    except (OSError, ValueError):
        _drop(sys.stderr)


def open_streams() -> None:
    """Opens /dev/null where a standard stream is closed, so that no other file takes its number.

    Writing to a stdout that was closed still fails. Characters that a stream's encoding has not are
    written as escapes.
    """
    modes = (os.O_RDONLY, os.O_RDONLY, os.O_WRONLY)
    for number, (name, mode) in enumerate(zip(("stdin", "stdout", "stderr"), modes, strict=True)):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, mode), True)  # the lowest number that is free
        if getattr(sys, name) is None:
            reads = "w" if number else "r"
            setattr(sys, name, os.fdopen(number, reads, encoding="utf-8", closefd=False))
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")


def _write(stream: TextIO | None, text: str) -> None:
    if stream is None:
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))
    stream.write(text)
    stream.flush()


def _drop(stream: TextIO | None) -> None:
    """Sends a stream to /dev/null, so that what it still holds does not fail at the exit either."""
    with contextlib.suppress(AttributeError, OSError, ValueError):  # no file behind it
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)
