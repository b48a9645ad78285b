"""Draws bench_scale.py's figures: clips a second, price and waiting over the number of workers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from .harness import Row
from .plots import COLOURS, WIDTH, footer, save

SIMULATED, MEASURED = COLOURS["other"], COLOURS["paper"]


def draw(rows: Sequence[Row], facts: dict, file: Path) -> None:
    """Writes the plot; measured points are drawn where there are some."""
    lines: dict[str, dict[int, float]] = {}
    for row in rows:
        if row.case == "predicted":
            lines.setdefault(row.metric, {})[int(row.contender.split()[0])] = row.value
        elif row.metric == "measured":
            lines.setdefault("measured", {})[int(row.case.split()[1])] = row.value
    figure, axes = plt.subplots(1, 3, figsize=(WIDTH, 4), layout="constrained")
    _line(axes[0], lines["shared"], "shared cores", COLOURS["bar"], "-")
    _line(axes[0], lines["split"], "split", COLOURS["reference"], "--")
    _line(axes[0], lines["simulated"], "simulated", SIMULATED, "o")
    if "measured" in lines:
        _line(axes[0], lines["measured"], "measured", MEASURED, "s")
    _line(axes[1], lines["price of 1,000"], "", COLOURS["bar"], "-")
    _line(axes[2], lines["wait"], "mean", COLOURS["bar"], "-")
    _line(axes[2], lines["95 % wait"], "95 %", COLOURS["reference"], "--")
    for axis, title in zip(
        axes, ("clips a second", "price of 1,000 clips", "seconds in queues, at 80 %"), strict=True
    ):
        axis.set_title(title, fontsize=10)
        axis.set_xscale("log")
        axis.set_xlabel("workers", fontsize=9)
        axis.grid(color="#dddddd", linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_yscale("log")
    axes[1].set_ylim(0)
    axes[2].set_yscale("symlog", linthresh=0.01)
    axes[2].set_ylim(0)
    for axis in (axes[0], axes[2]):
        axis.legend(fontsize=9, frameon=False)
    text = f"seconds measured on {facts['cpu']}, one thread, load average {facts['load_average']}"
    footer(figure, text)
    save(figure, file)


def _line(axis: Axes, points: dict[int, float], label: str, colour: str, style: str) -> None:
    axis.plot(list(points), list(points.values()), style, color=colour, label=label, markersize=5)
