"""What fewer steps cost in quality and save in seconds: of a model, and of its students.

    python benchmarks/judge_few_steps.py --work FOLDER [--students FOLDER …] [--steps 1 2 4 8 20 50]
        [--solver ddim unipc] [--reuse-every 2 3 residual=3] [--json FILE] [--plot FILE.png]
    python benchmarks/judge_few_steps.py --draw FILE.json --plot FILE.png

The judges and the clips are those of judge_model.py, and stay in FOLDER. A student takes the steps
that it was distilled to; a network of it that was not distilled takes as many, of the last solver.
Only the first solver takes the most steps. Features are reused in these. Seconds are medians of
a warm clip's, networks loaded, a clip of each way a turn: run it on a quiet machine.

A verdict compares with the most steps: what is to be large may be a tenth less, and what is to be
small a tenth more.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path

import judge_model
from lib.harness import Row, Target, machine, say, table, verdicts, write_json
from lib.judged_clips import Sampling
from lib.plots import COLOURS, WIDTH, footer, plt, save
from matplotlib.ticker import LogLocator, NullLocator

from vfengine import VideoFusionPipeline
from vfengine.formats.checkpoint import DEFAULT
from vfengine.names import SOLVERS

# What is drawn: case and metric, how it is called, and whether more of it is better.
SHOWN = (
    ("actions", "right", "action judged right, %", True),
    ("attributes", "on average", "colours and place judged right, %", True),
    ("pictures, times real's", "below 4 pixels", "waves below 4 pixels, times real's", True),
    ("distances", "Fréchet, motion", "Fréchet distance, motion", False),
    ("distances", "Fréchet, look", "Fréchet distance, look", False),
    ("distances", "kernel, look", "kernel distance, look", False),
)
JUDGED = (
    *SHOWN,
    ("pictures, times real's", "waves below 8 pixels", "", True),
    ("distances", "kernel, motion", "", False),
)
STUDENT, PART, REUSED = "distilled", "base network distilled", "features reused"
LINES = {STUDENT: "#cc3311", PART: "#aa3377", REUSED: "#228833"}
OF_SOLVERS = ("#4477aa", "#66ccee", "#ccbb44", "#888888", "#000000")
TOLERANCE = 0.1


@dataclass(frozen=True)
class Way:
    """A way to make a clip: of a line of the plot, at a point of it."""

    line: str
    point: str
    pipeline: VideoFusionPipeline
    sampling: Sampling

    @property
    def name(self) -> str:
        return f"{self.line}, {self.point}"


def ways(options: argparse.Namespace) -> list[Way]:
    """All that is compared; the first is the one with most steps."""
    pipeline = judge_model.loaded(options.model, options)
    most, path = max(options.steps), pipeline.config.base_path
    plain = Sampling(path, most, options.solver[0], options.guidance_scale, options.seed)
    found = [
        Way(solver, str(steps), pipeline, replace(plain, solver=solver, steps=steps))
        for solver in options.solver
        for steps in sorted(set(options.steps), reverse=True)
        if steps < most or solver == plain.solver
    ]
    for folder in options.students:
        student = judge_model.loaded(folder, options)
        few = student.config.distilled or {}
        if "base" not in few:
            raise ValueError(f"{folder}: expected a student, whose base network is distilled")
        steps = len(few["base"].timesteps)
        solver = few["base"].solver if "residual" in few else options.solver[-1]
        how = {"base_path": student.config.base_path, "solver": solver}
        sampling = replace(plain, steps=steps, **how)
        found.append(Way(STUDENT if "residual" in few else PART, str(steps), student, sampling))
    for every in options.reuse_every:
        found.append(Way(REUSED, f"every {every}", pipeline, replace(plain, reuse_every=every)))
    return found


def seconds(compared: list[Way], turns: int) -> list[Row]:
    """Medians of a warm clip's seconds, of one that is made after another."""
    times: dict[str, list[float]] = defaultdict(list)
    for pipeline in {id(way.pipeline): way.pipeline for way in compared}.values():
        pipeline.keep_parts()
    for turn in range(-1, turns):  # the first makes all programs and is not counted
        say(f"turn {turn + 1} of {turns}")
        for way in compared:
            how = way.sampling
            label = judge_model.known_actions(way.pipeline)[-1]
            started = time.perf_counter()
            way.pipeline(
                label,
                num_inference_steps=how.steps,
                solver=how.solver,
                guidance_scale=how.guidance_scale,
                reuse_every=how.reuse_every,
                base_seed=2 * turn + 2,
                residual_seed=2 * turn + 3,
                offload_base=False,
            )
            if turn >= 0:
                times[way.name].append(time.perf_counter() - started)
    return [Row("clip", name, "seconds", statistics.median(t), "s") for name, t in times.items()]


def targets(rows: list[Row], most: str, names: list[str]) -> list[Target]:
    """What keeps a way within 10 % of the one with most steps."""
    values = {(row.case, row.contender, row.metric): row.value for row in rows}
    found = []
    for name in names:
        for case, metric, _, more in JUDGED:
            value = values[case, most, metric]
            worse = TOLERANCE * abs(value)
            bound = value - worse if more else value + worse
            found.append(Target(case, name, metric, bound, at_most=not more))
    return found


def draw(file: Path, plot: Path) -> None:
    """A panel for each measure of quality, over a clip's seconds."""
    report = json.loads(file.read_text())
    values = {(r["case"], r["contender"], r["metric"]): r["value"] for r in report["rows"]}
    names = [name for case, name, _ in values if case == "clip"]
    lines = dict.fromkeys(name.rpartition(", ")[0] for name in names)
    plain = [line for line in lines if line not in LINES]
    colours = dict(zip(plain, OF_SOLVERS, strict=False)) | LINES
    figure, axes = plt.subplots(2, 3, figsize=(WIDTH, 6.2), layout="constrained")
    for axis, (case, metric, title, more) in zip(axes.flat, SHOWN, strict=True):
        for line, colour in colours.items():
            points = sorted(
                (values["clip", name, "seconds"], values[case, name, metric], name)
                for name in names
                if name.startswith(f"{line}, ")
            )
            if not points:
                continue
            x, y, labels = zip(*points, strict=True)
            rise = 7 if list(colours).index(line) % 2 == 0 else -8  # of labels, in points
            axis.plot(x, y, "o-", color=colour, linewidth=1.5, markersize=4, label=line)
            for place, value, name in points:
                text = name.removeprefix(f"{line}, ")
                axis.annotate(
                    text, (place, value), (0, rise), textcoords="offset points",
                    ha="center", va="center", fontsize=7, color=colour,
                )  # fmt: skip
        best = values.get((case, "real, coded", metric))
        if best is not None:
            axis.axhline(best, color=COLOURS["reference"], linewidth=1, linestyle="--")
        axis.set_title(title, fontsize=9)
        axis.set_xscale("log")
        axis.set_yscale("linear" if more else "symlog", **({} if more else {"linthresh": 10}))
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_locator(NullLocator())
        axis.tick_params(labelsize=8)
        axis.margins(y=0.15)
        axis.grid(color="#dddddd", linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[1]:
        axis.set_xlabel("seconds a clip", fontsize=9)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3, fontsize=9, frameon=False)
    facts = report["machine"]
    what = "numbers are steps; broken line: real clips through the autoencoder"
    footer(figure, f"{what}. {facts['cpu']}, {facts['threads']} threads, torch {facts['torch']}")
    save(figure, plot)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    judge_model.add_judges(parser)
    add("--model", type=Path, default=DEFAULT, help="checkpoint folder; default: the package's")
    add("--students", type=Path, nargs="+", default=[], metavar="FOLDER", help="distilled from it")
    add("--steps", type=int, nargs="+", default=[1, 2, 4, 8, 20, 50], help="of the model itself")
    about = "of the model itself, the usual one first"
    add("--solver", choices=SOLVERS, nargs="+", default=["ddim"], help=about)
    about = "N, or base=N,residual=N: ways to reuse features in the most steps"
    add("--reuse-every", type=judge_model.every, nargs="+", default=[], metavar="N", help=about)
    add("--guidance-scale", type=float, default=2.0)
    add("--turns", type=int, default=5, help="clips of each way that are timed")
    add("--plot", type=Path, metavar="FILE.png", help="draw quality over seconds there")
    add("--draw", type=Path, metavar="FILE.json", help="measure nothing, draw this; needs --plot")
    options = parser.parse_args(arguments)
    if options.draw and not options.plot:
        parser.error("--draw needs --plot FILE.png")
    if not options.draw and not options.work:
        parser.error("--work FOLDER is needed")
    if options.plot and not options.draw and not options.json:
        parser.error("--plot draws what --json FILE keeps")
    return options


def main(arguments: list[str] | None = None) -> list[Row]:
    options = parse(arguments)
    if options.draw:
        draw(options.draw, options.plot)
        return []
    options.work.mkdir(parents=True, exist_ok=True)
    motion, look = judge_model.judges(options)
    compared = ways(options)
    subject = judge_model.of_scenes(compared[0].pipeline, options)
    for way in compared:
        made = judge_model.generated_clips(
            way.pipeline, subject.clips["real"], way.sampling, options
        )
        subject.clips[way.name] = made
    facts = machine()
    rows = seconds(compared, options.turns) + judge_model.judged(subject, motion, look)
    print(table(rows))
    others = [way.name for way in compared[1:]]
    print(verdicts(rows, targets(rows, compared[0].name, others)))
    if options.json:
        files = ("work", "json", "model", "students", "plot", "draw")  # of one machine
        told = {name: str(v) for name, v in vars(options).items() if name not in files}
        write_json(options.json, rows, facts, {"options": told})
    if options.plot:
        draw(options.json, options.plot)
    return rows


if __name__ == "__main__":
    main()
