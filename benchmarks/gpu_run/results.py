"""The format of gpu.jsonl: what gpu_check.py writes line by line and gpu_report.py reads.

A line is one JSON object with exactly the keys KEYS, in any order:

section, case, contender, metric
           what was measured; "" where there is nothing to distinguish
value      a finite number, or null; "measured" and "done" have one
unit       of the value
spread, n  (max - min) / median of n repeats, or null
gpu        name of the card
graph      whether the calls were replayed from a CUDA graph
dtype      one of DTYPES
status     one of STATUSES
note       why, in words; of "head" and "tail" the facts, a JSON object as text
time       seconds since the run began
run        id of the run; a file may hold several, one appended to another

A run may be killed at any byte. What is whole is kept, what is not is counted, and nothing raises.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

KEYS = (
    "section",
    "case",
    "contender",
    "metric",
    "value",
    "unit",
    "spread",
    "n",
    "gpu",
    "graph",
    "dtype",
    "status",
    "note",
    "time",
    "run",
)
STATUSES = {
    "head": "first line of a run; the note says on what and of what",
    "tail": "last line of a run; the note says how it ended",
    "measured": "a figure",
    "passed": "found correct",
    "failed": "found wrong, or broken off; the note says why",
    "unavailable": "something is missing here, and its rows with it",
    "skipped": "no longer fitted the budget",
    "done": "a section ended; the value is its seconds",
}
DTYPES = ("fp32", "bf16", "fp16", "")
NOTHING_FOUND = ("skipped", "unavailable")  # such a line says nothing against an earlier one
UNKNOWN_CARD = "unknown card"

Line = dict  # as validated
Key = tuple  # section, case, contender, metric, dtype, graph, whether the section's end


def validate(line: dict) -> None:
    """Raises ValueError where the line breaks the format, naming the key."""
    if not isinstance(line, dict):
        raise ValueError(f"line must be a JSON object, got {line!r}")
    if set(line) != set(KEYS):
        missing, unknown = set(KEYS) - set(line), set(line) - set(KEYS)
        raise ValueError(f"line lacks {sorted(missing)} and has {sorted(unknown)} too many")
    for key in ("section", "case", "contender", "metric", "unit", "gpu", "note", "run"):
        if not isinstance(line[key], str):
            raise ValueError(f"{key} must be a text, got {line[key]!r}")
    for key in ("section", "run"):
        if not line[key]:
            raise ValueError(f"{key} must not be empty")
    for key in ("value", "spread"):
        if line[key] is not None and not _number(line[key]):
            raise ValueError(f"{key} must be a finite number or null, got {line[key]!r}")
    if line["n"] is not None and (type(line["n"]) is not int or line["n"] < 1):
        raise ValueError(f"n must be a count of repeats or null, got {line['n']!r}")
    if not _number(line["time"]) or line["time"] < 0:
        raise ValueError(f"time must be seconds since the run began, got {line['time']!r}")
    if not isinstance(line["graph"], bool):
        raise ValueError(f"graph must be true or false, got {line['graph']!r}")
    if line["dtype"] not in DTYPES:
        raise ValueError(f"dtype must be one of {DTYPES}, got {line['dtype']!r}")
    if line["status"] not in STATUSES:
        raise ValueError(f"status must be one of {tuple(STATUSES)}, got {line['status']!r}")
    if line["status"] in ("measured", "done") and line["value"] is None:
        raise ValueError(f"a line of status {line['status']} needs a value")
    if line["status"] in ("head", "tail"):
        facts(line)


def facts(line: Line) -> dict:
    """The facts in the note of a head or a tail; ValueError if it is no JSON object."""
    try:
        found = json.loads(line["note"])
    except ValueError as error:
        raise ValueError(f"note of a {line['status']} must be JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"note of a {line['status']} must be an object, got {found!r}")
    return found


def key(line: Line) -> Key:
    """The key: a later line of the same key replaces this one."""
    names = ("section", "case", "contender", "metric", "dtype", "graph")
    return (*(line[name] for name in names), line["status"] == "done")


def _number(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


# -- reading ---------------------------------------------------------------------------------------


@dataclass
class Run:
    """Lines of one run; head and tail hold their facts, {} where a kill took the line."""

    id: str
    head: dict = field(default_factory=dict)
    tail: dict = field(default_factory=dict)
    lines: list[Line] = field(default_factory=list)

    @property
    def card(self) -> str:
        named = [line["gpu"] for line in self.lines if line["gpu"]]
        return next(iter(named), str(self.head.get("gpu") or UNKNOWN_CARD))


@dataclass
class Results:
    """Runs in the order in which they began; cut: lines that were cut off or not of the format."""

    runs: list[Run] = field(default_factory=list)
    cut: int = 0

    @property
    def cards(self) -> list[str]:
        """Names of the cards in the order of their first run."""
        return list(dict.fromkeys(run.card for run in self.runs))

    def of_card(self, card: str) -> Results:
        """The runs on this card alone: figures of two cards have no place in one table."""
        return Results([run for run in self.runs if run.card == card], self.cut)

    @property
    def sections(self) -> list[str]:
        """Names in the order of their first line."""
        return list(dict.fromkeys(line["section"] for run in self.runs for line in run.lines))

    def latest(self, section: str) -> Run:
        """The last run with a result for the section, whose verdict counts.

        If no run has one, the last run.
        """
        having = [run for run in self.runs if any(x["section"] == section for x in run.lines)]
        if not having:
            raise ValueError(f"no run has a section {section!r}")
        found = [
            run
            for run in having
            if any(x["section"] == section and x["status"] not in NOTHING_FOUND for x in run.lines)
        ]
        return (found or having)[-1]

    def merged(self, section: str) -> list[Line]:
        """One line a key, the latest, in the order of the keys' first lines.

        Verdicts ("passed", "failed", "done" and omissions) are those of the latest run only: a
        failure that was fixed, and is not tried again, is none any more. Figures of earlier runs
        stay until one of the same key replaces them. Within a run a failure stays.
        """
        latest = self.latest(section)
        kept: dict[Key, Line] = {}
        for run in self.runs:
            for line in run.lines:
                if line["section"] != section:
                    continue
                before = kept.get(key(line))
                found = before and before["status"] not in NOTHING_FOUND
                if found and line["status"] in NOTHING_FOUND:
                    continue
                if before and before["status"] == "failed" and before["run"] == line["run"]:
                    continue
                kept[key(line)] = line
        return [x for x in kept.values() if x["status"] == "measured" or x["run"] == latest.id]

    @property
    def figures(self) -> dict[Key, Line]:
        """Every measured line that no later one replaces, by its key."""
        lines = [line for section in self.sections for line in self.merged(section)]
        return {key(line): line for line in lines if line["status"] == "measured"}


def beside(figures: dict[Key, Line], line: Line, **changes: object) -> float | None:
    """The value of the line that differs from this one in these keys alone, if it was measured."""
    found = figures.get(key({**line, **changes}))
    return found["value"] if found else None


def read(path: Path | str) -> Results:
    """Every whole line of the file; no file is no results."""
    path = Path(path)
    results, runs = Results(), {}
    if not path.exists():
        return results
    for raw in path.read_bytes().split(b"\n"):
        line, whole = _parse(raw)
        results.cut += not whole
        if line is None:
            continue
        if line["run"] not in runs:
            runs[line["run"]] = Run(line["run"])
            results.runs.append(runs[line["run"]])
        run = runs[line["run"]]
        if line["status"] == "head":
            run.head = facts(line)
        elif line["status"] == "tail":
            run.tail = facts(line)
        else:
            run.lines.append(line)
    return results


def _parse(raw: bytes) -> tuple[Line | None, bool]:
    """The line, and whether nothing of it was lost.

    A run appended to a killed one continues its last, unfinished line: what follows is whole.
    """
    text = raw.decode(errors="replace").strip()
    if not text:
        return None, True
    for start in _braces(text):
        try:
            line = json.loads(text[start:])
            validate(line)
        except ValueError:
            continue
        return line, start == 0
    return None, False


def _braces(text: str) -> Iterator[int]:
    start = text.find("{")
    while start >= 0:
        yield start
        start = text.find("{", start + 1)
