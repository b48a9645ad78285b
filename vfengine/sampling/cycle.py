"""Clips that repeat without a seam: overlapping windows around a cycle of frames.

The frames of such a clip are counted modulo N: the first follows the last. Windows go around the
cycle, so that frames N - 1 and 0 stand side by side inside of windows, as any two neighbours do. A
clip of at most the trained length has three windows or more of its own length, each turned around
the cycle. A longer one has windows as in windows.py, evenly around it. A network sees each window
as frames 0 … W - 1, with the base frame, if there is one, in the middle.

Windows stay where they are at every step. Turning them from step to step closes a clip no better,
and damps its motion.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..arguments import as_int
from ..diffusion.decompose import Lam
from .blended import Windows, triangle

LEAST_WINDOWS = 3  # of two halves a cycle each, the seam of one would be the middle of the other


def largest_cycle_stride(window: int, base: bool = True) -> int:
    """The largest stride with which any two neighbours stand side by side in a window.

    The base frame takes the place of the middle frame, which then has no neighbours there.
    """
    return window // 2 - 1 if base else window - 1


def default_cycle_overlap(window: int, base: bool = True) -> int:
    """The least possible with a base frame in every window; half of a window without."""
    return window - largest_cycle_stride(window) if base else window // 2


def least_cycle(base: bool = True) -> int:
    """The least frames of a cycle, and of a window of it."""
    return 4 if base else 3


def cycle_windows(
    num_frames: int,
    trained: int,
    window: int | None = None,
    overlap: int | None = None,
    *,
    lam: Lam = 0.5,
    base: bool = True,
) -> tuple[int, int]:
    """(window, overlap) of a cycle, as given, or the defaults.

    trained: frames of the clips that the network was trained on
    window:  at most num_frames are taken; 0 is all of them; None is `trained`
    overlap: None is `default_cycle_overlap`

    Raises ValueError as `plan_cycle`, and for an overlap with window=0.
    """
    if as_int(window) == 0:
        if overlap is not None:
            raise ValueError("window_overlap was given, but window=0 asks for none")
        window = num_frames
    plan = plan_cycle(
        num_frames, trained if window is None else window, overlap, lam=lam, base=base
    )
    return plan.window, default_cycle_overlap(plan.window, base) if overlap is None else overlap


def plan_cycle(
    num_frames: int,
    window: int,
    overlap: int | None = None,
    *,
    lam: Lam = 0.5,
    base: bool = True,
) -> Windows:
    """Windows of `window` frames, at most num_frames, evenly around a cycle of num_frames frames.

    overlap: the least frames that two neighbouring windows share; None is `default_cycle_overlap`.
             There are at least three windows, which may share more
    lam:     λ of the clip, which must be one number
    base:    whether the clip has a base frame, which every window shares

    Raises ValueError for a cycle or window under `least_cycle` frames; for an overlap with which
    two neighbours would stand side by side in no window; and for a λ for each frame.
    """
    for name, value in (("window", window), ("window_overlap", overlap)):
        if value is not None and as_int(value) is None:
            raise ValueError(f"{name} must be an int, got {value!r}")
    least = least_cycle(base)
    if num_frames < least:
        raise ValueError(f"a loop must have at least {least} frames, got {num_frames}")
    if window < least:
        raise ValueError(f"window must be at least {least} frames in a loop, got {window}")
    if torch.as_tensor(lam, device="cpu").numel() != 1:
        raise ValueError("a loop needs one lam for all frames, got one for each")
    window = min(window, num_frames)
    overlap = default_cycle_overlap(window, base) if overlap is None else overlap
    least_overlap = window - largest_cycle_stride(window, base)
    if not least_overlap <= overlap < window:
        raise ValueError(
            f"window_overlap of a window of {window} frames must be from {least_overlap} to "
            f"{window - 1} in a loop, got {overlap}"
        )
    count = max(LEAST_WINDOWS, -(-num_frames // (window - overlap)))
    starts = tuple(k * num_frames // count for k in range(count))
    shape = triangle(window, base)
    total = torch.zeros(num_frames, dtype=torch.float32, device="cpu")
    for start in starts:
        total.index_add_(0, _around(start, window, num_frames), shape)
    weights = torch.stack([shape / total[_around(s, window, num_frames)] for s in starts])
    return Windows(num_frames, window, starts, weights, base, loop=True)


def _around(start: int, count: int, num_frames: int) -> Tensor:
    """The frames from `start` on around the cycle, int64 [count]."""
    return (start + torch.arange(count, dtype=torch.int64, device="cpu")) % num_frames
