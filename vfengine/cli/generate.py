"""`python -m vfengine.generate`: its command line and its exit status.

Settings come from flags, then from --config FILE, then from the checkpoint. The exit status is 0, 2
for bad input (one line on stderr, nothing written), 1 for a failure later on, 130 when interrupted;
files that were complete by then are named, and nothing is left half-written.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from .flags import Failure, one_line
from .settings import GENERATE, read_settings
from .start import short_name


def main(
    argv: Sequence[str] | None = None, started: float | None = None, program: str = GENERATE
) -> int:
    """Runs one command line; returns the exit status.

    argv:    without the program's name; None is the process's own
    started: `time.perf_counter()` at the moment that times count from; None is now
    program: how the command was called, for help and errors
    """
    started = time.perf_counter() if started is None else started
    name = short_name(program)
    files: list[Path] = []
    try:
        settings = read_settings(sys.argv[1:] if argv is None else argv, program)
        with _warnings_in_one_line(settings.quiet, name):
            _run(settings, started, files, name)
    except (ValueError, OSError, Failure) as error:
        status = 1 if isinstance(error, Failure) else 2
        message = f"error: {one_line(error)}"
    except KeyboardInterrupt:
        status, message = 130, "interrupted"
    else:
        return 0
    if files:
        message += f" (complete: {', '.join(map(str, files))})"
    print(f"{name}: {message}", file=sys.stderr)
    return status


def _run(settings: argparse.Namespace, started: float, files: list[Path], name: str) -> None:
    # imported here, so that --help needs none of them
    if settings.prompts is not None:
        from .prompts import generate_lines

        generate_lines(settings, started, files, name)
    elif settings.dry_run:
        from .dry_run import dry_run

        dry_run(settings)
    else:
        from .job import generate

        generate(settings, started, files)


@contextmanager
def _warnings_in_one_line(quiet: bool, name: str) -> Iterator[None]:
    """Prints warnings as errors are printed, above the progress bar; none if quiet."""

    def show(message: Warning, *_: object) -> None:
        from tqdm import tqdm

        tqdm.write(f"{name}: warning: {one_line(message)}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.showwarning = show
        if quiet:
            warnings.simplefilter("ignore")
        yield
