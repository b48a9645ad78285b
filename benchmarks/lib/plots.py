"""Shared code of the plots of report.py and gpu_run: size, colours, bars, the paper's marks."""

from __future__ import annotations

import os
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # draws without a display

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

WIDTH = 10  # inches, of 100 pixels
COLOURS = {"bar": "#4477aa", "other": "#ccbb44", "reference": "#888888", "paper": "#cc3311"}


def bar(
    axis: Axes,
    place: float,
    value: float,
    text: str,
    colour: str,
    limit: float,
    height: float = 0.8,
) -> None:
    """A horizontal bar with its text at its end; one longer than `limit` is cut, and says so."""
    axis.barh(place, min(value, limit), height, color=colour)
    inside = value > 0.85 * limit
    axis.text(
        min(value, limit) + (-0.015 if inside else 0.015) * limit,
        place,
        text + (" (bar cut)" if value > limit else ""),
        ha="right" if inside else "left",
        va="center",
        fontsize=9,
        color="white" if inside and colour != COLOURS["other"] else "black",
        bbox=None if inside else {"facecolor": "white", "edgecolor": "none", "pad": 1},
    )


def not_read(axis: Axes, place: float) -> None:
    """A text in place of a bar."""
    end = axis.get_xlim()[1]
    axis.text(0.015 * end, place, "not read", va="center", fontsize=9, color="#666666")


def finish(axis: Axes, names: list[str], limit: float, top: float = -0.6) -> None:
    """Names beside the bars, the first on top, and an axis from 0 to `limit`."""
    axis.set_yticks(range(len(names)), names, fontsize=9)
    axis.set_ylim(len(names) - 0.4, top)
    axis.set_xlim(0, limit)
    axis.tick_params(axis="x", labelsize=9)
    axis.spines[["top", "right"]].set_visible(False)


def mark(axis: Axes, value: float, text: str) -> None:
    """A broken line across the panel, its text above the first bar."""
    axis.axvline(value, color=COLOURS["paper"], linewidth=1.2, linestyle="--")
    place = value + 0.015 * axis.get_xlim()[1]
    axis.text(place, -0.62, text, color=COLOURS["paper"], fontsize=9, va="bottom")


def headline(axis: Axes, text: str) -> None:
    """Above a row of panels, at the figure's left edge; `axis` is the row's first."""
    axis.annotate(
        text,
        (0.01, 1),
        (0, 20),
        ("figure fraction", "axes fraction"),
        "offset points",
        fontsize=11,
        weight="bold",
        va="bottom",
    )


def footer(figure: Figure, text: str) -> None:
    """The machine of the figures, under the panels."""
    figure.supxlabel(text, fontsize=9, color="#444444", x=0.99, ha="right")


def save(figure: Figure, path: Path) -> None:
    """Writes under another name first, so that no reader sees half a plot."""
    temporary = path.with_name(f".{path.name}.tmp")
    figure.savefig(temporary, format="png", dpi=100, facecolor="white")
    plt.close(figure)
    os.replace(temporary, path)
