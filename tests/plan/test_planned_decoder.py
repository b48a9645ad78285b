"""PlannedDecoder against the Decoder that it replaces: values, bits, errors, memory."""

import copy

import pytest
import torch
from seeded import filled, normal
from test_planned import BF16_ISAS, all_dtypes, distance
from test_planned_bits import threads  # noqa: F401  a fixture

from vfengine.models import Autoencoder, AutoencoderConfig, Decoder, PlannedDecoder
from vfengine.native import vfengine_native

SMALL = AutoencoderConfig(block_out_channels=(32, 40), layers_per_block=1, norm_groups=8)


def decoder() -> Decoder:
    return filled(Decoder(SMALL))


@pytest.mark.parametrize("isa", vfengine_native.cpu_isas)
@pytest.mark.parametrize("size", [(8, 8), (5, 7), (1, 1)])
def test_planned_decoder_matches_the_module_on_every_isa(size, isa, isas):
    isas(isa)
    module, z = decoder(), normal(2, 4, *size)
    with torch.no_grad():
        expected = module(z)
        exact = copy.deepcopy(module).double()(z.double())
    out = PlannedDecoder(module, torch.float32)(z)
    assert out.shape == expected.shape and out.dtype is torch.float32 and out.is_contiguous()
    assert distance(out, exact) < max(1e-5, distance(expected, exact))


@pytest.mark.parametrize("isa", BF16_ISAS)
@pytest.mark.parametrize("widths", [(32, 40), (512,)], ids=["narrow", "a head of 512"])
def test_planned_decoder_in_bf16_is_as_close_as_the_module(widths, isa, isas):
    isas(isa)
    config = AutoencoderConfig(block_out_channels=widths, layers_per_block=1, norm_groups=8)
    module, z = filled(Decoder(config)), normal(1, 4, 5, 7)
    with torch.no_grad():
        exact = copy.deepcopy(module).double()(z.double())
        peer = copy.deepcopy(module).bfloat16()(z)
    out = PlannedDecoder(module, torch.bfloat16)(z)
    assert distance(out, exact) <= 1.5 * distance(peer, exact)


@all_dtypes
def test_results_depend_on_neither_threads_nor_batch(dtype, threads):  # noqa: F811
    planned, z, results = PlannedDecoder(decoder(), dtype), normal(3, 4, 6, 5), []
    for count in (1, 2, 3):
        threads(count)
        results.append(planned(z))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    for i in range(3):
        assert torch.equal(planned(z[i : i + 1])[0], results[0][i])


@all_dtypes
def test_clips_are_decoded_frame_by_frame_with_one_program(dtype):
    planned = PlannedDecoder(decoder(), dtype)
    autoencoder, z = Autoencoder(SMALL, planned), normal(2, 5, 4, 4, 6)
    out = autoencoder.decode(z)
    assert out.shape == (2, 5, 3, 8, 12)
    assert list(planned._programs) == [((1, 4, 4, 6),)]
    assert torch.equal(autoencoder.decode(z[:, 2]), out[:, 2])
    half = autoencoder.decode(z.bfloat16())
    assert half.dtype is torch.bfloat16 and distance(half, out.double()) < 0.05


def test_weights_are_held_once():
    module = decoder()
    PlannedDecoder(module, torch.float32)
    assert {n for n, p in module.named_parameters() if p.numel() and "norm" not in n} == set()


@pytest.mark.parametrize(
    "z, error, message",
    [
        (
            normal(4, 4, 4),
            ValueError,
            r"expected \[B, N, C, h, w\] .* C = 4, got shape \(4, 4, 4\)",
        ),
        (normal(1, 3, 4, 4), ValueError, r"got shape \(1, 3, 4, 4\)"),
        (normal(1, 0, 4, 4, 4), ValueError, r"not empty, .* got shape \(1, 0, 4, 4, 4\)"),
        (torch.zeros(1, 4, 4, 4).int(), TypeError, "float dtype, got torch.int32"),
    ],
)
def test_refuses_other_latents(z, error, message):
    with pytest.raises(error, match=message):
        Autoencoder(SMALL, PlannedDecoder(decoder(), torch.float32)).decode(z)


def test_refuses_wider_heads_than_the_kernels_take():
    wide = AutoencoderConfig(block_out_channels=(520,), layers_per_block=1, norm_groups=8)
    with pytest.raises(ValueError, match="heads may have up to 512 dimensions, got 520"):
        PlannedDecoder(Decoder(wide), torch.float32)


def test_refuses_to_be_moved_or_cast():
    planned = PlannedDecoder(decoder(), torch.float32)
    with pytest.raises(RuntimeError, match=r"PlannedDecoder: packed for .*float32 on the CPU"):
        Autoencoder(SMALL, planned).double()
