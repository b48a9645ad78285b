"""AdamW, averaged weights and the state that a run goes on from: the same for every training."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn

from ..files import open_tensors, write_tensors
from .options import TrainingOptions
from .team import ALONE, Execution


class Updates:
    """Owns the optimizer of some networks, and averaged copies of them.

    averaged     the copies by name, in eval mode: the weights that are shipped
    parameters, averages    the weights of the networks that are trained, which are those that take
                            gradients, and of their copies, in one order
    fixed        weights that are not trained here, and other tensors: a part of the state
    """

    def __init__(
        self,
        networks: Mapping[str, nn.Module],
        options: TrainingOptions,
        fixed: Sequence[nn.Module] = (),
        others: Sequence[Tensor] = (),
        execution: Execution = ALONE,
        device: torch.device | str = "cpu",
    ):
        """fixed: networks that are not trained; others: further tensors of the state

        device: where each process has its share, if the execution gives it one
        """
        self.options, self.team = options, execution.team
        self.fixed = [*(p for net in fixed for p in net.parameters()), *others]
        self.averaged = {
            name: copy.deepcopy(network).eval().requires_grad_(False)
            for name, network in networks.items()
        }
        if execution.shard:
            for network in (*networks.values(), *self.averaged.values()):
                self.team.shard(network, torch.device(device))
        pairs = [
            (weight, average)
            for name, network in networks.items()
            for weight, average in zip(
                network.parameters(), self.averaged[name].parameters(), strict=True
            )
            if weight.requires_grad
        ]
        self.parameters = [weight for weight, _ in pairs]
        self.averages = [average for _, average in pairs]
        self.optimizer = adamw(
            self.parameters, options.learning_rate, (0.9, 0.99), options.weight_decay
        )
        self._rate: Tensor | None = None  # of AdamW; None: a number is enough
        self._share: Tensor | float = 0.0  # of the weights in their averages

    def keep_rates_on(self, device: torch.device) -> None:
        """The rates of each step are tensors from now on, which a captured step finds in place."""
        self._rate, self._share = (
            torch.zeros((), dtype=torch.float32, device=device) for _ in range(2)
        )
        for group in self.optimizer.param_groups:
            group["lr"], group["capturable"] = self._rate, True

    def apply(self, loss: Tensor, step: int) -> None:
        """One optimizer step down this loss, the step-th from 0."""
        self.set_rates(step)
        loss.backward()
        self.descend()

    def set_rates(self, step: int) -> None:
        """What `descend` does next is the step-th step from 0."""
        rate = self.options.learning_rate_at(step)
        # a shorter average at first, so that initial weights do not linger
        share = 1 - min(self.options.ema, (step + 1) / (step + 10))
        if self._rate is not None:
            self._rate.fill_(rate)
            self._share.fill_(share)
            return
        self._share = share
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    def descend(self) -> None:
        """One optimizer step down the gradients that are there."""
        torch.nn.utils.clip_grad_norm_(self.parameters, self.options.gradient_clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        averages, weights = self.team.own(self.averages), self.team.own(self.parameters)
        share = self._share if self._rate is None else [self._share] * len(averages)
        with torch.no_grad():
            torch._foreach_lerp_(averages, weights, share)

    def save(self, file: Path, identity: str, steps_done: int, checkpoint: str = "") -> None:
        """Writes everything that a run continues from to one .safetensors file, atomically.

        identity:   names the model and the data
        checkpoint: names the checkpoint that was exported of this state

        Tensors are whole, however many processes have a share of them.
        """
        tensors = {
            f"{kind}.{i}": self.team.whole(value)
            for kind, values in self._state().items()
            for i, value in enumerate(values)
        }
        metadata = {"steps_done": str(steps_done), "model": identity}
        metadata["options"] = json.dumps(asdict(self.options))
        if checkpoint:
            metadata["checkpoint"] = checkpoint
        self.team.of_first(lambda: write_tensors(file, tensors, metadata))

    def restore(self, file: Path, identity: str) -> int:
        """Continues from `save`; returns the number of steps that were done.

        Raises ValueError for a damaged file or another model's state.
        """
        with open_tensors(file, "training state") as stored, torch.no_grad():
            metadata = stored.metadata() or {}
            if metadata.get("model") != identity:
                raise ValueError(f"{file} is the training state of another model or of other data")
            for kind, values in self._state().items():
                for i, value in enumerate(values):
                    self.team.fill(value, stored.get_tensor(f"{kind}.{i}"))
        return int(metadata["steps_done"])

    def _state(self) -> dict[str, list[Tensor]]:
        return {
            "parameter": self.parameters,
            "average": self.averages,
            "fixed": self.fixed,
            **adam_states(self.optimizer),
        }


def adamw(
    parameters: Sequence[nn.Parameter],
    learning_rate: float,
    betas: tuple[float, float],
    weight_decay: float,
) -> torch.optim.AdamW:
    """AdamW that has its state already, to be saved or to be restored into."""
    optimizer = torch.optim.AdamW(
        parameters, learning_rate, betas=betas, weight_decay=weight_decay, fused=True
    )
    for parameter in parameters:  # as its first step would
        optimizer.state[parameter] = {
            "step": torch.zeros((), device=parameter.device, dtype=torch.float32),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    return optimizer


def adam_states(optimizer: torch.optim.AdamW) -> dict[str, list[Tensor]]:
    """The moments and counts of steps of each parameter."""
    adam = [optimizer.state[p] for group in optimizer.param_groups for p in group["params"]]
    return {key: [state[key] for state in adam] for key in ("exp_avg", "exp_avg_sq", "step")}
