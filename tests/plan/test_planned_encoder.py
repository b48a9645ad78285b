"""PlannedEncoder against the Encoder that it replaces, and what an Autoencoder says of frames."""

import copy

import pytest
import torch
from seeded import filled, normal
from test_planned import BF16_ISAS, all_dtypes, distance
from test_planned_bits import threads  # noqa: F401  a fixture

from vfengine.models import (
    Autoencoder,
    AutoencoderConfig,
    Decoder,
    Encoder,
    PlannedDecoder,
    PlannedEncoder,
)
from vfengine.native import vfengine_native

SMALL = AutoencoderConfig(block_out_channels=(32, 40), layers_per_block=1, norm_groups=8)


def encoder() -> Encoder:
    return filled(Encoder(SMALL))


def autoencoder(dtype: torch.dtype = torch.float32) -> Autoencoder:
    decoder = PlannedDecoder(filled(Decoder(SMALL)), dtype)
    return Autoencoder(SMALL, decoder, PlannedEncoder(encoder(), dtype))


@pytest.mark.parametrize("isa", vfengine_native.cpu_isas)
@pytest.mark.parametrize("size", [(16, 16), (10, 14), (2, 2)])
def test_planned_encoder_matches_the_module_on_every_isa(size, isa, isas):
    isas(isa)
    module, x = encoder(), normal(2, 3, *size)
    with torch.no_grad():
        expected = module(x)
        exact = copy.deepcopy(module).double()(x.double())
    out = PlannedEncoder(module, torch.float32)(x)
    assert out.shape == expected.shape == (2, 4, size[0] // 2, size[1] // 2)
    assert distance(out, exact) < max(1e-5, distance(expected, exact))


@pytest.mark.parametrize("isa", BF16_ISAS)
@pytest.mark.parametrize("widths", [(32, 40), (512,)], ids=["narrow", "a head of 512"])
def test_planned_encoder_in_bf16_is_as_close_as_the_module(widths, isa, isas):
    isas(isa)
    config = AutoencoderConfig(block_out_channels=widths, layers_per_block=1, norm_groups=8)
    module, x = filled(Encoder(config)), normal(1, 3, 6, 10)
    with torch.no_grad():
        exact = copy.deepcopy(module).double()(x.double())
        peer = copy.deepcopy(module).bfloat16()(x)
    out = PlannedEncoder(module, torch.bfloat16)(x)
    assert distance(out, exact) <= 1.5 * distance(peer, exact)


@all_dtypes
def test_results_depend_on_neither_threads_nor_batch(dtype, threads):  # noqa: F811
    planned, x, results = PlannedEncoder(encoder(), dtype), normal(3, 3, 12, 10), []
    for count in (1, 2, 3):
        threads(count)
        results.append(planned(x))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    for i in range(3):
        assert torch.equal(planned(x[i : i + 1])[0], results[0][i])


@all_dtypes
def test_clips_are_encoded_frame_by_frame_with_one_program(dtype):
    vae, x = autoencoder(dtype), normal(2, 5, 3, 8, 12)
    z = vae.encode(x)
    assert z.shape == (2, 5, 4, 4, 6) and z.is_contiguous()
    assert list(vae.encoder._programs) == [((1, 3, 8, 12),)]
    assert torch.equal(vae.encode(x[:, 2]), z[:, 2])
    half = vae.encode(x.bfloat16())
    assert half.dtype is torch.bfloat16 and distance(half, z.double()) < 0.05


@pytest.mark.parametrize("frames", [1, 40])
def test_a_clip_needs_the_memory_of_a_frame(frames):
    """One arena, whatever the number of frames."""
    vae = autoencoder()
    vae.encode(vae.decode(normal(1, frames, 4, 8, 8)))
    for network, size in ((vae.decoder, (4, 8, 8)), (vae.encoder, (3, 16, 16))):
        (forward,) = network._programs.values()
        alone = network._planned((1, *size))
        assert forward.program.arena.nbytes == alone.program.arena.nbytes


def test_each_frame_is_reported():
    vae, seen = autoencoder(), []
    z, x = normal(2, 3, 4, 2, 2), normal(2, 3, 4, 4)
    vae.decode(z, callback=lambda *counts: seen.append(counts))
    assert seen == [(done, 6) for done in range(1, 7)]
    seen.clear()
    vae.encode(x, callback=lambda *counts: seen.append(counts))
    assert seen == [(1, 2), (2, 2)]


def test_a_callback_may_stop_between_frames():
    vae, seen = autoencoder(), []

    def stop(done: int, total: int) -> None:
        seen.append(done)
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        vae.decode(normal(1, 5, 4, 2, 2), callback=stop)
    assert seen == [1, 2]
    assert vae.decode(normal(1, 4, 2, 2)).shape == (1, 3, 4, 4)


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (normal(1, 3, 5, 4), ValueError, r"must be multiples of 2, got \(5, 4\)"),
        (normal(1, 2, 3, 4, 7), ValueError, r"must be multiples of 2, got \(4, 7\)"),
        (normal(1, 4, 4, 4), ValueError, r"C = 3, got shape \(1, 4, 4, 4\)"),
        (normal(1, 0, 3, 4, 4), ValueError, r"not empty, .* got shape \(1, 0, 3, 4, 4\)"),
        (torch.zeros(1, 3, 4, 4).int(), TypeError, "pictures must be of a float dtype"),
    ],
)
def test_refuses_other_pictures(x, error, message):
    with pytest.raises(error, match=message):
        autoencoder().encode(x)


def test_weights_are_held_once():
    module = encoder()
    PlannedEncoder(module, torch.float32)
    assert {n for n, p in module.named_parameters() if p.numel() and "norm" not in n} == set()
