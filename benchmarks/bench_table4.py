"""VideoFusion against VDM* on the same work in one run: the paper's Table 4, its parts, its growth.

The paper reports, against its own video diffusion model made of the base network (VDM*): memory
63.82 -> 49.85 GB (0.781), latency 0.40 -> 0.17 s (0.425). Its hardware, batch and resolution are
not known; ours are in the names of the cases, sizes and networks in table4_models.py.

Latency  contenders take turns, a clip each; networks are loaded and warm. "per clip" is the median
         over rounds, "per step" that over the clip's steps: for two phases one base step (an image)
         and one residual step (all frames). Of K = 8 clips on one base path, a clip's share.
         "slowest / fastest" of the rounds tells how much else the machine was doing
Memory   each contender in a process of its own (peak_memory.py): networks, states and all that runs
         them, above the idle process; a clip of a few steps, which take turns in the same memory.
         Freeing the base weights between phases shows here, not in latency, which has no loading
Training forward, backward, AdamW: bf16 autocast over fp32 weights, 1 clip; VideoFusion the joint
         loss of both networks (no further images), VDM* its ε loss. Median seconds of a step
Ratios   "/ VDM*" is over VDM* as our pipeline would run it, on a CPU as a plan
Forms    the script takes every size, clips of many steps and the growth, in some six minutes; slow
         peers take one turn. Under pytest fewer steps and rounds, within a minute each where a
         machine is slow; with --short the tiny size

`python benchmarks/report.py` draws the JSON that this writes.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

import torch
from lib import peak_memory
from lib.clips import DEVICE
from lib.harness import Row, Target, main, say, table, verdicts, write_json
from lib.table4_models import SHARING, Networks, flops, make_noise, size, skeleton
from lib.table4_ways import (
    BASE_KEPT,
    CALLS,
    CONTENDERS,
    INTERLEAVED,
    OVERLAPPED,
    PEER,
    PLAIN,
    SHARED,
    TWO_PHASE,
    VDM,
    training_step,
)

REDUCED_JSON = Path(__file__).parent.parent / "build" / "table4-reduced.json"
OURS = tuple(name for name in CONTENDERS if name != PEER)
ABLATION = {  # each line's own contribution: label -> contender
    PLAIN: PLAIN,
    "+ our plan (CPU) and step kernel": VDM,
    "decomposed, interleaved": INTERLEAVED,
    "in two phases": BASE_KEPT,
    "+ base weights released": TWO_PHASE,
    "+ overlapped (both resident)": OVERLAPPED,
    f"K = {SHARING} on one base, released": SHARED,
}
LATENCY, MEMORY, ARITHMETIC = "per step / VDM*", "memory / VDM*", "FLOPs / VDM*"
OVER_PEER = "per step / diffusers"


@dataclass(frozen=True)
class Plan:
    """The measurements of one size.

    contenders     that take turns in making a clip of `steps` steps, `rounds` times
    once           those that take one turn, not warmed up, because they are slow
    seconds        no further round is begun once so many have gone by
    memory         those whose peak memory is read, over clips of `memory_steps` steps
    training       rounds of a training step; 0: neither time nor memory of it
    """

    size: str
    steps: int
    rounds: int
    contenders: Sequence[str] = OURS
    once: Sequence[str] = ()
    memory: Sequence[str] = OURS
    memory_steps: int = 4
    training: int = 0
    dtype: str = "bfloat16"
    seconds: float = math.inf

    @property
    def case(self) -> str:
        """The size, its clip, dtype and steps: the name of a table."""
        shape = size(self.size)
        clip = f"{shape.frames}x3x{shape.pixels}x{shape.pixels}"
        steps = f"{self.steps} step{'s' if self.steps > 1 else ''}"
        return f"{self.size}, {clip}, {self.dtype}, {steps}"


FULL = (
    Plan("default", steps=50, rounds=3, training=5),
    Plan("large", 1, 3, (*OURS, PEER), (PEER, PLAIN), (*OURS, PEER), memory_steps=1, training=1),
    Plan("default", 10, 3, (PLAIN, VDM, INTERLEAVED, TWO_PHASE), memory=(), dtype="float32"),
)
REDUCED = (
    Plan("default", steps=5, rounds=2, training=1, memory_steps=2, seconds=60),
    Plan(
        "large",
        1,
        1,
        (VDM, INTERLEAVED, TWO_PHASE, PEER),
        memory=(VDM, INTERLEAVED, TWO_PHASE),
        memory_steps=1,
        seconds=60,
    ),
)
LEAST = (Plan("tiny", 2, 1, (*OURS, PEER), memory=(), training=1),)  # the growth reads memory
LEAST_GROWTH = (2, 4)
GROWTH = (8, 16, 32, 64, 128)  # frames

TARGETS = [
    target
    for case in dict.fromkeys(plan.case for plan in (*FULL, *REDUCED) if plan.dtype == "bfloat16")
    for target in (
        Target(case, TWO_PHASE, LATENCY, 0.38, at_most=True),
        Target(case, TWO_PHASE, MEMORY, 0.60, at_most=True),
        Target(case, TWO_PHASE, OVER_PEER, 0.25, at_most=True),
    )
]


def measure(
    plans: Sequence[Plan] = FULL, growth: Sequence[int] = GROWTH, growth_size: str = "default"
) -> list[Row]:
    """Every table of the plans, then the growth with the number of frames (none: left out)."""
    rows, plans = [], [_able(plan) for plan in plans]
    for name in dict.fromkeys(plan.size for plan in plans):
        with_peer = any(PEER in plan.contenders for plan in plans if plan.size == name)
        rows += weights(name, with_peer)
    for plan in plans:
        say(f"{plan.case}: latency")
        times = clip_seconds(plan)
        say(f"{plan.case}: memory" + (" and training" if plan.training else ""))
        peaks = {name: sampling_peak(plan, name) for name in plan.memory}
        rows += [*comparison(plan, times, peaks), *ablation(plan, times, peaks)]
        rows += training(plan) if plan.training else []
    if growth:
        say("growth with the number of frames")
        rows += growing(growth, growth_size)
    say("done")
    return rows


def _able(plan: Plan) -> Plan:
    """The plan without the peer where diffusers is missing."""
    if find_spec("diffusers") or PEER not in (*plan.contenders, *plan.memory):
        return plan
    say(f"LEFT OUT: {plan.case}: {PEER}, which needs pip install diffusers")
    contenders, memory = (
        tuple(name for name in names if name != PEER) for names in (plan.contenders, plan.memory)
    )
    return replace(plan, contenders=contenders, memory=memory)


# -- what is counted -------------------------------------------------------------------------------


def weights(size_name: str, with_peer: bool) -> list[Row]:
    rows, case = [], f"{size_name}, networks"
    for network in ("base", "residual", "video", *(["peer"] if with_peer else [])):
        name = {"video": "VDM*", "peer": PEER}.get(network, network)
        model = skeleton(size(size_name), network, torch.bfloat16)
        parameters = sum(p.numel() for p in model.parameters())
        rows.append(Row(case, name, "parameters", parameters / 1e6, "M"))
        rows.append(Row(case, name, "a call", flops(size_name, network) / 1e9, "GFLOP"))
    return rows


# -- what is measured ------------------------------------------------------------------------------


def clip_seconds(plan: Plan) -> dict[str, list[float]]:
    """Seconds a clip, by rounds; for SHARED those of all K clips over K."""
    shape = size(plan.size)
    networks = Networks(shape, DEVICE, getattr(torch, plan.dtype), keep=True)
    noise = make_noise(shape, DEVICE)

    def call(name: str, steps: int) -> Callable[[], object]:
        return lambda: CONTENDERS[name](networks, noise, steps)

    for name in plan.contenders:
        if name not in plan.once:
            call(name, 1)()
    calls = {name: call(name, plan.steps) for name in plan.contenders}
    times = take_turns(calls, plan.rounds, plan.seconds, plan.once)
    if SHARED in times:
        times[SHARED] = [value / SHARING for value in times[SHARED]]
    return times


def take_turns(
    contenders: Mapping[str, Callable[[], object]],
    rounds: int,
    seconds: float = math.inf,
    once: Sequence[str] = (),
) -> dict[str, list[float]]:
    """`harness.interleave` for calls that take seconds, warmed up by the caller.

    seconds: no further round is begun once so many have gone by
    once:    those that take no further turn after the first round
    """
    times: dict[str, list[float]] = {name: [] for name in contenders}
    end = time.perf_counter() + seconds
    for index in range(rounds):
        if index and time.perf_counter() > end:
            break
        for name, contender in contenders.items():
            if index and name in once:
                continue
            start = _now()
            contender()
            times[name].append(_now() - start)
    return times


def medians(times: Mapping[str, Sequence[float]]) -> dict[str, float]:
    return {name: statistics.median(values) for name, values in times.items()}


def _now() -> float:
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def sampling_peak(plan: Plan, contender: str, frames: int | None = None) -> float:
    """MiB above the idle process."""
    arguments = {
        "contender": contender,
        "size_name": plan.size,
        "dtype": plan.dtype,
        "device": DEVICE,
        "steps": plan.memory_steps,
        "frames": frames,
    }
    return peak_memory.measure("lib.table4_ways:sampling_probe", arguments, DEVICE).main


def training(plan: Plan) -> list[Row]:
    """Seconds and peak memory of a training step, of VDM* and of VideoFusion."""
    case = f"{plan.case.rsplit(', ', 2)[0]}, a training step"
    ways = {"VDM*": False, "VideoFusion": True}
    noise, steps = make_noise(size(plan.size), DEVICE), {}
    for name, decomposed in ways.items():
        networks = Networks(size(plan.size), DEVICE, torch.float32, keep=True, trained=True)
        steps[name] = training_step(networks, noise, decomposed)
        if plan.training > 1:  # a single round of slow steps is not warmed up
            steps[name]()
    times = take_turns(steps, plan.training, plan.seconds)
    steps.clear()
    rows, peaks, seconds = [], {}, medians(times)
    for name, decomposed in ways.items():
        arguments = {"decomposed": decomposed, "size_name": plan.size, "device": DEVICE}
        peaks[name] = peak_memory.measure("lib.table4_ways:training_probe", arguments, DEVICE).main
        rows += [
            Row(case, name, "time", seconds[name], "s"),
            Row(case, name, "slowest / fastest", max(times[name]) / min(times[name]), ""),
            Row(case, name, "time / VDM*", seconds[name] / seconds["VDM*"], ""),
            Row(case, name, "peak memory", peaks[name], "MiB"),
            Row(case, name, MEMORY, peaks[name] / peaks["VDM*"], ""),
        ]
    return rows


# -- tables ----------------------------------------------------------------------------------------


def comparison(
    plan: Plan, times: Mapping[str, Sequence[float]], peaks: Mapping[str, float]
) -> list[Row]:
    """Table 4: every contender beside VDM* and, where it ran, diffusers' network."""
    seconds = medians(times)
    counted = {network: flops(plan.size, network) for network in ("base", "residual", "video")}
    if PEER in plan.contenders:
        counted["peer"] = flops(plan.size, "peer")
    rows = []
    for name, value in seconds.items():
        arithmetic = sum(share * counted[network] for network, share in CALLS[name].items())
        rows += [
            Row(plan.case, name, "per step", value / plan.steps * 1e3, "ms"),
            Row(plan.case, name, "per clip", value, "s"),
            Row(plan.case, name, "slowest / fastest", max(times[name]) / min(times[name]), ""),
            Row(plan.case, name, LATENCY, value / seconds[VDM], ""),
        ]
        if PEER in seconds:
            rows.append(Row(plan.case, name, OVER_PEER, value / seconds[PEER], ""))
        rows.append(Row(plan.case, name, ARITHMETIC, arithmetic / counted["video"], ""))
        if name in peaks:
            rows.append(Row(plan.case, name, "peak memory", peaks[name], "MiB"))
            rows.append(Row(plan.case, name, MEMORY, peaks[name] / peaks[VDM], ""))
    return rows


def ablation(
    plan: Plan, times: Mapping[str, Sequence[float]], peaks: Mapping[str, float]
) -> list[Row]:
    """One line a mechanism, with its ratio to the line before and to VDM*; needs all contenders."""
    seconds = medians(times)
    if not set(ABLATION.values()) <= seconds.keys() & peaks.keys():
        return []
    rows, case, before = [], f"{plan.case}: what each part adds", PLAIN
    for label, name in ABLATION.items():
        rows += [
            Row(case, label, "per step", seconds[name] / plan.steps * 1e3, "ms"),
            Row(case, label, "per clip", seconds[name], "s"),
            Row(case, label, "time / line before", seconds[name] / seconds[before], ""),
            Row(case, label, "time / VDM*", seconds[name] / seconds[VDM], ""),
            Row(case, label, "peak memory", peaks[name], "MiB"),
            Row(case, label, "memory / line before", peaks[name] / peaks[before], ""),
            Row(case, label, MEMORY, peaks[name] / peaks[VDM], ""),
        ]
        before = name
    return rows


# -- growth ----------------------------------------------------------------------------------------


def growing(frames: Sequence[int], size_name: str, steps: int = 4, rounds: int = 3) -> list[Row]:
    """Per step and peak memory by number of frames, and the exponent p of a fit c N^p to them."""
    plan = Plan(size_name, steps, rounds, memory_steps=2)
    networks = Networks(size(size_name), DEVICE, getattr(torch, plan.dtype), keep=True)
    names = (VDM, TWO_PHASE)
    times: dict[str, list[float]] = {name: [] for name in names}
    peaks: dict[str, list[float]] = {name: [] for name in names}
    for count in frames:
        noise = make_noise(size(size_name), DEVICE, count, clips=1)
        calls = {n: lambda n=n, noise=noise: CONTENDERS[n](networks, noise, steps) for n in names}
        for call in calls.values():
            call()
        for name, value in medians(take_turns(calls, rounds)).items():
            times[name].append(value / steps * 1e3)
            peaks[name].append(sampling_peak(plan, name, count))
    rows = []
    for what, unit, values in (("per step", "ms", times), ("peak memory", "MiB", peaks)):
        case = f"{size_name}, growth: {what}"
        for name in names:
            rows += [
                Row(case, name, f"N = {count}", value, unit)
                for count, value in zip(frames, values[name], strict=True)
            ]
            rows.append(Row(case, name, "exponent", exponent(frames, values[name]), ""))
    return rows


def exponent(x: Sequence[float], y: Sequence[float]) -> float:
    """The slope of the least-squares line through (log x, log y): p of y = c x^p."""
    return statistics.linear_regression(list(map(math.log, x)), list(map(math.log, y))).slope


def bench_table4(benchmark, capsys, short):
    arguments = {"plans": REDUCED, "growth": ()}
    if short:
        arguments = {"plans": LEAST, "growth": LEAST_GROWTH, "growth_size": "tiny"}
    rows = benchmark.pedantic(measure, kwargs=arguments, rounds=1)
    benchmark.extra_info["rows"] = [vars(row) for row in rows]
    if short:
        return
    REDUCED_JSON.parent.mkdir(exist_ok=True)
    write_json(REDUCED_JSON, rows)
    with capsys.disabled():
        print(f"\n{table(rows)}\n{verdicts(rows, TARGETS)}\nwritten to {REDUCED_JSON}")


def training_alone() -> list[Row]:
    """The rows of training steps, each warmed up."""
    plans = (Plan("default", steps=50, rounds=3, training=5), Plan("large", 1, 3, training=3))
    return [row for plan in plans for row in training(plan)]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--training", action="store_true", help="training steps, and nothing else")
    alone = parser.parse_known_args()[0].training
    main(training_alone if alone else measure, __doc__, () if alone else TARGETS, parser)
