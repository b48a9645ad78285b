"""What reusing deep features costs in quality and saves in seconds, by `reuse_every` of each phase.

The shipped model as it is shipped, 50 steps of DDIM, a clip at a time, networks loaded. Contenders
take turns, one clip each a turn, another prompt and other seeds every turn. `difference` is to the
clip in which nothing is reused: the root mean square over all pixels, in % of the range from black
to white; `PSNR` says the same in decibels. Seconds are medians of the process's CPU time, which a
busy machine disturbs less than the clock: run it with OMP_NUM_THREADS=1, where the two are the same
on a quiet machine. A phase does not depend on the other's number, so its median is of all turns.

The published part is one call of a UNet of ModelScope's widths with random weights
(lib/published_model.py): whole, and its shallow part alone. The script needs 5 GB of memory for it;
--no-published leaves it out. Under pytest both are small.

    python benchmarks/bench_reuse.py [--turns T] [--frames N] [--no-published] [--no-clips]
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections import defaultdict

import numpy as np
import torch
from lib.harness import Row, main, say, table
from lib.published_model import WIDTHS

from vfengine import VideoFusionPipeline
from vfengine.formats.diffusers import diffusers_config
from vfengine.models import PlannedUNet, UNet
from vfengine.pipelines.reuse_every import ReuseEvery, each_phase
from vfengine.sampling.features import Kept

PROMPTS = (
    "a woman in a red shirt walks in a park",
    "a man in blue jeans boxes in a room",
    "a person in a green sweater does a cartwheel on grass",
    "a man kicks on a street at night",
)
PHASES = ("base", "residual")
EVERY: tuple[ReuseEvery, ...] = (
    1,
    *({"base": n} for n in (2, 3, 5)),
    *({"residual": n} for n in (2, 3, 5)),
    *(2, 3, 5),
)


def name_of(every: ReuseEvery) -> str:
    if isinstance(every, int):
        return f"both {every}" if every > 1 else "off"
    return " ".join(f"{phase} {n}" for phase, n in every.items())


def clips(turns: int, steps: int, contenders: tuple[ReuseEvery, ...] = EVERY) -> list[Row]:
    """Rows of the shipped model's clips."""
    pipe = VideoFusionPipeline.from_pretrained()
    pipe.keep_parts()
    spent: dict[tuple[str, int], list[float]] = defaultdict(list)
    errors: dict[str, list[float]] = defaultdict(list)
    for turn in range(-1, turns):  # the first makes all programs and is not counted
        say(f"turn {turn + 1} of {turns}")
        seeds = {"base_seed": 2 * turn + 2, "residual_seed": 2 * turn + 3}
        prompt = PROMPTS[turn % len(PROMPTS)]
        first: np.ndarray | None = None
        marks: dict[tuple[str, bool], float] = {}

        def mark(phase: str, done: int, total: int, marks: dict = marks) -> None:
            if done in (0, total):
                marks[phase, done == total] = time.process_time()

        for every in contenders:
            how = {
                "solver": "ddim",
                "num_inference_steps": steps if turn >= 0 else min(steps, 6),
                "offload_base": False,
            }
            out = pipe(prompt=prompt, reuse_every=every, callback=mark, **how, **seeds)
            if turn < 0:
                continue
            first = out.frames if first is None else first
            name = name_of(every)
            for phase, number in each_phase(every, PHASES).items():
                spent[phase, number].append(marks[phase, True] - marks[phase, False])
            errors[name].append(float(np.square(out.frames - first).mean()))
    rows, case = [], f"clip, {steps} steps"
    for (phase, number), found in sorted(spent.items()):
        median, off = statistics.median(found), statistics.median(spent[phase, 1])
        rows.append(Row(f"{phase} phase", f"every {number}", "time", median, "s"))
        rows.append(Row(f"{phase} phase", f"every {number}", "speed-up", off / median, "x"))
    for name, found in errors.items():
        error = statistics.mean(found)
        rows.append(Row(case, name, "difference", 100 * math.sqrt(error), "%"))
        if error:
            rows.append(Row(case, name, "PSNR", -10 * math.log10(error), "dB"))
    return rows


@torch.inference_mode()
def published(frames: int, pixels: int, widths: str = "published", rounds: int = 3) -> list[Row]:
    """Rows of a call of a published UNet, on the guided pair of a clip."""
    say(f"drawing a UNet of {widths} width")
    config = diffusers_config({"_class_name": "UNet3DConditionModel", **WIDTHS[widths].unet})
    with torch.device("meta"):
        unet = UNet(config)
    unet.to(torch.bfloat16).to_empty(device="cpu")
    random = torch.Generator().manual_seed(0)
    for weights in unet.parameters():
        fan_in = weights[0].numel() if weights.ndim > 1 else 100
        weights.normal_(0, fan_in**-0.5, generator=random)
    planned = PlannedUNet(unet, torch.bfloat16)
    side = pixels // 8
    z = torch.randn(1, frames, 4, side, side, generator=random).repeat(2, 1, 1, 1, 1)
    context = torch.randn(2, 77, config.context_dim, generator=random)
    given, kept = (z, torch.tensor([500, 500]), context), {"whole": Kept(), "shallow": Kept()}
    planned(*given, kept=kept["shallow"])
    kept["shallow"].shallow = True
    case = f"UNet of {widths} width, {frames} frames of {pixels}x{pixels}"
    say(case)
    calls = {name: lambda place=place: planned(*given, kept=place) for name, place in kept.items()}
    times: dict[str, list[float]] = defaultdict(list)
    for number in range(rounds):
        say(f"round {number + 1} of {rounds}")
        for name, call in calls.items():
            started = time.process_time()
            call()
            times[name].append(time.process_time() - started)
    medians = {name: statistics.median(found) for name, found in times.items()}
    rows = [Row(case, name, "step", median, "s") for name, median in medians.items()]
    share = medians["shallow"] / medians["whole"]
    rows.append(Row(case, "shallow", "share", 100 * share, "%"))
    for every in (2, 3, 5):
        mean = (1 + (every - 1) * share) / every
        rows.append(Row(case, f"every {every}", "speed-up", 1 / mean, "x"))
    return rows


def bench_reuse(benchmark, capsys, short):
    def measure() -> list[Row]:
        few = EVERY if not short else (1, {"residual": 3})
        return clips(1, 2 if short else 25, few) + published(4, 64, "small", rounds=1)

    rows = benchmark.pedantic(measure, rounds=1)
    benchmark.extra_info["rows"] = [vars(row) for row in rows]
    with capsys.disabled():
        print("\n" + table(rows))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--turns", type=int, default=8, metavar="T", help="clips of each contender")
    parser.add_argument("--frames", type=int, default=16, metavar="N", help="of the published clip")
    parser.add_argument("--no-published", action="store_true", help="leave the published part out")
    parser.add_argument("--no-clips", action="store_true", help="leave the shipped model out")
    options, _ = parser.parse_known_args()

    def measure() -> list[Row]:
        rows = [] if options.no_clips else clips(options.turns, 50)
        return rows if options.no_published else rows + published(options.frames, 256)

    main(measure, __doc__, parser=parser)
