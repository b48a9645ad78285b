"""Counts of one sampling step on CUDA, made without a GPU: kernels, FLOPs and bytes.

The loops and networks are those that Table 4 times, made of fake CUDA tensors (FakeTensorMode with
tests/tools/fake_cuda.py), so what is counted is what a captured graph would hold.

kernels  launches as lib/costs.py counts them, and at most so many where a call takes several
         (KERNELS): cuDNN adds a bias in a kernel of its own, group_norm_silu takes one or two
FLOPs    of the network's module (lib/costs.py), whatever runs in its place
bytes    of every launch: each tensor read once, each written once
"""

from __future__ import annotations

import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import fake_cuda  # of tests/tools
import torch
import torch.nn.functional as F
from gpu_run.prediction import Counts
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from lib.costs import Costs, to_fake, trace
from lib.table4_models import Size, flops, generator, size, skeleton
from lib.table4_ways import ddim, step_loops
from vfengine.diffusion.solvers import SolverTable
from vfengine.models import for_inference
from vfengine.sampling.loop import Loop

NETWORKS = ("base", "residual", "video")
KERNELS = {"aten.convolution": 2, "vfengine.group_norm_silu": 2}  # of a call, where not one
STEPS = 20  # of the loop, of which one is counted


@dataclass(frozen=True)
class Step:
    """One step of a network's loop, one clip; by_name: its kernels by the op that launches them."""

    counts: Counts
    by_name: dict[str, int]


class FakeNetworks:
    """As lib.table4_models.Networks, of fake CUDA tensors; call it under its `mode`."""

    device, dtype = "cuda", torch.bfloat16

    def __init__(self, size: Size) -> None:
        self.size = size
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.skeletons = {name: skeleton(size, name, self.dtype) for name in NETWORKS}

    def __call__(self, name: str) -> nn.Module:
        unet = to_fake(self.skeletons[name], self.device)
        model = generator(name, for_inference(unet, self.dtype, self.device))
        for part in model.modules():
            for key, tensor in part._buffers.items():
                if tensor is not None:
                    part._buffers[key] = tensor.to(self.device)
        return model


class _Known(SolverTable):
    """A table of DDIM at η = 0, whose values a fake tensor need not have."""

    stochastic = False


class _OneAttention(TorchFunctionMode):
    """Attention as one fused kernel, which a torch without CUDA does not choose."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.scaled_dot_product_attention:
            q, k, v = args[:3]
            return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0]
        return function(*args, **(kwargs or {}))


class _Valid(TorchDispatchMode):
    """Lets pass what asks whether values are valid: fake tensors have none."""

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op is torch.ops.aten._local_scalar_dense.default and args[0].dtype is torch.bool:
            return True
        return op(*args, **(kwargs or {}))


def count(size_name: str) -> dict[str, Step]:
    """One step of each network's loop at this size (lib.table4_models.size)."""
    counted = {}
    for network, costs in steps(size_name).items():
        calls = Counter(op.name for op in costs.ops)
        by_name = {name: n * KERNELS.get(name, 1) for name, n in calls.most_common()}
        counts = Counts(sum(by_name.values()), flops(size_name, network), costs.bytes)
        counted[network] = Step(counts, by_name)
    return counted


def steps(size_name: str) -> dict[str, Costs]:
    """What one step of each loop dispatches, its launches by name among it."""
    with tempfile.TemporaryDirectory() as folder:
        remove = fake_cuda.install(Path(folder))
        try:
            networks = FakeNetworks(size(size_name))
            table = _Known(**vars(ddim(STEPS)))
            with networks.mode, torch.no_grad(), _OneAttention():
                return {name: _step(*loop) for name, loop in step_loops(networks, table).items()}
        finally:
            remove()


def _step(loop: Loop, noise: tuple[Tensor, ...]) -> Costs:
    with _Valid():
        loop.start(*noise)
    loop.step()  # what is made once and kept
    return trace(loop.step)
