"""The time of a step on a GPU, predicted from counts that need none, beside what was measured.

    seconds = kernels x NODE + FLOP / rate + bytes / bandwidth

kernels    that one captured step launches; FLOP and bytes of them: lib/step_costs.py counts them on
           fake CUDA tensors, count_steps.py writes them to docs/gpu-counts.json
NODE       what a node of a CUDA graph costs beside its work
rate       of the card's bf16 matrix product, 8192 a side: its "ceilings" in gpu.jsonl
bandwidth  of its copy of 2 GiB, likewise

The terms are added, as if none overlapped. No product or copy of a network reaches the ceilings,
and caches spare bytes; the two errors are of opposite sign. Like gpu_report.py it imports no torch.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from gpu_run.findings import VDM, number, two_phases
from gpu_run.results import Line, Results
from gpu_run.tables import rows, sentence

NODE = 4.7e-6  # s; 2.0 was assumed before a first run took 1.29 ms for 261 small kernels
NOT_YET = "not yet run"
NAMES = {"base": "base", "residual": "residual", "video": "VDM*"}
NETWORKS = {name: network for network, name in NAMES.items()}
TWO_PHASES = "two phases"
HEAD = ("", "", "kernels", "GFLOP", "GB", "nodes", "arithmetic", "bytes", "predicted", "of VDM*")


@dataclass(frozen=True)
class Counts:
    """One step: kernels, FLOPs, bytes."""

    kernels: int
    flops: int
    bytes: int

    def __add__(self, other: Counts) -> Counts:
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return Counts(*(a + b for a, b in pairs))


@dataclass(frozen=True)
class Ceilings:
    """FLOP/s and bytes/s of a card."""

    rate: float
    bandwidth: float

    def terms(self, counts: Counts) -> tuple[float, float, float]:
        """Seconds of the nodes, of the arithmetic and of the bytes."""
        return (
            counts.kernels * NODE,
            counts.flops / self.rate,
            counts.bytes / self.bandwidth,
        )


@dataclass(frozen=True)
class Counted:
    """The commit that was counted, and size -> network -> counts."""

    commit: str
    sizes: dict[str, dict[str, Counts]]


NOTHING = Counted("", {})


def read(file: Path) -> Counted:
    """What count_steps.py wrote; no file is no counts."""
    if not file.exists():
        return NOTHING
    found = json.loads(file.read_text())
    sizes = {
        size: {name: Counts(**counts) for name, counts in networks.items()}
        for size, networks in found["sizes"].items()
    }
    return Counted(found["commit"], sizes)


def ceilings(results: Results) -> Ceilings | None:
    """Of this card, where both were measured."""
    read = {
        (line["case"], line["metric"]): line["value"]
        for line in results.figures.values()
        if line["section"] == "ceilings"
    }
    rate = read.get(("matmul 8192 bf16", "rate"))
    bandwidth = read.get(("copy 2 GiB", "bandwidth"))
    return rate and bandwidth and Ceilings(rate * 1e12, bandwidth * 1e9)


def chapter(results: Results, counted: Counted) -> list[str]:
    """Heading, formula and table; nothing without counts or the card's ceilings."""
    card = ceilings(results)
    if not counted.sizes or not card:
        return []
    places = enumerate(results.runs, 1)
    runs = {run.id: [str(run.head.get("commit", "")), str(place)] for place, run in places}
    body = []
    for size, networks in counted.sizes.items():
        steps = {NAMES[name]: counts for name, counts in networks.items()}
        steps[TWO_PHASES] = networks["base"] + networks["residual"]
        whole = sum(card.terms(networks["video"]))
        for place, (name, counts) in enumerate(steps.items()):
            share = f"{sum(card.terms(counts)) / whole:.2f}" if name == TWO_PHASES else ""
            measured = _read(_measured(results, size, name), runs)
            body.append(["" if place else size, name, *_cells(counts, card), share, *measured])
    words = (
        f"A captured step, one clip, bf16: predicted = kernels x {NODE * 1e6:.1f} µs + FLOP / "
        f"{card.rate / 1e12:,.0f} TFLOP/s + bytes / {card.bandwidth / 1e9:,.0f} GB/s, the ceilings "
        "below. Kernels, FLOP and bytes are counted on fake CUDA tensors at commit "
        f"{sentence(counted.commit)}; measured figures are of the commit beside them, which may "
        "launch others. Of two phases and VDM*, measured is a step of the loop; of base and "
        "residual, the time of its kernels."
    )
    return [
        "### Predicted and measured",
        words,
        rows([*HEAD, "measured", "commit", "run"], body),
    ]


def _cells(counts: Counts, card: Ceilings) -> list[str]:
    terms = card.terms(counts)
    return [
        f"{counts.kernels:,}",
        number(counts.flops / 1e9),
        number(counts.bytes / 1e9),
        *(f"{number(seconds * 1e3)} ms" for seconds in (*terms, sum(terms))),
    ]


def _read(line: Line | None, runs: dict[str, list[str]]) -> list[str]:
    """The figure, and the commit and place of its run."""
    if line is None:
        return [NOT_YET, "", ""]
    unit = {"ms": 1.0, "us": 1e-3}[line["unit"]]
    return [f"{number(line['value'] * unit)} ms", *runs[line["run"]]]


def _measured(results: Results, size: str, name: str) -> Line | None:
    """The latest figure of this step, replayed from a graph."""
    figures, case = results.figures, f"{size}, 1 clip"
    if name == TWO_PHASES:
        lines = two_phases(figures, "table4", "per step")
        return next((x for x in lines if x["case"] == case and x["graph"]), None)
    if name == NAMES["video"]:
        wanted = ("table4", case, VDM, "per step")
    else:
        wanted = ("profile", f"{size}, {name}", "all", "time")
    keys = ("section", "case", "contender", "metric")
    found = (x for x in figures.values() if tuple(x[key] for key in keys) == wanted)
    return next((x for x in found if x["graph"]), None)
