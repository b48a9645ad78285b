"""What a training has in its --output: a log, a state, the state's checkpoint, and samples.

The folder is one training's at a time. A lock on its log says so, which ends with the process.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from ..files import open_tensors, sweep
from ..training.team import Team
from .ending import verdict
from .flags import UsageError, one_line
from .streams import tell

STATE, LOG = "training.safetensors", "log.jsonl"
CHECKPOINT, LORA = "checkpoint", "lora.safetensors"  # what a training makes


class Output:
    """An --output folder that is this training's alone (`open_output`).

    Of several processes all call these methods, and the first alone writes.
    """

    def __init__(self, folder: Path, product: str = CHECKPOINT, team: Team | None = None) -> None:
        """product, team: see `open_output`"""
        self.state, self.checkpoint = folder / STATE, folder / product
        self.team = team or Team()
        self._samples, self._log = folder / "samples", -1

    def opened(self, log: int) -> None:
        """log: the descriptor of the log, to append to; the first process has it"""
        self._log = log

    def log(self, values: Mapping[str, Any]) -> None:
        """Adds a line of JSON; an OSError leaves no part of it."""
        self.team.of_first(lambda: self._append(values))

    def _append(self, values: Mapping[str, Any]) -> None:
        line, end = (json.dumps(values, default=str) + "\n").encode(), os.fstat(self._log).st_size
        try:
            while line:
                line = line[os.write(self._log, line) :]
        except OSError as error:
            os.ftruncate(self._log, end)
            error.filename = str(self.state.with_name(LOG))
            raise

    def save(self, training) -> None:
        """Writes the checkpoint, then the state, which names the checkpoint that is its own.

        Where the second fails, a state of fewer steps stays beside a checkpoint of more.
        """
        training.export(self.checkpoint)
        training.save(self.state, self.team.of_first(lambda: _digest(self.checkpoint)))

    def is_current(self) -> bool:
        """Whether there is a state, and its own checkpoint, whole."""
        return self.team.of_first(self._is_current)

    def _is_current(self) -> bool:
        named = self._metadata().get("checkpoint")
        return named is not None and named == _digest(self.checkpoint)

    def saved(self) -> int | None:
        """The steps of the state; None without one."""
        steps = self._metadata().get("steps_done")
        return None if steps is None else int(steps)

    def _metadata(self) -> Mapping[str, str]:
        if not self.state.exists():
            return {}
        with open_tensors(self.state, "training state") as stored:
            return stored.metadata() or {}

    def was_begun_by(self, run: str | None) -> bool:
        """Whether there is a state, and the last that began here was of this torchrun."""
        file = self.state.with_name(LOG)
        if run is None or not (self.state.exists() and file.is_file()):
            return False
        lines = [line for line in file.read_text().splitlines() if line.startswith('{"start"')]
        return bool(lines) and json.loads(lines[-1]).get("torchrun") == run

    def samples(self, step: int) -> Path:
        """The file of the samples of a step."""
        return self._samples / f"step-{step:07d}.png"

    def write_samples(self, training) -> None:
        """Writes the samples of this step; each file whole, or not at all."""
        self.team.of_first(lambda: self._samples.mkdir(exist_ok=True))
        training.write_samples(self.samples(training.steps_done))

    def has_samples(self, step: int) -> bool:
        return self.team.of_first(lambda: self.samples(step).exists())


@contextmanager
def open_output(
    folder: Path, resume: bool, product: str = CHECKPOINT, team: Team | None = None
) -> Iterator[Output]:
    """The folder of --output, made if need be, which no other training has meanwhile.

    resume: whether it must hold a state, or must not
    product: what the training makes there: CHECKPOINT, or LORA
    team:    the processes of the training; None: this one

    Where nothing has been logged in the end, what was made here is removed again. Raises UsageError
    for a folder that cannot be used; OSError of the machine, such as a full disk.
    """
    output = Output(folder, product, team)
    with ExitStack() as stack:
        held = partial(_held, output, folder, resume)
        output.team.of_first(lambda: stack.enter_context(held()))
        yield output


@contextmanager
def _held(output: Output, folder: Path, resume: bool) -> Iterator[None]:
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    log = None
    try:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            log = _locked(folder / LOG)
        except OSError as error:
            if verdict(error).status != 2:
                raise
            raise UsageError(f"--output {folder}: cannot be used ({one_line(error)})") from error
        output.opened(log)
        _check(output, resume)
        for written in (folder, output.samples(0).parent):
            sweep(os.path.abspath(written))
        yield
    finally:
        if log is not None:
            if not os.fstat(log).st_size:
                (folder / LOG).unlink(missing_ok=True)
            os.close(log)
        with suppress(OSError):  # up to the first that is not empty
            for path in made:
                path.rmdir()


def _digest(made: Path) -> str:
    """Names what a checkpoint's folder holds, or a file."""
    from ..formats.folders import folder_digest

    return hashlib.sha256(made.read_bytes()).hexdigest() if made.is_file() else folder_digest(made)


def _locked(file: Path) -> int:
    """A descriptor of a file, to append to, locked until it is closed or the process ends."""
    while True:
        opened = os.open(file, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        try:
            _lock(opened, file.parent)
            if file.exists() and os.path.samestat(os.fstat(opened), os.stat(file)):
                return opened
        except BaseException:
            os.close(opened)
            raise
        os.close(opened)  # a training that ended just now has removed it


def _lock(opened: int, folder: Path) -> None:
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            raise UsageError(f"--output {folder}: another training writes there") from error
        problem = f"--output {folder} cannot be locked ({one_line(error)})"
        tell(f"warning: {problem}: no other training must write there")


def _check(output: Output, resume: bool) -> None:
    """UsageError for a folder without the state to resume, or with one that would be lost."""
    from ..formats.folders import check_replaceable

    if output.state.exists() and not resume:
        raise UsageError(
            f"{output.state} exists: pass --resume to go on from it, or another --output"
        )
    if resume and not output.state.exists():
        raise UsageError(f"nothing to resume: there is no {output.state}")
    if output.checkpoint.name == CHECKPOINT:
        check_replaceable(output.checkpoint)
    elif output.checkpoint.exists() and not resume:
        raise UsageError(f"{output.checkpoint} exists: it is not overwritten")
    samples = output.samples(0).parent
    if samples.exists() and not samples.is_dir():
        raise UsageError(f"{samples} exists and is no folder")
