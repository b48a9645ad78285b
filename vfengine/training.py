"""Training a decomposed model: the joint loss of `decompose.py` on clips, averaged weights, state.

Everything random in step k is drawn from (seed, k), so a run that is stopped and resumed takes, bit
for bit, the steps of one that was never stopped (same machine, thread count and torch).
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .checkpoint import (
    CheckpointConfig,
    build_base,
    build_residual,
    read_config,
    read_weights,
    save_checkpoint,
    write_safetensors,
)
from .decompose import add_noise, joint_loss

# the log shows the losses by fifths of the schedule: where motion is decided, where detail
TIME_BINS = 5


@dataclass(frozen=True)
class TrainingOptions:
    """How to train; recorded with the weights.

    steps            optimizer steps; the learning rate rises over `warmup` and falls over the last
                     `decay` share
    batch_size       clips a step
    extra_images     base frames of further clips a step, for the base network alone
    learning_rate, weight_decay, gradient_clip   of AdamW (0.9, 0.99)
    ema              decay of the averaged weights, which are the ones that are shipped
    class_dropout    share of samples whose label becomes the null class, for classifier-free
                     guidance
    clean_share      share of clips on which the residual network sees the exact base noise
                     (base_path="clean")
    base_jitter      noise on the base frame that those clips show it, of a standard deviation
                     uniform up to this: a generated base frame is not as clean as a real one
    precision        "bf16" (autocast) or "fp32"
    """

    steps: int = 20_000
    batch_size: int = 8
    extra_images: int = 40
    learning_rate: float = 8e-4
    warmup: int = 150
    decay: float = 0.5
    weight_decay: float = 0.01
    gradient_clip: float = 1.0
    ema: float = 0.999
    class_dropout: float = 0.12
    clean_share: float = 0.85
    base_jitter: float = 0.1
    precision: str = "bf16"
    seed: int = 0

    def __post_init__(self):
        for name in ("steps", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("decay", "ema", "class_dropout", "clean_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in 0..1, got {getattr(self, name)}")
        for name in ("extra_images", "warmup", "weight_decay", "base_jitter", "seed"):
            if not getattr(self, name) >= 0:  # also refuses NaN
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        for name in ("learning_rate", "gradient_clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.precision not in ("bf16", "fp32"):
            raise ValueError(f'precision must be "bf16" or "fp32", got {self.precision!r}')

    def learning_rate_at(self, step: int) -> float:
        """Linear warm-up, constant, linear to zero over the last `decay` share of the steps."""
        rise = min(1.0, (step + 1) / max(self.warmup, 1))
        fall = min(1.0, (1 - step / self.steps) / max(self.decay, 1e-9))
        return self.learning_rate * rise * fall


@dataclass(frozen=True)
class StepReport:
    """One step's losses: their means, and those in each fifth of the schedule (NaN: no sample)."""

    base_loss: float
    residual_loss: float
    base_by_t: list[float]
    residual_by_t: list[float]


class Trainer:
    """Owns the networks, their averaged copies and the optimizer; `step` takes one optimizer step.

    clips uint8 [M, N, H, W, 3] (an array or memory map), labels int64 [M]; they must fit `config`.
    """

    def __init__(
        self,
        config: CheckpointConfig,
        options: TrainingOptions,
        clips: np.ndarray,
        labels: np.ndarray,
        device: torch.device | str = "cpu",
    ):
        shape = (config.num_frames, config.height, config.width, config.channels)
        if clips.dtype != np.uint8 or clips.ndim != 5 or clips.shape[1:] != shape:
            raise ValueError(f"expected uint8 clips [M, {shape}], got {clips.dtype} {clips.shape}")
        if not len(clips):
            raise ValueError("expected at least one clip, got none")
        if len(labels) != len(clips) or not (
            0 <= labels.min() <= labels.max() < len(config.labels)
        ):
            raise ValueError(
                f"expected {len(clips)} labels in 0..{len(config.labels) - 1}, got {labels.shape}"
            )
        self.config, self.options, self.clips, self.labels = config, options, clips, labels
        self.device, self.schedule = torch.device(device), config.noise_schedule()
        self.steps_done = 0
        torch.manual_seed(options.seed)
        self.base, self.residual = build_base(config).to(device), build_residual(config).to(device)
        self.parameters = [*self.base.parameters(), *self.residual.parameters()]
        self.averaged_base, self.averaged_residual = build_base(config), build_residual(config)
        for averaged, trained in (
            (self.averaged_base, self.base),
            (self.averaged_residual, self.residual),
        ):
            averaged.load_state_dict(trained.state_dict())
            averaged.to(device).eval().requires_grad_(False)
        self.averages = [*self.averaged_base.parameters(), *self.averaged_residual.parameters()]
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            options.learning_rate,
            betas=(0.9, 0.99),
            weight_decay=options.weight_decay,
            fused=True,
        )
        self._prepare_optimizer()

    def step(self) -> StepReport:
        """One optimizer step on the batch of this step."""
        options, k = self.options, self.steps_done
        for group in self.optimizer.param_groups:
            group["lr"] = options.learning_rate_at(k)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=options.precision == "bf16"):
            t, base_loss, base_t, residual_loss = self.losses(k)
        (base_loss.mean() + residual_loss.mean()).backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, options.gradient_clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():  # early on a shorter average, or the first weights would linger
            torch._foreach_lerp_(
                self.averages, self.parameters, 1 - min(options.ema, (k + 1) / (k + 10))
            )
        self.steps_done += 1
        report = StepReport(
            float(base_loss.detach().mean()),
            float(residual_loss.detach().mean()),
            self._by_t(base_loss, base_t),
            self._by_t(residual_loss, t),
        )
        if not np.isfinite(report.base_loss + report.residual_loss):
            raise FloatingPointError(f"the loss is not finite at step {k}")
        return report

    def losses(self, step: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Per-sample losses of a step's batch: (t [B], base [B + extra], its t, residual [B])."""
        options = self.options
        rng = np.random.default_rng((options.seed, step))
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        x, labels = self._clips(rng, options.batch_size)
        batch, m = len(x), x.shape[1] // 2
        t = self._timesteps(generator, batch)
        b, r = self._normal(generator, x[:, m].shape), self._normal(generator, x.shape)
        exact = torch.rand(batch, generator=generator).to(self.device) < options.clean_share
        jitter = self._jitter(generator, exact, x[:, m].shape)
        signal, _ = self.schedule.signal_and_noise(t, x[:, m])

        def base_model(z, t):
            return self.base(z, t, class_labels=labels)

        def residual_model(z, t):
            z = z.clone()
            z[:, m] += signal * jitter
            return self.residual(z, t, class_labels=labels)

        weights = (self._clean_weight(t, 1.0, self.base.data_std),
                   self._clean_weight(t, 1 - self.config.lam, self.residual.data_std))  # fmt: skip
        base_loss, residual_loss = joint_loss(
            base_model, residual_model, x, t, b, r,
            schedule=self.schedule, lam=self.config.lam, exact_base=exact, weights=weights,
        )  # fmt: skip
        base_t = t
        if options.extra_images:
            loss, image_t = self._image_loss(rng, generator, options.extra_images)
            base_loss, base_t = torch.cat([base_loss, loss]), torch.cat([t, image_t])
        return t, base_loss, base_t, residual_loss

    def _image_loss(self, rng, generator, count: int) -> tuple[Tensor, Tensor]:
        """The base network's loss on further base frames, eq. (4): (loss [count], t [count])."""
        x, labels = self._clips(rng, count, only_base=True)
        t, b = self._timesteps(generator, count), self._normal(generator, x.shape)
        error = b - self.base(add_noise(x, b, t, self.schedule), t, class_labels=labels)
        return error.square().flatten(1).mean(1) * self._clean_weight(t, 1.0, self.base.data_std), t

    def _clean_weight(self, t: Tensor, noise_share: float, data_std: float) -> Tensor:
        """Factor [B] on the squared ε error: clean-pixel errors weigh min(1/σ², 10) + 1/std².

        σ² = share (1-ᾱ)/ᾱ is the noise a network sees beside unit signal, and (1-ᾱ)/ᾱ turns ε
        errors (of the frame's whole noise) into pixel errors: the weighting of EDM (arXiv
        2206.00364, Table 1), capped.
        """
        signal, noise = self.schedule.signal_and_noise(t, torch.empty(len(t), device=self.device))
        pixels = (noise / signal).square()
        return pixels * ((1 / (noise_share * pixels)).clamp(max=10) + data_std**-2)

    def _clips(self, rng, count: int, only_base: bool = False) -> tuple[Tensor, Tensor]:
        """`count` clips [B, N, C, H, W] (or base frames [B, C, H, W]) in -1..1, and their labels.

        A share `class_dropout` of the labels is the null class.
        """
        chosen = rng.integers(0, len(self.clips), count)
        m = self.config.num_frames // 2
        pixels = np.stack([self.clips[i, m] if only_base else self.clips[i] for i in chosen])
        x = torch.from_numpy(pixels).to(self.device).movedim(-1, -3).float()
        x = x.div(127.5).sub(1).contiguous()
        labels = self.labels[chosen].copy()
        labels[rng.uniform(size=count) < self.options.class_dropout] = self.config.null_class
        return x, torch.from_numpy(labels).to(self.device)

    def _timesteps(self, generator, count: int) -> Tensor:
        """One t in each of `count` equal parts of the schedule: int64 [count]."""
        total = self.schedule.num_train_timesteps
        place = (torch.arange(count) + torch.rand(1, generator=generator)) / count
        return (place * total).long().clamp(max=total - 1).to(self.device)

    def _normal(self, generator, shape) -> Tensor:
        return torch.randn(shape, generator=generator).to(self.device)

    def _jitter(self, generator, exact: Tensor, shape) -> Tensor:
        """Noise [B, C, H, W] on the base frames that the residual network is shown.

        Zero where b̂ is the base network's.
        """
        share = torch.rand(len(exact), 1, 1, 1, generator=generator).to(self.device)
        std = share * self.options.base_jitter
        return self._normal(generator, shape) * std * exact.view(-1, 1, 1, 1)

    def _by_t(self, loss: Tensor, t: Tensor) -> list[float]:
        bins = t * TIME_BINS // self.schedule.num_train_timesteps
        return [float(loss.detach()[bins == i].mean()) for i in range(TIME_BINS)]

    # -- on disk -------------------------------------------------------------------------------

    def warm_start(self, folder: Path) -> list[str]:
        """Start from the weights of a checkpoint folder where name and shape are the same.

        Returns the names of the weights that keep their fresh initialisation. Raises
        FileNotFoundError or ValueError for a folder that holds no whole checkpoint.
        """
        config = read_config(folder)
        fresh = []
        for name, nets in (
            ("base", (self.base, self.averaged_base)),
            ("residual", (self.residual, self.averaged_residual)),
        ):
            state = read_weights(folder, name, config)
            for net in nets:
                own = net.unet.state_dict()
                fits = {k: v for k, v in state.items() if k in own and own[k].shape == v.shape}
                net.unet.load_state_dict(fits, strict=False)
            fresh += [f"{name}.{key}" for key in own if key not in fits]
        return fresh

    def export(self, folder: Path) -> CheckpointConfig:
        """Write the averaged weights as a checkpoint that `vfengine.generate --model` takes."""
        return save_checkpoint(
            folder,
            self.config,
            self.averaged_base.unet.state_dict(),
            self.averaged_residual.unet.state_dict(),
        )

    def save(self, file: Path) -> None:
        """Everything a run continues from, in one .safetensors file that is whole or not there."""
        tensors = {
            f"{kind}.{i}": value.detach().cpu().contiguous()
            for kind, values in self._state().items()
            for i, value in enumerate(values)
        }
        metadata = {"steps_done": str(self.steps_done), "model": self._identity()}
        metadata["options"] = json.dumps(asdict(self.options))
        temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
        try:
            write_safetensors(tensors, temporary, metadata)
            os.replace(temporary, file)
        finally:
            temporary.unlink(missing_ok=True)

    def restore(self, file: Path) -> None:
        """Continue from `save`. Raises ValueError for a damaged file or another model's state."""
        try:
            with safe_open(file, "pt") as stored:
                metadata = stored.metadata() or {}
                if metadata.get("model") != self._identity():
                    raise ValueError(
                        f"{file} is the training state of another model or of other data"
                    )
                with torch.no_grad():
                    for kind, values in self._state().items():
                        for i, value in enumerate(values):
                            value.copy_(stored.get_tensor(f"{kind}.{i}"))
        except SafetensorError as error:
            raise ValueError(f"{file} is not a complete training state: {error}") from error
        self.steps_done = int(metadata["steps_done"])

    def _state(self) -> dict[str, list[Tensor]]:
        adam = [self.optimizer.state[p] for p in self.parameters]
        return {
            "parameter": self.parameters,
            "average": self.averages,
            **{key: [state[key] for state in adam] for key in ("exp_avg", "exp_avg_sq", "step")},
        }

    def _prepare_optimizer(self) -> None:
        """Give AdamW the state that its first step would, so that `save` and `restore` find it."""
        for parameter in self.parameters:
            self.optimizer.state[parameter] = {
                "step": torch.zeros((), device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }

    def _identity(self) -> str:
        """Names the model and the amount of data that a state belongs to."""
        values = {
            f.name: getattr(self.config, f.name) for f in fields(self.config) if f.name != "sha256"
        }
        text = repr((sorted(values.items()), self.clips.shape, self.options.seed))
        return hashlib.sha256(text.encode()).hexdigest()[:16]
