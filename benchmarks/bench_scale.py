"""Clips a second and their cost on 1 to 1,000 workers: a formula, a simulation, and two nodes.

A worker is a core. Measured, of the shipped model on one core, warm:

    b  seconds of a clip's base phase, with the text encoder
    r  seconds of its residual phase, with decoding and the writing of its file
    d  seconds of the driver for a clip: its line checked, sent, received, written and told
    p, f, o  bytes of its base path, of its file, and of what the driver sends for it

Predicted, for W workers, links of `worker` and `driver` bytes a second:

    shared  X = min( W / (b + r),  1 / d,  driver / (f + o),  W worker / (p + f) )
    split   X = min( B / b,  (W - B) / r,  …  )    with the best number B of base workers

`shared` is what --ray does: a base worker and a residual worker share a core, which none of them
leaves idle. `split` has a core, or a GPU, for one network alone. The price of a clip is
W × price / (3600 X). Waiting is simulated (lib/queueing.py): clips arrive at random, at `LOAD`
times X, and workers may be lost.

    python benchmarks/bench_scale.py --json docs/scale.json --plot docs/scale.png
    python benchmarks/bench_scale.py --check     # and the first points, on local nodes of one core
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from lib.harness import Row, machine, say, table, write_json
from lib.queueing import Outcome, Stage, simulate
from lib.scale_costs import AHEAD, Measured, local_cluster, measure, read_measured
from lib.scale_plot import draw

WORKERS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1000)
PATIENCE = 900.0  # seconds for a command of --check
LOAD = 0.8  # of the predicted rate, at which clips arrive where waiting is simulated


@dataclass(frozen=True)
class Place:
    """What workers cost and how they are connected.

    price:         of an hour of a worker
    worker_gbit, driver_gbit: of their links, in Gbit/s
    hours_to_loss: mean hours of work until a worker is lost; restart: seconds until it is back
    """

    price: float = 0.10
    worker_gbit: float = 1.0
    driver_gbit: float = 10.0
    hours_to_loss: float = math.inf
    restart: float = 10.0


@dataclass(frozen=True)
class Predicted:
    """For a number of workers.

    shared, split: clips a second; base_workers: of the split, which one worker has not
    limit:         of `shared`
    cost:          of a clip, of `shared`
    """

    workers: int
    shared: float
    limit: str
    cost: float
    base_workers: int
    split: float


# -- the formula -----------------------------------------------------------------------------------


def best_split(measured: Measured, workers: int) -> int:
    """The number of base workers with which the slower kind is fastest."""
    b, r = measured.base, measured.residual
    near = math.floor(workers * b / (b + r))
    choices = sorted({min(max(count, 1), workers - 1) for count in (near, near + 1)})
    return max(choices, key=lambda count: min(count / b, (workers - count) / r))


def predict(measured: Measured, workers: int, place: Place) -> Predicted:
    m, worker_link = measured, place.worker_gbit * 1e9 / 8
    common = {
        "driver": 1 / m.driver,
        "driver's link": place.driver_gbit * 1e9 / 8 / (m.clip_bytes + m.order_bytes),
        "workers' links": workers * worker_link / (m.path_bytes + m.clip_bytes),
    }
    limits = {"workers": workers / (m.base + m.residual), **common}
    limit = min(limits, key=limits.get)
    split, count = 0.0, 0
    if workers > 1:
        count = best_split(m, workers)
        split = min(count / m.base, (workers - count) / m.residual, *common.values())
    cost = workers * place.price / (3600 * limits[limit])
    return Predicted(workers, limits[limit], limit, cost, count, split)


# -- the simulation --------------------------------------------------------------------------------


def simulated(
    measured: Measured,
    workers: int,
    place: Place,
    *,
    clips: int,
    shared: bool = True,
    load: float | None = None,
) -> Outcome:
    """The clips' passage: the driver, base phase, links, residual phase, and the driver again.

    load: of the predicted rate, at which clips arrive; None: as many are in flight as with --ray
    """
    m, found = measured, predict(measured, workers, place)
    base, residual = ("workers", "workers") if shared else ("base workers", "residual workers")
    pools = {"workers": workers}
    if not shared:
        pools = {base: found.base_workers, residual: workers - found.base_workers}
    sent = (m.path_bytes + m.clip_bytes) * 8 / (place.worker_gbit * 1e9)
    told = (m.clip_bytes + m.order_bytes) * 8 / (place.driver_gbit * 1e9)
    stages = [
        Stage("driver", m.driver / 2),
        Stage(base, m.base),
        Stage("workers' links", sent),
        Stage(residual, m.residual),
        Stage("driver's link", told),
        Stage("driver", m.driver / 2),
    ]
    pools |= {"driver": 1, "driver's link": 1, "workers' links": workers}
    rate = found.shared if shared else found.split
    arrivals = {"in_flight": AHEAD * workers} if load is None else {"rate": load * rate}
    losses = {"hours_to_loss": place.hours_to_loss, "restart": place.restart}
    return simulate(pools, stages, clips, **arrivals, **losses)


# -- the first points, in earnest ------------------------------------------------------------------


def check(measured: Measured, clips: int, more: Sequence[str] = ()) -> list[Row]:
    """Clips a second of `--ray` on one and on two nodes of one core, beside the predicted ones."""
    rows = []
    for nodes in (1, 2):
        say(f"{clips} clips on {nodes} local nodes of one core")
        with local_cluster(nodes) as address:
            rate = commanded(address, clips, (AHEAD + 1) * nodes, more)
        found = predict(measured, nodes, Place()).shared
        case = f"--ray, {nodes} nodes of one core, {clips} clips"
        rows += [
            Row(case, "vfengine", "measured", rate, "clips/s"),
            Row(case, "vfengine", "predicted", found, "clips/s"),
            Row(case, "vfengine", "measured / predicted", rate / found, "x"),
        ]
    return rows


def commanded(address: str, clips: int, in_flight: int, more: Sequence[str]) -> float:
    """Clips a second of the command, while as many are in flight as it lets be.

    Before that base paths are walked ahead, and after it no more are.
    """
    with tempfile.TemporaryDirectory() as folder:
        lines = Path(folder) / "lines.jsonl"
        lines.write_text("".join(f'{{"label": "walk", "seed": {k}}}\n' for k in range(clips)))
        command = [sys.executable, "-m", "vfengine.generate", "--prompts", str(lines)]
        command += ["--output", f"{folder}/{{index}}.mp4", "--json", "--ray", address, *more]
        told: list[float] = []
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            end = threading.Timer(PATIENCE, process.kill)
            end.start()
            try:
                for line in process.stdout:
                    if "error" in json.loads(line):
                        raise RuntimeError(f"a line failed: {line}")
                    told.append(time.perf_counter())
            except BaseException:
                process.kill()
                raise
            finally:
                end.cancel()
        if process.returncode or len(told) != clips:
            raise RuntimeError(f"status {process.returncode}, {len(told)} of {clips} clips")
    aside = min(in_flight, clips // 4)
    last = clips - 1 - aside
    return (last - aside) / (told[last] - told[aside])


# -- the report ------------------------------------------------------------------------------------


def predictions(
    measured: Measured, place: Place, workers: Sequence[int] = WORKERS, clips_each: int = 100
) -> list[Row]:
    """The table: a case for each number of workers."""
    rows = []
    for count in workers:
        found = predict(measured, count, place)
        clips = max(clips_each * count, 10 * clips_each)
        full = simulated(measured, count, place, clips=clips)
        calm = simulated(measured, count, place, clips=clips, load=LOAD)
        case, name = "predicted", f"{count} workers, by {found.limit}"
        rows += [
            Row(case, name, "shared", found.shared, "clips/s"),
            Row(case, name, "simulated", full.rate, "clips/s"),
            Row(case, name, "price of 1,000", 1000 * found.cost, ""),
            Row(case, name, "busy", 100 * full.busy["workers"], "%"),
            Row(case, name, "wait", calm.wait, "s"),
            Row(case, name, "95 % wait", calm.wait95, "s"),
        ]
        if math.isfinite(place.hours_to_loss):
            rows.append(Row(case, name, "lost", full.lost, "workers"))
        if count > 1:
            apart = simulated(measured, count, place, clips=clips, shared=False)
            rows += [
                Row(case, name, "base workers", found.base_workers, ""),
                Row(case, name, "split", found.split, "clips/s"),
                Row(case, name, "split, simulated", apart.rate, "clips/s"),
            ]
    return rows


@functools.cache
def figures(short: bool) -> Measured:
    return measure(rounds=1, calls=4) if short else measure(rounds=3)


def bench_scale(benchmark, short, capsys):
    """The figures, and their table; in short for few workers."""
    measured = benchmark.pedantic(figures, args=(short,), rounds=1)
    workers = (1, 4) if short else WORKERS
    rows = predictions(measured, Place(hours_to_loss=1.0), workers, 10)
    benchmark.extra_info["measured"] = asdict(measured)
    with tempfile.TemporaryDirectory() as folder:
        draw(rows, machine(), Path(folder) / "scale.png")
    with capsys.disabled():
        print(f"\n{measured}\n{table(rows)}")


def bench_two_nodes(benchmark, short, capsys):
    """The first points; in short of two steps, whose ratio means nothing."""
    measured = figures(short)
    how = {"clips": 2, "more": ["--num-inference-steps", "2"]} if short else {"clips": 12}
    rows = benchmark.pedantic(check, args=(measured,), kwargs=how, rounds=1)
    with capsys.disabled():
        print(f"\n{table(rows)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    defaults = asdict(Place())
    parser.add_argument("--measured", type=Path, metavar="FILE", help="take these figures")
    for name, what in (
        ("price", "of a worker's hour, in any unit"),
        ("worker_gbit", "a worker's link, in Gbit/s"),
        ("driver_gbit", "the driver's link, in Gbit/s"),
        ("hours_to_loss", "mean hours of work until a worker is lost"),
        ("restart", "seconds until a lost worker is back"),
    ):
        flag, value = "--" + name.replace("_", "-"), defaults[name]
        parser.add_argument(flag, type=above_0, default=value, help=f"{what}; {value:g}")
    parser.add_argument("--check", action="store_true", help="run 1 and 2 local nodes as well")
    parser.add_argument("--clips", type=int, default=40, help="of --check, on each cluster; 40")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw them there")
    arguments = parser.parse_args()
    place = Place(**{name: getattr(arguments, name) for name in defaults})
    facts = machine()
    say("measuring" if arguments.measured is None else f"reading {arguments.measured}")
    measured = measure() if arguments.measured is None else read_measured(arguments.measured)
    print(", ".join(f"{name} {value:.4g}" for name, value in asdict(measured).items()))
    rows = predictions(measured, place)
    rows += check(measured, arguments.clips) if arguments.check else []
    print(table(rows))
    if arguments.json:
        place = {name: value for name, value in asdict(place).items() if math.isfinite(value)}
        write_json(arguments.json, rows, facts, {"measured": asdict(measured), "place": place})
    if arguments.plot:
        draw(rows, facts, arguments.plot)


def above_0(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"must be above 0, got {text}")
    return value


if __name__ == "__main__":
    main()
