"""Training of diffusion networks on clips: steps, state, checkpoints. Losses: objectives.py.

Everything random in step k is drawn from (seed, k), by batch.py. A run that is stopped and resumed
takes, bit for bit, the steps of one that was never stopped (same machine, thread count and torch).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from ..formats.checkpoint import CheckpointConfig, read_config, read_weights, save_checkpoint
from ..models import UNet
from .batch import BatchSampler, Latents, Pixels
from .captured import CapturedSteps, ScheduleOnDevice, StaticBatch
from .objectives import OBJECTIVES, Losses, Objective
from .options import TrainingOptions
from .parts import Parts
from .report import StepReport, sums_by_t
from .samples import Showcase, write_labels, write_prompts
from .team import ALONE, Execution
from .updates import Updates

if TYPE_CHECKING:
    from .published import PublishedParts

# entries of decomposed models that the names of plain models' states include
_ONCE_IN_PLAIN_MODELS = {
    **{"lam": None, "base": None, "residual": None},
    **{"base_std": 0.5, "residual_std": 0.35, "base_path": "stepwise"},
}
# entries that configurations gained; where there are none, states have the name that they had
_LATER = ("autoencoder", "latent_mean", "latent_std", "text_encoder", "prompts", "distilled")
_LATER += ("published",)


class Trainer:
    """Owns the objective's networks, averaged copies and the optimizer; `step` takes one step.

    clips:  uint8 [M, N, H, W, 3] (an array or memory map) with labels int64 [M]; or `Latents`, for
            a model with an autoencoder and a text encoder. They must fit `config`
    device: where it trains; `Latents` are best there too
    parts, showcase: of a model on latents: what its checkpoint holds beside the networks, and what
            its samples show
    objective: made of (config, options, device), as `distillation.Distillation` with its teacher;
            None: that of the model's kind
    execution: by which processes, and how; each of them has a trainer of the same arguments, and
            calls the same methods

    Raises ValueError for data that do not fit, and for an execution that cannot be.
    """

    def __init__(
        self,
        config: CheckpointConfig,
        options: TrainingOptions,
        clips: np.ndarray | Latents,
        labels: np.ndarray | None = None,
        device: torch.device | str = "cpu",
        *,
        parts: Parts | PublishedParts | None = None,
        showcase: Showcase | None = None,
        objective: Callable[..., Objective] | None = None,
        execution: Execution = ALONE,
    ):
        execution.check(options)
        self.execution, self.team = execution, execution.team
        self._parts, self._showcase = parts, showcase
        if isinstance(clips, Latents):
            _check_latents(config, clips)
            self.data = clips
        else:
            _check_pixels(config, clips, labels)
            self.data = Pixels(clips, labels, config.null_class)
        self.options, self.device, self.steps_done = options, torch.device(device), 0
        torch.manual_seed(options.seed)
        make = OBJECTIVES[config.objective] if objective is None else objective
        made_on = torch.device("cpu") if execution.shard else self.device  # whole, they may not fit
        given = {} if parts is None else parts.networks(config, options, made_on)
        self.objective = make(config, options, made_on, **({"given": given} if given else {}))
        self.objective.device = self.device
        self.config, self.networks = self.objective.config, self.objective.networks
        self._prepare()
        trained = {name: self.networks[name] for name in self.objective.trained}
        fixed = {name: net for name, net in self.networks.items() if name not in trained}
        for network in fixed.values():
            network.to(self.device).eval().requires_grad_(False)
        kept = [net for name, net in fixed.items() if name not in config.foreign]
        if execution.checkpoint_activations:
            _checkpoint(trained)
        self.updates = Updates(trained, options, kept, (), execution, self.device)
        if execution.compile:
            compile_networks(trained.values(), self.device)
        self._losses = _Losses(self.objective, trained)
        self._is_reducing = execution.shard  # FSDP2 does
        self.averaged = {**self.networks, **self.updates.averaged}
        self.parameters, self.averages = self.updates.parameters, self.updates.averages
        self.optimizer = self.updates.optimizer
        self._captured: CapturedSteps | None = None
        if execution.capture:
            self._check_capture()
            self._captured = self._capture()

    def _prepare(self) -> None:
        """Readies the networks, once they are made; what needs no gradient is not trained."""

    def step(self) -> StepReport:
        """One optimizer step on the batch of this step, of which each process takes its parts.

        Raises `team.Lost` where another process is gone.
        """
        k, count = self.steps_done, self.objective.count
        with self.team.noticing():
            if not self._is_reducing:
                self._losses, self._is_reducing = self.team.reducing(self._losses), True
            self.updates.set_rates(k)
            take = partial(self._take, partial(self.batch_sampler, k))
            told = take() if self._captured is None else self._captured(k)
            sums = dict(zip(self.objective.trained, self.team.sum_(told), strict=True))
        self.steps_done += 1
        report = StepReport(
            {name: own[0, -1] / count(name) for name, own in sums.items()},
            {name: own[0, :-1] / own[1, :-1] for name, own in sums.items()},
            step=k,
        )
        if self.device.type == "cpu":  # a GPU is not waited for: whoever reads the report finds out
            _ = report.losses
        return report

    def _take(self, batch: Callable[[int], BatchSampler | StaticBatch]) -> Tensor:
        """An optimizer step on this process's parts of a batch, by their numbers; what it tells."""
        told: Tensor | float = 0.0
        for number in range(self.execution.accumulate):
            is_last = number == self.execution.accumulate - 1
            with nullcontext() if is_last else self.team.postponed(self._losses):
                with torch.autocast(
                    self.device.type, torch.bfloat16, enabled=self.options.precision == "bf16"
                ):
                    losses = self._losses(batch(number))
                means = {n: loss.sum() / self.objective.count(n) for n, (loss, _) in losses.items()}
                loss = sum(means.values()) * self.team.size
                loss.backward()  # gradients become means over processes
            told = told + self._told(losses)
        self.updates.descend()
        return told

    def _capture(self) -> CapturedSteps:
        """Readies all that a step reads to stay where it is."""
        self.updates.keep_rates_on(self.device)
        self.objective.schedule = ScheduleOnDevice(self.objective.schedule, self.device)
        parts = self.execution.accumulate
        return CapturedSteps(self._take, self.batch_sampler, parts, self.options.steps, self.device)

    def _check_capture(self) -> None:
        if self.device.type != "cuda":
            raise ValueError(f"capture needs a CUDA device, got {self.device}")
        if not self.objective.captures:
            raise ValueError(f"a step of {type(self.objective).__name__} cannot be captured")

    def _told(self, losses: Losses) -> Tensor:
        """Sums and counts [networks, 2, bins + 1] of losses by fifths, and of all of them."""
        timesteps = self.objective.schedule.num_train_timesteps
        rows = []
        for loss, t in losses.values():
            own = loss.detach()
            whole = torch.stack([own.sum(), torch.ones_like(own).sum()])
            rows.append(torch.cat([sums_by_t(own, t, timesteps), whole[:, None]], 1))
        return torch.stack(rows)

    def losses(self, step: int) -> Losses:
        """Per-sample losses of a step's batch, and their timesteps: name -> (loss [B], t [B]).

        Of this process's rows, if there are several.
        """
        return self.objective.losses(self.batch_sampler(step))

    def batch_sampler(self, step: int, number: int = 0) -> BatchSampler:
        """A sampler for everything random in a step, of this process's number-th part."""
        return BatchSampler(
            self.data,
            (self.options.seed, step),
            dropout=self.options.class_dropout,
            num_timesteps=self.objective.schedule.num_train_timesteps,
            timestep_shift=self.options.timestep_shift,
            device=self.device,
            part=self.execution.part(number),
        )

    def describe(self) -> str:
        """Clips, networks and device, in one line."""
        sizes = [
            f"{name} {_count(self.networks[name]) / 1e6:.2f} M" for name in self.objective.trained
        ]
        return (
            f"{self.data.shape[0]} clips of {len(self.config.labels)} classes; "
            f"{' and '.join(sizes)} parameters; {self.options.precision} on {self.device}"
            + (f", {self.team.size} processes" if self.team.size > 1 else "")
        )

    # -- on disk -------------------------------------------------------------------------------

    def warm_start(self, folder: Path, only: str | None = None) -> list[str]:
        """Start from the weights of a checkpoint folder where name and shape are the same.

        only: the one network that is taken from there

        A plain model may start from a decomposed model's base network. Returns the names of the
        weights that keep their fresh initialisation. Raises FileNotFoundError or ValueError for a
        folder without a whole checkpoint, or with one of a kind that ours cannot start from.
        """
        config = read_config(folder)
        fresh = []
        for name, source in self.objective.sources(config).items():
            if only not in (None, name) or name in self.config.foreign:
                continue
            state = {} if source in config.foreign else read_weights(folder, source, config)
            for net in (self.networks[name], self.averaged[name]):
                own = net.unet.state_dict()
                fits = {k: v for k, v in state.items() if k in own and own[k].shape == v.shape}
                for key, value in fits.items():
                    self.team.fill(own[key], value)
            fresh += [f"{name}.{key}" for key in own if key not in fits]
        return fresh

    def export(self, folder: Path) -> CheckpointConfig:
        """Write the averaged weights as a checkpoint that `vfengine.generate --model` takes.

        A network that is not trained has the weights that it started from.
        """
        names = [name for name in self.config.networks if name not in self.config.foreign]
        whole, parts = self.team.whole, None if self._parts is None else self._parts.files()
        states = [
            {key: whole(value) for key, value in self.averaged[name].unet.state_dict().items()}
            for name in names
        ]
        return self.team.of_first(
            lambda: save_checkpoint(folder, self.config, *states, parts=parts)
        )

    def write_samples(self, file: Path) -> None:
        """A sheet of clips from the averaged weights (samples.py)."""
        shown = () if self._showcase is None else (self._showcase,)
        how = self.objective, self.averaged, *shown, self.options.precision
        write = write_prompts if shown else write_labels
        if self.execution.shard:  # networks are called in all processes
            self.team.agreed(lambda: write(*how, file if self.team.is_first else None))
        else:
            self.team.of_first(lambda: write(*how, file))

    def save(self, file: Path, checkpoint: str = "") -> None:
        """Writes everything that a run continues from to one .safetensors file, atomically.

        checkpoint: names the checkpoint that was exported of this state
        """
        self.updates.save(file, self._identity(), self.steps_done, checkpoint)

    def restore(self, file: Path) -> None:
        """Continue from `save`. Raises ValueError for a damaged file or another model's state."""
        self.steps_done = self.updates.restore(file, self._identity())

    def _identity(self) -> str:
        """Names the model and the amount of data that a state belongs to."""
        values = {f.name: getattr(self.config, f.name) for f in fields(self.config)}
        del values["sha256"], values["usual_steps"]
        for name in _LATER:
            if values.get(name, 0) is None:
                del values[name]
        if self.config.objective == "decomposed":
            del values["clean_share"]
        else:
            values |= {**_ONCE_IN_PLAIN_MODELS, "video": self.config.video.identity()}
        named = (sorted(values.items()), self.data.shape, self.options.seed)
        if self.objective.trained != self.config.networks:
            named = (*named, self.objective.trained)
        if self._parts is not None:
            named = (*named, *self._parts.identity())
        return hashlib.sha256(repr(named).encode()).hexdigest()[:16]


class _Losses(nn.Module):
    """forward(batch) -> an objective's losses; the module of all weights that are trained."""

    def __init__(self, objective: Objective, trained: dict[str, nn.Module]):
        super().__init__()
        self._objective, self.trained = objective, nn.ModuleDict(trained)

    def forward(self, batch: BatchSampler) -> Losses:
        return self._objective.losses(batch)


def _checkpoint(networks: dict[str, nn.Module]) -> None:
    """Has networks compute their stages again for the gradient; ValueError for other networks."""
    for name, network in networks.items():
        if not isinstance(network.unet, UNet):
            raise ValueError(f"the {name} network has no stages whose activations to checkpoint")
        network.unet.checkpoints = True


def compile_networks(networks: Iterable[nn.Module], device: torch.device) -> None:
    """Has torch.compile make their code, at the first call; ValueError where no compiler works."""
    try:
        probe = torch.compile(lambda x: 2 * x + 1)
        probe(torch.ones(2, device=device, dtype=torch.float32))
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"compile needs a compiler that works: {reason}") from error
    for network in networks:
        network.compile()


def _count(network: nn.Module) -> int:
    """The number of weights that are trained."""
    return sum(weight.numel() for weight in network.parameters() if weight.requires_grad)


def _check_pixels(config: CheckpointConfig, clips: np.ndarray, labels: np.ndarray) -> None:
    shape = (config.num_frames, config.height, config.width, config.channels)
    if clips.dtype != np.uint8 or clips.ndim != 5 or clips.shape[1:] != shape:
        raise ValueError(f"expected uint8 clips [M, {shape}], got {clips.dtype} {clips.shape}")
    if not len(clips):
        raise ValueError("expected at least one clip, got none")
    if len(labels) != len(clips) or not (0 <= labels.min() <= labels.max() < len(config.labels)):
        raise ValueError(
            f"expected {len(clips)} labels in 0..{len(config.labels) - 1}, got {labels.shape}"
        )


def _check_latents(config: CheckpointConfig, latents: Latents) -> None:
    shape = (config.num_frames, config.channels, config.height, config.width)
    clips, captions, null = latents.clips, latents.captions, latents.null
    if clips.dim() != 5 or clips.shape[1:] != shape or not len(clips):
        raise ValueError(f"expected latents [M, {shape}], got {tuple(clips.shape)}")
    text = (len(clips), captions.shape[1], *null.shape)
    if captions.dim() != 4 or captions.shape != text or null.shape[-1] != config.base.context_dim:
        raise ValueError(
            f"expected captions' states [{len(clips)}, P, L, {config.base.context_dim}] and that "
            f"of the empty prompt, got {tuple(captions.shape)} and {tuple(null.shape)}"
        )
