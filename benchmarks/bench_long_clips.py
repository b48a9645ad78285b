"""Long clips of the shipped model in windows: visible seams, time, and growth of memory.

The model was trained on 16 frames. Longer clips are made in bf16 with DDIM. Every contender gets
the same base path and the same noise, frame by frame (vfengine/sampling/windows.py):

windows, 9 of 16  the default: windows of 16 frames, of which neighbours share 9
windows, ...      a wider overlap; longer windows
whole clip        the network on all frames at once, further from the base frame than in training
cuts              clips of 16 frames one after another, each from noise of its own: no overlap, no
                  blending, and the base frame in every one

Seams    mean absolute difference of neighbouring frames, of 255, by where they lie: at seams, where
         a window begins or ends; at middles, before and after a window's middle frame, whose
         estimate comes from the neighbours; at the base frame, likewise, where pixels are given;
         and inside, all others. Ratios are of sums over labels. "whole there" is the whole clip's
         ratio at the same places: the effect of motion alone. Measured once on pixels, where the
         grain of this small model counts most, and once on means of 8 x 8, where the body does
Motion   inside / that of the model's own 16 frames: below 1, blending has damped it
Return   the middles of windows against the base frame, over how much all others differ from it: 1
         is no return, 0 the same image again. Cuts return every 16 frames by construction
Time     seconds a frame of the residual phase, all its steps, networks loaded: the median label
Memory   peak resident set of a clip of two steps in a process of its own (peak_memory.py), above
         that process with its networks loaded; least squares over N of a + b N, and the p of c N^p.
         One copy of the frames is 4 bytes x N x 3 x H x W, 192 KiB a frame, and the loop, the
         blending and the pictures hold several: those must grow. The network's activations must not

Expected before measuring: windows show no seams in pixels (at most 1.2 inside, as at any places of
a whole clip), cuts do; windows grow by under 0.5 MiB a frame (ten copies of a clip of 64 x 64
pixels), a whole clip by its activations too. Means of squares, middles, motion and return came
after pixels had shown little; the target of 1.2 holds for the means as well.

Result, of the model of 64 x 64 pixels: memory is as expected. Seams of the default windows stay
under 1.2 in 64 frames but not, by means of squares, in 512 frames of cartwheels, and a window's
middle shows as much as its ends; cuts show a little more. In pixels cuts hardly show either: frames
of one base path have their room and colours in common, and only the body's place jumps. Blending
damps motion, the more the wider the overlap. A whole clip has neither fault, and in 64 frames takes
half the time: what windows save is memory.

The script makes 64 frames of three labels and 512 of one; under pytest it is 64 frames of one label
in fewer steps, and the memory of short clips; with --short 48 frames in two steps.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from lib import peak_memory
from lib.clips import DEVICE
from lib.harness import Row, Target, main, table, verdicts

from vfengine import VideoFusionPipeline
from vfengine.diffusion.base_path import BaseTrajectory
from vfengine.media.pictures import to_uint8
from vfengine.sampling.windows import plan_windows

LABELS = ("walk", "cartwheel", "run")
FRAMES = 16  # of training
WHOLE, CUTS, TRAINED = "whole clip", "cuts", "16 frames"
WINDOWS = {  # contender -> (window, overlap)
    "windows, 9 of 16": (16, 9),
    "windows, 12 of 16": (16, 12),
    "windows, 13 of 24": (24, 13),
}
CONTENDERS = (*WINDOWS, WHOLE, CUTS)
SEAMS, SCALES = "seams / inside", {"pixels": 1, "means of 8 x 8 pixels": 8}
DEFAULT_WINDOWS, GUIDANCE, RESIDUAL_SEED = "windows, 9 of 16", 2.0, 1
GROWTH = {DEFAULT_WINDOWS: (16, 64, 128, 256, 512), WHOLE: (16, 64, 128, 256)}  # frames
SHORT_GROWTH = {DEFAULT_WINDOWS: (16, 64), WHOLE: (16, 64)}


@dataclass(frozen=True)
class Plan:
    """Clips of `frames` frames of each label, in `steps` steps."""

    frames: int
    steps: int
    labels: Sequence[str]
    contenders: Sequence[str] = CONTENDERS

    @property
    def case(self) -> str:
        return f"{self.frames} frames, {self.steps} steps, {', '.join(self.labels)}"


FULL = (Plan(64, 20, LABELS), Plan(512, 20, ("cartwheel",), (DEFAULT_WINDOWS, WHOLE, CUTS)))
REDUCED = (Plan(64, 6, ("cartwheel",)),)
LEAST = (Plan(48, 2, ("cartwheel",)),)
TARGETS = [
    *(
        Target(f"{plan.case}: {what}", name, SEAMS, 1.2, at_most=True)
        for plan in FULL + REDUCED
        for what in SCALES
        for name in WINDOWS
    ),
    Target("growth", DEFAULT_WINDOWS, "a frame", 0.5, at_most=True),
]


def measure(plans: Sequence[Plan] = FULL, growth: dict[str, Sequence[int]] = GROWTH) -> list[Row]:
    return [*(row for plan in plans for row in quality(plan)), *growing(growth)]


# -- clips -----------------------------------------------------------------------------------------


class Maker:
    """The shipped model: uint8 clips [N, H, W, 3], and the seconds of their residual phase."""

    def __init__(self, steps: int) -> None:
        self.how = {"solver": "ddim", "num_inference_steps": steps, "guidance_scale": GUIDANCE}
        self.pipeline = VideoFusionPipeline.from_pretrained(device=DEVICE, dtype=torch.bfloat16)

    def path(self, label: str) -> BaseTrajectory:
        return self.pipeline.walk_base(label, **self.how)

    def clip(
        self,
        label: str,
        path: BaseTrajectory,
        frames: int,
        window: int,
        overlap: int | None = None,
        residual_seed: int = RESIDUAL_SEED,
    ) -> tuple[np.ndarray, float]:
        """window: 0 makes the clip whole."""
        made = self.pipeline(
            label,
            trajectory=path,
            num_frames=frames,
            window=window,
            window_overlap=overlap,
            residual_seed=residual_seed,
            offload_base=False,
            **self.how,
        )
        return to_uint8(made.frames)[0], made.timings["residual"]

    def cuts(self, label: str, path: BaseTrajectory, frames: int) -> tuple[np.ndarray, float]:
        """Clips of the trained length one after another, the first of them `clip`'s own."""
        starts = range(0, frames, FRAMES)
        parts, seconds = zip(
            *(
                self.clip(label, path, FRAMES, 0, residual_seed=RESIDUAL_SEED + i)
                for i in range(len(starts))
            ),
            strict=True,
        )
        return np.concatenate(parts)[:frames], sum(seconds)


# -- what is seen ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Places:
    """Sets of i, for the step from frame i - 1 to frame i; and windows' middle frames."""

    seams: frozenset[int]
    middles: frozenset[int]
    base: frozenset[int]
    middle_frames: tuple[int, ...]


def places(contender: str, frames: int) -> Places:
    """Where the windows of a contender begin, end and have their middles; a whole clip has none."""
    window, bases = FRAMES, [frames // 2]
    starts: Sequence[int] = ()
    if contender == CUTS:
        starts = range(0, frames, FRAMES)
        bases = [start + FRAMES // 2 for start in starts]
    elif contender != WHOLE:
        window, overlap = WINDOWS[contender]
        starts = plan_windows(frames, window, overlap).starts
    edges = set(starts) | {start + window for start in starts}
    middles = [start + window // 2 for start in starts]
    base = {i for m in bases for i in (m, m + 1)}
    seams = {i for i in edges if 0 < i < frames} - base
    beside = {i for m in middles for i in (m, m + 1)} - seams - base
    again = tuple(m for m in middles if m != frames // 2)
    return Places(frozenset(seams), frozenset(beside), frozenset(base), again)


def quality(plan: Plan) -> list[Row]:
    """Every contender on the clips of a plan: seams and motion at both scales, and the time."""
    clips, seconds = make(plan)
    rows = []
    for what, side in SCALES.items():
        steps = {name: [differences(clip, side) for clip in made] for name, made in clips.items()}
        for name in seconds:
            rows += seen(f"{plan.case}: {what}", name, steps, plan.frames)
    for name, spent in seconds.items():
        rows.append(Row(plan.case, name, "time", 1e3 * statistics.median(spent), "ms/frame"))
        again = places(name, plan.frames).middle_frames
        if again:
            value = returning(clips[name], clips[TRAINED], again)
            rows.append(Row(plan.case, name, "return", value, ""))
    return rows


def make(plan: Plan) -> tuple[dict[str, list[np.ndarray]], dict[str, list[float]]]:
    """Clips of each label by contender, and the seconds a frame; TRAINED: clips of 16 frames."""
    maker, clips, seconds = Maker(plan.steps), defaultdict(list), defaultdict(list)
    for label in plan.labels:
        path = maker.path(label)
        clips[TRAINED].append(maker.clip(label, path, FRAMES, 0)[0])
        if not np.array_equal(clips[TRAINED][-1], maker.cuts(label, path, FRAMES)[0]):
            raise RuntimeError(f"{label}: a cut is not the model's own clip of {FRAMES} frames")
        for name in plan.contenders:
            if name == CUTS:
                clip, spent = maker.cuts(label, path, plan.frames)
            else:
                clip, spent = maker.clip(label, path, plan.frames, *WINDOWS.get(name, (0, None)))
            m = plan.frames // 2
            if name != CUTS and not np.array_equal(clip[m], clips[TRAINED][-1][FRAMES // 2]):
                raise RuntimeError(f"{label}, {name}: frame {m} is not the base frame")
            clips[name].append(clip)
            seconds[name].append(spent / plan.frames)
    return clips, seconds


def seen(case: str, name: str, steps: dict[str, list[np.ndarray]], frames: int) -> list[Row]:
    """Seams, middles and motion of one contender; steps: `differences` of all of them."""
    where, m = places(name, frames), {frames // 2, frames // 2 + 1}
    inside = set(range(1, frames)) - where.seams - where.middles - where.base
    level = at(steps[name], inside)
    own = at(steps[TRAINED], set(range(1, FRAMES)) - {FRAMES // 2, FRAMES // 2 + 1})
    rows = [Row(case, name, "inside", level, "of 255")]
    if where.seams:
        seams = at(steps[name], where.seams)
        there = at(steps[WHOLE], where.seams - m) / at(steps[WHOLE], inside - m)
        rows += [
            Row(case, name, "at seams", seams, "of 255"),
            Row(case, name, SEAMS, seams / level, ""),
            Row(case, name, "whole there", there, ""),
        ]
    if where.middles:
        rows.append(Row(case, name, "middles / inside", at(steps[name], where.middles) / level, ""))
    return [
        *rows,
        Row(case, name, "base / inside", at(steps[name], where.base) / level, ""),
        Row(case, name, "motion", level / own, ""),
    ]


def differences(clip: np.ndarray, side: int) -> np.ndarray:
    """[N]: of frame i, its mean absolute difference from frame i - 1; of frame 0, nothing.

    side: pixels are first averaged over squares of this side
    """
    count, height, width, channels = clip.shape
    squares = clip.reshape(count, height // side, side, width // side, side, channels)
    means = squares.astype(np.float32).mean((2, 4))
    return np.concatenate([[np.nan], np.abs(np.diff(means, axis=0)).mean((1, 2, 3))])


def at(steps: Sequence[np.ndarray], where: set[int] | frozenset[int]) -> float:
    """Their mean at these places of all clips."""
    return float(np.mean([values[sorted(where)] for values in steps]))


def returning(clips: list[np.ndarray], own: list[np.ndarray], middles: Sequence[int]) -> float:
    """The distance of middle frames from the base frame, over that of all others."""
    m = len(clips[0]) // 2
    others = [i for i in range(len(clips[0])) if i not in middles and i != m]
    apart = [
        np.abs(clip.astype(np.int16) - short[FRAMES // 2].astype(np.int16)).mean((1, 2, 3))
        for clip, short in zip(clips, own, strict=True)
    ]
    return at(apart, set(middles)) / at(apart, set(others))


# -- memory ----------------------------------------------------------------------------------------


def memory_probe(frames: int, window: int, overlap: int | None) -> Callable[[], object]:
    """Two steps of a clip, after imports, the base phase and a clip of one frame."""
    maker = Maker(steps=2)
    path = maker.path("cartwheel")
    maker.pipeline("cartwheel", trajectory=path, num_frames=1, offload_base=False, **maker.how)
    return lambda: maker.clip("cartwheel", path, frames, window, overlap)


def growing(growth: dict[str, Sequence[int]]) -> list[Row]:
    """Peak memory by number of frames, and two fits to it."""
    rows = []
    for name, counts in growth.items():
        window, overlap = WINDOWS.get(name, (0, None))
        peaks = []
        for frames in counts:
            settings = {"frames": frames, "window": window, "overlap": overlap}
            peak = peak_memory.measure("bench_long_clips:memory_probe", settings, DEVICE)
            peaks.append(peak.main)
            rows.append(Row("growth", name, f"N = {frames}", peak.main, "MiB"))
        line = statistics.linear_regression(counts, peaks)
        log = statistics.linear_regression(
            [math.log(n) for n in counts], list(map(math.log, peaks))
        )
        rows += [
            Row("growth", name, "fixed", line.intercept, "MiB"),
            Row("growth", name, "a frame", line.slope, "MiB"),
            Row("growth", name, "exponent", log.slope, ""),
        ]
    return rows


def bench_long_clips(benchmark, capsys, short):
    arguments = {"plans": REDUCED, "growth": SHORT_GROWTH}
    if short:
        arguments = {"plans": LEAST, "growth": {WHOLE: (8, 16)}}
    rows = benchmark.pedantic(measure, kwargs=arguments, rounds=1)
    benchmark.extra_info["rows"] = [vars(row) for row in rows]
    with capsys.disabled():
        print(f"\n{table(rows)}\n{verdicts(rows, TARGETS)}")


if __name__ == "__main__":
    main(measure, __doc__, TARGETS)
