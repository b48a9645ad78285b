"""Distillation: a network learns to take many steps of its teacher's at once.

A student visits the timesteps τ_1 > … > τ_S and no others. From τ_k it must land where the
teacher lands after several DDIM steps under guidance, whose scale is an input of the student:

    z_p  = the teacher's last state, from z_t (t = τ_k) to p = τ_{k+1}, or to a clean sample
    ε*   = (z_p - c1 z_t) / c2,    c1 = √(ᾱ_p/ᾱ_t),  c2 = √(1-ᾱ_p) - c1 √(1-ᾱ_t)
    loss = w_t ‖ε* - ε̂(z_t, t, s)‖²

ε* is the estimate whose one DDIM step ends in z_p. This is progressive distillation (Salimans & Ho
2022, arXiv 2202.00512) with guidance folded in (Meng et al. 2023, arXiv 2210.03142): a teacher that
was distilled to twice the steps itself is a stage of it. benchmarks/study_distillation.py compares
it with others. States are noised samples of the data.

The base network's states are of base frames. The residual network's are of whole clips, along the
base path of `decompose.py`: under the exact base noise (base_path="clean"), or under the estimates
of the model's base network. Teacher and student each follow the base network of their own model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn

from ..diffusion.decompose import add_noise, base_index, combine, mean_of_others, remove_base
from ..diffusion.schedule import NoiseSchedule
from ..formats.checkpoint import DecomposedConfig, FewSteps, load_network, read_config
from ..models import UNet
from ..plan.network import for_inference
from .batch import BatchSampler
from .objectives import Decomposed, Losses
from .options import TrainingOptions

CLEAN = -1  # the timestep after the last one: a clean sample
SHOWN_SCALE = 2.0  # guidance scale of samples


class Teacher:
    """A model whose steps a student takes together; its networks are read when first asked.

    steps: DDIM steps that it takes where the student takes all of its own; a teacher that is
           distilled itself takes those that it was made for
    dtype: of its weights and activations

    Raises what `read_config` does, and ValueError for a model that is not decomposed.
    """

    def __init__(
        self,
        folder: str | Path | None,
        steps: int = 48,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ):
        self.folder, self.config = folder, read_config(folder)
        if not isinstance(self.config, DecomposedConfig):
            raise ValueError(f"{folder}: only decomposed models are distilled, not a VDM*")
        self._steps, self._device, self._dtype = steps, torch.device(device), dtype
        self._networks: dict[str, nn.Module] = {}

    def estimate(
        self, name: str, z: Tensor, t: Tensor, conditions: Mapping[str, Tensor], scales: Tensor
    ) -> Tensor:
        """A network's ε̂ under guidance, in fp32.

        conditions: by the networks' argument, what to draw, and then as much of what says nothing
        scales:     [B]
        """
        network, t = self._network(name), t.to(z.device)
        with torch.no_grad():
            if self.is_distilled(name):
                shown = {key: rows[: len(z)] for key, rows in conditions.items()}
                return network(z, t, **shown, guidance=scales).float()
            shown, plain = network(torch.cat([z, z]), torch.cat([t, t]), **conditions).chunk(2)
            return plain + scales.view(-1, *[1] * (z.dim() - 1)) * (shown - plain)

    def is_distilled(self, name: str) -> bool:
        return name in (self.config.distilled or {})

    def times(self, name: str, timesteps: tuple[int, ...]) -> Tensor:
        """The timesteps that it visits from each of a student's to the next: int64 [S, K+1].

        Raises ValueError where it was distilled to others.
        """
        count = len(timesteps)
        if not self.is_distilled(name):
            parts = max(2, round(self._steps / count))
            rows = [
                [t + (p - t) * k / parts for k in range(parts + 1)]
                for t, p in pairwise((*timesteps, CLEAN))
            ]
            return _ints(rows)
        own = _ints(self.config.distilled[name].timesteps)
        if len(own) % count or len(own) == count or tuple(own[:: len(own) // count]) != timesteps:
            raise ValueError(
                f"{self.folder}: its {name} network takes {len(own)} steps, which are not a "
                f"multiple of {count}"
            )
        parts = len(own) // count
        return torch.cat([own, _ints([CLEAN])]).unfold(0, parts + 1, parts)

    def _network(self, name: str) -> nn.Module:
        if name not in self._networks:
            place = self._device, self._dtype
            network = load_network(self.folder, self.config, name, *place)
            if isinstance(network.unet, UNet):
                network.unet = for_inference(network.unet, self._dtype, self._device)
            self._networks[name] = network
        return self._networks[name]


def distilled_config(
    teacher: DecomposedConfig,
    names: tuple[str, ...],
    steps: int,
    guidance: tuple[float, float],
    others: DecomposedConfig | None = None,
) -> DecomposedConfig:
    """The configuration of a student of these networks.

    others: of the model whose other networks are taken; None: the teacher's own

    Raises ValueError for steps that the schedule has not.
    """
    timesteps = tuple(teacher.noise_schedule().timesteps(steps, "trailing").tolist())
    others = teacher if others is None else others
    distilled = {n: few for n, few in (others.distilled or {}).items() if n not in names}
    unets = {name: getattr(others, name) for name in teacher.networks}
    for name in names:
        digest = teacher.sha256.get(name, "")[:16]
        distilled[name] = FewSteps(timesteps=timesteps, guidance=guidance, teacher=digest)
        unets[name] = replace(getattr(teacher, name), guidance_embedding=True)
    ordered = {name: distilled[name] for name in teacher.networks if name in distilled}
    return replace(teacher, **unets, distilled=ordered, sha256={})


class Distillation(Decomposed):
    """The students of a teacher's networks, those that options.train names."""

    captures = False  # the way of the teacher is walked with numbers of the host

    def __init__(
        self,
        config: DecomposedConfig,
        options: TrainingOptions,
        device: torch.device | str,
        teacher: Teacher,
    ):
        super().__init__(config, options, device)
        self.teacher, self.jumps = teacher, Jumps(self.schedule)
        self._times = {
            name: teacher.times(name, config.distilled[name].timesteps) for name in self.trained
        }

    def losses(self, batch: BatchSampler) -> Losses:
        """The base network's on B + extra_images base frames, the residual network's on B clips."""
        losses = {}
        if "base" in self.trained:
            losses["base"] = self._base_loss(batch)
        if "residual" in self.trained:
            losses["residual"] = self._residual_loss(batch)
        return losses

    def _base_loss(self, batch: BatchSampler) -> tuple[Tensor, Tensor]:
        count = self.options.batch_size + self.options.extra_images
        x, condition, figure = batch.clips(count, only_base=True)
        times, scales = self._times_of(batch, "base", count), self._scales(batch, "base", count)
        t, p = times[0], times[-1]
        noise = batch.normal((count, *x.shape[1:]))
        z = add_noise(x, noise, t, self.schedule)
        conditions = self._both(batch, condition)
        landed = z
        for a, b in pairwise(times):
            estimate = self.teacher.estimate("base", landed, a, conditions, scales)
            landed = self.jumps.step(landed, estimate, a, b)
        error = self.jumps.between(z, landed, t, p) - self.student("base", z, t, condition, scales)
        return self._weighed(error, t, "base", self._cells(figure)), t

    def _residual_loss(self, batch: BatchSampler) -> tuple[Tensor, Tensor]:
        """As Algorithm 2 of VideoFusion walks a clip, teacher and student."""
        count, lam, schedule = self.options.batch_size, self.config.lam, self.schedule
        x, condition, figure = batch.clips(count)
        m, of_frames = base_index(x.shape[1]), (count, *x.shape[2:])
        times = self._times_of(batch, "residual", count)
        scales = self._scales(batch, "residual", count)
        t, p = times[0], times[-1]
        b, r = batch.normal(of_frames), batch.normal((count, *x.shape[1:]))
        exact = (batch.uniform(count) < self.options.clean_share).view(-1, 1, 1, 1)
        jitter = self._jitter(batch, exact.flatten(), of_frames)
        conditions, stepwise = self._both(batch, condition), self.options.clean_share < 1
        z = add_noise(x, combine(b, r, lam), t, schedule)

        def seen(z: Tensor, b_hat: Tensor, t: Tensor) -> Tensor:
            """z', what a residual network sees."""
            seen = remove_base(z, b_hat, lam, t, schedule)
            seen[:, m] += schedule.signal_and_noise(t, b)[0] * jitter
            return seen

        landed = z
        for first, last in pairwise(times):
            b_hat = b
            if stepwise:
                of_base = self.teacher.estimate("base", landed[:, m], first, conditions, scales)
                b_hat = torch.where(exact, b, of_base)
            place = seen(landed, b_hat, first), first
            r_hat = self.teacher.estimate("residual", *place, conditions, scales)
            landed = self.jumps.step(landed, combine(b_hat, r_hat, lam), first, last)

        b_hat = b
        if stepwise:
            with torch.no_grad():
                of_base = self.student("base", z[:, m], t, condition, scales)
            b_hat = torch.where(exact, b, of_base)
        r_hat = self.student("residual", seen(z, b_hat, t), t, condition, scales)
        error = self.jumps.between(z, landed, t, p) - combine(b_hat, r_hat, lam)
        return self._weighed(error, t, "residual", self._cells(figure, m)), t

    def student(self, name: str, z: Tensor, t: Tensor, condition: Tensor, scales: Tensor) -> Tensor:
        """ε̂ of a network of the model's own, told the guidance scale where it is an input."""
        network, told = self.networks[name], {self.condition: condition}
        if name in self.config.distilled:
            told["guidance"] = scales
        return network(z, t.to(z.device, non_blocking=True), **told)

    def _weighed(self, error: Tensor, t: Tensor, name: str, cells: Tensor | None) -> Tensor:
        """Each sample's loss [B], of errors of ε at t."""
        share = 1.0 if name == "base" else 1 - self.config.lam
        error = error.square() if cells is None else error.square() * cells
        means = (
            error.flatten(1).mean(1) if name == "base" else mean_of_others(error.flatten(2).mean(2))
        )
        return means * self.clean_weight(t, share, self.networks[name].data_std)

    def _times_of(self, batch: BatchSampler, name: str, count: int) -> Tensor:
        """The teacher's timesteps for each sample, int64 [K+1, B]; as many of each student step."""
        times = self._times[name]
        parts = (batch.places(count) * len(times)).long().clamp(max=len(times) - 1)
        return times[parts].T.contiguous()

    def _scales(self, batch: BatchSampler, name: str, count: int) -> Tensor:
        """Guidance scales [B], evenly from the range of the student."""
        least, largest = self.config.distilled[name].guidance
        return least + (largest - least) * batch.uniform(count)

    def _both(self, batch: BatchSampler, condition: Tensor) -> dict[str, Tensor]:
        """The condition and, as often, the one that says nothing."""
        null = batch.null.to(self.device, condition.dtype).expand_as(condition)
        return {self.condition: torch.cat([condition, null])}

    def _shown(self, name, network, condition, steps, null):
        few = self.config.distilled.get(name)
        if few is None:
            return super()._shown(name, network, condition, steps, null)
        scale = min(max(SHOWN_SCALE, few.guidance[0]), few.guidance[1])
        told = {self.condition: condition, "guidance": scale}
        return lambda z, t: network(z, t.to(z.device), **told), {"timesteps": few.timesteps}


class Jumps:
    """DDIM's rule between any two timesteps, each sample at its own; -1 is a clean sample."""

    def __init__(self, schedule: NoiseSchedule):
        one = torch.ones(1, dtype=torch.float64, device="cpu")
        self._alphas = torch.cat([schedule.alphas_cumprod, one])  # the last is found at -1

    def step(self, z: Tensor, eps: Tensor, t: Tensor, p: Tensor) -> Tensor:
        """z_p = c1 z_t + c2 ε; z, eps [B, …], t, p int64 [B] on the CPU."""
        c1, c2 = self._coefficients(z, t, p)
        return c1 * z + c2 * eps

    def between(self, z: Tensor, landed: Tensor, t: Tensor, p: Tensor) -> Tensor:
        """ε* = (z_p - c1 z_t) / c2, the estimate whose step from z ends in `landed`."""
        c1, c2 = self._coefficients(z, t, p)
        return (landed - c1 * z) / c2

    def _coefficients(self, z: Tensor, t: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
        a_t, a_p = self._alphas[t], self._alphas[p]
        c1 = (a_p / a_t).sqrt()
        c2 = (1 - a_p).sqrt() - c1 * (1 - a_t).sqrt()
        shape = (-1, *[1] * (z.dim() - 1))
        return c1.float().view(shape).to(z.device), c2.float().view(shape).to(z.device)


def _ints(values: Sequence) -> Tensor:
    """int64 on the CPU, rounded."""
    return torch.tensor(values, dtype=torch.float64, device="cpu").round().long()
