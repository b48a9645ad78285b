"""Clips longer than a network was trained on, in overlapping windows.

The network is called on W frames at a time. Its estimates are blended, weighted by a triangle over
the window. The solver's step runs on the whole clip, so that windows are blended at every step and
not only at the end. The network needs the memory of one window. Windows of a clip that is a loop go
around a cycle (cycle.py).

A residual network has the clip's base frame in the middle of every window, where it was trained to
find it. A window's own middle frame, whose place that takes, is estimated by neighbouring windows.
A plain video network sees the window as it is.
"""

from __future__ import annotations

import torch

from ..arguments import as_int
from ..diffusion.decompose import Lam, Model
from .blended import Blended, Windows, triangle
from .cycle import cycle_windows, plan_cycle


def largest_stride(window: int) -> int:
    """The largest stride with which every window's middle frame lies in another window too."""
    return (window - 1) // 2


def default_overlap(window: int, base: bool = True) -> int:
    """The least possible with a base frame in every window; half of a window without."""
    return window - largest_stride(window) if base else window // 2


def plan_windows(
    num_frames: int,
    window: int,
    overlap: int | None = None,
    *,
    lam: Lam = 0.5,
    base: bool = True,
) -> Windows:
    """Windows of `window` frames over num_frames frames; two neighbours share `overlap` of them.

    overlap: None is `default_overlap`; the last window ends with the clip and may overlap more
    lam:     λ of the clip, which must be one number if there are several windows
    base:    whether the clip has a base frame, which every window shares

    Raises ValueError for a window under 3 frames, or 2 without a base frame; for an overlap under
    1 frame, or one that leaves the middle frame, which the base frame takes, to one window alone;
    and for more than one window of a clip with a λ for each frame.
    """
    for name, value in (("window", window), ("window_overlap", overlap)):
        if value is not None and as_int(value) is None:
            raise ValueError(f"{name} must be an int, got {value!r}")
    if window < _shortest(base):
        raise ValueError(f"window must be at least {_shortest(base)} frames, got {window}")
    least = default_overlap(window) if base else 1
    overlap = default_overlap(window, base) if overlap is None else overlap
    if not least <= overlap < window:
        raise ValueError(
            f"window_overlap of a window of {window} frames must be from {least} to {window - 1}, "
            f"got {overlap}"
        )
    if num_frames <= window:
        ones = torch.ones(1, num_frames, dtype=torch.float32, device="cpu")
        return Windows(num_frames, num_frames, (0,), ones, base)
    if torch.as_tensor(lam, device="cpu").numel() != 1:
        raise ValueError("windows need one lam for all frames, got one for each")
    last, stride = num_frames - window, window - overlap
    starts = (*range(0, last, stride), last)
    shape = triangle(window, base)
    total = torch.zeros(num_frames, dtype=torch.float32, device="cpu")
    for start in starts:
        total[start : start + window] += shape
    weights = torch.stack([shape / total[start : start + window] for start in starts])
    return Windows(num_frames, window, starts, weights, base)


def _shortest(base: bool) -> int:
    """The least frames of a window: its middle and two neighbours, or two that can overlap."""
    return 3 if base else 2


def choose_windows(
    num_frames: int,
    trained: int,
    window: int | None = None,
    overlap: int | None = None,
    *,
    lam: Lam = 0.5,
    base: bool = True,
    loop: bool = False,
) -> tuple[int, int] | None:
    """(window, overlap) as given, or for a clip longer than the trained length; None: no windows.

    trained: frames of the clips that the network was trained on
    window:  0 is none; None is `trained` for a longer clip, else none
    overlap: None is `default_overlap`
    base:    whether the clip has a base frame
    loop:    whether the clip is a cycle, which always has windows: `cycle_windows`

    Raises ValueError as `plan_windows`, and for an overlap without windows.
    """
    if loop:
        return cycle_windows(num_frames, trained, window, overlap, lam=lam, base=base)
    if as_int(window) == 0:
        if overlap is not None:
            raise ValueError("window_overlap was given, but window=0 asks for none")
        return None
    if window is None and overlap is None and not num_frames > trained >= _shortest(base):
        return None
    window = trained if window is None else window
    plan_windows(num_frames, window, overlap, lam=lam, base=base)
    return window, default_overlap(window, base) if overlap is None else overlap


def windowed(
    model: Model,
    num_frames: int,
    window: int | None,
    overlap: int | None = None,
    *,
    lam: Lam = 0.5,
    base: bool = True,
    loop: bool = False,
    device: torch.device | str = "cpu",
) -> Model:
    """A network of clips, called window by window: (z [B, N, C, H, W], t) -> its estimate.

    window: W; None is refused, as it means that an overlap was given alone. For a clip of at most
            W frames the result is the model itself
    lam, base: as in `plan_windows`
    loop:   whether the clip is a cycle: always in windows, and window=None is N
    device: of the clips

    Raises ValueError as `plan_windows` or `plan_cycle`.
    """
    if loop:
        window = num_frames if window is None else window
        plan = plan_cycle(num_frames, window, overlap, lam=lam, base=base)
        return Blended(model, plan, device)
    if window is None:
        raise ValueError("window_overlap was given without a window")
    plan = plan_windows(num_frames, window, overlap, lam=lam, base=base)
    if len(plan.starts) == 1:
        return model
    return Blended(model, plan, device)
