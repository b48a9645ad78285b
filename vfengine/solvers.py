"""Solvers, each a table: one row (c1, c2, σ) per visited step, and a weight on the previous ε.

    z_p = c1 z_t + c2 ε̃_t + σ ξ,     ε̃_t = ε_t + w (ε_t - ε_prev)

t is the visited step, p the next one (ᾱ_p = 1 after the last). The rule is linear and the same for
every frame, which is all the two-phase form asks for. Tables are float64 on the CPU.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .schedule import NoiseSchedule

SOLVERS = ("ddim", "ddpm", "dpmsolver")


@dataclass(frozen=True, eq=False)
class SolverTable:
    """What a sampler does, step by step; S steps.

    solver, eta:    how it was made
    timesteps:      int64 [S], descending
    alphas_cumprod: float64 [S+1], ᾱ of the visited steps, then 1
    coeffs:         float64 [S, 3] = (c1, c2, σ), σ a standard deviation
    extrapolation:  float64 [S] = w, zero but for multistep solvers
    """

    solver: str
    eta: float
    timesteps: Tensor
    alphas_cumprod: Tensor
    coeffs: Tensor
    extrapolation: Tensor

    def __len__(self) -> int:
        return self.timesteps.numel()

    @property
    def stochastic(self) -> bool:
        """Whether any step adds noise."""
        return bool((self.coeffs[:, 2] > 0).any())


def solver_table(
    solver: str,
    schedule: NoiseSchedule,
    num_inference_steps: int,
    eta: float = 0.0,
    spacing: str = "leading",
) -> SolverTable:
    """The table of a named solver.

    "ddim":      DDIM(η), η in [0, 1] (Song et al. 2021); Algorithm 2 of VideoFusion at η = 0
    "ddpm":      η = 1; Algorithm 1 when num_inference_steps = T
    "dpmsolver": DPM-Solver-2, multistep, in ε form (Lu et al. 2022); η = 0

    Raises ValueError for an unknown solver or spacing, steps outside 1 … T, or an η the solver
    does not take.
    """
    if solver not in SOLVERS:
        raise ValueError(f"solver must be one of {SOLVERS}, got {solver!r}")
    if isinstance(eta, bool) or not isinstance(eta, (int, float)) or not 0.0 <= eta <= 1.0:
        raise ValueError(f"eta must be a number in [0, 1], got {eta!r}")
    if solver == "dpmsolver" and eta != 0.0:
        raise ValueError(f"dpmsolver is deterministic: eta must be 0, got {eta}")
    if solver == "ddpm" and eta not in (0.0, 1.0):
        raise ValueError(f"ddpm is eta = 1: leave eta out, or use solver='ddim'; got {eta}")
    eta = 1.0 if solver == "ddpm" else float(eta)

    timesteps = schedule.timesteps(num_inference_steps, spacing)
    alpha_t, alpha_p = schedule.selected(timesteps), schedule.selected_previous(timesteps)
    return SolverTable(
        solver=solver,
        eta=eta,
        timesteps=timesteps,
        alphas_cumprod=torch.cat([alpha_t, alpha_p[-1:]]),
        coeffs=ddim_coefficients(alpha_t, alpha_p, eta),
        extrapolation=(
            midpoint_extrapolation(alpha_t, alpha_p)
            if solver == "dpmsolver"
            else torch.zeros_like(alpha_t)
        ),
    )


def ddim_coefficients(alpha_t: Tensor, alpha_p: Tensor, eta: float) -> Tensor:
    """DDIM(η) in the form of this file (Song et al. 2021, eq. 12 and 16); returns [S, 3].

    alpha_t, alpha_p: float64 [S], ᾱ before and after each step, ᾱ_t < ᾱ_p <= 1
    """
    sigma = eta * ((1 - alpha_p) / (1 - alpha_t)).sqrt() * (1 - alpha_t / alpha_p).sqrt()
    c1 = (alpha_p / alpha_t).sqrt()
    c2 = (1 - alpha_p - sigma**2).sqrt() - c1 * (1 - alpha_t).sqrt()
    return torch.stack([c1, c2, sigma], dim=1)


def midpoint_extrapolation(alpha_t: Tensor, alpha_p: Tensor) -> Tensor:
    """w of DPM-Solver-2 multistep: h_t / (2 h_prev), h the step in ℓ = log √(ᾱ/(1-ᾱ)); [S].

    Zero, so plain DDIM, in the first step (no history) and the last (ℓ is infinite at ᾱ_p = 1).
    """
    h = 0.5 * (torch.logit(alpha_p) - torch.logit(alpha_t))
    w = torch.zeros_like(h)
    w[1:-1] = h[1:-1] / (2 * h[:-2])
    return w
