"""VideoFusion's sampler as printed: both networks at every step, on one clip.

Tests compare the two phases (two_phase.py) with it, so it shares none of their algebra.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import ops
from ..diffusion.decompose import Lam, Model, base_index, combine, frame_weights
from ..ops._dispatch import step_op
from .in_loop import Steps, in_loop
from .loop import Loop, LoopSpec, Mixing, estimate


@dataclass(frozen=True, kw_only=True)
class InterleavedSpec(LoopSpec):
    """The spec of an interleaved loop; shape, dtype and place are those of the residual noise.

    base: the same for the base noise
    lam:  λ, a number or [N]
    """

    phase = "interleaved"

    base: LoopSpec
    lam: Lam


class InterleavedLoop(Loop):
    """Algorithm 2 of VideoFusion, and with σ > 0 Algorithm 1, line by line.

    z: [B, N, C, H, W] fp32 (float64 for float64)
    """

    def __init__(self, base_model: Model, residual_model: Model, spec: InterleavedSpec) -> None:
        super().__init__(spec)
        if self.reuse_every > 1:
            raise ValueError("the interleaved method reuses no features: reuse_every must be 1")
        clock, base = (self.timesteps, self.counter), spec.base
        self.base_model = in_loop(base_model, Steps(*clock, base.shape, base.dtype))
        self.residual_model = in_loop(residual_model, Steps(*clock, spec.shape, spec.dtype))
        self.base_dtype, table, frames = spec.base.dtype, spec.table, spec.shape[1]
        like = {"dtype": self.state_dtype, "device": self.device}
        self.m, self.lam = base_index(frames), frame_weights(spec.lam, frames, device=self.device)
        self.noise_levels = (1.0 - table.alphas_cumprod).sqrt().to(**like)
        self.z = torch.zeros(spec.shape, **like)
        self.z_removed = torch.zeros_like(self.z)
        self.mix_base = Mixing(table, spec.base.shape, **like)
        self.mix_residual = Mixing(table, spec.shape, **like)
        kind = (self.dtype, self.backend)
        self.remove = step_op(ops.remove_base, ops.remove_base_reference, *kind)
        self.advance = step_op(ops.decomposed_step, ops.decomposed_step_reference, *kind)
        self.noise: dict[str, int] = {}
        if spec.place is not None:
            self.noise = {"base_seed": spec.base.place.seed, "residual_seed": spec.place.seed}

    def start(self, base_noise: Tensor, residual_noise: Tensor) -> None:
        """base_noise: b [B, C, H, W]; residual_noise: r [B, N, C, H, W]."""
        self._rewind()
        self.base_model.start()
        self.residual_model.start()
        self.mix_base.clear()
        self.mix_residual.clear()
        # Sampling b, r^i;  z^m <- b;  z^i = √λ^i b + √(1-λ^i) r^i
        parts = base_noise.to(self.state_dtype), residual_noise.to(self.state_dtype)
        self.z.copy_(combine(*parts, self.lam))

    def sample(self, done: int) -> Tensor:
        return self.z

    def _step(self) -> None:
        # for t = T to 1 do
        row, z = self.counter, self.z
        # b <- z_φ(z^m, t)
        z_m = z[:, self.m].to(self.base_dtype, copy=True).contiguous()
        b = estimate("base_model", self.base_model, z_m, self.t).to(z.dtype).contiguous()
        # z'^i <- z^i - √λ^i √(1-ᾱ_t) b
        step = {"lam": self.lam, "step": self.counter}
        self.remove(z, b, noise_levels=self.noise_levels, **step, out=self.z_removed)
        # r^i <- z_ψ(z'^i, t, i)
        r = estimate("residual_model", self.residual_model, self.z_removed.to(self.dtype), self.t)
        # ε^m <- b;  ε^i <- √λ^i b + √(1-λ^i) r^i
        # Algorithm 1: sampling b, r^i;  ξ^m = b, ξ^i = √λ^i b + √(1-λ^i) r^i
        # z^i <- √ᾱ_p (z^i - √(1-ᾱ_t) ε^i) / √ᾱ_t + √(1-ᾱ_p-σ²) ε^i + σ ξ^i
        #      = c1 z^i + c2 ε^i + σ ξ^i
        b, r = self.mix_base(row, b), self.mix_residual(row, r.to(z.dtype)).contiguous()
        step |= {"coeffs": self.coeffs, **self.noise}
        self.advance(z, b, r, **step, out=z)
        self.clock.move_on()
