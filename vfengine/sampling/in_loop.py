"""How a loop calls its models: what they can compute for all steps, they compute before the first.

A model is any callable (z, t) -> noise. One that has more to gain from knowing the loop says so by
a method `in_loop(steps)`, which returns a `LoopModel`, or None where it has not: guidance
(guidance.py), windows (windows.py) and generators on CUDA (vfengine/models/tied.py) have it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..diffusion.decompose import Model
from .features import Kept


@dataclass(frozen=True, eq=False)
class Steps:
    """The steps of a loop, as its models see them.

    timesteps: int64 [S]
    counter:   int32 [1], the steps done; a captured step reads both where they lie
    shape:     of z, [B, C, H, W] or [B, N, C, H, W]
    dtype:     of z
    """

    timesteps: Tensor
    counter: Tensor
    shape: torch.Size
    dtype: torch.dtype


class LoopModel(Protocol):
    """A model in a loop: started once a run, outside of the loop's graph, then called each step."""

    def start(self) -> None:
        """Computes what the steps have in common, for the conditions that hold now."""

    def __call__(self, z: Tensor, t: Tensor, kept: Kept | None = None) -> Tensor:
        """The noise of the step that the counter says, t int64 [B] being its timestep.

        kept: where features are reused; a model is given it only then
        """


def in_loop(model: Model, steps: Steps) -> LoopModel:
    """The model as a loop of these steps calls it."""
    if not callable(model):
        raise TypeError(f"a model must be callable as model(z, t), got {type(model).__name__}")
    tie = getattr(model, "in_loop", None)
    tied = None if tie is None else tie(steps)
    return _Untied(model) if tied is None else tied


class _Untied:
    """A model that is the same in a loop as anywhere."""

    def __init__(self, model: Model) -> None:
        self.model = model

    def start(self) -> None:
        pass

    def __call__(self, z: Tensor, t: Tensor, *kept: Kept) -> Tensor:
        return self.model(z, t, *kept)
