"""What a model's configuration says of steps: those of a distilled network, and the usual ones."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from ..names import DEFAULT_STEPS, SOLVERS
from .checks import check_number, object_of


@dataclass(frozen=True, kw_only=True)
class UsualSteps:
    """How a model is sampled where nobody says; one that names nothing takes 50 steps of DDIM."""

    solver: str = "ddim"
    num_inference_steps: int = DEFAULT_STEPS

    def __post_init__(self):
        if self.solver not in SOLVERS:
            raise ValueError(f"solver must be one of {SOLVERS}, got {self.solver!r}")
        steps = self.num_inference_steps
        if type(steps) is not int or not 1 <= steps <= 1000:
            raise ValueError(f"num_inference_steps must be an int from 1 to 1000, got {steps!r}")


@dataclass(frozen=True, kw_only=True)
class FewSteps:
    """The steps that a distilled network was made for (training/distillation.py).

    solver, timesteps   how it is sampled: in these steps, and in no others
    guidance    least and largest guidance scale that it was trained under, which is its input
    teacher     SHA-256 of the weights whose steps it takes together, 16 hex digits; "": unknown
    """

    timesteps: tuple[int, ...]
    guidance: tuple[float, float]
    solver: str = "ddim"
    teacher: str = ""

    def __post_init__(self):
        steps = self.timesteps
        if not isinstance(steps, tuple) or not steps or not all(type(t) is int for t in steps):
            raise ValueError(f"timesteps must be whole numbers, got {steps!r}")
        if min(steps) < 0 or any(a <= b for a, b in pairwise(steps)):
            raise ValueError(f"timesteps must descend to 0 or more, got {list(steps)}")
        if self.solver != "ddim":
            raise ValueError(f'solver must be "ddim", got {self.solver!r}')
        if not isinstance(self.guidance, tuple) or len(self.guidance) != 2:
            raise ValueError(f"guidance must be two numbers, got {self.guidance!r}")
        for scale in self.guidance:
            check_number("guidance", scale, lambda scale: 0 <= scale <= 100)
        if self.guidance[0] > self.guidance[1]:
            raise ValueError(f"guidance must not descend, got {list(self.guidance)}")
        if not isinstance(self.teacher, str):
            raise ValueError(f"teacher must be a text, got {self.teacher!r}")

    @classmethod
    def from_dict(cls, values: object) -> FewSteps:
        """Of an object of JSON; ValueError or TypeError for another."""
        values = dict(object_of("a network's entry", values))
        for name in ("timesteps", "guidance"):
            if isinstance(values.get(name), list):
                values[name] = tuple(values[name])
        return cls(**values)
