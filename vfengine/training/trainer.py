"""Training on clips: optimizer steps, averaged weights, state. Losses are in objectives.py.

Everything random in step k is drawn from (seed, k), by batch.py. A run that is stopped and resumed
takes, bit for bit, the steps of one that was never stopped (same machine, thread count and torch).
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
from .batch import BatchSampler
from .objectives import OBJECTIVES, Losses, build_networks
from .options import TrainingOptions

# the log shows losses by fifths of the schedule: early fifths are detail, late ones motion
TIME_BINS = 5

# entries of decomposed models that the names of plain models' states include
_ONCE_IN_PLAIN_MODELS = {
    **{"lam": None, "base": None, "residual": None},
    **{"base_std": 0.5, "residual_std": 0.35, "base_path": "stepwise"},
}


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
        with torch.no_grad():  # a shorter average at first, so that initial weights do not linger
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
        return self.objective.losses(self.batch_sampler(step))

    def batch_sampler(self, step: int) -> BatchSampler:
        """A sampler for everything random in a step."""
        return BatchSampler(
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

        A plain model may start from a decomposed model's base network. Returns the names of the
        weights that keep their fresh initialisation. Raises FileNotFoundError or ValueError for a
        folder without a whole checkpoint, or with one of a kind that ours cannot start from.
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
        """Writes everything that a run continues from to one .safetensors file, atomically."""
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
