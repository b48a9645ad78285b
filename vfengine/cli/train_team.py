"""Which processes a training is one of: those that torchrun started, or none but itself.

Nothing here imports torch unless torchrun started this process beside others.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout

from ..training.team import Execution, Lost, Team
from .ending import verdict
from .flags import Failure
from .start import on_stop

# flags, and its fields
EXECUTION = ("accumulate", "shard", "checkpoint_activations", "compile", "capture")


def team_of_process() -> Team:
    """The processes of this one's torchrun, by its environment variables; else this one alone."""
    environ = os.environ
    if "TORCHELASTIC_RUN_ID" not in environ:
        return Team()
    # whoever is started anew has the same parent, and another torchrun of that name has not
    run = f"{environ['TORCHELASTIC_RUN_ID']}-{os.getppid()}"
    restarted = int(environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
    if int(environ["WORLD_SIZE"]) == 1:
        return Team(run, restarted)
    from ..training.distributed import Processes

    return Processes(run, restarted, _status_of)


def _status_of(error: Exception) -> int:
    found = verdict(error)
    return 1 if found is None else found.status


@contextmanager
def opened(team: Team) -> Iterator[None]:
    """A team at work: the first process alone prints, and a lost one is told of in one line."""
    if team.size == 1:
        yield
        return

    def stop(number: int, frame: object) -> None:
        if not team.failed:  # else this process is about to tell why, and to end
            raise SystemExit(128 + number)

    on_stop(stop)
    try:
        with open(os.devnull, "w", encoding="utf-8") as nowhere:
            out, err = (nowhere, nowhere) if not team.is_first else (sys.stdout, sys.stderr)
            with redirect_stdout(out), redirect_stderr(err):
                team.open()
                yield
    except Lost as error:
        raise Failure(f"a worker was lost: {error}") from error
    team.close()


def execution_of(settings: argparse.Namespace, team: Team) -> Execution:
    """How the flags say that steps are computed."""
    given = {name: getattr(settings, name) for name in EXECUTION}
    return Execution(team, **{name: value for name, value in given.items() if value is not None})
