"""The distance of each solver's clips in few steps from 1,000 steps of DDIM, and the seconds.

The shipped model in bf16, one clip at a time, from the same seeds and at the default spacing. A
distance is the root mean square over all pixels, in % of the range from black to white: of the base
frame, and of a whole clip by base path. Seconds are of both phases, networks loaded.

The script takes three labels. Under pytest it is the base frame of one, against 500 steps.
"""

import statistics
import time
from collections import defaultdict

import torch
from lib.harness import Row, main, table
from torch import Tensor

from vfengine import VideoFusionPipeline
from vfengine.diffusion.base_path import BASE_PATHS

LABELS = ("cartwheel", "kick", "walk")
FEW = (10, 15, 20)
CONTENDERS = (
    *(("ddim", steps) for steps in (*FEW, 50)),
    *((solver, steps) for solver in ("dpmsolver", "dpmsolver++", "unipc") for steps in FEW),
)


def pictures(
    pipeline: VideoFusionPipeline,
    label: str,
    solver: str,
    steps: int,
    base_paths: tuple[str, ...],
) -> dict[str, tuple[Tensor, float]]:
    """The base frame, and a clip per base path: pixels in 0..1, and the seconds each takes."""
    how = {"solver": solver, "num_inference_steps": steps}
    started = time.perf_counter()
    base = pipeline.preview(label, output_type="pt", **how)
    base_seconds = time.perf_counter() - started
    made = {"base frame": (base.frames, base_seconds)}
    for name in base_paths:
        started = time.perf_counter()
        options = {"trajectory": base.trajectory, "base_path": name, "output_type": "pt"}
        out = pipeline(label, **options, **how)
        made[f"{name} clip"] = (out.frames, base_seconds + time.perf_counter() - started)
    return made


def measure(
    labels: tuple[str, ...] = LABELS,
    base_paths: tuple[str, ...] = BASE_PATHS,
    reference_steps: int = 1000,
) -> list[Row]:
    pipeline = VideoFusionPipeline.from_pretrained(dtype=torch.bfloat16)
    pictures(pipeline, labels[0], "ddim", 2, base_paths)  # loads the networks
    distances: dict[tuple[str, str], dict[str, float]] = defaultdict(dict)
    seconds: dict[tuple[str, str], list[float]] = defaultdict(list)
    for label in labels:
        references = pictures(pipeline, label, "ddim", reference_steps, base_paths)
        for solver, steps in CONTENDERS:
            made = pictures(pipeline, label, solver, steps, base_paths)
            for what, (pixels, spent) in made.items():
                key = (f"{what} against ddim {reference_steps}", f"{solver} {steps}")
                error = (pixels - references[what][0]).square().mean().sqrt().item()
                distances[key][label] = 100 * error
                seconds[key].append(spent)
    rows = []
    for (case, contender), by_label in distances.items():
        rows += [Row(case, contender, label, value, "%") for label, value in by_label.items()]
        mean, spent = statistics.mean(by_label.values()), seconds[case, contender]
        rows.append(Row(case, contender, "mean", mean, "%"))
        rows.append(Row(case, contender, "time", statistics.median(spent), "s"))
    return rows


def bench_solvers(benchmark, capsys, short):
    steps = 20 if short else 500
    arguments = {"labels": LABELS[:1], "base_paths": (), "reference_steps": steps}
    rows = benchmark.pedantic(measure, kwargs=arguments, rounds=1)
    benchmark.extra_info["rows"] = [vars(row) for row in rows]
    with capsys.disabled():
        print("\n" + table(rows))


if __name__ == "__main__":
    main(measure, __doc__)
