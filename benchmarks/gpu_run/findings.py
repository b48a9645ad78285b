"""Findings from the figures of a GPU: targets reached or missed, and a paragraph in plain English.

Like gpu_report.py, whose page holds both, it imports no torch. It therefore repeats the names of
contenders; tests/benchmarks/test_gpu_report.py compares them with those of table4_ways.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from lib import paper

from gpu_run.results import Key, Line, Results, beside

VDM, TWO_PHASE, BASE_KEPT = "VDM*, our kernels", "two-phase", "two-phase, base kept"
OVERLAPPED = "two-phase, overlapped"
OURS = {"cuda": "CUDA C++", "triton": "Triton"}
LARGE, SMALL = "64x3x512x512", "16x3x64x64"
STEP_OPS = ("path_step", "base_step", "residual_step", "decomposed_step", "remove_base")
PASSES = {"group_norm_silu": 80, "temporal_attention": 80}  # targets, % of a copy
LATENCIES = {"large, 1 clip": 0.40, "paper, 1 clip": 0.33, "default, 16 clips": 0.60}  # of VDM*'s
MEMORY = {"paper, 1 clip": 0.60}
PEERS = (  # at large: ours, its name's like, and how many times as fast as the best of those
    ("VDM*, captured", "VDM*, compiled", 1.2),
    ("diffusers UNet3D, ours, captured", "diffusers UNet3D, compiled", 1.5),
)
MEMORIES = ("reserved", "allocated", "driver")  # the first that was read: graphs' pools are in it
Figures = dict[Key, Line]


def parts(case: str) -> tuple[str, str, str]:
    """Op, variant and shape of "residual_step, guided, 64x3x512x512"; "" for what is not named."""
    op, *rest = case.split(", ")
    shape = rest.pop() if rest and re.search(r"\d+x\d+", rest[-1]) else ""
    return op, ", ".join(rest), shape


def number(value: float) -> str:
    """Three digits; counts, and what is greater, whole."""
    size = abs(value)
    if isinstance(value, int):
        return f"{value:,}"
    if size >= 1:
        return f"{value:,.{0 if size >= 100 else 1 if size >= 10 else 2}f}"
    return f"{value:.2f}" if size >= 0.1 else f"{value:.3g}"


# -- targets ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verdict:
    """A contender's target, and what it reached."""

    what: str
    contender: str
    got: float
    target: float
    unit: str
    at_most: bool = False

    @property
    def goal(self) -> str:
        return f"{'at most' if self.at_most else 'at least'} {self.target:.3g} {self.unit}"

    @property
    def reached(self) -> bool:
        return self.got <= self.target if self.at_most else self.got >= self.target

    @property
    def short(self) -> float:
        """The share that is missing."""
        return 1 - (self.target / self.got if self.at_most else self.got / self.target)

    def __str__(self) -> str:
        if self.reached:
            return f"{number(self.got)}, reached"
        return f"{number(self.got)}, **short by {max(self.short * 100, 1):.0f} %**"


def verdicts(figures: Figures) -> list[Verdict]:
    """Every target whose figures were read."""
    found: list[Verdict] = []
    for line in figures.values():
        name = OURS.get(line["contender"])
        if line["section"] == "kernels" and name:
            found += _kernel(figures, line, name)
        if line["section"] == "network_ops" and name and line["metric"] == "of copy":
            target = PASSES.get(parts(line["case"])[0])
            if target:
                found.append(Verdict(_what(line), name, line["value"], target, "% of a copy"))
    return [*found, *_shares(figures), *_captured(figures), *_peers(figures)]


def _shares(figures: Figures) -> Iterator[Verdict]:
    """Two phases against VDM*, in graphs: latency, and memory."""
    lines = [x for x in figures.values() if x["section"] == "table4" and x["graph"]]
    for line in lines:
        target = LATENCIES.get(line["case"])
        of_two = line["contender"] in (BASE_KEPT, TWO_PHASE, OVERLAPPED)
        if of_two and target and line["metric"] == "per step":
            over = ratio(figures, line)
            if over is not None:
                yield Verdict(line["case"], line["contender"], over, target, "of VDM*", True)
    for line in memory(figures):
        target, over = MEMORY.get(line["case"]), ratio(figures, line)
        if line["graph"] and target and over is not None:
            what = f"{line['case']}, memory ({line['metric']})"
            yield Verdict(what, line["contender"], over, target, "of VDM*", True)


def _captured(figures: Figures) -> Iterator[Verdict]:
    for line, plain in _steps_both_ways(figures):
        yield Verdict(
            line["case"], "captured", plain / line["value"], 4, "x the speed of plain calls"
        )


def _peers(figures: Figures) -> Iterator[Verdict]:
    """A step of ours against the best form of the compiler's that was read."""
    case = "large, 1 clip"
    times = {
        line["contender"]: line["value"]
        for line in figures.values()
        if line["section"] in ("peers", "unet3d")
        and (line["case"], line["metric"]) == (case, "per step")
    }
    for ours, peer, target in PEERS:
        theirs = [time for name, time in times.items() if name.startswith(peer)]
        if ours in times and theirs:
            speed = min(theirs) / times[ours]
            yield Verdict(case, ours, speed, target, f"x {peer}'s speed")


def _kernel(figures: Figures, line: Line, name: str) -> Iterator[Verdict]:
    op, variant, shape = parts(line["case"])
    plain, value, what = variant in ("", "plain"), line["value"], _what(line)
    if op in STEP_OPS and shape == LARGE and line["metric"] == "of copy":
        if plain:
            yield Verdict(what, name, value, 92, "% of a copy")
        if variant == "drawn" and line["dtype"] == "bf16":
            yield Verdict(what, name, value, 75, "% of a copy")
    if line["metric"] != "time":
        return
    if op in STEP_OPS and plain and shape == SMALL:
        yield Verdict(what, name, value, 2.2, "µs a node", True)
    if shape != LARGE:
        return
    if variant == "guided":
        beneath = beside(figures, line, case=f"{op}, plain, {shape}")
        if beneath:
            yield Verdict(what, name, value / beneath, 4 / 3, "of plain", True)
    peers = {"randn": 1} if op == "decomposed_noise" else {}
    if op == "residual_step" and plain:
        peers = {"eager": 5, "compiled": 1.3}
    for peer, target in peers.items():
        theirs = beside(figures, line, contender=peer)
        if theirs:
            yield Verdict(what, name, theirs / value, target, f"x {peer}'s speed")


def _what(line: Line) -> str:
    return ", ".join(filter(None, (line["case"], line["dtype"])))


def ratio(figures: Figures, line: Line) -> float | None:
    """A contender's figure over VDM*'s of the same case: as measured, or the quotient of both."""
    measured = beside(figures, line, metric=f"{line['metric']} / VDM*")
    theirs = beside(figures, line, contender=VDM)
    return measured if measured is not None else theirs and line["value"] / theirs


def two_phases(figures: Figures, section: str, metric: str) -> list[Line]:
    """The lines of two phases, one for each case, dtype and form: as shipped, else both kept."""
    found: dict[tuple, Line] = {}
    for name in (BASE_KEPT, TWO_PHASE):
        for line in figures.values():
            if (line["section"], line["contender"], line["metric"]) == (section, name, metric):
                found[line["case"], line["dtype"], line["graph"]] = line
    return list(found.values())


def _ratios(figures: Figures) -> list[tuple[Line, float]]:
    lines = two_phases(figures, "table4", "per step")
    both = [(line, ratio(figures, line)) for line in lines]
    return [(line, value) for line, value in both if value is not None]


def memory(figures: Figures) -> list[Line]:
    """Memory of two phases: of the first reading in MEMORIES that there is."""
    return next(filter(None, (two_phases(figures, "memory", name) for name in MEMORIES)), [])


# -- in words --------------------------------------------------------------------------------------


def summary(results: Results) -> str:
    """A sentence for what failed, and one for each kind of figure that was read."""
    figures = results.figures
    lines = {name: results.merged(name) for name in results.sections}
    failed = [x for x, found in lines.items() if any(y["status"] == "failed" for y in found)]
    said = [f"Failed in part: {', '.join(failed)}." if failed else "Nothing failed."]
    said += [*_latency(figures), *_memory(figures), *_kernels(figures)]
    said += [*_launches(figures), *_capture(figures)]
    found = verdicts(figures)
    if found:
        reached = sum(verdict.reached for verdict in found)
        said.append(f"Of {len(found)} targets that could be read, {reached} are reached.")
    return " ".join(said)


def _latency(figures: Figures) -> Iterator[str]:
    """A sentence on two phases over VDM*, from graphs where there are any."""
    found = {(x["case"], x["dtype"], x["graph"]): (x, over) for x, over in _ratios(figures)}
    for graph, form in ((True, "From graphs"), (False, "Without graphs")):
        said = []
        for (case, dtype, graphs), (line, over) in found.items():
            if graphs != graph or (not graph and (case, dtype, True) in found):
                continue
            more = [number(line["value"]) + f" {line['unit']}"]
            theirs = beside(figures, line, contender=VDM)
            if theirs:
                more = [f"{number(line['value'])} of {number(theirs)} {line['unit']}"]
            if graph and (case, dtype, False) in found:
                more.append(f"{found[case, dtype, False][1]:.2f} without graphs")
            of = "" if said else "of VDM*'s time a step "
            said.append(f"{over:.2f} {of}at {case} ({', '.join(more)})")
        if said:
            yield f"{form}, two phases take {'; '.join(said)}. The paper has {paper.LATENCY}."


def _memory(figures: Figures) -> Iterator[str]:
    lines = [x for x in memory(figures) if ratio(figures, x) is not None]
    graphs = any(x["graph"] for x in lines)
    said = [f"{ratio(figures, x):.2f} at {x['case']}" for x in lines if x["graph"] == graphs]
    if said:
        read = f"{lines[0]['metric']}, graphs {'on' if graphs else 'off'}"
        yield (
            f"Two phases' memory ({read}) over VDM*'s is {'; '.join(said)}. "
            f"The paper has {paper.MEMORY}."
        )


def _kernels(figures: Figures) -> Iterator[str]:
    said = []
    for contender, name in OURS.items():
        shares = []
        for line in figures.values():
            op, _, shape = parts(line["case"])
            names = line["section"], line["contender"], line["metric"]
            if names == ("kernels", contender, "of copy") and op in STEP_OPS and shape == LARGE:
                shares.append(round(line["value"]))
        if shares:
            low, high = min(shares), max(shares)
            said.append(f"{low} {f'to {high} ' * (high > low)}% in {name}")
    if said:
        yield f"The step kernels reach {' and '.join(said)} of a copy's bandwidth at {LARGE}."


def launches(figures: Figures) -> dict[str, dict[str, float]]:
    """Kernels a step of each size's networks: size -> network -> count."""
    found: dict[str, dict[str, float]] = {}
    for line in figures.values():
        names = line["section"], line["contender"], line["metric"]
        if names == ("profile", "all", "kernels") and ", " in line["case"]:
            size, network = line["case"].rsplit(", ", 1)
            found.setdefault(size, {})[network] = line["value"]
    return found


def _launches(figures: Figures) -> Iterator[str]:
    said = [
        f"{counts['base'] + counts['residual']:,.0f} kernels to {counts['video']:,.0f} at {size}"
        for size, counts in launches(figures).items()
        if {"base", "residual", "video"} <= set(counts)
    ]
    if said:
        yield f"A step of two phases against one of VDM* is {_listed(said)}."


def _capture(figures: Figures) -> Iterator[str]:
    for line, plain in _steps_both_ways(figures):
        yield (
            f"A step ({line['case']}) takes {number(line['value'])} {line['unit']} captured "
            f"and {number(plain)} when its kernels are launched one by one."
        )


def _steps_both_ways(figures: Figures) -> Iterator[tuple[Line, float]]:
    """Captured steps, and the time of those whose kernels are launched one by one."""
    for line in figures.values():
        names = line["section"], line["contender"], line["metric"]
        if names != ("capture", "captured", "per step"):
            continue
        plain = beside(figures, line, contender="plain", graph=False)
        if plain is None:
            plain = beside(figures, line, contender="plain")
        if plain is not None:
            yield line, plain


def _listed(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
