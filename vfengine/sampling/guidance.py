"""Conditions of the networks, and classifier-free guidance towards them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Condition:
    """What the clips of a call are to show, and how strongly.

    classes:        int64 [B], on the networks' device
    guidance_scale: s of classifier-free guidance; 1 is off
    """

    classes: Tensor
    guidance_scale: float
