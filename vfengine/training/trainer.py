"""Training a model on clips: optimizer steps, averaged weights, state. For losses: objectives.py.

Everything random in step k is drawn from (seed, k), so a run that is stopped and resumed takes, bit
for bit, the steps of one that was never stopped (same machine, thread count and torch).
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..files import open_tensors, write_tensors
from ..formats.checkpoint import CheckpointConfig, read_config, read_weights, save_checkpoint
from .objectives import OBJECTIVES, Draw, Losses, build_networks

# the log shows the losses by fifths of the schedule: where motion is decided, where detail
TIME_BINS = 5

# entries of decomposed models that plain ones had too when their first states were named
_ONCE_IN_PLAIN_MODELS = {
    **{"lam": None, "base": None, "residual": None},
    **{"base_std": 0.5, "residual_std": 0.35, "base_path": "stepwise"},
}


@dataclass(frozen=True)
class TrainingOptions:
    """How to train; recorded with the weights.

    steps            optimizer steps; the learning rate rises over `warmup` and falls over the last
                     `decay` share
    batch_size       clips a step
    learning_rate, weight_decay, gradient_clip   of AdamW (0.9, 0.99)
    ema              decay of the averaged weights, which are the ones that are shipped
    class_dropout    share of samples whose label becomes the null class, for classifier-free
                     guidance
    precision        "bf16" (autocast) or "fp32"

    Of no use to a VDM*, every frame of whose clips is a picture with noise of its own:
    extra_images     base frames of further clips a step, for the base network alone
    clean_share      share of clips on which the residual network sees the exact base noise
                     (base_path="clean")
    base_jitter      noise on the base frame that those clips show it, of a standard deviation
                     uniform up to this: a generated base frame is not as clean as a real one
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
    """One step's losses by network: the means, and those of each fifth of the schedule.

    A fifth without a sample is NaN.
    """

    losses: dict[str, float]
    by_t: dict[str, list[float]]


class Trainer:
    """Owns the objective's networks, averaged copies and the optimizer; `step` takes one step.

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
        self.options, self.clips, self.labels = options, clips, labels
        self.device, self.steps_done = torch.device(device), 0
        torch.manual_seed(options.seed)
        self.objective = OBJECTIVES[config.objective](config, options, device)
        self.config, self.networks = self.objective.config, self.objective.networks
        self.averaged = build_networks(config)
        for name, averaged in self.averaged.items():
            averaged.load_state_dict(self.networks[name].state_dict())
            averaged.to(device).eval().requires_grad_(False)
        self.parameters = [p for net in self.networks.values() for p in net.parameters()]
        self.averages = [p for net in self.averaged.values() for p in net.parameters()]
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
            losses = self.losses(k)
        sum(loss.mean() for loss, _ in losses.values()).backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, options.gradient_clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():  # early on a shorter average, or the first weights would linger
            torch._foreach_lerp_(
                self.averages, self.parameters, 1 - min(options.ema, (k + 1) / (k + 10))
            )
        self.steps_done += 1
        report = StepReport(
            {name: float(loss.detach().mean()) for name, (loss, _) in losses.items()},
            {name: self._by_t(loss.detach(), t) for name, (loss, t) in losses.items()},
        )
        if not np.isfinite(sum(report.losses.values())):
            raise FloatingPointError(f"the loss is not finite at step {k}")
        return report

    def losses(self, step: int) -> Losses:
        """Per-sample losses of a step's batch, and their timesteps: name -> (loss [B], t [B])."""
        return self.objective.losses(self.draw(step))

    def draw(self, step: int) -> Draw:
        """What is random in a step, from its beginning."""
        return Draw(
            self.clips,
            self.labels,
            (self.options.seed, step),
            class_dropout=self.options.class_dropout,
            null_class=self.config.null_class,
            num_timesteps=self.objective.schedule.num_train_timesteps,
            device=self.device,
        )

    def _by_t(self, loss: Tensor, t: Tensor) -> list[float]:
        bins = t * TIME_BINS // self.objective.schedule.num_train_timesteps
        return [float(loss[bins == i].mean()) for i in range(TIME_BINS)]

    # -- on disk -------------------------------------------------------------------------------

    def warm_start(self, folder: Path) -> list[str]:
        """Start from the weights of a checkpoint folder where name and shape are the same.

        A VDM* may start from a decomposed model's base network. Returns the names of the weights
        that keep their fresh initialisation. Raises FileNotFoundError or ValueError for a folder
        that holds no whole checkpoint, or none that ours can start from.
        """
        config = read_config(folder)
        fresh = []
        for name, source in self.objective.sources(config).items():
            state = read_weights(folder, source, config)
            for net in (self.networks[name], self.averaged[name]):
                own = net.unet.state_dict()
                fits = {k: v for k, v in state.items() if k in own and own[k].shape == v.shape}
                net.unet.load_state_dict(fits, strict=False)
            fresh += [f"{name}.{key}" for key in own if key not in fits]
        return fresh

    def export(self, folder: Path) -> CheckpointConfig:
        """Write the averaged weights as a checkpoint that `vfengine.generate --model` takes."""
        states = [self.averaged[name].unet.state_dict() for name in self.config.networks]
        return save_checkpoint(folder, self.config, *states)

    def save(self, file: Path) -> None:
        """Everything a run continues from, in one .safetensors file that is whole or not there."""
        tensors = {
            f"{kind}.{i}": value
            for kind, values in self._state().items()
            for i, value in enumerate(values)
        }
        metadata = {"steps_done": str(self.steps_done), "model": self._identity()}
        metadata["options"] = json.dumps(asdict(self.options))
        write_tensors(file, tensors, metadata)

    def restore(self, file: Path) -> None:
        """Continue from `save`. Raises ValueError for a damaged file or another model's state."""
        with open_tensors(file, "training state") as stored, torch.no_grad():
            metadata = stored.metadata() or {}
            if metadata.get("model") != self._identity():
                raise ValueError(f"{file} is the training state of another model or of other data")
            for kind, values in self._state().items():
                for i, value in enumerate(values):
                    value.copy_(stored.get_tensor(f"{kind}.{i}"))
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
        values = {f.name: getattr(self.config, f.name) for f in fields(self.config)}
        del values["sha256"]
        if self.config.objective == "decomposed":
            del values["clean_share"]
        else:
            values |= {**_ONCE_IN_PLAIN_MODELS, "video": self.config.video.identity()}
        text = repr((sorted(values.items()), self.clips.shape, self.options.seed))
        return hashlib.sha256(text.encode()).hexdigest()[:16]
