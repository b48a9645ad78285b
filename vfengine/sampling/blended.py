"""A network called window by window, its estimates blended: where windows lie is planned elsewhere.

windows.py plans those of a clip with two ends, cycle.py those of a loop.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..diffusion.decompose import Model, base_index
from .features import Kept
from .in_loop import LoopModel, Steps, in_loop


@dataclass(frozen=True)
class Windows:
    """Where the windows of a clip begin, and the weight of each of their frames.

    starts:  first frame of each window
    weights: fp32 [number of windows, W]; every frame's weights sum to 1
    base:    whether the clip's base frame takes the middle of every window
    loop:    whether frame j of a window that begins at s is (s + j) mod num_frames
    """

    num_frames: int
    window: int
    starts: tuple[int, ...]
    weights: Tensor
    base: bool = True
    loop: bool = False


def triangle(window: int, base: bool = True) -> Tensor:
    """What the frames of a window count, fp32 [W]; nothing the middle one under a base frame."""
    frames = torch.arange(window, dtype=torch.int64, device="cpu")
    weights = torch.minimum(frames + 1, window - frames).float()
    if base:
        weights[base_index(window)] = 0.0
    return weights


class Blended:
    """(z [B, N, C, H, W], t) -> the blended estimates of a network of windows.

    The weights are on the device before the first call.
    """

    def __init__(self, model: Model, plan: Windows, device: torch.device | str) -> None:
        self.model, self.plan = model, plan
        self.weights = plan.weights.view(*plan.weights.shape, 1, 1, 1).to(device)

    def in_loop(self, steps: Steps) -> LoopModel:
        """Its model in a loop, called window by window."""
        batch, _, *image = steps.shape
        of_window = replace(steps, shape=torch.Size((batch, self.plan.window, *image)))
        return Blended(in_loop(self.model, of_window), self.plan, self.weights.device)

    def start(self) -> None:
        self.model.start()

    def __call__(self, z: Tensor, t: Tensor, kept: Kept | None = None) -> Tensor:
        plan, window = self.plan, self.plan.window
        m, middle = base_index(plan.num_frames), base_index(window)
        frames = z
        if plan.loop:  # no window is cut at the last frame
            frames = torch.cat((z, z[:, : window - 1]), 1)
        blended = torch.zeros_like(frames, dtype=torch.promote_types(z.dtype, torch.float32))
        part = torch.empty_like(z[:, :window])
        windows = zip(plan.starts, self.weights.unbind(), strict=True)
        for number, (start, weights) in enumerate(windows):
            part.copy_(frames[:, start : start + window])
            if plan.base:
                part[:, middle].copy_(z[:, m])  # the base path's state, the same in all windows
            own = () if kept is None else (kept.part(number),)
            blended[:, start : start + window] += weights * self.model(part, t, *own)
        if plan.loop:
            blended[:, : window - 1] += blended[:, plan.num_frames :]
            blended = blended[:, : plan.num_frames]
        return blended.to(z.dtype)
