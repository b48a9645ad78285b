"""The base path: all that the residual phase needs to know of the base generator.

    d_t = z_m,t - √(1-ᾱ_t) b̂_t        √ᾱ_t times the clean base frame predicted at step t
    d_0 = z_m                          the finished base frame, kept last
    g_t = d_p - c1 d_t                 the base term of the step t -> p

T small images: about a megabyte, computed once, saved, and used again for any residual seed, number
of frames, λ, or chunk of a long clip. A given image has a path of its own, d_t = √ᾱ_t x.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ..files import open_tensors, parse_json, write_tensors
from ..names import BASE_PATHS, SOLVERS
from .schedule import NoiseSchedule
from .solvers import NUM_HISTORY, SolverTable, extrapolation_mixing, no_mixing, solver_table

_FORMAT = "vfengine.base_trajectory.2"
_FORMAT_1 = "vfengine.base_trajectory.1"  # before solvers with more history than ε_prev


@dataclass(frozen=True, eq=False)
class BaseTrajectory:
    """A base path of S steps, for B clips.

    states:      [S+1, B, C, H, W] fp32 or float64: d_t of each visited step, then the final frame
    table:       the solver that made it, and that the residual phase will use
    schedule_id: `NoiseSchedule.fingerprint()` of its schedule
    base_path:   "stepwise" (the base network's estimates) or "clean" (d_t = √ᾱ_t x, so g_t = 0)
    metadata:    notes that travel with the file, such as seeds: str -> str
    """

    states: Tensor
    table: SolverTable
    schedule_id: str
    base_path: str = "stepwise"
    metadata: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.states.ndim != 5 or self.states.shape[0] != len(self.table) + 1:
            raise ValueError(
                f"BaseTrajectory: states must be [{len(self.table) + 1}, B, C, H, W], "
                f"got {list(self.states.shape)}"
            )
        if self.states.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"BaseTrajectory: states must be fp32 or float64: {self.states.dtype}")
        if self.base_path not in BASE_PATHS:
            raise ValueError(f"base_path must be one of {BASE_PATHS}, got {self.base_path!r}")

    @property
    def final(self) -> Tensor:
        """The finished base frame, [B, C, H, W]."""
        return self.states[-1]

    @property
    def timesteps(self) -> Tensor:
        """The visited timesteps, int64 [S], descending."""
        return self.table.timesteps

    @property
    def num_inference_steps(self) -> int:
        """S, the number of steps."""
        return len(self.table)

    def base_terms(self) -> Tensor:
        """g_t = d_p - c1 d_t of every step, [S, B, C, H, W]; exactly 0 on a clean path."""
        if self.base_path == "clean":
            return torch.zeros_like(self.states[:-1])
        c1 = self.table.coeffs[:, 0].view(-1, 1, 1, 1, 1).to(self.states.device)
        return (self.states[1:] - c1 * self.states[:-1]).to(self.states.dtype)

    def clean(self, table: SolverTable | None = None) -> BaseTrajectory:
        """The path of base_path="clean": d_t = √ᾱ_t x_m, with x_m this path's finished frame.

        table: the steps of the residual phase; None: those of this path
        """
        table = self.table if table is None else table
        states = _clean_states(self.final, table)
        return BaseTrajectory(states, table, self.schedule_id, "clean", self.metadata)

    @classmethod
    def from_image(
        cls,
        x: Tensor,
        *,
        schedule: NoiseSchedule,
        num_inference_steps: int = 50,
        solver: str = "ddim",
        eta: float = 0.0,
        spacing: str = "leading",
        timesteps: Sequence[int] | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> BaseTrajectory:
        """The path of a given base frame, with no base generator: d_t = √ᾱ_t x.

        x: [B, C, H, W] floating point, in the range the networks were trained on
        timesteps: those to visit, descending, in place of num_inference_steps and spacing

        Raises ValueError for another shape, TypeError for another dtype.
        """
        table = solver_table(
            solver, schedule, num_inference_steps, eta, spacing, timesteps=timesteps
        )
        return cls.along(x, table, schedule, metadata)

    @classmethod
    def along(
        cls,
        x: Tensor,
        table: SolverTable,
        schedule: NoiseSchedule,
        metadata: Mapping[str, str] | None = None,
    ) -> BaseTrajectory:
        """As `from_image`, along a solver's table on the schedule."""
        if x.ndim != 4 or x.numel() == 0:
            raise ValueError(f"from_image: expected x [B, C, H, W], got {list(x.shape)}")
        if not x.is_floating_point():
            raise TypeError(f"from_image: expected a floating point image, got {x.dtype}")
        if not bool(x.isfinite().all()):
            raise ValueError("from_image: x must be finite, got NaN or infinity")
        states = _clean_states(x.to(torch.promote_types(x.dtype, torch.float32)), table)
        return cls(states, table, schedule.fingerprint(), "clean", dict(metadata or {}))

    def to(self, device: torch.device | str) -> BaseTrajectory:
        """The same path with its states on another device."""
        states = self.states.to(device)
        return BaseTrajectory(states, self.table, self.schedule_id, self.base_path, self.metadata)

    def check_schedule(self, schedule: NoiseSchedule) -> None:
        """ValueError when the path was made on another schedule, TypeError for what is none."""
        if not isinstance(schedule, NoiseSchedule):
            raise TypeError(f"schedule must be a NoiseSchedule, got {type(schedule).__name__}")
        if schedule.fingerprint() != self.schedule_id:
            raise ValueError(
                f"the base trajectory was made with noise schedule {self.schedule_id}, "
                f"not {schedule.fingerprint()}"
            )

    # -- on disk -------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike) -> None:
        """Write a .safetensors file, whole or not at all. Raises OSError when it cannot."""
        tensors = {
            "states": self.states,
            "timesteps": self.table.timesteps,
            "alphas_cumprod": self.table.alphas_cumprod,
            "coeffs": self.table.coeffs,
            "mixing": self.table.mixing,
        }
        header = {
            "format": _FORMAT,
            "solver": self.table.solver,
            "eta": repr(self.table.eta),
            "schedule_id": self.schedule_id,
            "base_path": self.base_path,
            "metadata": json.dumps(dict(self.metadata)),
        }
        write_tensors(Path(path), tensors, header)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike,
        *,
        schedule: NoiseSchedule | None = None,
        device: torch.device | str = "cpu",
    ) -> BaseTrajectory:
        """Read what `save` wrote, now or in format 1.

        schedule: refuse a path of any other schedule

        Raises FileNotFoundError; ValueError, one line, for a file that is truncated, is not a base
        trajectory, or was made with another schedule.
        """
        path = Path(path)
        if path.is_dir():
            raise ValueError(f"{path}: a folder, not a base trajectory")
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such base trajectory")
        try:
            with open_tensors(path) as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                trajectory = _from_file(file.metadata() or {}, tensors)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: truncated, or not a base trajectory ({error})") from error
        if schedule is not None:
            trajectory.check_schedule(schedule)
        return trajectory.to(device)


def _clean_states(x: Tensor, table: SolverTable) -> Tensor:
    """d_t = √ᾱ_t x, ending in x itself; [S+1, B, C, H, W]."""
    signal = table.alphas_cumprod.sqrt().view(-1, 1, 1, 1, 1).to(x.device)
    signal[-1] = 1  # also where the last step goes to ᾱ_0
    return (signal * x.contiguous()).to(x.dtype)  # the steps take no other strides


def _from_file(header: Mapping[str, str], tensors: Mapping[str, Tensor]) -> BaseTrajectory:
    """Header and tensors back to a path; KeyError, TypeError or ValueError for anything amiss."""
    if header.get("format") not in (_FORMAT, _FORMAT_1):
        raise ValueError(f"format {header.get('format')!r}, expected {_FORMAT!r} or {_FORMAT_1!r}")
    if header["solver"] not in SOLVERS:
        raise ValueError(f"solver {header['solver']!r} is not one of {SOLVERS}")
    tensors = dict(tensors)
    if header["format"] == _FORMAT_1:
        tensors["mixing"] = _mixing_of_format_1(header["solver"], tensors["extrapolation"])
    steps, width = tensors["timesteps"].numel(), 1 + NUM_HISTORY[header["solver"]]
    expected = {
        "timesteps": ((steps,), torch.int64),
        "alphas_cumprod": ((steps + 1,), torch.float64),
        "coeffs": ((steps, 3), torch.float64),
        "mixing": ((steps, width, width), torch.float64),
    }
    for name, (shape, dtype) in expected.items():
        found = tensors[name]
        if found.shape != shape or found.dtype != dtype:
            raise ValueError(f"{name} is {found.dtype} {list(found.shape)}")
    for name in ("states", *expected):
        if not bool(tensors[name].isfinite().all()):
            raise ValueError(f"{name} are not finite")
    if bool((tensors["timesteps"].diff() > 0).any()) or bool((tensors["timesteps"] < 0).any()):
        raise ValueError(f"timesteps {tensors['timesteps'].tolist()} do not descend to 0 or more")
    if bool(((tensors["alphas_cumprod"] <= 0) | (tensors["alphas_cumprod"] > 1)).any()):
        raise ValueError("alphas_cumprod do not lie in (0, 1]")
    metadata, eta = parse_json(header["metadata"]), float(header["eta"])
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ValueError("metadata is not a mapping of texts to texts")
    if not 0 <= eta <= 1:
        raise ValueError(f"eta is {eta}")
    table = SolverTable(
        solver=header["solver"], eta=eta, **{name: tensors[name] for name in expected}
    )
    return BaseTrajectory(
        states=tensors["states"],
        table=table,
        schedule_id=header["schedule_id"],
        base_path=header["base_path"],
        metadata=metadata,
    )


def _mixing_of_format_1(solver: str, w: Tensor) -> Tensor:
    """The mixing of w [S] in ε̃ = ε + w (ε - ε_prev); ValueError where the solver has no w."""
    if w.ndim != 1 or w.dtype != torch.float64:
        raise ValueError(f"extrapolation is {w.dtype} {list(w.shape)}")
    if solver == "dpmsolver":
        return extrapolation_mixing(w)
    if solver not in ("ddim", "ddpm") or bool(w.any()):
        raise ValueError(f"{solver} does not extrapolate in format 1")
    return no_mixing(len(w))
