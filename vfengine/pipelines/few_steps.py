"""How many steps a model's networks take: those asked for, or those that they were distilled to.

A distilled network (training/distillation.py) takes the timesteps that its checkpoint names, and
no others. Its guidance scale is an input, within the range that it was trained under.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from ..diffusion.solvers import SolverTable
from ..formats.checkpoint import CheckpointConfig, FewSteps
from ..formats.few_steps import UsualSteps
from ..names import DEFAULT_STEPS
from .request import VideoRequest


class Steps(NamedTuple):
    """How networks are sampled."""

    num_inference_steps: int
    solver: str
    eta: float


def distilled(config: CheckpointConfig, names: Iterable[str]) -> dict[str, FewSteps]:
    """Those of these networks that were distilled."""
    found = config.distilled or {}
    return {name: found[name] for name in names if name in found}


def network_table(
    config: CheckpointConfig,
    name: str,
    steps: int | None,
    solver: str | None,
    eta: float,
) -> SolverTable:
    """The steps of a network, where so many of a solver are asked for; None: the usual ones.

    A solver and an eta are those of networks that are not distilled, if the model has any: the
    others keep to their own.

    Raises ValueError for a solver or an eta that no network was made for.
    """
    found = config.distilled or {}
    few = found.get(name)
    if few is None:
        asked = _usual(config, steps, solver, eta)
        return config.table(asked.solver, asked.num_inference_steps, asked.eta)
    if len(found) == len(config.networks):
        _check_solver({name: few}, solver, eta)
    return config.table(few.solver, len(few.timesteps), timesteps=few.timesteps)


def chosen_steps(
    config: CheckpointConfig,
    names: Iterable[str],
    steps: int | None = None,
    solver: str | None = None,
    eta: float = 0.0,
) -> Steps:
    """The steps of a request whose networks are these; None: the usual ones.

    They are those of networks that are not distilled, if there are any.

    Raises ValueError for what all of them were not made for.
    """
    names = tuple(names)
    found = distilled(config, names)
    if not found or len(found) < len(names):
        return _usual(config, steps, solver, eta)
    _check_solver(found, solver, eta)
    made_for = sorted({len(few.timesteps) for few in found.values()})
    if steps is not None and steps not in made_for:
        raise ValueError(
            f"this model was distilled to {' and '.join(map(str, made_for))} steps, and takes no "
            f"other number: num_inference_steps={steps}"
        )
    (own, *_) = found.values()
    return Steps(made_for[-1] if steps is None else steps, own.solver, 0.0)


def _usual(config: CheckpointConfig, steps: int | None, solver: str | None, eta: float) -> Steps:
    """What is asked for, and of what is not, what the model usually takes.

    Its number of steps is that of its solver; of any other it is 50. Only DDIM has an eta.
    """
    usual = config.usual_steps or UsualSteps()
    if solver is None:
        solver = "ddim" if eta else usual.solver
    if steps is None:
        steps = usual.num_inference_steps if solver == usual.solver else DEFAULT_STEPS
    return Steps(steps, solver, eta)


def _check_solver(found: Mapping[str, FewSteps], solver: str | None, eta: float) -> None:
    for name, few in found.items():
        if solver not in (None, few.solver):
            raise ValueError(
                f"the {name} network was distilled for the solver {few.solver}: {solver}"
            )
        if eta:
            raise ValueError(
                f"the {name} network was distilled: its steps add no noise, but eta={eta}"
            )


def check_guidance(config: CheckpointConfig, names: Iterable[str], request: VideoRequest) -> None:
    """ValueError for a guidance scale or a negative prompt that distilled networks cannot take."""
    for name, few in distilled(config, names).items():
        least, largest = few.guidance
        if not least <= request.guidance_scale <= largest:
            raise ValueError(
                f"the {name} network was distilled under guidance scales from {least:g} to "
                f"{largest:g}, got guidance_scale={request.guidance_scale:g}"
            )
        if any(request.negatives):
            raise ValueError(
                f"the {name} network was distilled with guidance away from the empty prompt: it "
                "takes no negative_prompt"
            )
