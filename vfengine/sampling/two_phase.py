"""The two phases."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from ..diffusion.decompose import Lam


@dataclass(frozen=True)
class Motion:
    """How the frames of a clip follow its base path.

    lam:     λ, a number or [N]
    windows: (window, overlap) of frames that the residual network sees at a time
             (sampling/windows.py); None: all
    clean:   whether they follow the path of a finished picture, on which g = 0
    """

    lam: Lam
    windows: tuple[int | None, int | None] | None = None
    clean: bool = False

    def __post_init__(self) -> None:
        lam = self.lam.tolist() if isinstance(self.lam, Tensor) else self.lam
        lam = tuple(lam) if isinstance(lam, Iterable) else lam
        object.__setattr__(self, "lam", lam)  # values, which can be compared and do not change
