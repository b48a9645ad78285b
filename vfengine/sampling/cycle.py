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

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..diffusion.decompose import Lam, Model, base_index
from .in_loop import LoopModel, Steps, in_loop

LEAST_WINDOWS = 3  # of two halves a cycle each, the seam of one would be the middle of the other


@dataclass(frozen=True)
class Cycle:
    """Where the windows of a cycle begin, and the weight of each of their frames.

    starts:  first frame of each window; frame s + j of a window is (s + j) mod num_frames
    weights: fp32 [number of windows, W]; every frame's weights sum to 1
    base:    whether the clip's base frame takes the middle of every window
    """

    num_frames: int
    window: int
    starts: tuple[int, ...]
    weights: Tensor
    base: bool = True


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
    if type(window) is int and window == 0:
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
) -> Cycle:
    """Windows of `window` frames, at most num_frames, evenly around a cycle of num_frames frames.

    overlap: the least frames that two neighbouring windows share; None is `default_cycle_overlap`.
             There are at least three windows, which may share more
    lam:     λ of the clip, which must be one number
    base:    whether the clip has a base frame, which every window shares

    Raises ValueError for a cycle or window under `least_cycle` frames; for an overlap with which
    two neighbours would stand side by side in no window; and for a λ for each frame.
    """
    for name, value in (("window", window), ("window_overlap", overlap)):
        if value is not None and type(value) is not int:
            raise ValueError(f"{name} must be an int, got {value!r}")
    least = least_cycle(base)
    if num_frames < least:
        raise ValueError(f"a loop must have at least {least} frames, got {num_frames}")
    if window < least:
        raise ValueError(f"window must be at least {least} frames in a loop, got {window}")
    if torch.as_tensor(lam).numel() != 1:
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
    total = torch.zeros(num_frames)
    for start in starts:
        total.index_add_(0, _around(start, window, num_frames), shape)
    weights = torch.stack([shape / total[_around(s, window, num_frames)] for s in starts])
    return Cycle(num_frames, window, starts, weights, base)


def triangle(window: int, base: bool = True) -> Tensor:
    """What the frames of a window count, fp32 [W]; nothing the middle one under a base frame."""
    frames = torch.arange(window)
    weights = torch.minimum(frames + 1, window - frames).float()
    if base:
        weights[base_index(window)] = 0.0
    return weights


def _around(start: int, count: int, num_frames: int) -> Tensor:
    """The frames from `start` on around the cycle, int64 [count]."""
    return (start + torch.arange(count)) % num_frames


def cyclic(
    model: Model,
    num_frames: int,
    window: int | None,
    overlap: int | None = None,
    *,
    lam: Lam = 0.5,
    base: bool = True,
    device: torch.device | str = "cpu",
) -> Model:
    """A network of cycles, called window by window: (z [B, N, C, H, W], t) -> its estimate.

    window: W; None is all frames of the clip
    lam, base: as in `plan_cycle`
    device: of the clips

    Raises ValueError as `plan_cycle`.
    """
    window = num_frames if window is None else window
    return _Cyclic(model, plan_cycle(num_frames, window, overlap, lam=lam, base=base), device)


class _Cyclic:
    """The model that `cyclic` returns; its weights are on the device before the first call."""

    def __init__(self, model: Model, plan: Cycle, device: torch.device | str) -> None:
        self.model, self.plan = model, plan
        self.weights = plan.weights.view(*plan.weights.shape, 1, 1, 1).to(device)

    def in_loop(self, steps: Steps) -> LoopModel:
        """Its model in a loop, called window by window."""
        batch, _, *image = steps.shape
        of_window = replace(steps, shape=torch.Size((batch, self.plan.window, *image)))
        return _Cyclic(in_loop(self.model, of_window), self.plan, self.weights.device)

    def start(self) -> None:
        self.model.start()

    def __call__(self, z: Tensor, t: Tensor) -> Tensor:
        frames, window, starts = self.plan.num_frames, self.plan.window, self.plan.starts
        m, middle = base_index(frames), base_index(window)
        around = torch.cat((z, z[:, : window - 1]), 1)  # no window is cut at the last frame
        blended = torch.zeros_like(around, dtype=torch.promote_types(z.dtype, torch.float32))
        part = torch.empty_like(z[:, :window])
        for start, weights in zip(starts, self.weights.unbind(), strict=True):
            part.copy_(around[:, start : start + window])
            if self.plan.base:
                part[:, middle].copy_(z[:, m])  # the base path's state, the same in all windows
            blended[:, start : start + window] += weights * self.model(part, t)
        blended[:, : window - 1] += blended[:, frames:]
        return blended[:, :frames].to(z.dtype)
