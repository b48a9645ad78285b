"""Base paths and pictures that a user brings: whether a model can follow them."""

from __future__ import annotations

from pathlib import Path

from ..diffusion.base_path import BaseTrajectory
from ..diffusion.schedule import NoiseSchedule
from ..diffusion.solvers import SolverTable
from ..formats.checkpoint import DecomposedConfig
from ..sampling.finite import check_given


def check_path(
    trajectory: BaseTrajectory,
    config: DecomposedConfig,
    schedule: NoiseSchedule,
    table: SolverTable,
    num_clips: int,
    base_path: str | None,
) -> None:
    """ValueError, naming both sides, when a model cannot follow a base path.

    schedule, table, num_clips, base_path: the model's noise schedule, and what is asked for
    """
    maker = trajectory.metadata.get("model", config.fingerprint())
    if maker != config.fingerprint():
        raise ValueError(
            f"the base trajectory was made by another model ({maker}, not {config.fingerprint()})"
        )
    trajectory.check_schedule(schedule)
    made = trajectory.table
    for name, theirs, ours in (
        ("num_inference_steps", len(made), len(table)),
        ("solver", made.solver, table.solver),
        ("eta", made.eta, table.eta),
        ("timesteps", made.timesteps.tolist(), table.timesteps.tolist()),
    ):
        if theirs != ours:
            raise ValueError(
                f"the base trajectory was made with {name} {theirs}, but {ours} is asked for"
            )
    if base_path == "stepwise" and trajectory.base_path == "clean":
        raise ValueError("the base trajectory is of an image: its base_path can only be clean")
    ours = [config.channels, config.height, config.width]
    clips, *theirs = trajectory.final.shape
    if theirs != ours:
        raise ValueError(
            f"the base trajectory's frames are [C, H, W] = {theirs}, this model's are {ours}"
        )
    check_given(trajectory=trajectory.states)
    if clips not in (1, num_clips):
        wanted = "not the 1" if num_clips == 1 else f"neither 1 nor the {num_clips}"
        raise ValueError(f"the base trajectory holds {clips} clips, {wanted} asked for")


def check_animates(config: DecomposedConfig, folder: Path) -> None:
    """ValueError for a model that cannot animate a picture."""
    if not config.animates_pictures:
        raise ValueError(
            f"{folder}: this model cannot animate a picture: its residual network was not trained "
            "for base_path='clean'"
        )
