"""Two phases, one network at a time, with the result of the paper's alternation.

Interleaved is the paper (VideoFusion, Algorithms 1 and 2; interleaved.py): per step, the base
network, then the residual network, on one clip z. The base frame's path never sees a residual, so
it can be sampled first and alone, at the cost of one image. In terms of u_i = z'_i, the residual
network's own input, the rest is one line per step:

    u_i <- c1 u_i + √λ_i g_t + √(1-λ_i) (c2 r̂_i + σ ξ_i),     g_t = d_p - c1 d_t

with d_t the base path of diffusion/base_path.py. The two forms are equal for every solver that is a
table (diffusion/solvers.py), up to rounding; the base frame is equal bit for bit.

A plain video diffusion model is the second phase alone: with no base path, g = 0 and λ = 0.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor

from .. import ops
from ..diffusion.decompose import Lam, Model, base_index, combine, frame_weights
from .in_loop import Steps, in_loop
from .loop import Loop, LoopSpec, Mixing, estimate, unshared
from .windows import windowed

# -- the base phase --------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class BaseSpec(LoopSpec):
    """The spec of a base loop."""

    phase = "base"

    def build(self, model: Model) -> BaseLoop:
        """A base loop; model: (z_m [B, C, H, W], t) -> b̂."""
        return BaseLoop(model, self)


class BaseLoop(Loop):
    """The base phase: image sampling of z_m that keeps d_t = z_m - √(1-ᾱ_t) b̂.

    states: [S+1, B, C, H, W] fp32 (float64 for float64): d_t of the steps done, then z_m
    """

    def __init__(self, model: Model, spec: BaseSpec) -> None:
        super().__init__(spec)
        self.model = in_loop(model, Steps(self.timesteps, self.counter, spec.shape, spec.dtype))
        table = spec.table
        like = {"dtype": self.state_dtype, "device": self.device}
        self.noise_levels = (1.0 - table.alphas_cumprod[:-1]).sqrt().to(**like)
        self.z = torch.zeros(spec.shape, **like)  # z_m
        self.states = torch.zeros(len(table) + 1, *spec.shape, **like)
        self.mix = Mixing(table, spec.shape, **like)
        self.noise: dict[str, int] = {}
        if (place := spec.place) is not None:
            self.noise = {"seed": place.seed, "sample_offset": place.sample_offset}

    def start(self, noise: Tensor) -> None:
        """noise: b [B, C, H, W]."""
        self._rewind()
        self.model.start()
        self.mix.clear()
        self.z.copy_(noise)  # z_m <- b

    def sample(self, done: int) -> Tensor:
        return self.states[done - 1 : None if done == len(self) else done]

    def _step(self) -> None:
        z = self.z
        b = estimate("base_model", self.model, z.to(self.dtype), self.t, self.kept)
        b = unshared(b.to(z.dtype), z)
        options = {"mixed": self.mix(self.counter, b), "backend": self.backend, **self.noise}
        tables = self.states, self.noise_levels, self.coeffs
        ops.base_step(z, b, *tables, self.clock, **options)


# -- the residual phase ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Motion:
    """How the frames of a clip follow its base path.

    lam:     λ, a number or [N]; kept as a number or a tuple
    windows: (window, overlap), the frames in one call of the network and those that two windows
             share (windows.py); None: no windows
    clean:   whether frames follow the path of a finished base frame, on which g = 0
    loop:    whether the clip is a cycle, seen in windows around it (cycle.py); without `windows`
             they are as long as the clip
    """

    lam: Lam
    windows: tuple[int | None, int | None] | None = None
    clean: bool = False
    loop: bool = False

    def __post_init__(self) -> None:
        lam = self.lam.tolist() if isinstance(self.lam, Tensor) else self.lam
        lam = tuple(lam) if isinstance(lam, Iterable) else lam
        object.__setattr__(self, "lam", lam)  # comparable, and immutable

    def frame_weights(self, num_frames: int) -> Tensor:
        """λ of the frames in one call of the network, fp32: a clip's, or a window's."""
        window = None if self.windows is None else self.windows[0]
        return frame_weights(self.lam, num_frames if window is None else min(window, num_frames))


@dataclass(frozen=True)
class PathSpec:
    """Where a residual loop reads its base path, [S+1, B or 1, C, H, W].

    shared:  states that the loop reads in place, as they are computed; None: the loop has its own
             buffer, to which a path is copied before each run
    address: of `shared`; no other tensor has it while this spec refers to the tensor
    """

    shape: torch.Size
    dtype: torch.dtype
    address: int | None = None
    shared: Tensor | None = field(default=None, compare=False)

    @classmethod
    def of(cls, states: Tensor, *, shared: bool) -> PathSpec:
        """The spec for exactly these states (shared), or for any of their shape and dtype."""
        if not shared:
            return cls(states.shape, states.dtype)
        return cls(states.shape, states.dtype, states.data_ptr(), states)

    def memory(self, device: torch.device) -> Tensor:
        """The shared states, or a new buffer."""
        if self.shared is not None:
            return self.shared
        return torch.zeros(self.shape, dtype=self.dtype, device=device)


@dataclass(frozen=True, kw_only=True)
class ResidualSpec(LoopSpec):
    """The spec of a residual loop.

    path: None for a plain video model, of whose motion windows and loop alone count
    """

    motion: Motion = Motion(lam=0.0)
    path: PathSpec | None = None

    @property
    def phase(self) -> str:
        return "video" if self.path is None else "residual"

    def build(self, model: Model) -> ResidualLoop:
        """A residual loop; model: (z' [B, N, C, H, W], t) -> r̂, of a window's frames if any.

        Raises ValueError for λ or windows that do not fit the clips.
        """
        frames, lam, windows = self.shape[1], self.motion.lam, self.motion.windows
        if windows is not None or self.motion.loop:
            how = {"lam": lam, "base": self.path is not None, "loop": self.motion.loop}
            model = windowed(model, frames, *(windows or (None,)), **how, device=self.device)
        return ResidualLoop(model, self)


class ResidualLoop(Loop):
    """The residual phase: u <- c1 u + √λ g + √(1-λ) (c2 r̂ + σ ξ) for all frames.

    states: [S+1, B or 1, C, H, W], the base path; each step reads two rows. None for a plain video
            model: g and λ are 0, and u <- c1 u + c2 ε̂ + σ ξ
    u:      [B, N, C, H, W] in noise's dtype: z' of the clip; after the last step, the clip
    """

    def __init__(self, model: Model, spec: ResidualSpec) -> None:
        super().__init__(spec)
        frames, steps = spec.shape[1], Steps(self.timesteps, self.counter, spec.shape, spec.dtype)
        self.model, self.m = in_loop(model, steps), base_index(frames)
        self.estimated = "model" if spec.path is None else "residual_model"
        if spec.path is None:
            self.states = None
            self.lam = torch.zeros(frames, device=self.device, dtype=torch.float32)
        else:
            self.states = spec.path.memory(self.device)
            self.lam = frame_weights(spec.motion.lam, frames, device=self.device)
        self.c1 = None  # g = 0
        if spec.path is not None and not spec.motion.clean:
            self.c1 = spec.table.coeffs[:, 0].to(self.device).contiguous()  # float64
        self.u = torch.zeros(spec.shape, dtype=self.dtype, device=self.device)
        self.mix = Mixing(spec.table, spec.shape, self.state_dtype, self.device)
        self.noise = {} if spec.place is None else asdict(spec.place)

    def start(self, noise: Tensor) -> None:
        """noise: r [B, N, C, H, W]; the first state of the path must be known."""
        self._rewind()
        self.model.start()
        self.mix.clear()
        if self.states is None:
            self.u.copy_(noise)
            return
        # z'_i at z_i = √λ_i b + √(1-λ_i) r_i is √λ_i d + √(1-λ_i) r_i
        d = self.states[0].expand(noise.shape[0], -1, -1, -1)
        self.u.copy_(combine(d, noise.to(d.dtype), self.lam))

    def sample(self, done: int) -> Tensor:
        return self.u

    def _step(self) -> None:
        u = self.u
        r = estimate(self.estimated, self.model, u, self.t, self.kept).to(self.dtype)
        r = unshared(self.mix(self.counter, r), u)
        path = {"states": self.states, "c1": self.c1, "base_frame": self.m}
        options = {"backend": self.backend, **path, **self.noise}
        ops.path_step(u, r, self.lam, self.coeffs, self.clock, **options)
