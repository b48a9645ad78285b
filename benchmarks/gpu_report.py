"""Makes docs/gpu.md and its pictures from docs/gpu.jsonl, which gpu_check.py writes.

`make gpu-report`. It needs no torch, no GPU and no complete run: the page shows what a killed run
had written.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from gpu_run import prediction
from gpu_run.findings import OURS, summary, verdicts
from gpu_run.results import Line, Results, Run, read
from gpu_run.tables import LEFT_OUT, TITLES, cell, checks, measured, profile, rows, sentence

DOCS = Path(__file__).parent.parent / "docs"
PICTURES = {  # of gpu_run.plots.DRAWINGS: what it shows, and the sections that it may stand in
    "kernels": ("Share of a copy's bandwidth, for every kernel", ("kernels", "network_ops")),
    "table4": ("Time and memory of VDM* and of two phases", ("table4", "memory")),
    "launches": ("Kernels launched in one denoising step", ("profile",)),
}
OPENING = """\
# On a GPU

What `python benchmarks/gpu_check.py` (`make gpu-check`) found on a machine with an NVIDIA GPU. This
page is made by `python benchmarks/gpu_report.py` (`make gpu-report`): its tables and pictures hold
no other figure."""
NOT_YET = """\
**Not yet run.** No GPU has given a figure so far, and nothing is claimed of any. On a machine with
an NVIDIA GPU:

    python benchmarks/gpu_check.py --out docs               # ten minutes at most
    python benchmarks/gpu_report.py                         # this page"""
READING = """\
Figures are medians; their spread, (largest - smallest) / median of the repeats, stands beside those
where it is 5 % or more."""


def page(
    results: Results,
    pictures: dict[str, dict[str, str]],
    notes: str = "",
    counts: prediction.Counted = prediction.NOTHING,
) -> str:
    """The whole page.

    pictures: for each card, the names of the files that were drawn
    notes:    what people say of the figures, a chapter of its own ahead of them
    counts:   of steps, from which their times are predicted
    """
    parts = [OPENING]
    if not any(results.of_card(card).figures for card in results.cards):
        parts.append(NOT_YET)
    else:
        parts.append(READING)
    if results.cut:
        were = "line was" if results.cut == 1 else "lines were"
        parts.append(f"{results.cut} {were} cut off, as in a run that is killed, and left out.")
    if notes.strip():
        parts.append(notes.strip())
    for card in results.cards:
        parts += _card(results.of_card(card), card, pictures.get(card, {}), counts)
    return "\n\n".join(parts) + "\n"


def _card(
    results: Results, card: str, pictures: dict[str, str], counts: prediction.Counted
) -> list[str]:
    parts = [f"## {card}", _provenance(results)]
    if results.figures:
        parts.append(summary(results))
    if results.sections:
        parts += ["### Verdicts", _verdicts(results)]
    parts += _failed(results) + _targets(results) + prediction.chapter(results, counts)
    known = [name for name in TITLES if name in results.sections]
    for section in known + [name for name in results.sections if name not in TITLES]:
        parts += _section(results, section, pictures)
    return [*parts, "### Runs", _runs(results.runs)]


# -- what was run ----------------------------------------------------------------------------------


def _provenance(results: Results) -> str:
    """Driver and versions of the last run; commit and date of every one."""
    head = results.runs[-1].head
    named = {"driver": "Driver", "cuda": "CUDA", "torch": "torch", "triton": "triton"}
    versions = [f"{name} {head[key]}" for key, name in named.items() if head.get(key)]
    commits = []
    for place, run in enumerate(results.runs, 1):
        of = f"Run {place}, of" if len(results.runs) > 1 else "One run, of"
        changed = ", with uncommitted changes" if run.head.get("dirty") is True else ""
        date = run.head.get("date", "an unknown date")
        commits.append(f"{of} commit {run.head.get('commit', 'unknown')}{changed}, on {date}.")
    return " ".join([f"{', '.join(versions) or 'Versions unknown'}.", *commits])


def _runs(runs: list[Run]) -> str:
    """A column for each run, all facts of its first and its last line."""
    ended = "how it ended"
    facts = [
        run.head | (run.tail or {ended: "killed: its last line is missing"}) | {"id": run.id}
        for run in runs
    ]
    for run, fact in zip(runs, facts, strict=True):
        if not run.head:
            fact["how it began"] = "its first line is missing"
    names = list(dict.fromkeys(name for fact in facts for name in fact))
    body = [[name, *(sentence(fact.get(name, "")) for fact in facts)] for name in names]
    return rows(["", *(f"run {place}" for place in range(1, len(runs) + 1))], body)


# -- right or wrong --------------------------------------------------------------------------------


def _verdict(lines: list[Line]) -> str:
    """The verdict on a section, from all its lines in one run."""
    kinds = {line["status"] for line in lines}
    if "failed" in kinds:
        return "**failed**"
    if kinds - {"done"} and kinds - {"done"} <= set(LEFT_OUT):
        return " and ".join(LEFT_OUT[kind] for kind in LEFT_OUT if kind in kinds)
    if "done" not in kinds:
        return "broken off"
    return next((kind for kind in ("passed", "measured") if kind in kinds), "done")


def _verdicts(results: Results) -> str:
    """A row for each section, those that failed first."""
    body = []
    for section in results.sections:
        run = results.latest(section)
        lines = [line for line in run.lines if line["section"] == section]
        counts = [
            sum(line["status"] in kinds for line in lines)
            for kinds in (("measured",), ("passed",), ("failed",), tuple(LEFT_OUT))
        ]
        seconds = [line["value"] for line in lines if line["status"] == "done"]
        body.append(
            [
                section,
                _verdict(lines),
                *(str(count or "") for count in counts),
                f"{seconds[-1]:.0f}" if seconds else "",
                str(results.runs.index(run) + 1),
            ]
        )
    body.sort(key=lambda cells: "failed" not in cells[1])
    head = ["section", "verdict", "figures", "passed", "failed", "left out", "seconds", "run"]
    return rows(head, body)


def _failed(results: Results) -> list[str]:
    lines = [
        line
        for section in results.sections
        for line in results.merged(section)
        if line["status"] == "failed"
    ]
    if not lines:
        return []
    names = ("section", "case", "contender", "metric", "dtype")
    body = [[*(sentence(line[name]) for name in names), _why(line)] for line in lines]
    return ["### Failed", rows([*names, "why"], body)]


def _why(line: Line) -> str:
    value = "" if line["value"] is None else cell(line)
    return ": ".join(filter(None, (value, sentence(line["note"])))) or "no reason given"


def _targets(results: Results) -> list[str]:
    """A table of all targets that figures were read for, a column a contender."""
    found = verdicts(results.figures)
    if not found:
        return []
    parts = ["### Targets"]
    for kernels in (True, False):
        cells: dict[tuple[str, str], dict[str, str]] = {}
        names: list[str] = []
        for verdict in sorted(found, key=lambda verdict: (verdict.unit, verdict.target)):
            if (verdict.contender in OURS.values()) == kernels:
                names += [verdict.contender] * (verdict.contender not in names)
                what = cells.setdefault((verdict.goal, verdict.what), {})
                what[verdict.contender] = str(verdict)
        body = [[*goal, *(got.get(name, "") for name in names)] for goal, got in cells.items()]
        if body:
            parts.append(rows(["target", "of", *names], body))
    return parts


# -- sections --------------------------------------------------------------------------------------


def _section(results: Results, section: str, pictures: dict[str, str]) -> list[str]:
    """Plot, figures, checks and omissions of a section, as far as there are any."""
    lines = results.merged(section)
    title, words = TITLES.get(section, (section, ""))
    parts = [words] if words else []
    for name, (shows, homes) in PICTURES.items():
        home = next((home for home in homes if home in results.sections), None)
        if name in pictures and home == section:
            parts.append(f"![{shows}]({pictures[name]})")
    runs = {run.id: f"run {place}" for place, run in enumerate(results.runs, 1)}
    show = profile if section == "profile" else measured
    parts += [*show(lines, runs), *checks(lines), *_left_out(lines)]
    return [f"### {title}", *parts] if parts[bool(words) :] else []


def _left_out(lines: list[Line]) -> list[str]:
    said = []
    for line in lines:
        if line["status"] in LEFT_OUT:
            names = ("case", "contender", "metric", "dtype")
            what = ", ".join(sentence(line[name]) for name in names if line[name]) or "the section"
            why = sentence(line["note"])
            said.append(f"- {what}: {LEFT_OUT[line['status']]}{': ' * bool(why)}{why}")
    return ["\n".join(said)] if said else []


# -- files -----------------------------------------------------------------------------------------


def write(results: Results, out: Path) -> list[Path]:
    """Writes the page and its plots; a card without figures gets no plot."""
    drawn: dict[str, dict[str, str]] = {}
    for place, card in enumerate(results.cards, 1):
        mine = results.of_card(card)
        if not mine.figures:
            continue
        # matplotlib takes longer than all the rest: only where there is a use
        from gpu_run import plots

        suffix = f"-{place}" if place > 1 else ""
        files = {name: out.with_name(f"gpu-{name}{suffix}.png") for name in plots.DRAWINGS}
        head = mine.runs[-1].head
        text = ", ".join(
            f"{name} {head[key]}".strip()
            for key, name in (("driver", "driver"), ("torch", "torch"), ("commit", "commit"))
            if head.get(key)
        )
        names = plots.draw(mine.figures, f"{card}, {text}".removesuffix(", "), files)
        drawn[card] = {name: files[name].name for name in names}
    temporary = out.with_name(f".{out.name}.tmp")
    notes = out.with_name(f"{out.stem}-notes.md")
    counts = prediction.read(out.with_name(f"{out.stem}-counts.json"))
    said = notes.read_text() if notes.exists() else ""
    temporary.write_text(page(results, drawn, said, counts))
    os.replace(temporary, out)
    return [out, *(out.with_name(name) for files in drawn.values() for name in files.values())]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", nargs="?", type=Path, default=DOCS / "gpu.jsonl")
    parser.add_argument("--out", type=Path, default=DOCS / "gpu.md", metavar="FILE")
    arguments = parser.parse_args()
    for file in write(read(arguments.results), arguments.out):
        print(file)


if __name__ == "__main__":
    main()
