"""The autoencoder in latent diffusion's names: the same bits as diffusers', and what is refused."""

from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from published_folders import VAE, ldm_state, small_networks
from seeded import normal
from torch import Tensor

from vfengine.models import load_autoencoder

PREFIX = "first_stage_model."


class Published(NamedTuple):
    """One autoencoder: diffusers' folder, latent diffusion's names, and what it makes of these."""

    folder: Path
    state: dict[str, Tensor]
    z: Tensor
    x: Tensor
    decoded: Tensor
    encoded: Tensor


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Published:
    folder, vae = tmp_path_factory.mktemp("autoencoder"), small_networks().vae
    vae.save_pretrained(folder)
    ours = load_autoencoder(folder, torch.float32)
    z, x = normal(1, 2, 4, 3, 5), normal(1, 2, 3, 24, 40, seed=2)
    return Published(folder, ldm_state(vae), z, x, ours.decode(z), ours.encode(x))


def whole_model(state: dict[str, Tensor]) -> dict[str, object]:
    """As files of training hold it: with a prefix, among other networks and values."""
    others = {"model.diffusion_model.out.2.bias": torch.zeros(4), "betas": torch.zeros(3)}
    others |= {"loss.logvar": torch.zeros(()), "first_stage_model.loss.logvar": torch.zeros(())}
    named = {PREFIX + name: weight for name, weight in state.items()}
    return {"epoch": 3, "global_step": 10, "state_dict": {**others, **named}}


def test_widths_as_published_are_found_by_shapes(published):
    config = load_autoencoder(published.folder, torch.float32).config
    assert (config.scale, config.latent_channels, config.layers_per_block) == (8, 4, 2)


@pytest.mark.parametrize("how", ["of a whole model", "its names alone", "old torch.save", ".ckpt"])
def test_a_file_gives_the_bits_of_diffusers_folder(how, published, tmp_path):
    file = tmp_path / ("model.ckpt" if how == ".ckpt" else VAE)
    state = published.state if how == "its names alone" else whole_model(published.state)
    torch.save(state, file, _use_new_zipfile_serialization=how != "old torch.save")
    ours = load_autoencoder(file, torch.float32)
    assert ours.config == load_autoencoder(published.folder, torch.float32).config
    assert torch.equal(ours.decode(published.z), published.decoded)
    assert torch.equal(ours.encode(published.x), published.encoded)


def test_a_folder_of_modelscope_holds_one(published, tmp_path):
    (tmp_path / "configuration.json").write_text('{"model": {"model_args": {}}}')
    torch.save(whole_model(published.state), tmp_path / VAE)
    ours = load_autoencoder(tmp_path, torch.float32)
    assert torch.equal(ours.decode(published.z), published.decoded)
    other = '{"model": {"model_args": {"ckpt_autoencoder": "other.pth"}}}'
    (tmp_path / "configuration.json").write_text(other)
    with pytest.raises(FileNotFoundError, match=r"has no other\.pth"):
        load_autoencoder(tmp_path)


def test_no_quantisation_and_no_attention_are_found_by_shapes(published, tmp_path):
    state = {n: w for n, w in published.state.items() if "quant" not in n and ".attn_1." not in n}
    torch.save(state, tmp_path / VAE)
    ours = load_autoencoder(tmp_path / VAE, torch.float32)
    config = ours.config
    assert not (config.mid_attention or config.quant_conv or config.post_quant_conv)
    assert ours.encode(published.x).shape == published.encoded.shape


def test_the_decoder_may_be_alone(published, tmp_path):
    state = {n: w for n, w in published.state.items() if not n.startswith(("encoder.", "quant"))}
    torch.save(state, tmp_path / VAE)
    ours = load_autoencoder(tmp_path / VAE, torch.float32)
    assert torch.equal(ours.decode(published.z), published.decoded)
    with pytest.raises(ValueError, match="no encoder was read"):
        ours.encode(published.x)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("decoder.mid.block_1.norm1.bias"), "misses weights: decoder.mid.block_1"),
        (
            lambda s: s.update({"encoder.down.1.attn.0.q.bias": torch.zeros(32)}),
            "of no known layer: encoder.down.1.attn.0.q.bias",
        ),
        (lambda s: s.pop("decoder.conv_in.weight"), "no 'decoder.conv_in.weight'"),
        (
            lambda s: s.update({"decoder.conv_out.bias": torch.zeros(4)}),
            r"decoder.conv_out.bias \[4\] instead of \[3\]",
        ),
        (lambda s: s.clear(), "not an autoencoder of latent diffusion"),
    ],
)
def test_refuses_other_weights_by_name(change, message, published, tmp_path):
    state = dict(published.state)
    change(state)
    torch.save(state, tmp_path / VAE)
    with pytest.raises(ValueError, match=message) as refused:
        load_autoencoder(tmp_path / VAE)
    assert str(tmp_path / VAE) in str(refused.value)


def test_code_in_a_file_is_not_run(tmp_path):
    torch.save({"state_dict": Path("x")}, tmp_path / VAE)
    with pytest.raises(ValueError, match="is not a file of weights alone"):
        load_autoencoder(tmp_path / VAE)
