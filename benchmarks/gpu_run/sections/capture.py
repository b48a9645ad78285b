"""The shipped model's clip, 50 steps, as users make it: plain, captured, overlapped, K of one path.

The first three should give the same clip, most likely bit for bit, though libraries may choose
algorithms by stream. The largest difference is printed; more than bf16 explains is a failure.
The first call of a pipeline includes reading, warm-up and capture; "per step" is of later calls.
"""

from __future__ import annotations

import time

import numpy as np
import torch

from gpu_run.sections import DEVICE, DRY, emit, guarded, verdict
from vfengine import VideoFusionPipeline

CASE = "default clip, 50 steps"
STEPS = 2 if DRY else 50
MOTIONS = 8
TOLERANCE = 0.02  # of pixels in 0..1
FORMS = {
    "plain": (False, {}),
    "captured": (True, {}),
    "overlapped": (True, {"overlap_phases": True}),
    f"K = {MOTIONS} on one base": (True, {"num_residuals": MOTIONS}),
}


def main() -> None:
    clips: dict[tuple[str, int], np.ndarray] = {}
    for form, (graph, options) in FORMS.items():
        place = {"dtype": "bf16", "graph": graph}
        if DRY and "num_residuals" in options:
            options = {"num_residuals": 2}
        with guarded(CASE, contender=form, **place):
            pipe = VideoFusionPipeline.from_pretrained(
                device=DEVICE, dtype=torch.bfloat16, capture=graph
            )
            times = []
            for seed in (3, 0, 3):  # the third uses the graphs of the first again
                start = time.perf_counter()
                frames = pipe(
                    "cartwheel",
                    base_seed=seed,
                    base_path="stepwise",
                    offload_base=False,
                    num_inference_steps=STEPS,
                    **options,
                ).frames
                times.append(time.perf_counter() - start)
                clips[form, seed] = frames
            share = options.get("num_residuals", 1)
            emit(CASE, form, "first call", times[0], "s", **place)
            emit(CASE, form, "per clip", min(times[1:]) / share * 1e3, "ms", n=2, **place)
            emit(CASE, form, "per step", min(times[1:]) / share / STEPS * 1e3, "ms", n=2, **place)
            compare(clips, form, **place)


def compare(clips: dict[tuple[str, int], np.ndarray], form: str, **place) -> None:
    """One clip of the same seeds must be that of the plain form; of K, the first one."""
    largest = max(
        float(np.abs(clip[:1] - clips["plain", seed]).max())
        for (name, seed), clip in clips.items()
        if name == form
    )
    emit(CASE, form, "largest difference", largest, "", **place)
    same = largest <= TOLERANCE  # NaN is not
    verdict(CASE, same, f"largest difference from plain: {largest:.3g}", contender=form, **place)


if __name__ == "__main__":
    main()
