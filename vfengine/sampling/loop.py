"""The sampling loops as steps over static buffers: what a CUDA graph can replay, and a CPU too.

A loop allocates its buffers once. `start` fills them, every `step` moves them on by one row of the
solver's table; the row is a counter on the device, so all steps are the same list of operations on
the same memory. Loops can be started again, with other noise.

The mathematics is that of vfengine/sampling/api.py, which drives them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..diffusion.decompose import Lam, Model, base_index, combine, frame_weights
from ..diffusion.solvers import SolverTable
from .cuda_graph import Step, captured

Callback = Callable[[str, int, int], None]


class Loop:
    """What all have: the table on the device, the counter, the timestep of every sample.

    phase: "base", "residual", "interleaved" or "video", for progress
    """

    phase: str

    def __init__(
        self, table: SolverTable, batch: int, device: torch.device, dtype: torch.dtype, backend: str
    ) -> None:
        self.table, self.device, self.dtype, self.backend = table, device, dtype, backend
        self.state_dtype = torch.promote_types(dtype, torch.float32)
        self.coeffs = table.coeffs.to(device, self.state_dtype)
        self.timesteps = table.timesteps.to(device)
        self.counter = torch.zeros(1, dtype=torch.int32, device=device)  # of the steps done
        self.t = torch.empty(batch, dtype=torch.int64, device=device)
        self._replay: Step | None = None

    def __len__(self) -> int:
        return len(self.table)

    def step(self) -> None:
        """One step of the solver on the buffers."""
        raise NotImplementedError

    def stepper(self, capture: bool) -> Step:
        """`step`, on CUDA captured in a graph if asked; to be called before `start`.

        Raises RuntimeError for a step that cannot be captured, as one of float64, whose references
        wait for the device.
        """
        if not capture or self.device.type != "cuda":
            return self.step
        if self.dtype == torch.float64:
            raise RuntimeError("steps of float64 clips cannot be captured in a CUDA graph")
        if self._replay is None:
            self._replay = captured(self.step, self.device, self._rewind)
        return self._replay

    def run(self, step: Step, callback: Callback | None = None) -> None:
        """All steps, from `stepper`, after `start`."""
        for k in range(len(self)):
            step()
            if callback is not None:
                callback(self.phase, k + 1, len(self))

    def _rewind(self) -> None:
        self.counter.zero_()

    def _set_timestep(self, row: Tensor) -> None:
        self.t.copy_(self.timesteps.index_select(0, row).expand_as(self.t))

    def _op(self, op: Callable[..., Tensor], *arguments: Tensor, out: Tensor, **options) -> None:
        """An op of vfengine/ops at the counter's row: its kernel, or its reference for float64."""
        if out.dtype != torch.float64:
            op(*arguments, **options, out=out, backend=self.backend)
        elif self.backend in ("auto", "reference"):
            out.copy_(getattr(ops, f"{op.__name__}_reference")(*arguments, **options))
        else:
            raise ValueError(f"float64 clips run backend='reference', got {self.backend!r}")


class BaseLoop(Loop):
    """The base phase: image sampling of z_m that keeps d_t = z_m - √(1-ᾱ_t) b̂.

    states: [S+1, B, C, H, W] fp32 (float64 for float64): d_t of the steps done, then z_m
    """

    phase = "base"

    def __init__(
        self,
        model: Model,
        noise: Tensor,
        table: SolverTable,
        *,
        seed: int,
        sample_offset: int = 0,
        backend: str = "auto",
    ) -> None:
        super().__init__(table, noise.shape[0], noise.device, noise.dtype, backend)
        self.model = model
        like = {"dtype": self.state_dtype, "device": self.device}
        self.noise_levels = (1.0 - table.alphas_cumprod).sqrt().to(**like)
        self.lam = torch.ones(1, device=self.device)
        self.z = torch.zeros(noise.shape, **like).unsqueeze(1)  # a clip of one frame, the base's
        self.d = torch.zeros_like(self.z)
        self.states = torch.zeros(len(table) + 1, *noise.shape, **like)
        self.mix = _Mixing(table, self.z.shape, **like)
        self.noise: dict[str, Any] = {}
        if table.stochastic:
            self.noise = {"base_seed": seed, "residual_seed": 0, "sample_offset": sample_offset}

    def start(self, noise: Tensor) -> None:
        """noise: b [B, C, H, W]."""
        self._rewind()
        self.mix.clear()
        self.z[:, 0].copy_(noise)  # z_m <- b

    def step(self) -> None:
        row, z = self.counter.long(), self.z
        self._set_timestep(row)
        z_m = z[:, 0].to(self.dtype)
        b = estimate("base_model", self.model, z_m, self.t)
        b = _owned(b.to(z.dtype).unsqueeze(1), z)
        place = {"lam": self.lam, "step": self.counter}
        self._op(
            ops.remove_base, z, b[:, 0], noise_levels=self.noise_levels, **place, out=self.d
        )  # d_t
        self.states.index_copy_(0, row, self.d.transpose(0, 1))
        b = self.mix(row, b)
        place |= {"coeffs": self.coeffs, **self.noise}
        self._op(ops.decomposed_step, z, b[:, 0], b, **place, out=z)  # λ = 1: ε̂ = b̂
        self.states.index_copy_(0, row + 1, z.transpose(0, 1))  # the last one stays
        self.counter.add_(1)


class ResidualLoop(Loop):
    """The residual phase: u <- c1 u + √λ g + √(1-λ) (c2 r̂ + σ ξ) for all frames.

    states: [S+1, B or 1, C, H, W], the base path; read where it lies, step by step
    clean:  whether it is the path of a finished picture, on which g = 0
    u:      [B, N, C, H, W] in noise's dtype: the clip less its base noise, at last the clip
    """

    phase = "residual"

    def __init__(
        self,
        model: Model,
        noise: Tensor,
        states: Tensor,
        table: SolverTable,
        *,
        clean: bool,
        lam: Lam,
        seed: int,
        sample_offset: int = 0,
        frame_offset: int = 0,
        backend: str = "auto",
    ) -> None:
        batch, frames, *picture = noise.shape
        super().__init__(table, batch, noise.device, noise.dtype, backend)
        self.model, self.states, self.clean = model, states, clean
        self.m = base_index(frames)
        self.lam = frame_weights(lam, frames, device=self.device)
        self.c1 = table.coeffs[:, 0].to(self.device)  # float64: g is a small difference
        self.u = torch.zeros(noise.shape, dtype=self.dtype, device=self.device)
        self.g = torch.zeros(batch, *picture, dtype=self.dtype, device=self.device)
        self.mix = _Mixing(table, noise.shape, self.state_dtype, self.device)
        self.noise: dict[str, Any] = {}
        if table.stochastic:
            offsets = {"sample_offset": sample_offset, "frame_offset": frame_offset}
            self.noise = {"seed": seed, **offsets}

    def start(self, noise: Tensor) -> None:
        """noise: r [B, N, C, H, W]; the first state of the path must be there."""
        self._rewind()
        self.mix.clear()
        # z'_i at z_i = √λ_i b + √(1-λ_i) r_i is √λ_i d + √(1-λ_i) r_i
        d = self.states[0].expand(noise.shape[0], -1, -1, -1)
        self.u.copy_(combine(d, noise.to(d.dtype), self.lam))

    def step(self) -> None:
        row, u = self.counter.long(), self.u
        d_p = self.states.index_select(0, row + 1)[0]
        if not self.clean:  # g = d_p - c1 d_t
            d_t, c1 = self.states.index_select(0, row)[0], self.c1.index_select(0, row)
            self.g.copy_(d_p.double() - c1 * d_t.double())
        self._set_timestep(row)
        r = estimate("residual_model", self.model, u, self.t).to(self.dtype)
        r = _owned(self.mix(row, r), u)
        table = (self.lam, self.coeffs, self.counter)
        self._op(ops.residual_step, u, r, self.g, *table, **self.noise, out=u)
        u[:, self.m].copy_(d_p)  # λ_m = 1 makes it so up to rounding; written, bit for bit
        self.counter.add_(1)


class InterleavedLoop(Loop):
    """Algorithm 2 of VideoFusion, and with σ > 0 Algorithm 1, line by line.

    z: [B, N, C, H, W] fp32 (float64 for float64)
    """

    phase = "interleaved"

    def __init__(
        self,
        base_model: Model,
        residual_model: Model,
        base_noise: Tensor,
        residual_noise: Tensor,
        table: SolverTable,
        *,
        lam: Lam,
        base_seed: int,
        residual_seed: int,
        backend: str = "auto",
    ) -> None:
        batch, frames = residual_noise.shape[:2]
        super().__init__(table, batch, residual_noise.device, residual_noise.dtype, backend)
        self.base_model, self.residual_model = base_model, residual_model
        self.base_dtype = base_noise.dtype
        like = {"dtype": self.state_dtype, "device": self.device}
        self.m, self.lam = base_index(frames), frame_weights(lam, frames, device=self.device)
        self.noise_levels = (1.0 - table.alphas_cumprod).sqrt().to(**like)
        self.z = torch.zeros(residual_noise.shape, **like)
        self.z_removed = torch.zeros_like(self.z)
        self.mix_base = _Mixing(table, base_noise.shape, **like)
        self.mix_residual = _Mixing(table, residual_noise.shape, **like)
        self.noise: dict[str, Any] = {}
        if table.stochastic:
            self.noise = {"base_seed": base_seed, "residual_seed": residual_seed}

    def start(self, base_noise: Tensor, residual_noise: Tensor) -> None:
        """base_noise: b [B, C, H, W]; residual_noise: r [B, N, C, H, W]."""
        self._rewind()
        self.mix_base.clear()
        self.mix_residual.clear()
        # Sampling b, r^i;  z^m <- b;  z^i = √λ^i b + √(1-λ^i) r^i
        parts = base_noise.to(self.state_dtype), residual_noise.to(self.state_dtype)
        self.z.copy_(combine(*parts, self.lam))

    def step(self) -> None:
        # for t = T to 1 do
        row, z = self.counter.long(), self.z
        self._set_timestep(row)
        # b <- z_φ(z^m, t)
        z_m = z[:, self.m].to(self.base_dtype, copy=True).contiguous()
        b = estimate("base_model", self.base_model, z_m, self.t).to(z.dtype).contiguous()
        # z'^i <- z^i - √λ^i √(1-ᾱ_t) b
        place = {"lam": self.lam, "step": self.counter}
        levels = {"noise_levels": self.noise_levels}
        self._op(ops.remove_base, z, b, **levels, **place, out=self.z_removed)
        # r^i <- z_ψ(z'^i, t, i)
        r = estimate("residual_model", self.residual_model, self.z_removed.to(self.dtype), self.t)
        # ε^m <- b;  ε^i <- √λ^i b + √(1-λ^i) r^i
        # Algorithm 1: sampling b, r^i;  ξ^m = b, ξ^i = √λ^i b + √(1-λ^i) r^i
        # z^i <- √ᾱ_p (z^i - √(1-ᾱ_t) ε^i) / √ᾱ_t + √(1-ᾱ_p-σ²) ε^i + σ ξ^i
        #      = c1 z^i + c2 ε^i + σ ξ^i
        b, r = self.mix_base(row, b), self.mix_residual(row, r.to(z.dtype)).contiguous()
        place |= {"coeffs": self.coeffs, **self.noise}
        self._op(ops.decomposed_step, z, b, r, **place, out=z)
        self.counter.add_(1)


class VideoLoop(Loop):
    """A plain video diffusion model: u <- c1 u + c2 ε̂ + σ ξ, the residual step at λ = 0.

    u: [B, N, C, H, W] in noise's dtype
    """

    phase = "video"

    def __init__(
        self,
        model: Model,
        noise: Tensor,
        table: SolverTable,
        *,
        seed: int,
        sample_offset: int = 0,
        backend: str = "auto",
    ) -> None:
        batch, frames, *picture = noise.shape
        super().__init__(table, batch, noise.device, noise.dtype, backend)
        self.model = model
        self.lam = torch.zeros(frames, device=self.device)
        self.u = torch.zeros(noise.shape, dtype=self.dtype, device=self.device)
        self.g = torch.zeros(batch, *picture, dtype=self.dtype, device=self.device)
        self.mix = _Mixing(table, noise.shape, self.state_dtype, self.device)
        self.noise = {"seed": seed, "sample_offset": sample_offset} if table.stochastic else {}

    def start(self, noise: Tensor) -> None:
        """noise: [B, N, C, H, W]."""
        self._rewind()
        self.mix.clear()
        self.u.copy_(noise)

    def step(self) -> None:
        row, u = self.counter.long(), self.u
        self._set_timestep(row)
        eps = estimate("model", self.model, u, self.t).to(self.dtype)
        eps = _owned(self.mix(row, eps), u)
        table = (self.lam, self.coeffs, self.counter)
        self._op(ops.residual_step, u, eps, self.g, *table, **self.noise, out=u)
        self.counter.add_(1)


class _Mixing:
    """(ε̃, h) <- mixing[k] (ε, h): the history of multistep solvers, in fp32 or float64.

    Products and sums element by element, so that no element depends on the others' number.
    """

    def __init__(
        self, table: SolverTable, shape: torch.Size, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.mixing = table.mixing.to(device, dtype)  # [S, 1+H, 1+H]
        history = torch.zeros(table.num_history, *shape, dtype=dtype, device=device)
        self.history = history.unbind()

    def clear(self) -> None:
        for slot in self.history:
            slot.zero_()

    def __call__(self, row: Tensor, eps: Tensor) -> Tensor:
        """ε̃ in the dtype of eps; one-step solvers get eps itself."""
        if not self.history:
            return eps
        mixing = self.mixing.index_select(0, row)[0]
        parts = (eps.to(mixing.dtype), *self.history)
        mixed, *history = [_dot(weights, parts) for weights in mixing.unbind()]
        for slot, value in zip(self.history, history, strict=True):
            slot.copy_(value)
        return mixed.to(eps.dtype)


def _dot(weights: Tensor, parts: tuple[Tensor, ...]) -> Tensor:
    total = weights[0] * parts[0]
    for weight, part in zip(weights[1:].unbind(), parts[1:], strict=True):
        total = total + weight * part
    return total


def estimate(name: str, model: Model, z: Tensor, t: Tensor) -> Tensor:
    """The model's estimate; ValueError when it does not have the shape of its input."""
    out = model(z, t)
    if not isinstance(out, Tensor) or out.shape != z.shape:
        got = list(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise ValueError(
            f"{name} must return noise of its input's shape {list(z.shape)}, got {got}"
        )
    return out


def _owned(out: Tensor, state: Tensor) -> Tensor:
    """Contiguous, and not in the state's memory, which is about to be written."""
    shared = out.untyped_storage()._cdata == state.untyped_storage()._cdata
    return out.clone() if shared else out.contiguous()
