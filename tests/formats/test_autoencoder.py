"""diffusers' AutoencoderKL, read into our own: values, ways of saving, what is refused."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from seeded import filled, normal
from test_load import copied

from vfengine.formats.stored import StoredNetwork
from vfengine.models import (
    Autoencoder,
    Decoder,
    Encoder,
    PlannedDecoder,
    PlannedEncoder,
    load_autoencoder,
)
from vfengine.plan.cuda import CudaImages
from vfengine.sampling.captured_call import CapturedCall

THREE = {"block_out_channels": (8, 16, 16), "norm_num_groups": 4, "layers_per_block": 1}
CASES = {  # changes to the configuration, and the shape of z
    "three levels": (THREE, (2, 3, 4, 6, 5)),
    "as published, narrow": (
        {"block_out_channels": (8, 16, 32, 32), "norm_num_groups": 4, "layers_per_block": 2},
        (1, 4, 4, 4),
    ),
    "one level": ({"block_out_channels": (8,), "norm_num_groups": 8}, (1, 1, 4, 5, 3)),
    "Winograd's form": ({**THREE, "block_out_channels": (32, 32, 40)}, (1, 2, 4, 4, 4)),
    "no attention": ({**THREE, "mid_block_add_attention": False}, (2, 4, 4, 4)),
    "no quantisation": (
        {**THREE, "use_quant_conv": False, "use_post_quant_conv": False},
        (2, 4, 4, 4),
    ),
    "channels": ({**THREE, "latent_channels": 6, "out_channels": 1}, (1, 2, 6, 3, 4)),
    "a head of 512": ({"block_out_channels": (512,), "norm_num_groups": 32}, (1, 4, 7, 9)),
}
OLD_NAMES = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
FILE = "diffusion_pytorch_model.safetensors"


def peer_of(case: str):
    from diffusers import AutoencoderKL

    entries, levels = CASES[case][0], len(CASES[case][0]["block_out_channels"])
    sides = {"down_block_types": ("DownEncoderBlock2D",) * levels}
    sides["up_block_types"] = ("UpDecoderBlock2D",) * levels
    return filled(AutoencoderKL(**sides, **entries))


def decoded(peer, z: torch.Tensor) -> torch.Tensor:
    """Frame by frame: in bf16 torch's result depends on the batch."""
    with torch.no_grad():
        frames = [peer.decode(frame[None]).sample for frame in z.flatten(0, -4)]
    return torch.cat(frames).unflatten(0, z.shape[:-3])


def encoded(peer, x: torch.Tensor) -> torch.Tensor:
    """The mean, frame by frame as `decoded`."""
    with torch.no_grad():
        frames = [peer.encode(frame[None]).latent_dist.mean for frame in x.flatten(0, -4)]
    return torch.cat(frames).unflatten(0, x.shape[:-3])


def pictures_of(case: str, channels: int = 3) -> torch.Tensor:
    """In -1..1, of the size that the case's latents decode to."""
    entries, (*lead, _, height, width) = CASES[case]
    scale = 2 ** (len(entries["block_out_channels"]) - 1)
    return normal(*lead, channels, scale * height, scale * width, seed=2).clamp(-1, 1)


def error(out: torch.Tensor, exact: torch.Tensor) -> float:
    return float((out.double() - exact.double()).norm() / exact.double().norm())


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("autoencoder")
    peer_of("three levels").save_pretrained(folder)
    return folder


@pytest.mark.parametrize("case", CASES)
def test_decodes_as_diffusers_does(case, tmp_path):
    peer, z = peer_of(case), normal(*CASES[case][1])
    peer.save_pretrained(tmp_path)
    exact = decoded(peer.double(), z.double())
    expected = decoded(peer.float(), z)
    ours = load_autoencoder(tmp_path, torch.float32)
    assert isinstance(ours, Autoencoder) and isinstance(ours.decoder, PlannedDecoder)
    out = ours.decode(z)
    assert out.shape == expected.shape and out.dtype is torch.float32
    assert error(out, exact) < max(1e-5, error(expected, exact))
    half = load_autoencoder(tmp_path, torch.bfloat16).decode(z)
    assert error(half, exact) <= 1.5 * error(decoded(peer.bfloat16(), z.bfloat16()), exact)


@pytest.mark.parametrize("case", CASES)
def test_encodes_as_diffusers_does(case, tmp_path):
    peer, x = peer_of(case), pictures_of(case)
    peer.save_pretrained(tmp_path)
    exact = encoded(peer.double(), x.double())
    expected = encoded(peer.float(), x)
    ours = load_autoencoder(tmp_path, torch.float32)
    assert isinstance(ours.encoder, PlannedEncoder)
    out = ours.encode(x)
    assert out.shape == expected.shape and out.dtype is torch.float32
    assert error(out, exact) < max(1e-5, error(expected, exact))
    half = load_autoencoder(tmp_path, torch.bfloat16).encode(x)
    assert error(half, exact) <= 1.5 * error(encoded(peer.bfloat16(), x.bfloat16()), exact)


def test_attention_of_older_files_is_read(folder, tmp_path):
    file = copied(folder, tmp_path) / FILE
    state = {}
    for name, weight in load_file(file).items():
        if "attentions" in name:
            for now, before in OLD_NAMES.items():
                name = name.replace(f".{now}.", f".{before}.")
        state[name] = weight
    save_file(state, file)
    z = normal(1, 4, 4, 4)
    expected = load_autoencoder(folder, torch.float32).decode(z)
    assert torch.equal(load_autoencoder(tmp_path, torch.float32).decode(z), expected)


def test_pipelines_hold_it_in_vae_and_a_file_may_be_named(folder, tmp_path):
    copied(folder, tmp_path / "vae")
    z = normal(1, 4, 4, 4)
    expected = load_autoencoder(folder, torch.float32).decode(z)
    for source in (tmp_path, tmp_path / "vae" / FILE, str(tmp_path / "vae")):
        assert torch.equal(load_autoencoder(source, torch.float32).decode(z), expected)


def test_the_encoder_need_not_be_there(folder, tmp_path):
    file = copied(folder, tmp_path) / FILE
    state = {n: w for n, w in load_file(file).items() if not n.startswith(("encoder", "quant"))}
    save_file(state, file)
    z, ours = normal(1, 4, 4, 4), load_autoencoder(tmp_path, torch.float32)
    expected = load_autoencoder(folder, torch.float32).decode(z)
    assert torch.equal(ours.decode(z), expected)
    for autoencoder in (ours, load_autoencoder(folder, encodes=False)):
        with pytest.raises(ValueError, match="Autoencoder: no encoder was read"):
            autoencoder.encode(normal(1, 3, 8, 8))


def test_float16_is_left_to_pytorch(folder):
    autoencoder = load_autoencoder(folder, torch.float16)
    parts = (autoencoder.decoder, autoencoder.encoder)
    assert [type(part) for part in parts] == [Decoder, Encoder]
    assert not any(part.training for part in parts)
    assert {p.dtype for p in autoencoder.parameters()} == {torch.float16}
    assert not any(p.requires_grad for p in autoencoder.parameters())


@pytest.mark.parametrize("capture", [True, False])
def test_on_cuda_it_is_walked_and_captured(capture, folder, monkeypatch):
    """Nothing runs: the weights stay where they are."""
    read = StoredNetwork.read
    monkeypatch.setattr(StoredNetwork, "read", lambda self, dtype, _: read(self, dtype, "cpu"))
    ours = load_autoencoder(folder, torch.float16, "cuda", capture=capture)
    for part in (ours.decoder, ours.encoder):
        assert isinstance(part, CapturedCall) is capture
        walked = part.network if capture else part
        assert isinstance(walked, CudaImages) and walked.dtype is torch.float16


# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "entries, message",
    [
        ({"_class_name": "AsymmetricAutoencoderKL"}, '_class_name = "Asym.* is not AutoencoderKL'),
        ({"up_block_types": ["UpDecoderBlock2D"]}, "up_block_types = .* at every level"),
        (
            {"up_block_types": ["AttnUpDecoderBlock2D", *["UpDecoderBlock2D"] * 2]},
            "up_block_types = .*Attn",
        ),
        ({"down_block_types": ["DownBlock2D"] * 3}, "must be DownEncoderBlock2D at every level"),
        ({"act_fn": "gelu"}, 'act_fn = "gelu"'),
        ({"latent_channels": 3}, "latent_channels must be even, got 3"),
        ({"latent_channels": "four"}, "latent_channels must be int, got 'four'"),
        ({"block_out_channels": [8, 16, 0]}, "block_out_channels must be tuple"),
        ({"mid_block_add_attention": 1}, "mid_block_add_attention must be bool, got 1"),
        ({"norm_num_groups": 5}, "8 channels are no multiple of norm_num_groups=5"),
        ({"new_trick": True}, "new_trick = true is an unknown entry"),
    ],
)
def test_refuses_configurations_by_name(entries, message, folder, tmp_path):
    with pytest.raises(ValueError, match=message) as refused:
        load_autoencoder(copied(folder, tmp_path, **entries))
    assert str(tmp_path) in str(refused.value)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda s: s.pop("decoder.conv_in.bias"), "misses weights: decoder.conv_in.bias$"),
        (lambda s: s.pop("encoder.conv_in.bias"), "misses weights: encoder.conv_in.bias$"),
        (lambda s: s.update({"encoder.x": torch.zeros(1)}), "of no known layer: encoder.x"),
        (lambda s: s.update({"decoder.x": torch.zeros(1)}), "of no known layer: decoder.x"),
        (
            lambda s: s.update({"post_quant_conv.weight": torch.zeros(4, 4, 3, 3)}),
            r"post_quant_conv.weight \[4, 4, 3, 3\] instead of \[4, 4\]",
        ),
    ],
)
def test_refuses_other_weights_by_name(change, message, folder, tmp_path):
    file = copied(folder, tmp_path) / FILE
    state = load_file(file)
    change(state)
    save_file(state, file)
    with pytest.raises(ValueError, match=message):
        load_autoencoder(tmp_path)


def test_refuses_folders_without_one_and_dtypes(folder, tmp_path):
    (tmp_path / "vae").mkdir()
    with pytest.raises(FileNotFoundError, match="no autoencoder in"):
        load_autoencoder(tmp_path)
    with pytest.raises(ValueError, match="load_autoencoder: dtype must be one of"):
        load_autoencoder(folder, torch.int8)
    (tmp_path / "config.json").write_text(json.dumps([1]))
    with pytest.raises(FileNotFoundError, match="has none of"):
        load_autoencoder(tmp_path)
