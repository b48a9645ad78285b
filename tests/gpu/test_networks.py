"""Networks as they are walked on a GPU, against fp32 on the CPU.

The shipped model's, on latents with prompts; and in fp32 untrained ones of the same widths, on
pixels with labels, in patches, so that no kernel is built for them alone.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from conftest import save_random
from pixel_model import pixel_config
from torch import Tensor

from vfengine.diffusion.noise import base_noise, residual_noise
from vfengine.formats.checkpoint import DEFAULT, DecomposedConfig, load_network, read_config
from vfengine.plan.cuda import CudaUNet
from vfengine.sampling.guidance import ModelSpec
from vfengine.sampling.in_loop import Steps

from .graphs import distance

NETWORKS = ("base", "residual")


@dataclass(frozen=True)
class Model:
    """A checkpoint folder, and what its networks are asked."""

    folder: Path
    config: DecomposedConfig

    def load(self, name: str, device: str, dtype: torch.dtype) -> torch.nn.Module:
        return load_network(self.folder, self.config, name, device, dtype)

    def walked(self, name: str, device: str, dtype: torch.dtype) -> torch.nn.Module:
        network = self.load(name, device, dtype)
        network.unet = CudaUNet(network.unet, dtype)
        return network

    def noise(self, name: str) -> Tensor:
        """Of two pictures or one clip."""
        size = (self.config.channels, self.config.height, self.config.width)
        if name == "base":
            return base_noise((2, *size), 5)
        return residual_noise((1, self.config.num_frames, *size), 5)

    def conditions(self, count: int) -> dict[str, Tensor]:
        """By the name of the networks' argument: so many labels or contexts, then as many nulls."""
        if self.config.text_encoder is None:
            labels = [*[3, 5][:count], *[self.config.null_class] * count]
            return {"class_labels": torch.tensor(labels)}
        text = self.config.text_encoder
        shape = (2 * count, text.max_length, text.width)
        return {"context": torch.randn(shape, generator=torch.Generator().manual_seed(1))}

    def guided(self, name: str, device: str, count: int) -> ModelSpec:
        """Under guidance of scale 2, in fp32."""
        network = self.walked(name, device, torch.float32)
        given = {k: v.to(device) for k, v in self.conditions(count).items()}
        labels, context = given.get("class_labels"), given.get("context")
        return ModelSpec(network, labels, 2.0, context=context)


@pytest.fixture(scope="module", params=["shipped"])
def model(request, tmp_path_factory) -> Model:
    shipped = read_config()
    if request.param == "shipped":
        return Model(DEFAULT, shipped)
    kind = {"context_dim": None, "num_classes": len(shipped.labels), "patch_size": 4}
    config = pixel_config()
    for name, inputs, outputs in (("base", 3, 4), ("residual", 6, 6)):
        unet = replace(getattr(shipped, name), in_channels=inputs, out_channels=outputs, **kind)
        config = replace(config, **{name: unet})
    folder = tmp_path_factory.mktemp("pixels")
    save_random(folder, config)
    return Model(folder, read_config(folder))


def forward(network: torch.nn.Module, model: Model, name: str, device: str) -> Tensor:
    """ε̂ of two noisy pictures or one clip."""
    z = model.noise(name)
    t = torch.tensor([900, 250])[: len(z)]
    conditions = {k: v[: len(z)].to(device) for k, v in model.conditions(len(z)).items()}
    with torch.inference_mode():
        return network(z.to(device), t.to(device), **conditions).cpu()


@pytest.mark.parametrize("model", ["shipped", "pixels"], indirect=True)
@pytest.mark.parametrize("name", NETWORKS)
def test_fp32_network_is_the_cpu_s(name, model, device):
    """1e-4: sums in another order, and a convolution by Winograd, err by 1e-5; TF32 by 3e-4."""
    exact = forward(model.load(name, "cpu", torch.float32), model, name, "cpu")
    here = forward(model.walked(name, device, torch.float32), model, name, device)
    assert distance(here, exact) <= 1e-4


@pytest.mark.parametrize("name", NETWORKS)
def test_bf16_network_errs_as_the_plain_one(name, model, device):
    """Both against fp32 with the same rounded weights: 1.5 times PyTorch's own error there."""
    exact = forward(model.load(name, "cpu", torch.bfloat16).float(), model, name, "cpu")
    networks = [make(name, device, torch.bfloat16) for make in (model.load, model.walked)]
    plain, ours = (distance(forward(net, model, name, device), exact) for net in networks)
    assert 0 < plain < 0.05, "PyTorch's own"
    assert ours <= 1.5 * plain, f"{ours:.3g}, PyTorch {plain:.3g}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", NETWORKS)
def test_same_bits_at_every_call(name, dtype, model, device):
    network = model.walked(name, device, dtype)
    first = forward(network, model, name, device)
    assert torch.equal(forward(network, model, name, device), first)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_in_a_loop_estimates_what_its_forward_does(name, model, device):
    """Guided, by two ops around its layers; in fp32, where their roundings are all there is."""
    z = model.noise(name).to(device)
    guided = model.guided(name, device, len(z)).build(device)
    timesteps = torch.tensor([900, 250, 3], device=device)
    steps = Steps(timesteps, torch.zeros(1, dtype=torch.int32, device=device), z.shape, z.dtype)
    with torch.inference_mode():
        tied = guided.in_loop(steps)
        tied.start()
        for row, t in enumerate(timesteps):
            steps.counter.fill_(row)
            exact = guided(z, t.repeat(len(z)))
            assert distance(tied(z, t.repeat(len(z))), exact) <= 1e-4
