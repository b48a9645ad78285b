"""What a model's configuration says of steps: those of a distilled network, and the usual ones."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from ..names import DEFAULT_STEPS, SOLVERS
from .checks import check_number, object_of


@dataclass(frozen=True, kw_only=True)
class UsualSteps:
    """How a model is sampled where nobody says; one that names nothing takes 50 steps of DDIM.

    timesteps   of this solver, where the model has better ones than the solver: a row for a number
                of steps
    """

    solver: str = "ddim"
    num_inference_steps: int = DEFAULT_STEPS
    timesteps: tuple[tuple[int, ...], ...] = ()

    def __post_init__(self):
        if self.solver not in SOLVERS:
            raise ValueError(f"solver must be one of {SOLVERS}, got {self.solver!r}")
        steps = self.num_inference_steps
        if type(steps) is not int or not 1 <= steps <= 1000:
            raise ValueError(f"num_inference_steps must be an int from 1 to 1000, got {steps!r}")
        if not isinstance(self.timesteps, tuple):
            raise ValueError(f"timesteps must be rows of whole numbers, got {self.timesteps!r}")
        for row in self.timesteps:
            _check_timesteps(row)
        if len(set(map(len, self.timesteps))) < len(self.timesteps):
            raise ValueError("timesteps must be one row for a number of steps, got two")

    def own_timesteps(self, solver: str, steps: int) -> tuple[int, ...] | None:
        """The row for so many steps of a solver; None: there is none."""
        rows = self.timesteps if solver == self.solver else ()
        return next((row for row in rows if len(row) == steps), None)

    @classmethod
    def from_dict(cls, values: object) -> UsualSteps:
        """Of an object of JSON; ValueError or TypeError for another."""
        values = _with_tuples(object_of("usual_steps", values), ("timesteps",))
        if isinstance(rows := values.get("timesteps"), tuple):
            rows = tuple(tuple(row) if isinstance(row, list) else row for row in rows)
            values["timesteps"] = rows
        return cls(**values)


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
        _check_timesteps(self.timesteps)
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
        names = ("timesteps", "guidance")
        return cls(**_with_tuples(object_of("a network's entry", values), names))


def _check_timesteps(timesteps: object) -> None:
    whole = isinstance(timesteps, tuple) and all(type(t) is int for t in timesteps)
    if not whole or not timesteps:
        raise ValueError(f"timesteps must be whole numbers, got {timesteps!r}")
    if min(timesteps) < 0 or any(a <= b for a, b in pairwise(timesteps)):
        raise ValueError(f"timesteps must descend to 0 or more, got {list(timesteps)}")


def _with_tuples(values: dict, names: tuple[str, ...]) -> dict:
    """The entries of JSON, with tuples for the lists of these names."""
    return {k: tuple(v) if k in names and isinstance(v, list) else v for k, v in values.items()}
