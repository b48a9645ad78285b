"""Autoencoders whose finest level is of patches: pixels are folded, in plans as in modules."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from seeded import filled, normal
from test_planned import BF16_ISAS, distance

from vfengine.models import (
    Autoencoder,
    AutoencoderConfig,
    Decoder,
    Encoder,
    PlannedDecoder,
    PlannedEncoder,
)

FOLDED = AutoencoderConfig(
    latent_channels=8,
    block_out_channels=(16, 24),
    layers_per_block=1,
    norm_groups=8,
    mid_attention=False,
    patch_size=2,
)
PARTS = {"decoder": (Decoder, PlannedDecoder), "encoder": (Encoder, PlannedEncoder)}
both_parts = pytest.mark.parametrize("part", PARTS)


def made(part: str, config: AutoencoderConfig = FOLDED) -> tuple[torch.nn.Module, torch.Tensor]:
    module = filled(PARTS[part][0](config)).requires_grad_(False)
    return module, normal(2, 8, 4, 6) if part == "decoder" else normal(2, 3, 16, 24)


@pytest.mark.parametrize("patch", [1, 2, 4])
def test_scale_counts_patches_and_levels(patch):
    config = replace(FOLDED, patch_size=patch)
    assert config.scale == 2 * patch
    vae = Autoencoder(config, Decoder(config), Encoder(config)).requires_grad_(False)
    z = vae.encode(normal(1, 2, 3, 4 * config.scale, 5 * config.scale))
    assert z.shape == (1, 2, 8, 4, 5)
    assert vae.decode(z).shape == (1, 2, 3, 4 * config.scale, 5 * config.scale)


@both_parts
def test_it_is_the_unfolded_network_of_more_channels(part):
    module, x = made(part)
    wide = replace(FOLDED, patch_size=1, in_channels=12, out_channels=12)
    plain = PARTS[part][0](wide).requires_grad_(False)
    plain.load_state_dict(module.state_dict())
    fold = F.pixel_unshuffle(x, 2) if part == "encoder" else x
    expected = plain(fold) if part == "encoder" else F.pixel_shuffle(plain(fold), 2)
    assert torch.equal(module(x), expected)


@both_parts
@pytest.mark.parametrize("patch", [1, 2, 4])
def test_the_plan_matches_the_module(part, patch):
    config = replace(FOLDED, patch_size=patch)
    module, x = made(part, config)
    exact, expected = copy.deepcopy(module).double()(x.double()), module(x)
    out = PARTS[part][1](module, torch.float32)(x)
    assert out.shape == expected.shape and out.is_contiguous()
    assert distance(out, exact) < max(1e-5, distance(expected, exact))


@both_parts
@pytest.mark.parametrize("isa", BF16_ISAS)
def test_the_plan_in_bf16_is_as_close_as_the_module(part, isa, isas):
    isas(isa)
    module, x = made(part)
    exact, peer = copy.deepcopy(module).double()(x.double()), copy.deepcopy(module).bfloat16()(x)
    out = PARTS[part][1](module, torch.bfloat16)(x)
    assert distance(out, exact) <= 1.5 * distance(peer, exact)


@pytest.mark.parametrize("patch", [0, -1, True, 2.0])
def test_other_patches_are_refused(patch):
    with pytest.raises(ValueError, match="patch_size must be int"):
        replace(FOLDED, patch_size=patch)
