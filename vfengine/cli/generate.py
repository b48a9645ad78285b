"""`python -m vfengine.generate`: its command line and its exit status.

Settings come from flags, then from --config FILE, then from the checkpoint. The exit status is that
of ending.py. Bad input writes nothing. Files that were complete before a failure or an interrupt
are named, and nothing is left half-written.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from .ending import ended
from .flags import one_line
from .output import LESS_MEMORY
from .settings import GENERATE, read_settings
from .start import short_name
from .streams import tell


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

    def run() -> None:
        settings = read_settings(sys.argv[1:] if argv is None else argv, program)
        with _warnings_in_one_line(settings.quiet, name):
            _run(settings, started, files, name)

    return ended(run, name, files, LESS_MEMORY)


def _run(settings: argparse.Namespace, started: float, files: list[Path], name: str) -> None:
    # imported here, so that --help needs none of them
    if settings.ray is not None:
        from .prompts_on_ray import generate_on_ray

        generate_on_ray(settings, started, files, name)
    elif settings.prompts is not None:
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

        with tqdm.external_write_mode(sys.stderr):
            tell(f"{name}: warning: {one_line(message)}")

    with warnings.catch_warnings():
        warnings.showwarning = show
        if quiet:
            warnings.simplefilter("ignore")
        yield
