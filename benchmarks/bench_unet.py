"""UNets, a decoder and their ops on a CPU in bf16, beside diffusers, torch.compile, OpenVINO.

Networks  random weights in a folder (unet_contenders.py), read by all. First every contender's
          output is compared with diffusers' in fp32: ours may be off by 1.5 times what diffusers in
          bf16 is, else nothing is timed. Then a forward pass each, in turns, medians. "time /
          vfengine" is how many times ours is faster. The ceiling is the best of oneDNN's 3x3
          convolutions, which take their turns in the same rounds; GFLOP/s count the network's own
          convolutions, products and attention, whatever a contender really computes
Memory    of the largest network: loading it and one forward pass, each contender in a process of
          its own, above the idle process (peak_memory.py)
Ops       beside PyTorch's on the same tensors and a copy of as many bytes; ours within twice the
          error of PyTorch's in bf16 (unet_ops.py)
Clip      the default clip end to end; --before CHECKOUT takes an older vfengine's turns beside ours

    python benchmarks/bench_unet.py [--case NAME ...] [--rounds R] [--before PATH] [--json FILE]

Under pytest: the ops, and the small UNet3D in few rounds without torch.compile. Contenders whose
library (diffusers, OpenVINO) is missing are left out, and the output says so.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path

import pytest
from lib import peak_memory
from lib.clip_turns import check_before, clip_rows
from lib.harness import Contender, Row, Target, machine, say, table, write_json
from lib.unet_contenders import (
    CASES,
    COMPILED,
    EAGER,
    NO_OPENVINO,
    OPENVINO,
    OURS,
    REFERENCE,
    Case,
    OutOfMemoryError,
    convert,
    flops,
    has_openvino,
    load,
    relative_error,
    require_accuracy,
    save_network,
    weights_mib,
)
from lib.unet_ops import BASELINES, DESCRIPTIONS, OPS, SPEEDUPS, convolutions, op_rows

from vfengine.native import vfengine_native

FASTER, OF_CEILING = "time / vfengine", "of conv ceiling"
MEMORY = "peak memory / vfengine"
CEILING = "conv 3x3, the best"
CLIPS = {"clip-bf16": "bfloat16", "clip-fp32": "float32"}
ALL = (*OPS, *CASES, *CLIPS)
UNDER_PYTEST, ALL_SHORT = (*OPS, "unet3d"), True
PAUSE = 0.02  # s between turns: idle threads of one library no longer spin on the cores of the next

TARGETS = [
    *(
        Target(name, OURS, f"speedup_over_{BASELINES[name]}", value)
        for name, value in SPEEDUPS.items()
    ),
    *(
        target
        for case in CASES.values()
        for target in (
            *(Target(case.name, peer, FASTER, value) for peer, value in case.targets.items()),
            *([Target(case.name, OURS, OF_CEILING, case.of_ceiling)] if case.of_ceiling else []),
            *(Target(case.name, peer, MEMORY, 1) for peer in case.targets if case.memory),
        )
    ),
]


@dataclass
class Report:
    """The measurements, and notes on what was not measured and why."""

    rows: list[Row] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    def leave_out(self, why: str) -> None:
        """Prints a note at once, and again below the tables and in the JSON."""
        if why not in self.left_out:
            self.left_out.append(why)
            say(f"LEFT OUT: {why}")


# -- measuring -------------------------------------------------------------------------------------


def measure(
    names: Sequence[str] = ALL,
    rounds: int | None = None,
    *,
    before: str | None = None,
    without: Sequence[str] = (),
    seconds: float = 2.0,
) -> Report:
    """Every case of names. rounds: of networks and clips, None: each one's own; seconds: of an op.

    without: contenders that are left out
    """
    report = Report()
    for name in names:
        if name in OPS:
            say(f"{name}: {DESCRIPTIONS[name]}")
            report.rows += op_rows(name, seconds)
        elif name in CLIPS:
            say(f"{name}: label cartwheel, 50 steps, guidance 2")
            report.rows += clip_rows(CLIPS[name], rounds or 3, before)
            if not before:
                report.leave_out(f"{name}: an older vfengine, which --before CHECKOUT would time")
    networks = [name for name in names if name in CASES]
    if networks and not find_spec("diffusers"):
        report.leave_out(f"{', '.join(networks)}: diffusers is not installed, which draws networks")
        networks = []
    with tempfile.TemporaryDirectory() as folder:
        saved: set[str] = set()
        for name in networks:
            case, root = CASES[name], Path(folder)
            if case.network not in saved:
                say(f"drawing and saving {case.network}")
                saved.add(case.network)
                (root / case.network).mkdir()
                save_network(case.network, root / case.network)
            _measure_network(case, root, rounds or case.rounds, without, report)
    say("done")
    return report


def _measure_network(
    case: Case, root: Path, rounds: int, without: Sequence[str], report: Report
) -> None:
    say(f"{case.name}: {case.description}; {flops(case.name) / 1e9:.1f} GFLOP")
    who = [name for name in _able(case, root, report) if name not in without]
    for name in set(without) & set(case.contenders):
        report.leave_out(f"{case.name}: {name} has no part in this form of the bench")
    say(f"{case.name}: {REFERENCE}")
    exact = load(REFERENCE, case, root)().clone()
    gc.collect()
    calls, errors = {}, {}
    for name in who:
        say(f"{case.name}: loading {name}, first pass")
        calls[name] = load(name, case, root)
        errors[name] = relative_error(calls[name](), exact)
    say(f"{case.name}: errors {', '.join(f'{k} {v:.4f}' for k, v in errors.items())}")
    require_accuracy(case.name, errors, EAGER, 1.5)
    report.rows += network_rows(case, errors, _times(case, calls, rounds))
    calls.clear()
    gc.collect()
    if case.memory:
        report.rows += memory_rows(case, root, who)


def _able(case: Case, root: Path, report: Report) -> list[str]:
    """The contenders that this machine can run; OpenVINO's file is written here."""
    who = [name for name in case.contenders if name != OPENVINO]
    if OPENVINO not in case.contenders:
        return who
    if not has_openvino():
        report.leave_out(NO_OPENVINO)
        return who
    say(f"{case.name}: OpenVINO converts the network")
    try:
        convert(case, root)
    except OutOfMemoryError as error:
        report.leave_out(str(error))
        return who
    return [*who, OPENVINO]


def _times(
    case: Case, calls: Mapping[str, Contender], rounds: int
) -> tuple[dict[str, list[float]], float]:
    """Seconds of every call by rounds, and FLOP/s of the best convolution, after a warm-up."""
    probes = convolutions()
    turns = {**calls, **{name: call for name, (call, _) in probes.items()}}
    times: dict[str, list[float]] = {name: [] for name in turns}
    for index in _rounds(case.name, rounds):
        for name, call in turns.items():
            time.sleep(PAUSE)
            start = time.perf_counter()
            call()
            if index:
                times[name].append(time.perf_counter() - start)
    speeds = [count / statistics.median(times.pop(name)) for name, (_, count) in probes.items()]
    return times, max(speeds)


def _rounds(name: str, rounds: int) -> Iterator[int]:
    """0 is the warm-up; progress every ten seconds."""
    last = time.perf_counter()
    for index in range(rounds + 1):
        yield index
        if time.perf_counter() - last > 10:
            last = time.perf_counter()
            say(f"{name}: round {index} of {rounds}")


# -- rows ------------------------------------------------------------------------------------------


def network_rows(
    case: Case, errors: Mapping[str, float], measured: tuple[Mapping[str, Sequence[float]], float]
) -> list[Row]:
    """A line per contender and one of the ceiling, from seconds by rounds and its FLOP/s."""
    times, ceiling = measured
    medians = {name: statistics.median(values) for name, values in times.items()}
    work, rows = flops(case.name), []
    for name, seconds in medians.items():
        rows += [
            Row(case.name, name, "time", seconds * 1e3, "ms"),
            Row(case.name, name, FASTER, seconds / medians[OURS], "x"),
            Row(case.name, name, "arithmetic", work / seconds / 1e9, "GFLOP/s"),
            Row(case.name, name, OF_CEILING, 100 * work / seconds / ceiling, "%"),
            Row(case.name, name, "slowest / fastest", max(times[name]) / min(times[name]), ""),
            Row(case.name, name, "error", errors[name] * 1e3, "1e-3"),
        ]
    return [*rows, Row(case.name, CEILING, "arithmetic", ceiling / 1e9, "GFLOP/s")]


def memory_rows(case: Case, root: Path, who: Sequence[str]) -> list[Row]:
    """MiB above the idle process: loading and one forward pass."""
    peaks = {}
    for name in who:
        say(f"{case.name}: memory of {name}")
        arguments = {"contender": name, "case_name": case.name, "root": str(root)}
        peaks[name] = peak_memory.measure("lib.unet_contenders:probe", arguments).main
    rows = [
        Row(case.name, "weights on disk", "peak memory", weights_mib(case.network, root), "MiB")
    ]
    for name, peak in peaks.items():
        rows += [
            Row(case.name, name, "peak memory", peak, "MiB"),
            Row(case.name, name, MEMORY, peak / peaks[OURS], "x"),
        ]
    return rows


# -- targets ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verdict:
    """A target and the measured value; None: its row was left out."""

    case: str
    contender: str
    metric: str
    target: float
    measured: float | None
    unit: str = ""

    @property
    def met(self) -> bool | None:
        return None if self.measured is None else self.measured >= self.target

    def __str__(self) -> str:
        what = f"{self.case}, {self.contender}: {self.metric}"
        goal = f"(target: at least {self.target:g})"
        if self.measured is None:
            return f"{what} not measured {goal}"
        verdict = "met" if self.met else "MISSED"
        return f"{what} {self.measured:.2f} {self.unit} {goal}: {verdict}"


def judge(rows: Sequence[Row], targets: Sequence[Target] = TARGETS) -> list[Verdict]:
    """One verdict for every target of the cases that rows are about."""
    figures = {(row.case, row.contender, row.metric): row for row in rows}
    cases = {row.case for row in rows}
    verdicts = []
    for target in targets:
        if target.case in cases:
            key = target.case, target.contender, target.metric
            row = figures.get(key)
            measured, unit = (row.value, row.unit) if row else (None, "")
            verdicts.append(Verdict(*key, target.value, measured, unit))
    return verdicts


def in_words(report: Report) -> str:
    """The tables, each target with its figure, and what is missing."""
    parts = [table(report.rows), "\n".join(map(str, judge(report.rows)))]
    if report.left_out:
        parts.append("\n".join(f"left out: {why}" for why in report.left_out))
    return "\n\n".join(part for part in parts if part)


def extra(report: Report) -> dict[str, object]:
    """The entries of the JSON besides machine and rows."""
    verdicts = [asdict(verdict) | {"met": verdict.met} for verdict in judge(report.rows)]
    return {"targets": verdicts, "left_out": report.left_out}


# -- the two forms ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", UNDER_PYTEST)
def bench_unet(benchmark, capsys, name, short, seconds):
    options = {"rounds": 1 if short else 2, "without": (COMPILED,), "seconds": seconds}
    report = benchmark.pedantic(measure, args=((name,),), kwargs=options, rounds=1)
    benchmark.extra_info["rows"] = [vars(row) for row in report.rows]
    with capsys.disabled():
        print(f"\n{in_words(report)}")


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was measured there")
    parser.add_argument(
        "--case", nargs="+", choices=ALL, default=ALL, metavar="NAME", help=", ".join(ALL)
    )
    parser.add_argument("--rounds", type=int, metavar="R", help="turns of networks and clips")
    parser.add_argument(
        "--before", metavar="PATH", help="an older checkout, or PYTHONPATH, for the clips"
    )
    options = parser.parse_args(arguments)
    if options.rounds is not None and options.rounds < 1:
        parser.error(f"--rounds expects at least 1, got {options.rounds}")
    if options.before is not None:
        try:
            check_before(options.before)
        except ValueError as error:
            parser.error(str(error))
    return options


def main(arguments: Sequence[str]) -> None:
    options = parse(arguments)
    facts = machine() | {"instruction set": vfengine_native.cpu_isa()}
    print(", ".join(f"{key} {value}" for key, value in facts.items()))
    report = measure(options.case, options.rounds, before=options.before)
    print(in_words(report))
    if options.json:
        write_json(options.json, report.rows, facts, extra(report))


if __name__ == "__main__":
    main(sys.argv[1:])
