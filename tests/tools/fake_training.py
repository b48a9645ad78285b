"""A captured training whose tensors are fake CUDA ones (fake_cuda.py), to audit its steps."""

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from vfengine.training.trainer import Trainer


def on_fake_cuda(trainer: Trainer, mode: FakeTensorMode) -> None:
    """Replaces all tensors that the trainer's step reads."""
    memo = {}

    def fake(t: torch.Tensor) -> torch.Tensor:
        if id(t) not in memo:
            with mode:
                twin = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cuda")
            memo[id(t)] = (t, twin.requires_grad_(t.requires_grad))
        return memo[id(t)][1]

    for network in (*trainer.networks.values(), *trainer.updates.averaged.values()):
        for part in network.modules():
            for name, weight in part._parameters.items():
                if weight is not None:
                    part._parameters[name] = torch.nn.Parameter(fake(weight), weight.requires_grad)
                    memo[id(weight)] = (weight, part._parameters[name])
            for name, buffer in part._buffers.items():
                part._buffers[name] = fake(buffer)
    updates = trainer.updates
    for name in ("parameters", "averages"):
        setattr(updates, name, [fake(weight) for weight in getattr(updates, name)])
    optimizer = updates.optimizer
    (group,) = optimizer.param_groups
    moments = [optimizer.state[p] for p in group["params"]]
    group["params"] = updates.parameters
    optimizer.state.clear()
    for weight, own in zip(updates.parameters, moments, strict=True):
        optimizer.state[weight] = {name: fake(value) for name, value in own.items()}
    updates._rate = group["lr"] = fake(updates._rate)
    updates._share = fake(updates._share)
    trainer.device = trainer.objective.device = torch.device("cuda", 0)
    schedule = trainer.objective.schedule
    object.__setattr__(schedule, "_table", fake(schedule._table))
    for batch in trainer._captured._batches:
        batch._buffers = [
            tuple(None if buffer is None else fake(buffer) for buffer in buffers)
            for buffers in batch._buffers
        ]


def adamw_on_cuda(*lists, lr, **numbers) -> None:
    """What CUDA's fused AdamW takes in a graph; fake tensors have none of their own."""
    tensors = [tensor for each in lists for tensor in each]
    assert {t.device.type for t in (*tensors, lr)} == {"cuda"}
    assert all(isinstance(x, float | bool | None) for x in numbers.values())
