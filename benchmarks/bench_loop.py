"""Clips that repeat: how well --loop closes them, and what it costs.

The shipped model makes clips of the trained length (16 frames in 50 steps) and longer
ones (40 in 20). Both contenders get the same base path and the same noise, frame by frame:

clip   as without the flag; a longer one in windows (vfengine/sampling/windows.py)
loop   windows around a cycle (vfengine/sampling/cycle.py)

Steps   mean absolute difference of neighbouring frames, of 255: of pixels, and of means of 8 x 8
        pixels, where the body counts and grain does not. Frames of a moving figure soon differ as
        much as they ever will, so that a clip's ends are not far apart in pixels either
Seam    the step from the last frame to the first, over the mean of the other steps of its clip:
        the mean of all clips, and the worst. 1 is no seam
Seam, 2 apart  the same for frames two apart: below 1, the clip holds its breath there
Largest        the largest step inside, over the mean: above that of clips, a loop is rougher there
Motion         mean step of loops, over that of clips: below 1, blending has damped it
Time    seconds a frame of the residual phase

Expected before measuring: the seam of loops is under 1.3 on average, in pixels and in means, where
that of clips is far more; loops are no rougher inside (at most 1.1 of what clips are), and move as
much (at least 0.9).

The script makes clips of four labels from three seeds; under pytest it is one clip of one label in
few steps.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from lib.clips import DEVICE
from lib.harness import Row, Target, main, table, verdicts

from vfengine import VideoFusionPipeline
from vfengine.media.pictures import to_uint8

LABELS, SEEDS = ("walk", "run", "dance_a", "spin"), (0, 1, 2)
CLIP, LOOP = "clip", "loop"
SEAM, SCALES = "seam", {"pixels": 1, "means of 8 x 8 pixels": 8}


@dataclass(frozen=True)
class Plan:
    """Clips of `frames` frames of each label from each seed, in `steps` steps."""

    frames: int
    steps: int = 50
    labels: Sequence[str] = LABELS
    seeds: Sequence[int] = SEEDS

    @property
    def case(self) -> str:
        return f"{self.frames} frames"


FULL = (Plan(16), Plan(40, 20))
REDUCED = (Plan(16, 10, ("walk",), (0,)),)
LEAST = (Plan(16, 2, ("walk",), (0,)),)
TARGETS = [
    Target(f"{plan.case}: {what}", LOOP, metric, value, at_most=metric != "motion")
    for plan in FULL
    for what in SCALES
    for metric, value in ((SEAM, 1.3), ("rougher", 1.1), ("motion", 0.9))
]


def measure(plans: Sequence[Plan] = FULL) -> list[Row]:
    pipeline = VideoFusionPipeline.from_pretrained(device=DEVICE)
    return [row for plan in plans for row in closing(plan, *make(plan, pipeline))]


def make(
    plan: Plan, pipeline: VideoFusionPipeline
) -> tuple[dict[str, list[np.ndarray]], dict[str, list[float]]]:
    """Clips uint8 [N, H, W, 3] by contender, and the seconds a frame."""
    clips, seconds = defaultdict(list), defaultdict(list)
    for label in plan.labels:
        for seed in plan.seeds:
            how = {"solver": "ddim", "num_inference_steps": plan.steps}
            path = pipeline.walk_base(label, base_seed=seed, **how)
            how |= {"trajectory": path, "residual_seed": seed + 1, "offload_base": False}
            for name in (CLIP, LOOP):
                made = pipeline(label, num_frames=plan.frames, loop=name == LOOP, **how)
                clips[name].append(to_uint8(made.frames)[0])
                seconds[name].append(made.timings["residual"] / plan.frames)
            ours = [clips[name][-1][plan.frames // 2] for name in (CLIP, LOOP)]
            if not np.array_equal(*ours):
                raise RuntimeError(f"{label}, seed {seed}: the loop has another base frame")
    return clips, seconds


def closing(
    plan: Plan, clips: dict[str, list[np.ndarray]], seconds: dict[str, list[float]]
) -> list[Row]:
    """All figures of a plan."""
    rows = []
    for what, side in SCALES.items():
        case = f"{plan.case}: {what}"
        steps = {name: [around(clip, side) for clip in made] for name, made in clips.items()}
        inside = {name: [values[:-1] for values in made] for name, made in steps.items()}
        levels = {name: [values.mean() for values in made] for name, made in inside.items()}
        largest = {
            name: [values.max() / values.mean() for values in made] for name, made in inside.items()
        }
        for name, made in steps.items():
            seams = [values[-1] / level for values, level in zip(made, levels[name], strict=True)]
            apart = [around(clip, side, 2) for clip in clips[name]]
            two = [values[-2:].mean() / values[:-2].mean() for values in apart]
            rows += [
                Row(case, name, "step", statistics.mean(levels[name]), "of 255"),
                Row(case, name, SEAM, statistics.mean(seams), ""),
                Row(case, name, "worst seam", max(seams), ""),
                Row(case, name, "seam, 2 apart", statistics.mean(two), ""),
                Row(case, name, "largest", statistics.mean(largest[name]), ""),
            ]
        rougher = statistics.mean(largest[LOOP]) / statistics.mean(largest[CLIP])
        motion = statistics.mean(levels[LOOP]) / statistics.mean(levels[CLIP])
        rows += [Row(case, LOOP, "rougher", rougher, ""), Row(case, LOOP, "motion", motion, "")]
    for name, spent in seconds.items():
        rows.append(Row(plan.case, name, "time", 1e3 * statistics.median(spent), "ms/frame"))
    return rows


def around(clip: np.ndarray, side: int, apart: int = 1) -> np.ndarray:
    """[N]: the mean absolute difference of frame i and frame i + apart, around the cycle.

    side: pixels are first averaged over squares of this side
    """
    count, height, width, channels = clip.shape
    squares = clip.reshape(count, height // side, side, width // side, side, channels)
    means = squares.astype(np.float32).mean((2, 4))
    return np.abs(means - np.roll(means, -apart, axis=0)).mean((1, 2, 3))


def bench_loop(benchmark, capsys, short):
    rows = benchmark.pedantic(measure, kwargs={"plans": LEAST if short else REDUCED}, rounds=1)
    benchmark.extra_info["rows"] = [vars(row) for row in rows]
    with capsys.disabled():
        print(f"\n{table(rows)}\n{verdicts(rows, TARGETS)}")


if __name__ == "__main__":
    main(measure, __doc__, TARGETS)
