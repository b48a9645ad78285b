"""What published text-to-video models need of a GPU: their autoencoder, and prompts in a loop."""

import pytest
import torch
from seeded import filled, normal

from vfengine.models import AutoencoderConfig, Decoder, Encoder, UNet, UNetConfig
from vfengine.plan.cuda import CudaImages, CudaUNet
from vfengine.sampling.captured_call import CapturedCall
from vfengine.sampling.guidance import prompted
from vfengine.sampling.in_loop import Steps

from .graphs import distance

CONFIG = AutoencoderConfig(block_out_channels=(32, 64), layers_per_block=1)
PARTS = {"decoder": (Decoder, (4, 8, 12)), "encoder": (Encoder, (3, 16, 24))}
PROMPTED = UNetConfig(
    block_out_channels=(64, 96),
    layers_per_block=(1, 1),
    patch_size=1,
    in_channels=4,
    out_channels=4,
    spatial_attention=(True, True),
    temporal_attention=(True, True),
    temporal_conv=(True, True),
    head_dim=32,
    context_dim=32,
    any_size=True,
)


@pytest.mark.parametrize("part", PARTS)
def test_the_autoencoder_is_the_cpu_s_and_captured(part, device):
    """1e-4: sums in another order err by 1e-5, TF32 by 3e-4."""
    make, size = PARTS[part]
    pictures = [normal(1, *size, seed=seed) for seed in (1, 2)]
    plain = filled(make(CONFIG)).requires_grad_(False)
    network = CudaImages(filled(make(CONFIG)).to(device), torch.float32)
    call = network if device == "cpu" else CapturedCall(network)
    for picture in pictures:
        out = call(picture.to(device))
        assert distance(out, plain(picture)) <= 1e-4
        assert torch.equal(call(picture.to(device)), out)


def test_the_autoencoder_in_bf16_errs_as_the_plain_one(device):
    plain = filled(Decoder(CONFIG)).bfloat16().requires_grad_(False)
    z = normal(1, 4, 8, 12).bfloat16()
    exact = filled(Decoder(CONFIG)).bfloat16().float()(z.float()).detach()
    ours = CudaImages(filled(Decoder(CONFIG)).bfloat16().to(device), torch.bfloat16)
    theirs = distance(plain.to(device)(z.to(device)), exact)
    assert distance(ours(z.to(device)), exact) <= 1.5 * theirs


def test_prompts_in_a_loop_are_those_of_a_call(device):
    from vfengine.diffusion.schedule import NoiseSchedule
    from vfengine.models import PretrainedGenerator

    unet = CudaUNet(filled(UNet(PROMPTED)).to(device), torch.float32)
    network = PretrainedGenerator(unet, NoiseSchedule.scaled_linear()).to(device).eval()
    context, negative = (normal(1, 7, 32, seed=seed).to(device) for seed in (3, 4))
    model = prompted(network, context, negative, 9.0).build(device)
    z, timesteps = normal(1, 3, 4, 6, 10).to(device), torch.tensor([981, 1], device=device)
    steps = Steps(timesteps, torch.zeros(1, dtype=torch.int32, device=device), z.shape, z.dtype)
    with torch.inference_mode():
        tied = model.in_loop(steps)
        tied.start()
        for row, t in enumerate(timesteps):
            steps.counter.fill_(row)
            assert distance(tied(z, t[None]), model(z, t[None])) <= 1e-4
