"""The shipped networks as they are walked on a GPU, against fp32 on the CPU."""

import pytest
import torch
from torch import Tensor

from vfengine.diffusion.noise import base_noise, residual_noise
from vfengine.formats.checkpoint import load_network, read_config
from vfengine.plan.cuda import CudaUNet
from vfengine.sampling.guidance import ModelSpec
from vfengine.sampling.in_loop import Steps

from .graphs import distance

CONFIG = read_config()
NETWORKS = CONFIG.networks


def forward(network: torch.nn.Module, name: str, device: str) -> Tensor:
    """ε̂ of two noisy pictures or one clip."""
    size = (CONFIG.channels, CONFIG.height, CONFIG.width)
    if name == "base":
        z = base_noise((2, *size), 5)
    else:
        z = residual_noise((1, CONFIG.num_frames, *size), 5)
    t = torch.tensor([900, 250])[: len(z)]
    labels = torch.tensor([3, CONFIG.null_class])[: len(z)]
    with torch.inference_mode():
        return network(z.to(device), t.to(device), class_labels=labels.to(device)).cpu()


def load(name: str, device: str, dtype: torch.dtype) -> torch.nn.Module:
    return load_network(None, CONFIG, name, device, dtype)


def walked(name: str, device: str, dtype: torch.dtype) -> torch.nn.Module:
    network = load(name, device, dtype)
    network.unet = CudaUNet(network.unet, dtype)
    return network


@pytest.mark.parametrize("name", NETWORKS)
def test_fp32_network_is_the_cpu_s(name, device):
    """1e-4: sums in another order, and a convolution by Winograd, err by 1e-5; TF32 by 3e-4."""
    exact = forward(load(name, "cpu", torch.float32), name, "cpu")
    assert distance(forward(walked(name, device, torch.float32), name, device), exact) <= 1e-4


@pytest.mark.parametrize("name", NETWORKS)
def test_bf16_network_errs_as_the_plain_one(name, device):
    """Both against fp32 with the same rounded weights: 1.5 times PyTorch's own error there."""
    exact = forward(load(name, "cpu", torch.bfloat16).float(), name, "cpu")
    plain = distance(forward(load(name, device, torch.bfloat16), name, device), exact)
    ours = distance(forward(walked(name, device, torch.bfloat16), name, device), exact)
    assert 0 < plain < 0.05, "PyTorch's own"
    assert ours <= 1.5 * plain, f"{ours:.3g}, PyTorch {plain:.3g}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", NETWORKS)
def test_same_bits_at_every_call(name, dtype, device):
    network = walked(name, device, dtype)
    first = forward(network, name, device)
    assert torch.equal(forward(network, name, device), first)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_in_a_loop_estimates_what_its_forward_does(name, device):
    """Guided, by two ops around its layers; in fp32, where their roundings are all there is."""
    size = (CONFIG.channels, CONFIG.height, CONFIG.width)
    noise = base_noise((2, *size), 5) if name == "base" else residual_noise((1, 16, *size), 5)
    z, labels = noise.to(device), [3, 5][: len(noise)]
    labels = torch.tensor([*labels, *[CONFIG.null_class] * len(labels)], device=device)
    model = ModelSpec(walked(name, device, torch.float32), labels, 2.0).build(device)
    timesteps = torch.tensor([900, 250, 3], device=device)
    steps = Steps(timesteps, torch.zeros(1, dtype=torch.int32, device=device), z.shape, z.dtype)
    with torch.inference_mode():
        tied = model.in_loop(steps)
        tied.start()
        for row, t in enumerate(timesteps):
            steps.counter.fill_(row)
            exact = model(z, t.repeat(len(z)))
            assert distance(tied(z, t.repeat(len(z))), exact) <= 1e-4
