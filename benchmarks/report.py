"""Draws what bench_table4.py measured: docs/table4.png and docs/growth.png, from docs/table4.json.

`make report` measures first where that file is not there, and with --measure in any case.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib.pyplot as plt
from bench_table4 import LATENCY, MEMORY, TARGETS, measure
from lib import paper
from lib.harness import Row, machine, table, verdicts, write_json
from lib.plots import (
    COLOURS,
    WIDTH,
    bar,
    finish,
    footer,
    headline,
    mark,
    not_read,
    save,
)
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

DOCS = Path(__file__).parent.parent / "docs"
PAPER = {LATENCY: paper.LATENCY, MEMORY: paper.MEMORY}
TITLES = {LATENCY: "latency per step", MEMORY: "peak memory of sampling"}
LIMIT = 1.3  # of the bars' axis: longer ones are cut, their numbers say so
LINES = {"#666666": 8, "#4477aa": -8}  # of VDM* and of two phases; how far up the labels, in points

Figures = dict[str, dict[str, dict[str, tuple[float, str]]]]  # case, contender, metric


def read(file: Path) -> tuple[dict, Figures]:
    """The machine, and value and unit of every figure."""
    report = json.loads(file.read_text())
    figures: Figures = {}
    for row in (Row(**values) for values in report["rows"]):
        case = figures.setdefault(row.case, {}).setdefault(row.contender, {})
        case[row.metric] = row.value, row.unit
    return report["machine"], figures


def draw_table4(facts: dict, figures: Figures) -> Figure:
    """Bars relative to VDM*, a row of panels per case that has both time and memory."""
    cases = {
        case: contenders
        for case, contenders in figures.items()
        if any(LATENCY in m and MEMORY in m for m in contenders.values())
    }
    bars = [len(contenders) for contenders in cases.values()]
    figure, axes = plt.subplots(
        len(cases),
        2,
        figsize=(WIDTH, 0.36 * sum(bars) + 1.1 * len(cases) + 0.4),
        sharey="row",
        squeeze=False,
        height_ratios=bars,
        layout="constrained",
    )
    for (case, contenders), panels in zip(cases.items(), axes, strict=True):
        for axis, metric in zip(panels, PAPER, strict=True):
            _bars(axis, contenders, metric)
            axis.set_title(f"{TITLES[metric]}, relative to VDM*", fontsize=10)
        headline(panels[0], case)
    _footer(figure, facts)
    return figure


def _bars(axis: Axes, contenders: dict, metric: str) -> None:
    finish(axis, list(contenders), LIMIT, top=-1.1)
    for place, (name, metrics) in enumerate(contenders.items()):
        if metric not in metrics:
            not_read(axis, place)
            continue
        value = metrics[metric][0]
        reference = name.startswith(("VDM*", "diffusers"))
        colour = COLOURS["reference" if reference else "bar"]
        bar(axis, place, value, f"{value:.2f}", colour, LIMIT)
    mark(axis, PAPER[metric], f"paper: {PAPER[metric]:.3f}")


def draw_growth(facts: dict, figures: Figures) -> Figure:
    """Time and memory over the number of frames, both axes logarithmic, with their exponents."""
    cases = {case: lines for case, lines in figures.items() if ", growth: " in case}
    figure, axes = plt.subplots(
        1, len(cases), figsize=(WIDTH, 4), squeeze=False, layout="constrained"
    )
    for axis, (case, lines) in zip(axes[0], cases.items(), strict=True):
        for (colour, rise), (name, metrics) in zip(LINES.items(), lines.items(), strict=True):
            points = {k.removeprefix("N = "): v for k, v in metrics.items() if "=" in k}
            frames = [int(count) for count in points]
            values = [value for value, _ in points.values()]
            unit = next(unit for _, unit in points.values())
            axis.plot(frames, values, "o-", color=colour, linewidth=2, markersize=5)
            power = f"~ N$^{{{metrics['exponent'][0]:.2f}}}$"
            axis.annotate(
                f"{name}\n{values[-1]:,.0f} {unit}, {power}",
                (frames[-1], values[-1]),
                (8, rise),
                textcoords="offset points",
                va="center",
                fontsize=9,
                color=colour,
                weight="bold",
            )
        size, what = case.split(", growth: ")
        axis.set_title(f"{what}, {size} size", fontsize=10)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        low, high = axis.dataLim.intervaly
        axis.set_ylim(low / 2, high * 1.5)
        axis.set_xticks(frames, [str(count) for count in frames])
        axis.set_xlim(frames[0] / 1.2, frames[-1] * 5)
        axis.set_xlabel("frames N", fontsize=9)
        axis.set_ylabel(f"{what}, {unit}", fontsize=9)
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_locator(NullLocator())
        axis.grid(axis="y", color="#dddddd", linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    _footer(figure, facts)
    return figure


def _footer(figure: Figure, facts: dict) -> None:
    where = facts.get("gpu") or f"{facts['cpu']}, {facts['threads']} threads"
    text = f"{where}, torch {facts['torch']}, load average {facts['load_average']} before the run"
    footer(figure, text)


def draw(file: Path, folder: Path) -> list[Path]:
    """Writes both pictures into the folder; growth is left out where it was not measured."""
    facts, figures = read(file)
    drawings = {"table4.png": draw_table4}
    if any(", growth: " in case for case in figures):
        drawings["growth.png"] = draw_growth
    for name, drawing in drawings.items():
        save(drawing(facts, figures), folder / name)
    return [folder / name for name in drawings]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--measure", action="store_true", help="measure even if FILE is there")
    parser.add_argument("--json", type=Path, default=DOCS / "table4.json", metavar="FILE")
    parser.add_argument("--output", type=Path, default=DOCS, metavar="DIR", help="of the pictures")
    arguments = parser.parse_args()
    if arguments.measure or not arguments.json.exists():
        facts = machine()
        rows = measure()
        print(f"{table(rows)}\n{verdicts(rows, TARGETS)}")
        write_json(arguments.json, rows, facts)
    for picture in draw(arguments.json, arguments.output):
        print(picture)


if __name__ == "__main__":
    main()
