"""One way to measure: contenders take turns in one run, beside a ceiling measured in the same run.

A bench file builds its contenders, checks their results, and calls `compare`. It runs as a script,
`python benchmarks/bench_<x>.py [--json FILE]`, and under `pytest benchmarks/ --benchmark-only`.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

Contender = Callable[[], object]


@dataclass(frozen=True)
class Row:
    """One figure: `contender` on `case`."""

    case: str
    contender: str
    metric: str
    value: float
    unit: str


@dataclass(frozen=True)
class Target:
    """A target for a figure: at least `value`, or with at_most, no more than it."""

    case: str
    contender: str
    metric: str
    value: float
    at_most: bool = False


def machine() -> dict[str, object]:
    """The machine of the figures; load_average tells a quiet machine from a busy one."""
    import vfengine  # here, so that a GPU's ceilings can be read while the package is built

    facts = {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 2),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "vfengine": vfengine.__version__,
    }
    if torch.cuda.is_available():
        facts |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    return facts


@dataclass(frozen=True)
class Times:
    """Seconds a call of one contender, one value a round."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def spread(self) -> float:
        """(max - min) / median."""
        return (max(self.values) - min(self.values)) / self.median


def interleave(
    contenders: dict[str, Contender], seconds: float = 2.0, device: str = "cpu"
) -> dict[str, float]:
    """Median seconds a call, the contenders taking turns so that a busy moment hits all alike.

    Every contender is called twice unmeasured, then at least 5 and at most 2,000 rounds are run.
    On CUDA a turn is the replay of a graph of many calls: what is timed are kernels, not Python.
    """
    return {name: times.median for name, times in timed_turns(contenders, seconds, device).items()}


def timed_turns(
    contenders: dict[str, Contender], seconds: float = 2.0, device: str = "cpu"
) -> dict[str, Times]:
    """As `interleave`, but every round's seconds."""
    if device == "cuda":
        clocks = {name: _graph_clock(contender) for name, contender in contenders.items()}
    else:
        for contender in contenders.values():
            contender()
            contender()
        clocks = {name: lambda call=call: _cpu_clock(call) for name, call in contenders.items()}
    times: dict[str, list[float]] = {name: [] for name in contenders}
    end = time.perf_counter() + seconds
    rounds = 0
    while rounds < 5 or (rounds < 2000 and time.perf_counter() < end):
        for name, clock in clocks.items():
            times[name].append(clock())
        rounds += 1
    return {name: Times(tuple(values)) for name, values in times.items()}


def warm_microseconds(
    contenders: dict[str, Contender], calls: int = 100, rounds: int = 200
) -> dict[str, float]:
    """Median microseconds a call with warm caches: contenders take turns of `calls` calls in a row.

    A tenth as many calls before each turn go unmeasured.
    """
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, contender in contenders.items():
            for _ in range(calls // 10):
                contender()
            start = time.perf_counter()
            for _ in range(calls):
                contender()
            times[name].append((time.perf_counter() - start) / calls)
    return {name: statistics.median(values) * 1e6 for name, values in times.items()}


def compare(
    case: str,
    contenders: dict[str, Contender],
    moved_bytes: int,
    *,
    baseline: str,
    device: str = "cpu",
    seconds: float = 2.0,
) -> list[Row]:
    """Time, GB/s, share of a copy's GB/s and speed-up over `baseline`, for each contender.

    moved_bytes: what the op must read and write. The ceiling is a copy that moves as many, so that
                 it sits in the same level of cache; it takes its turn among the contenders.
    """
    source = torch.empty(max(moved_bytes // 2, 1), dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)
    medians = interleave(
        {**contenders, "copy": lambda: target.copy_(source)}, seconds=seconds, device=device
    )
    rows = []
    for name, median in medians.items():
        rows += [
            Row(case, name, "time", median * 1e6, "us"),
            Row(case, name, "bandwidth", moved_bytes / median / 1e9, "GB/s"),
            Row(case, name, "of_copy", 100 * medians["copy"] / median, "%"),
            Row(case, name, f"speedup_over_{baseline}", medians[baseline] / median, "x"),
        ]
    return rows


def say(what: str) -> None:
    """Prints progress, and how busy the machine was, by its load average over the last minute."""
    load = os.getloadavg()[0]
    print(f"{time.strftime('%H:%M:%S')} load average {load:.2f}; {what}", file=sys.stderr)


def table(rows: Sequence[Row]) -> str:
    """A table per case: a line per contender, a column per metric."""
    cases = dict.fromkeys(row.case for row in rows)
    return "\n\n".join(_table([row for row in rows if row.case == case]) for case in cases)


def _table(rows: Sequence[Row]) -> str:
    lines: dict[str, dict[str, str]] = {}
    for row in rows:
        lines.setdefault(row.contender, {})[row.metric] = f"{row.value:,.2f} {row.unit}"
    metrics = list(dict.fromkeys(row.metric for row in rows))
    body = [[rows[0].case, *metrics]]
    body += [
        [name, *(cells.get(metric, "") for metric in metrics)] for name, cells in lines.items()
    ]
    widths = [max(map(len, column)) for column in zip(*body, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        for line in body
    )


def verdicts(rows: Sequence[Row], targets: Sequence[Target]) -> str:
    """A line per target: the target, what was measured, and how much is missing."""
    figures = {(row.case, row.contender, row.metric): row for row in rows}
    lines = []
    for target in targets:
        row = figures.get((target.case, target.contender, target.metric))
        if row is None:
            continue
        goal = f"{'at most' if target.at_most else 'at least'} {target.value:,.2f} {row.unit}"
        low, high = sorted((row.value, target.value))
        reached = target.value == (high if target.at_most else low)
        missing = (high - low) / abs(high) if high else 0.0
        verdict = "reached" if reached else f"SHORT by {missing:.0%}"
        what = f"{target.case}, {target.contender}: {target.metric}"
        lines.append(f"{what} {row.value:,.2f} {row.unit}, {goal}: {verdict}")
    return "\n".join(lines)


def main(
    measure: Callable[[], list[Row]],
    description: str | None,
    targets: Sequence[Target] = (),
    parser: argparse.ArgumentParser | None = None,
) -> None:
    """The script form of a bench file: print a table and verdicts, and write --json FILE.

    parser: has the bench's own arguments, and no help
    """
    parents = [parser] if parser else []
    parser = argparse.ArgumentParser(
        description=(description or "").splitlines()[0], parents=parents
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write machine and rows there")
    arguments = parser.parse_args()
    facts = machine()
    print(", ".join(f"{key} {value}" for key, value in facts.items()))
    rows = measure()
    print(table(rows))
    print(verdicts(rows, targets))
    if arguments.json:
        write_json(arguments.json, rows, facts)


def write_json(
    file: Path,
    rows: Sequence[Row],
    facts: dict[str, object] | None = None,
    extra: dict[str, object] | None = None,
) -> None:
    """Writes {"machine": {...}, "rows": [{...}, ...]}; facts: of `machine`, None: read now.

    extra: further entries of the object
    """
    report = {"machine": facts or machine(), "rows": [asdict(row) for row in rows]}
    file.write_text(json.dumps(report | (extra or {}), indent=1) + "\n")


def _cpu_clock(contender: Contender) -> float:
    start = time.perf_counter()
    contender()
    return time.perf_counter() - start


def _graph_clock(contender: Contender) -> Callable[[], float]:
    """Captures as many calls as take a millisecond, 64 at most; a replay's seconds a call.

    A contender may use other buffers at every call: the graph holds all of its calls.
    """
    one = _replay_seconds(_capture(contender, 1))
    calls = max(1, min(64, round(1e-3 / max(one, 1e-7))))
    graph = _capture(contender, calls)
    _replay_seconds(graph)
    return lambda: _replay_seconds(graph) / calls


def _capture(contender: Contender, calls: int) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        contender()
        contender()
    torch.cuda.current_stream().wait_stream(stream)
    inference = torch.is_inference_mode_enabled()
    graph = torch.cuda.CUDAGraph()
    # A capture begun in inference mode would leave torch's random generators in it.
    with (
        torch.inference_mode(False),
        torch.cuda.graph(graph, stream=stream),
        torch.inference_mode(inference),
    ):
        for _ in range(calls):
            contender()
    return graph


def _replay_seconds(graph: torch.cuda.CUDAGraph) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
