"""`generate --prompts FILE`: a task of each line, with one model, and a line of JSON of each.

A line that fails does not stop the others: its error is its line of JSON, and in the end the exit
status is 1. Lines of a stream are made as they come.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from ..pipelines.request import TextRequest
from .dry_run import describe, words
from .ending import verdict
from .flags import Failure, UsageError, one_line
from .job import Task, make_clips, open_pipeline, prepare
from .output import (
    LESS_MEMORY,
    Progress,
    Record,
    check_base_files,
    check_outputs,
    encoding_of,
    json_line,
    output_files,
    progress_bar,
)
from .prompt_lines import Line, Lines, check_template, open_lines, output_name
from .settings import line_settings
from .streams import Unsaid, say, tell

if TYPE_CHECKING:
    from ..pipelines.batches import Steps
    from ..pipelines.pipeline import Pipeline


def generate_lines(
    settings: argparse.Namespace,
    started: float,
    files: list[Path],
    name: str,
    make: Callable[..., None] | None = None,
) -> None:
    """Makes the clips of all lines and reports each line.

    started: `time.perf_counter()` at the moment that times count from
    files:   a list, to which complete files are added
    name:    of the program, for errors of lines
    make:    makes the lines, of which all that no model is needed for is checked; None: here

    Raises ValueError or OSError for bad input before the first line is made; Failure in the end if
    lines have failed, naming them.
    """
    fields = None if settings.output is None else _check_template(settings)
    check_base_files(settings)
    with open_lines(settings.prompts) as lines:
        if not lines.objects:
            for shown in {"label", "prompt"} & settings.given:
                raise UsageError(
                    f"--{shown} cannot go with --prompts {settings.prompts}, of prompts"
                )
        if fields == [] and lines.count is None:
            raise UsageError(f"--output {settings.output}: needs {{index}}, or lines share a file")
        (make or _make_here)(settings, lines, started, files, name)


def _make_here(settings: argparse.Namespace, lines: Lines, *told: Any) -> None:
    """told: started, files and name of `generate_lines`"""
    pipe = open_pipeline(settings)
    pipe.keep_parts()
    run = Run(settings, pipe, lines, *told)
    run.check_names()
    run.all()


def _check_template(settings: argparse.Namespace) -> list[str]:
    """The fields in --output; ValueError or OSError for names that no line could have."""
    fields = check_template(settings.output)
    values = {"label": "label", "prompt": "prompt"}
    name = output_name(argparse.Namespace(**{**vars(settings), **values}), 0)
    check_outputs(Path(name), 1, makes_folders=True)
    encoding_of(settings, name)
    return fields


class Run:
    """The lines of one command, and what has become of them."""

    def __init__(
        self,
        settings: argparse.Namespace,
        pipe: Pipeline,
        lines: Lines,
        started: float,
        files: list[Path],
        name: str,
    ) -> None:
        self.settings, self.pipe, self.lines = settings, pipe, lines
        self.started, self.files, self.name = started, files, name
        self.failed: list[int] = []
        self.unsaid: Unsaid | None = None  # the first line of JSON that could not be printed
        self.count = 0
        self.owners: dict[Path, int] = {}  # the line that each file is of

    def check_names(self) -> None:
        """UsageError if two lines of a file would write the same one."""
        if self.lines.count is None:
            return
        for line in self.lines.lines:
            try:
                self._claim(line, self._settings(line))
            except UsageError as error:
                if isinstance(error, _Shared):
                    raise
                continue  # the line says so when its turn comes
        self.owners.clear()

    def all(self) -> None:
        """Makes every line; in the end Failure if some have failed, Unsaid if one was not told."""
        with LinesBar(self.lines.count, self.settings.quiet) as bar:
            self._lines(bar)
        if self.failed:
            self.files.clear()  # their lines have named them
            numbers = ", ".join(map(str, sorted(self.failed)))
            raise Failure(f"{len(self.failed)} of {self.count} lines failed: {numbers}")
        if self.unsaid is not None:
            raise self.unsaid

    def _lines(self, bar: LinesBar) -> None:
        for line in self.lines.lines:
            self._line(line, bar)
            self.started = time.perf_counter()

    # -- one line ----------------------------------------------------------------------------------

    def _line(self, line: Line, bar: LinesBar) -> None:
        """Makes a line, or tells why not."""
        record = Record(self.started)
        self.count += 1
        try:
            begun = self._begun(line, bar)
            told = begun if isinstance(begun, dict) else self._made(line, begun, record, bar)
        except Exception as error:  # the other lines may go well
            told = self._failure(line, error, record, bar)
        finally:
            self.files += record.files
        self._tell(line, told, bar)

    def _begun(self, line: Line, bar: LinesBar) -> Task | dict[str, Any]:
        """The task of a line, checked; what is told of one that needs none."""
        if line.error:
            raise UsageError(line.error)
        settings = self._settings(line)
        self._claim(line, settings)
        check_base_files(settings)
        self._wait_for(settings)
        task = prepare(settings, self.pipe, makes_folders=True)
        if self.settings.resume and task.is_done:
            bar.passed_over()
            return {"files": list(map(str, task.targets)), "skipped": True}
        if self.settings.dry_run:
            return describe(task, base_needed_again=True)
        return task

    def _wait_for(self, settings: argparse.Namespace) -> None:
        """Waits for earlier lines whose files a line reads: here they are complete."""

    def _made(self, line: Line, task: Task, record: Record, bar: LinesBar) -> dict[str, Any]:
        """What is told of a line that went well."""
        task.targets[0].parent.mkdir(parents=True, exist_ok=True)
        job = make_clips(task, record, bar.of_line(line.number, record), base_needed_again=True)
        bar.made()
        return json_line(job, record)

    def _failure(
        self, line: Line, error: Exception, record: Record, bar: LinesBar
    ) -> dict[str, Any]:
        """Notes that a line has failed; what is told of it."""
        found = verdict(error, LESS_MEMORY)
        reason = found.reason if found else f"{type(error).__name__}: {one_line(error)}"
        self.failed.append(line.number)
        bar.passed_over()
        with bar.aside(sys.stderr):
            tell(f"{self.name}: error: line {line.number}: {reason}")
        return {"error": reason, "files": list(map(str, record.files))}

    def _settings(self, line: Line) -> argparse.Namespace:
        """The settings of a line, with its file; of a model without prompts they are labels."""
        entries = line.entries
        if not self.lines.objects and not self._reads_prompts():
            entries = {"label": entries["prompt"]}
        settings = line_settings(self.settings, entries, line.index)
        settings.output = output_name(settings, line.index)
        return settings

    def _reads_prompts(self) -> bool:
        text = self.pipe.request_type is TextRequest
        return text or self.pipe.config.text_encoder is not None

    def _claim(self, line: Line, settings: argparse.Namespace) -> None:
        """_Shared if another line has a file of this one."""
        count = max(settings.num_videos, settings.num_residuals)
        for file in output_files(Path(settings.output), count):
            owner = self.owners.setdefault(file, line.number)
            if owner != line.number:
                raise _Shared(
                    f"lines {owner} and {line.number} share the file {file}: --output needs "
                    "{index}"
                )

    # -- reports -----------------------------------------------------------------------------------

    def _tell(self, line: Line, told: dict[str, Any], bar: LinesBar) -> None:
        """Prints what has become of a line."""
        settings = self.settings
        if settings.dry_run and not settings.json and "steps" in told:
            text = f"line {line.number}: {words(told)}"
        else:
            text = json.dumps({"index": line.index, "line": line.number, **told})
        if settings.quiet and not settings.json:
            return
        try:
            with bar.aside(sys.stdout):
                say(text)
        except Unsaid as error:
            self.unsaid = error
            if error.unread and self.lines.count is None:
                raise  # lines of a stream might never end


class _Shared(UsageError):
    """Two lines have the same file."""


# -- progress --------------------------------------------------------------------------------------


class LinesBar:
    """One bar over all lines; with the time that is left, where their number is known."""

    def __init__(self, count: int | None, quiet: bool) -> None:
        form = "{desc}{n:.1f} lines [{elapsed}]"
        if count is not None:
            form = "{desc}{percentage:3.0f}%|{bar}| {n:.1f}/{total} lines [{elapsed}<{remaining}]"
        self.bar, self.lines = progress_bar(count, quiet, bar_format=form), 0

    def __enter__(self) -> LinesBar:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def of_line(self, number: int, record: Record) -> Callable[[int], _LineProgress]:
        """Progress of a line, of so many steps."""
        return lambda total: _LineProgress(self, number, record)

    def made(self) -> None:
        self.lines += 1
        self.bar.update(self.lines - self.bar.n)

    def passed_over(self) -> None:
        """A line takes no time; the others' times tell how long the rest will take."""
        if self.bar.total is not None:
            self.bar.total -= 1
        self.bar.update(self.lines - self.bar.n)

    def aside(self, stream: TextIO) -> AbstractContextManager[None]:
        """Out of the way of a line of text, where both are on a terminal."""
        return self.bar.external_write_mode(stream)


class _LineProgress(Progress):
    """A line's share of the bar."""

    def __init__(self, bar: LinesBar, number: int, record: Record) -> None:
        self.whole, self.number, self.record = bar, number, record

    def __exit__(self, *_: object) -> None:
        pass

    def __call__(self, steps: Steps) -> None:
        self.record.begin()
        bar = self.whole.bar
        bar.set_description(f"line {self.number}, {steps.phase}", refresh=False)
        bar.update(self.whole.lines + steps.done / max(steps.total, 1) - bar.n)

    def expect(self, total: int) -> None:
        pass
