"""Solvers, each a table: per visited step a row (c1, c2, σ), and how it mixes in earlier ε.

    z_p = c1 z_t + c2 ε̃_t + σ ξ,     (ε̃_t, h'_1 … h'_H) = mixing_t (ε_t, h_1 … h_H)

t is the visited step, p the next one (after the last, ᾱ_p is 1 or ᾱ_0); the history h is 0 before
the first step, h' is the next step's. The rule is linear and the same for every frame, which is all
the two-phase form asks for. Every linear multistep solver of the probability-flow ODE has this
form: ε = 0 must take √ᾱ_t x to √ᾱ_p x, so c1 = √(ᾱ_p/ᾱ_t), and a constant ε must give DDIM's c2.

Below, N = √((1-ᾱ)/ᾱ) and Z = z/√ᾱ, so that a step is Z_p = Z_t + (N_p - N_t) ε̃_t and the clean
sample is predicted as x_t = Z_t - N_t ε_t. Tables are float64 on the CPU.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..arguments import as_float
from ..names import SOLVERS
from .schedule import NoiseSchedule

NUM_HISTORY = {"ddim": 0, "ddpm": 0, "dpmsolver": 1, "dpmsolver++": 1, "unipc": 2}  # H of each


@dataclass(frozen=True, eq=False)
class SolverTable:
    """What a sampler does, step by step; S steps, H tensors of history.

    solver, eta:    how it was made
    timesteps:      int64 [S], descending
    alphas_cumprod: float64 [S+1], ᾱ of the visited steps, then where the last one goes: 1 or ᾱ_0
    coeffs:         float64 [S, 3] = (c1, c2, σ), σ a standard deviation
    mixing:         float64 [S, 1+H, 1+H]; all rows sum to 1; ones where H = 0 (ddim, ddpm)
    """

    solver: str
    eta: float
    timesteps: Tensor
    alphas_cumprod: Tensor
    coeffs: Tensor
    mixing: Tensor

    def __len__(self) -> int:
        return self.timesteps.numel()

    @property
    def num_history(self) -> int:
        """H, how many tensors of ε's size a step hands to the next."""
        return self.mixing.shape[1] - 1

    @property
    def stochastic(self) -> bool:
        """Whether any step adds noise."""
        return bool((self.coeffs[:, 2] > 0).any())

    def fingerprint(self) -> str:
        """16 hex digits naming the table: SHA-256 of all that it holds, to the last bit."""
        tensors = (self.timesteps, self.alphas_cumprod, self.coeffs, self.mixing)
        digest = hashlib.sha256(f"{self.solver} {self.eta!r} {len(self)}".encode())
        for tensor in tensors:
            digest.update(tensor.numpy().tobytes())
        return digest.hexdigest()[:16]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, SolverTable):
            return NotImplemented
        return self.fingerprint() == other.fingerprint()

    def __hash__(self) -> int:
        return hash(self.fingerprint())


def usual_spacing(solver: str) -> str:
    """The spacing of timesteps that a solver takes where a model does not name its own.

    Solvers of higher order are for few steps: these begin at T-1, where a state is noise alone.
    "leading" would begin them at T - T / steps, whose states are not ("Common Diffusion Noise
    Schedules and Sample Steps Are Flawed", Lin et al. 2024, arXiv 2305.08891).
    benchmarks/bench_solvers.py measures it.
    """
    return "leading" if solver in ("ddim", "ddpm") else "trailing"


def solver_table(
    solver: str,
    schedule: NoiseSchedule,
    num_inference_steps: int,
    eta: float = 0.0,
    spacing: str = "leading",
    steps_offset: int = 0,
    set_alpha_to_one: bool = True,
    timesteps: Sequence[int] | None = None,
) -> SolverTable:
    """The table of a named solver.

    "ddim":        DDIM(η), η in [0, 1] (Song et al. 2021); Algorithm 2 of VideoFusion at η = 0
    "ddpm":        η = 1; Algorithm 1 when num_inference_steps = T
    "dpmsolver":   DPM-Solver-2, multistep, in ε form (Lu et al. 2022a); H = 1
    "dpmsolver++": DPM-Solver++(2M), midpoint (Lu et al. 2022b); H = 1
    "unipc":       UniPC-2 with B(h) = e^h - 1 and corrector (Zhao et al. 2023); H = 2

    The last three take η = 0 alone; their first and last steps are of first order.

    spacing, steps_offset: see `NoiseSchedule.timesteps`
    set_alpha_to_one:      False: the last step goes to ᾱ_0, as published latent models were sampled
    timesteps: the visited ones, descending, in place of num_inference_steps, spacing and offset

    Raises ValueError for an unknown solver or spacing, steps outside 1 … T, an η the solver does
    not take, or an offset that leads past T-1.
    """
    if solver not in SOLVERS:
        raise ValueError(f"solver must be one of {SOLVERS}, got {solver!r}")
    if not isinstance(schedule, NoiseSchedule):
        raise TypeError(f"schedule must be a NoiseSchedule, got {type(schedule).__name__}")
    number = as_float(eta)
    if number is None or not 0.0 <= number <= 1.0:
        raise ValueError(f"eta must be a number in [0, 1], got {eta!r}")
    eta = number
    if solver not in ("ddim", "ddpm") and eta != 0.0:
        raise ValueError(f"{solver} is deterministic: eta must be 0, got {eta}")
    if solver == "ddpm" and eta not in (0.0, 1.0):
        raise ValueError(f"ddpm is eta = 1: leave eta out, or use solver='ddim'; got {eta}")
    eta = 1.0 if solver == "ddpm" else float(eta)

    if timesteps is None:
        timesteps = schedule.timesteps(num_inference_steps, spacing, steps_offset)
    else:
        timesteps = torch.tensor(timesteps, dtype=torch.int64, device="cpu")
    alpha_t = schedule.selected(timesteps)
    alpha_p = schedule.selected_previous(timesteps, set_alpha_to_one)
    h = 0.5 * (torch.logit(alpha_p) - torch.logit(alpha_t))
    if h[-1] == 0:  # from t = 0 to ᾱ_0: c1 = 1 and c2 = 0, whatever is mixed
        h[-1] = torch.inf
    if solver == "dpmsolver":
        mixing = extrapolation_mixing(midpoint_weights(h))
    elif solver == "dpmsolver++":
        mixing = dpmsolver_pp_mixing(h)
    elif solver == "unipc":
        mixing = unipc_mixing(h)
    else:
        mixing = no_mixing(len(timesteps))
    return SolverTable(
        solver=solver,
        eta=eta,
        timesteps=timesteps,
        alphas_cumprod=torch.cat([alpha_t, alpha_p[-1:]]),
        coeffs=ddim_coefficients(alpha_t, alpha_p, eta),
        mixing=mixing,
    )


def ddim_coefficients(alpha_t: Tensor, alpha_p: Tensor, eta: float) -> Tensor:
    """DDIM(η) in the form of this file (Song et al. 2021, eq. 12 and 16); returns [S, 3].

    alpha_t, alpha_p: float64 [S], ᾱ before and after each step, ᾱ_t <= ᾱ_p <= 1
    """
    sigma = eta * ((1 - alpha_p) / (1 - alpha_t)).sqrt() * (1 - alpha_t / alpha_p).sqrt()
    c1 = (alpha_p / alpha_t).sqrt()
    c2 = (1 - alpha_p - sigma**2).sqrt() - c1 * (1 - alpha_t).sqrt()
    return torch.stack([c1, c2, sigma], dim=1)


# -- mixing ------------------------------------------------------------------------------------
#
# h: float64 [S], the steps in log-SNR, h_t = log(N_t/N_p); infinite where the last goes to 1.
# A quantity is its row of coefficients on (ε, h_1 … h_H): a sum of rows is a sum of quantities.


def no_mixing(num_steps: int) -> Tensor:
    """ε̃ = ε, and no history: [S, 1, 1]."""
    return torch.ones(num_steps, 1, 1, dtype=torch.float64, device="cpu")


def extrapolation_mixing(w: Tensor) -> Tensor:
    """ε̃ = ε + w (ε - ε_prev), h_1 = ε_prev: [S, 2, 2]; w: float64 [S]."""
    eps, eps_prev = torch.eye(2, dtype=torch.float64, device="cpu")
    mixed = eps + w[:, None] * (eps - eps_prev)
    return torch.stack([mixed, eps.expand_as(mixed)], dim=1)


def midpoint_weights(h: Tensor) -> Tensor:
    """w = h_t / (2 h_prev) of the second-order multistep solvers; [S].

    Zero, so plain DDIM, in the first step (no history) and in the last, where h may be infinite.
    """
    w = torch.zeros_like(h)
    w[1:-1] = h[1:-1] / (2 * h[:-2])
    return w


def dpmsolver_pp_mixing(h: Tensor) -> Tensor:
    """DPM-Solver++(2M): [S, 2, 2].

    Z_p = Z_t - (1 - N_p/N_t) (Z_t - D) with D = x_t + w (x_t - x_prev), hence ε̃ = (Z_t - D)/N_t:

        ε̃ = ε + w (ε - h_1),     h_1 = (Z_t - x_prev)/N_t,     h'_1 = ε̃ + (N_t/N_p) (ε - ε̃)

    h_1 is the noise left in z_t if the previous prediction was right.
    """
    w, rho = midpoint_weights(h)[:, None], _noise_ratio(h)
    eps, h_1 = torch.eye(2, dtype=torch.float64, device="cpu")
    mixed = eps + w * (eps - h_1)
    return torch.stack([mixed, mixed + rho * (eps - mixed)], dim=1)


def unipc_mixing(h: Tensor) -> Tensor:
    """UniPC-2, B(h) = e^h - 1: [S, 3, 3].

    z_t is the predicted sample, which the network sees; the next prediction starts at the corrected
    one, Zc_t = (N_t/N_prev) Zc_prev + q_prev (a0 x_t + a1 x_prev + a2 x_prevprev), q = 1 - N_p/N_t
    and a0 + a1 + a2 = 1 of `corrector_weights`. Up to it all is DPM-Solver++(2M), h_1 included.
    Zc_t - Z_t is linear in ε_t and in the past, and 0 where ε is constant: it is - N_t G (ε - h_2)
    with G = a0 q_prev, and h_2 the ε that would need no correction. Then

        ε̃   = ε + w (ε - h_1) + G N_p/(N_t - N_p) (ε - h_2)
        h'_2 = (ε̃ - (G/q) (ε - h_2) - a1' h'_1 - a2' (Z_p - x_prev)/N_p) / a0'

    a' is the next step's corrector; (Z_p - x_prev)/N_p = ε̃ + (N_t/N_p) (h_1 - ε̃). The first step
    has no corrector (G = 0); where the last goes to N_p = 0 a correction would not matter.
    """
    w, rho = midpoint_weights(h)[:, None], _noise_ratio(h)
    a0, a1, a2 = (a[:, None] for a in corrector_weights(h))
    q = -torch.expm1(-h)[:, None]
    gain = torch.zeros_like(q)
    gain[1:] = a0[:-1] * q[:-1]

    eps, h_1, h_2 = torch.eye(3, dtype=torch.float64, device="cpu")
    correction = gain * (eps - h_2)
    mixed = eps + w * (eps - h_1) + correction / torch.expm1(h)[:, None]
    next_1 = mixed + rho * (eps - mixed)
    next_2 = (mixed - correction / q - a1 * next_1 - a2 * (mixed + rho * (h_1 - mixed))) / a0
    return torch.stack([mixed, next_1, next_2], dim=1)


def corrector_weights(h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """a0, a1, a2 on x_p, x_t, x_prev, for the corrector that follows each step; each [S].

    The mean over the step of the parabola through the three, at τ = 1, 0 and -r = -h_prev/h, with
    weight e^{hτ} (Gauss-Legendre: the closed form cancels where h is small). Half and half after
    the first step, which has no x_prev, and after the last, where it goes unused.
    """
    a0, a2 = torch.full_like(h, 0.5), torch.zeros_like(h)
    tau, weights = (torch.from_numpy(x) / 2 for x in np.polynomial.legendre.leggauss(32))
    tau = tau + 0.5
    inner, r = h[1:-1, None], h[:-2] / h[1:-1]
    weights = weights * (inner * (tau - 1)).exp()
    weights = weights / weights.sum(1, keepdim=True)
    a0[1:-1] = (weights * tau * (tau + r[:, None])).sum(1) / (1 + r)
    a2[1:-1] = -(weights * tau * (1 - tau)).sum(1) / (r * (1 + r))
    return a0, 1 - a0 - a2, a2


def _noise_ratio(h: Tensor) -> Tensor:
    """N_t/N_p as [S, 1]; 1 in the last step, where it may be infinite and nothing follows."""
    rho = h.exp()
    rho[-1] = 1.0
    return rho[:, None]
