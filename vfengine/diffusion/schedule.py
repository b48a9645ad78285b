"""The noise schedule: ᾱ_t on the training grid, and which of its steps a sampler visits.

Everything is float64 on the CPU: a table of T numbers read once per run, never in a kernel.
Spacings follow diffusers' DDIMScheduler, so that both visit the same timesteps.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..arguments import as_int

SPACINGS = ("leading", "trailing", "linspace")


def check_input(name: str, x: Tensor) -> None:
    """TypeError for a network's input that is no tensor of a float dtype."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        found = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"{name}: the input must be a tensor of a float dtype, got {found}")


def batch_timesteps(name: str, t: Tensor | int, x: Tensor) -> Tensor:
    """One timestep for each sample of x [B, …], [B] on its device: t itself, or one t for all.

    Raises TypeError for a t that is neither an int nor a tensor of real numbers, ValueError for
    another shape or device.
    """
    if (number := None if isinstance(t, Tensor) else as_int(t)) is not None:
        return torch.full(x.shape[:1], number, dtype=torch.int64, device=x.device)
    if not isinstance(t, Tensor) or t.dtype == torch.bool or t.is_complex():
        found = t.dtype if isinstance(t, Tensor) else type(t).__name__
        raise TypeError(f"{name}: t must be an int or a tensor of timesteps, got {found}")
    if t.device != x.device:
        raise ValueError(f"{name}: t must be on {x.device} as its input, got {t.device}")
    if t.shape not in ((), x.shape[:1]):
        raise ValueError(f"{name}: t must have shape [{x.shape[0]}], got {tuple(t.shape)}")
    return t if t.ndim else t.expand(x.shape[:1])


def _check_betas(name: str, num_train_timesteps: int, beta_start: float, beta_end: float) -> None:
    if not 1 <= (as_int(num_train_timesteps) or 0) <= 10**6:
        raise ValueError(
            f"{name}: num_train_timesteps must be an int in 1 … 10^6, got {num_train_timesteps!r}"
        )
    if not 0.0 < beta_start <= beta_end < 1.0:
        raise ValueError(
            f"{name}: expected 0 < beta_start <= beta_end < 1, got {beta_start!r} and {beta_end!r}"
        )


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """ᾱ_t for t = 0 … T-1, strictly decreasing inside (0, 1).

    alphas_cumprod: [T], anything `torch.as_tensor` takes; kept as a float64 CPU copy
    recipe:         how a named schedule was made, for `to_dict`; leave it out otherwise

    Raises ValueError when the values are not 1-D, leave (0, 1) or do not decrease.
    """

    alphas_cumprod: Tensor
    recipe: dict = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        given = self.alphas_cumprod
        dtype = None if hasattr(given, "dtype") else torch.float32  # a list's, as ever
        alphas = torch.as_tensor(given, dtype=dtype, device="cpu").detach().double().clone()
        if alphas.ndim != 1 or alphas.numel() == 0:
            raise ValueError(f"NoiseSchedule: alphas_cumprod must be [T], got {list(alphas.shape)}")
        if not bool(((alphas > 0) & (alphas < 1)).all()):  # also false for NaN
            raise ValueError("NoiseSchedule: alphas_cumprod must lie inside (0, 1)")
        if not bool((alphas[1:] < alphas[:-1]).all()):
            raise ValueError("NoiseSchedule: alphas_cumprod must decrease from step to step")
        object.__setattr__(self, "alphas_cumprod", alphas)

    # -- named schedules ---------------------------------------------------------------------

    @classmethod
    def from_betas(cls, betas: np.ndarray, **recipe: Any) -> NoiseSchedule:
        """ᾱ_t = Π (1 - β_s) over s <= t; betas: [T]."""
        return cls(torch.from_numpy(np.cumprod(1.0 - np.asarray(betas, np.float64))), recipe)

    @classmethod
    def linear(
        cls, num_train_timesteps: int = 1000, beta_start: float = 1e-4, beta_end: float = 2e-2
    ) -> NoiseSchedule:
        """β linear from beta_start to beta_end (DDPM, Ho et al. 2020)."""
        _check_betas("NoiseSchedule.linear", num_train_timesteps, beta_start, beta_end)
        betas = np.linspace(beta_start, beta_end, num_train_timesteps)
        return cls.from_betas(
            betas,
            name="linear",
            num_train_timesteps=num_train_timesteps,
            beta_start=beta_start,
            beta_end=beta_end,
        )

    @classmethod
    def scaled_linear(
        cls, num_train_timesteps: int = 1000, beta_start: float = 8.5e-4, beta_end: float = 1.2e-2
    ) -> NoiseSchedule:
        """√β linear from √beta_start to √beta_end (latent diffusion, Rombach et al. 2022)."""
        _check_betas("NoiseSchedule.scaled_linear", num_train_timesteps, beta_start, beta_end)
        betas = np.linspace(beta_start**0.5, beta_end**0.5, num_train_timesteps) ** 2
        return cls.from_betas(
            betas,
            name="scaled_linear",
            num_train_timesteps=num_train_timesteps,
            beta_start=beta_start,
            beta_end=beta_end,
        )

    @classmethod
    def cosine(
        cls, num_train_timesteps: int = 1000, offset: float = 0.008, max_beta: float = 0.999
    ) -> NoiseSchedule:
        """ᾱ(s) = cos²(π/2 · (s + offset)/(1 + offset)), β capped (Nichol & Dhariwal 2021, (17))."""
        _check_betas("NoiseSchedule.cosine", num_train_timesteps, max_beta, max_beta)
        if not 0.0 <= offset < 1.0:
            raise ValueError(f"NoiseSchedule.cosine: offset must be in [0, 1), got {offset!r}")
        s = np.arange(num_train_timesteps + 1) / num_train_timesteps
        alphas = np.cos((s + offset) / (1.0 + offset) * np.pi / 2.0) ** 2
        betas = np.minimum(1.0 - alphas[1:] / alphas[:-1], max_beta)
        return cls.from_betas(
            betas,
            name="cosine",
            num_train_timesteps=num_train_timesteps,
            offset=offset,
            max_beta=max_beta,
        )

    # -- which steps a sampler visits ----------------------------------------------------------

    @property
    def num_train_timesteps(self) -> int:
        """T, the number of steps the networks were trained on."""
        return self.alphas_cumprod.numel()

    def timesteps(
        self, num_inference_steps: int, spacing: str = "leading", steps_offset: int = 0
    ) -> Tensor:
        """The visited timesteps, int64 [num_inference_steps], descending.

        "leading":  0, k, 2k … with k = T // num_inference_steps, each plus steps_offset
        "trailing": T-1, T-1-k … with k = T / num_inference_steps (starts at T-1)
        "linspace": evenly from T-1 to 0, both included

        As in diffusers, the offset is one of "leading" alone.

        Raises ValueError for an unknown spacing, steps outside 1 … T, or an offset that is no int
        from 0 on or leads past T-1.
        """
        total = self.num_train_timesteps
        count, offset = as_int(num_inference_steps), as_int(steps_offset)
        if count is None or not 1 <= count <= total:
            raise ValueError(
                f"timesteps: num_inference_steps must be an int in 1 … {total}, "
                f"got {num_inference_steps!r}"
            )
        if offset is None or offset < 0:
            raise ValueError(f"timesteps: steps_offset must be an int >= 0, got {steps_offset!r}")
        num_inference_steps, steps_offset = count, offset
        k = np.arange(num_inference_steps)
        if spacing == "leading":
            spaced = total // num_inference_steps
            first = (num_inference_steps - 1) * spaced + steps_offset
            if first >= total:
                raise ValueError(
                    f"timesteps: {num_inference_steps} steps with steps_offset {steps_offset} "
                    f"begin at {first}, past the last timestep {total - 1}"
                )
            steps = (k * spaced)[::-1] + steps_offset
        elif spacing == "trailing":
            steps = np.round(total - k * (total / num_inference_steps)) - 1
        elif spacing == "linspace":
            steps = np.linspace(0, total - 1, num_inference_steps).round()[::-1]
        else:
            raise ValueError(f"timesteps: spacing must be one of {SPACINGS}, got {spacing!r}")
        return torch.from_numpy(steps.astype(np.int64))

    def selected(self, timesteps: Tensor) -> Tensor:
        """ᾱ_t of each visited step, float64 [S]; timesteps: int64 [S], strictly descending.

        Raises ValueError when the timesteps leave 0 … T-1 or do not descend.
        """
        steps = torch.as_tensor(timesteps, device="cpu").to("cpu")
        if steps.ndim != 1 or steps.numel() == 0 or steps.dtype != torch.int64:
            raise ValueError(f"timesteps must be int64 [S], got {steps.dtype} {list(steps.shape)}")
        if bool((steps < 0).any()) or bool((steps >= self.num_train_timesteps).any()):
            raise ValueError(f"timesteps must lie in 0 … {self.num_train_timesteps - 1}")
        if not bool((steps[1:] < steps[:-1]).all()):
            raise ValueError("timesteps must descend from step to step")
        return self.alphas_cumprod[steps]

    def selected_previous(self, timesteps: Tensor, set_alpha_to_one: bool = True) -> Tensor:
        """ᾱ_p after each visited step: that of the next visited one; float64 [S].

        set_alpha_to_one: whether the last step goes to 1, a clean sample; otherwise to ᾱ_0

        The less noisy neighbour on the *visited* grid, not t-1.
        """
        last = (
            torch.ones(1, dtype=torch.float64, device="cpu")
            if set_alpha_to_one
            else self.alphas_cumprod[:1]
        )
        return torch.cat([self.selected(timesteps)[1:], last])

    def signal_and_noise(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """√ᾱ_t and √(1-ᾱ_t), both [B, 1, …] on like's device, float64 for float64, else fp32.

        t: int64 [B], one step per sample of like [B, …]

        Raises ValueError when t is not int64 [B] with values in 0 … T-1.
        """
        if t.dtype != torch.int64 or t.shape != like.shape[:1]:
            raise ValueError(f"t must be int64 [{like.shape[0]}], got {t.dtype} {list(t.shape)}")
        t = t.cpu()
        if bool((t < 0).any()) or bool((t >= self.num_train_timesteps).any()):
            raise ValueError(f"t must lie in 0 … {self.num_train_timesteps - 1}, got {t.tolist()}")
        alphas = self.alphas_cumprod[t].reshape(-1, *[1] * (like.ndim - 1))
        at_least_fp32 = torch.promote_types(like.dtype, torch.float32)
        signal, noise = alphas.sqrt(), (1.0 - alphas).sqrt()
        place = {"device": like.device, "dtype": at_least_fp32, "non_blocking": True}
        return signal.to(**place), noise.to(**place)

    # -- identity --------------------------------------------------------------------------------

    def fingerprint(self) -> str:
        """16 hex digits naming the schedule: SHA-256 of ᾱ rounded to little-endian fp32.

        Rounded, so that the last float64 bit of another machine's cosine changes nothing.
        """
        data = self.alphas_cumprod.numpy().astype("<f4").tobytes()
        return hashlib.sha256(data).hexdigest()[:16]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, NoiseSchedule):
            return NotImplemented
        return torch.equal(self.alphas_cumprod, other.alphas_cumprod)

    def __hash__(self) -> int:
        return hash(self.fingerprint())

    def to_dict(self) -> dict:
        """A JSON-ready description: the named recipe, or the values themselves."""
        return dict(self.recipe) or {"alphas_cumprod": self.alphas_cumprod.tolist()}

    @classmethod
    def from_dict(cls, config: dict) -> NoiseSchedule:
        """The inverse of `to_dict`. Raises ValueError for an unknown name or argument."""
        args = dict(config)
        if set(args) == {"alphas_cumprod"}:
            return cls(torch.tensor(args["alphas_cumprod"], dtype=torch.float64, device="cpu"))
        named = {"linear": cls.linear, "scaled_linear": cls.scaled_linear, "cosine": cls.cosine}
        name = args.pop("name", None)
        if not isinstance(name, str) or name not in named:
            raise ValueError(f"NoiseSchedule: name must be one of {tuple(named)}, got {name!r}")
        try:
            return named[name](**args)
        except TypeError as error:
            raise ValueError(f"NoiseSchedule: {name} does not take {sorted(args)}") from error
