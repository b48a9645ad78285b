"""The three plots of docs/gpu.md: share of a copy's bandwidth, Table 4, kernels a step.

Each shows the figures of one card, and is left out where there are none.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import matplotlib.pyplot as plt
from lib import paper
from lib.plots import COLOURS, WIDTH, bar, finish, footer, headline, mark, not_read, save
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from gpu_run.findings import OURS, VDM, Figures, launches, memory, number, parts, two_phases
from gpu_run.results import Line, beside

FORMS = {False: "graphs off", True: "graphs on"}
SHARE_LIMIT = 130  # per cent of a copy's bandwidth: longer bars are cut
BACKENDS = {"cuda": COLOURS["bar"], "triton": COLOURS["other"]}


def draw(figures: Figures, text: str, files: dict[str, Path]) -> list[str]:
    """Draws and names the plots with figures; `files` has a path for each of DRAWINGS."""
    drawn = []
    for name, drawing in DRAWINGS.items():
        figure = drawing(figures)
        if figure:
            footer(figure, text)
            save(figure, files[name])
            drawn.append(name)
    return drawn


# -- share of a copy's bandwidth -------------------------------------------------------------------


def draw_kernels(figures: Figures) -> Figure | None:
    """A row of panels for every shape of the step kernels and one for the network ops."""
    rows: dict[str, list[Line]] = {}
    for line in figures.values():
        if line["metric"] != "of copy" or line["contender"] not in OURS:
            continue
        if line["section"] == "kernels":
            rows.setdefault(parts(line["case"])[2], []).append(line)
        elif line["section"] == "network_ops":
            rows.setdefault("network ops", []).append(line)
    if not rows:
        return None
    titles = sorted(rows, key=lambda name: -_volume(name))
    dtypes = sorted({line["dtype"] for lines in rows.values() for line in lines})
    heights = [len({_label(x, title) for x in rows[title]}) * 2 for title in titles]
    figure, axes = plt.subplots(
        len(titles),
        len(dtypes),
        figsize=(WIDTH, 0.19 * sum(heights) + 1.0 * len(titles) + 0.9),
        squeeze=False,
        sharey="row",
        height_ratios=heights,
        layout="constrained",
    )
    for title, panels in zip(titles, axes, strict=True):
        for axis, dtype in zip(panels, dtypes, strict=True):
            _shares(axis, rows[title], title, dtype)
            axis.set_title(f"{dtype}: % of a copy of as many bytes", fontsize=10)
        headline(panels[0], title)
    colours = [Patch(color=BACKENDS[name], label=label) for name, label in OURS.items()]
    figure.legend(handles=colours, loc="outside upper right", ncols=2, fontsize=9, frameon=False)
    return figure


def _shares(axis: Axes, lines: list[Line], title: str, dtype: str) -> None:
    """Two bars for every kernel, one below the other."""
    labels = list(dict.fromkeys(_label(line, title) for line in lines))
    finish(axis, labels, SHARE_LIMIT, top=-1.0)
    read = {(_label(x, title), x["contender"]): x["value"] for x in lines if x["dtype"] == dtype}
    for place, label in enumerate(labels):
        for offset, backend in ((-0.2, "cuda"), (0.2, "triton")):
            value = read.get((label, backend))
            if value is None:
                continue
            text = f"{value:.0f}"
            bar(axis, place + offset, value, text, BACKENDS[backend], SHARE_LIMIT, height=0.36)
        if not any((label, backend) in read for backend in BACKENDS):
            not_read(axis, place)
    mark(axis, 100, "copy")


def _label(line: Line, title: str) -> str:
    """The case without what the row's headline says."""
    return line["case"].removesuffix(f", {title}")


def _volume(shape: str) -> int:
    """Numbers in a shape; the network ops, which have many, come last."""
    sizes = shape.split("x")
    return math.prod(map(int, sizes)) if all(size.isdigit() for size in sizes) else 0


# -- Table 4 ---------------------------------------------------------------------------------------


def draw_table4(figures: Figures) -> Figure | None:
    """Milliseconds a step and GiB, VDM* above two phases, graphs off and on, a row a size."""
    kinds = {
        "latency": (two_phases(figures, "table4", "per step"), paper.LATENCY),
        "memory": (memory(figures), paper.MEMORY),
    }
    cases = list(
        dict.fromkeys((x["case"], x["dtype"]) for lines, _ in kinds.values() for x in lines)
    )
    if not cases:
        return None
    figure, axes = plt.subplots(
        len(cases),
        2,
        figsize=(WIDTH, 2.3 * len(cases) + 0.4),
        squeeze=False,
        sharey="row",
        layout="constrained",
    )
    for (case, dtype), panels in zip(cases, axes, strict=True):
        for axis, (kind, (lines, share)) in zip(panels, kinds.items(), strict=True):
            here = {x["graph"]: x for x in lines if (x["case"], x["dtype"]) == (case, dtype)}
            _pairs(axis, figures, here, share)
            what = f"{lines[0]['metric']}, {lines[0]['unit']}" if lines else "not read"
            axis.set_title(f"{kind}: {what}", fontsize=10)
        headline(panels[0], ", ".join(filter(None, (case, dtype))))
    return figure


def _pairs(axis: Axes, figures: Figures, lines: dict[bool, Line], share: float) -> None:
    """VDM* and two phases, without graphs and with them; the paper's share drawn across the latter.

    The share is of the VDM* just above it, so that each pair has a mark of its own.
    """
    names, bars = [], []
    for graph, form in FORMS.items():
        ours = lines.get(graph)
        theirs = beside(figures, ours, contender=VDM) if ours else None
        names += [f"VDM*, {form}", f"two phases, {form}"]
        bars += [(theirs, None), (ours and ours["value"], theirs)]
    limit = 1.5 * max((value for value, _ in bars if value is not None), default=1)
    finish(axis, names, limit)
    for place, (value, whole) in enumerate(bars):
        if value is None:
            not_read(axis, place)
            continue
        text = number(value) + (f" = {value / whole:.2f} of VDM*" if whole else "")
        bar(axis, place, value, text, COLOURS["bar" if place % 2 else "reference"], limit)
        if whole:
            axis.vlines(
                whole * share, place - 0.47, place + 0.47, COLOURS["paper"], "--", linewidth=1.6
            )
    if any(whole for _, whole in bars):
        axis.set_xlabel(
            f"broken line: the paper's {share} of VDM*", fontsize=9, color=COLOURS["paper"]
        )


# -- kernels a step --------------------------------------------------------------------------------


def draw_launches(figures: Figures) -> Figure | None:
    """Kernels of one step: VDM*, and both networks of two phases end to end."""
    sizes = launches(figures)
    if not sizes:
        return None
    names, bars = [], []
    for size, counts in sizes.items():
        names += [f"{size}: VDM*", f"{size}: two phases"]
        bars += [(counts.get("video"), None), (counts.get("base"), counts.get("residual"))]
    figure, axis = plt.subplots(figsize=(WIDTH, 0.36 * len(names) + 1.2), layout="constrained")
    limit = 1.3 * max((first or 0) + (then or 0) for first, then in bars)
    finish(axis, names, limit)
    for place, (first, then) in enumerate(bars):
        phases = place % 2
        if first is None or (phases and then is None):
            not_read(axis, place)
            continue
        colour = COLOURS["bar" if phases else "reference"]
        text = f"{first + then:,.0f} = {first:,.0f} base + {then:,.0f} residual" if phases else ""
        bar(axis, place, first + (then or 0), text or f"{first:,.0f}", colour, limit)
        if phases:
            axis.vlines(first, place - 0.4, place + 0.4, "white", linewidth=1.5)
    axis.set_title("kernels launched in one denoising step", fontsize=10)
    return figure


DRAWINGS: dict[str, Callable[[Figures], Figure | None]] = {
    "kernels": draw_kernels,
    "table4": draw_table4,
    "launches": draw_launches,
}
