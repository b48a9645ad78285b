"""The lines of --prompts FILE: prompts, or JSON objects of settings; and the names of their files.

Blank lines, and those that begin with #, are passed over. FILE.jsonl holds objects, FILE.txt
prompts. Any other, and stdin, holds objects if its first line begins with {. Nothing here imports
torch.
"""

from __future__ import annotations

import argparse
import json
import re
import string
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from .flags import UsageError, one_line

_OBJECTS = {".jsonl": True, ".txt": False}  # what files of these suffixes hold


class Line(NamedTuple):
    """A line that is to be made.

    number:  its number in the file, from 1
    index:   the same among the lines that are made, from 0
    entries: its settings by name; a prompt alone is {"prompt": …}
    error:   why it cannot be read; empty if it can
    """

    number: int
    index: int
    entries: Mapping[str, Any]
    error: str = ""


class Lines(NamedTuple):
    """The lines of a file, or of a stream as they come.

    objects: whether they are JSON objects, not prompts
    count:   how many there are; None where that is not known yet
    """

    lines: Iterable[Line]
    objects: bool
    count: int | None


@contextmanager
def open_lines(name: str) -> Iterator[Lines]:
    """The lines of a file, all of them read, or of a stream: stdin ("-"), or a pipe.

    A line that cannot be read has an `error`. Raises UsageError where there are no lines, and for a
    file that cannot be read, or none of whose lines can.
    """
    file = Path(name)
    if name == "-":
        yield _of_stream(sys.stdin.buffer, "--prompts -")
        return
    try:
        with file.open("rb") as opened:
            if file.is_file():
                lines = _of_stream(opened, f"--prompts {file}", _OBJECTS.get(file.suffix.lower()))
                found = list(lines.lines)
                if all(line.error for line in found):
                    number, error = found[0].number, found[0].error
                    raise UsageError(f"--prompts {file}: line {number}: {error}")
                lines = Lines(found, lines.objects, len(found))
            else:
                lines = _of_stream(opened, f"--prompts {file}")
            yield lines
    except OSError as error:
        if error.filename != str(file):
            raise
        raise UsageError(f"--prompts {file}: {one_line(error)}") from error


def _of_stream(stream: Iterable[bytes], where: str, objects: bool | None = None) -> Lines:
    """The lines of a stream, once its first one is there; objects: None is what that line is."""
    found = _texts(stream)
    number, text, error = next(found, (0, "", ""))
    if not number:
        raise UsageError(f"{where}: no prompts")
    objects = text.startswith("{") if objects is None else objects

    def lines() -> Iterator[Line]:
        yield _line(number, 0, text, error, objects)
        for index, (later, words, problem) in enumerate(found, 1):
            yield _line(later, index, words, problem, objects)

    return Lines(lines(), objects, None)


def _texts(stream: Iterable[bytes]) -> Iterator[tuple[int, str, str]]:
    """Number, text and error of each line that is neither blank nor a comment."""
    for number, line in enumerate(stream, 1):
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
        except UnicodeDecodeError as error:
            yield number, "", f"not UTF-8 ({one_line(error)})"
            continue
        if text and not text.startswith("#"):
            yield number, text, ""


def _line(number: int, index: int, text: str, error: str, objects: bool) -> Line:
    if error or not objects:
        return Line(number, index, {"prompt": text}, error)
    try:
        entries = json.loads(text)
    except (ValueError, RecursionError) as problem:
        return Line(number, index, {}, f"no JSON ({one_line(problem)})")
    if not isinstance(entries, dict):
        return Line(number, index, {}, f"expected an object of settings, got {one_line(entries)}")
    return Line(number, index, entries)


# -- names of files --------------------------------------------------------------------------------

_NUMBERS = ("index", "seed", "base_seed", "residual_seed")
_WORDS = ("label", "prompt")
DEFAULT_NAME = "{index:04d}-{prompt}"  # with .mp4, or .png of a preview


def check_template(template: str) -> list[str]:
    """The fields in a name of files; UsageError for one that is unknown or has an unknown format.

    Numbers may have a width, as in {index:04d}. {{ and }} are braces.
    """
    problem = f"--output {template}: "
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise UsageError(problem + one_line(error)) from error
    names = []
    for _, name, form, conversion in parts:
        if name is None:
            continue
        if name not in (*_NUMBERS, *_WORDS):
            known = ", ".join(f"{{{known}}}" for known in (*_NUMBERS, *_WORDS))
            raise UsageError(f"{problem}unknown field {{{name}}}, expected some of {known}")
        allowed = r"(0?[1-9])?d?" if name in _NUMBERS else ""
        if conversion or not re.fullmatch(allowed, form or ""):
            raise UsageError(
                f"{problem}{{{name}}} may only have a width of digits, as {{index:04d}}"
            )
        names.append(name)
    return names


def output_name(settings: argparse.Namespace, index: int) -> str:
    """The file of a line by its --output, whose fields stand for what the line has.

    Labels and prompts come without path separators: their words, joined by hyphens. {prompt} is
    the label where there is no prompt, and {label} is empty where there is none.
    """
    template = settings.output
    if template is None:
        template = DEFAULT_NAME + (".png" if settings.preview else ".mp4")
    check_template(template)
    label = "" if settings.label is None else re.sub(r"[^\w-]+", "-", settings.label)
    values = {name: vars(settings).get(name, 0) for name in _NUMBERS}
    prompt = label if settings.prompt is None else slug(settings.prompt)
    return template.format(**{**values, "index": index, "label": label, "prompt": prompt or "clip"})


def slug(words: str) -> str:
    """The first words of a text as a part of a file's name; "clip" if there are none."""
    name = "-".join(re.findall(r"\w+", words.lower())[:8])[:60]
    return name.encode()[:120].decode(errors="ignore") or "clip"  # names are limited in bytes
