"""How many steps a model's networks take: those asked for, or those that they were distilled to.

A distilled network (training/distillation.py) takes the timesteps that its checkpoint names, and
no others. Its guidance scale is an input, within the range that it was trained under.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ..diffusion.solvers import SolverTable
from ..formats.checkpoint import CheckpointConfig, FewSteps
from .request import VideoRequest

DEFAULT_STEPS = 50


def distilled(config: CheckpointConfig, names: Iterable[str]) -> dict[str, FewSteps]:
    """Those of these networks that were distilled."""
    found = config.distilled or {}
    return {name: found[name] for name in names if name in found}


def network_table(
    config: CheckpointConfig,
    name: str,
    steps: int | None,
    solver: str,
    eta: float,
) -> SolverTable:
    """The steps of a network, where so many are asked for; None: as many as are usual for it.

    A solver and an eta are those of networks that are not distilled, if the model has any: the
    others keep to their own.

    Raises ValueError for a solver or an eta that no network was made for.
    """
    found = config.distilled or {}
    few = found.get(name)
    if few is None:
        return config.table(solver, DEFAULT_STEPS if steps is None else steps, eta)
    if len(found) == len(config.networks):
        _check_solver({name: few}, solver, eta)
    return config.table(few.solver, len(few.timesteps), timesteps=few.timesteps)


def _check_solver(found: Mapping[str, FewSteps], solver: str, eta: float) -> None:
    for name, few in found.items():
        if solver != few.solver:
            raise ValueError(
                f"the {name} network was distilled for the solver {few.solver}: {solver}"
            )
        if eta:
            raise ValueError(
                f"the {name} network was distilled: its steps add no noise, but eta={eta}"
            )


def chosen_steps(
    config: CheckpointConfig,
    names: Iterable[str],
    steps: int | None,
    solver: str = "ddim",
    eta: float = 0.0,
) -> int:
    """The number of steps of a request whose networks are these; None: the usual one.

    Number, solver and eta are those of networks that are not distilled, if there are any.

    Raises ValueError for what all of them were not made for.
    """
    names = tuple(names)
    found = distilled(config, names)
    if not found or len(found) < len(names):
        return DEFAULT_STEPS if steps is None else steps
    _check_solver(found, solver, eta)
    made_for = sorted({len(few.timesteps) for few in found.values()})
    if steps is None:
        return made_for[-1]
    if steps not in made_for:
        raise ValueError(
            f"this model was distilled to {' and '.join(map(str, made_for))} steps, and takes no "
            f"other number: num_inference_steps={steps}"
        )
    return steps


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
