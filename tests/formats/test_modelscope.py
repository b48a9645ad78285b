"""ModelScope's text-to-video UNet, from files in its own names: diffusers' is the oracle."""

import json

import pytest
import torch
from published_folders import unet_state
from seeded import filled, normal
from test_peers import error, run_peer
from torch import nn

from vfengine.models import read_unet

# Made for the tests, from the published list of keys
MODEL_CFG = {
    "unet_in_dim": 4,
    "unet_dim": 32,
    "unet_y_dim": 768,
    "unet_context_dim": 12,
    "unet_out_dim": 4,
    "unet_dim_mult": [1, 2, 2],
    "unet_num_heads": 8,
    "unet_head_dim": 16,
    "unet_res_blocks": 2,
    "unet_attn_scales": [1, 0.5],
    "unet_dropout": 0.1,
    "temporal_attention": "True",
    "num_timesteps": 1000,
    "mean_type": "eps",
}


def modelscope_peer() -> nn.Module:
    from diffusers import UNet3DConditionModel

    return filled(
        UNet3DConditionModel(
            block_out_channels=(32, 64, 64),
            attention_head_dim=16,
            cross_attention_dim=12,
            down_block_types=(*("CrossAttnDownBlock3D",) * 2, "DownBlock3D"),
            up_block_types=("UpBlock3D", *("CrossAttnUpBlock3D",) * 2),
            layers_per_block=2,
        )
    )


@pytest.fixture(scope="module")
def modelscope(tmp_path_factory) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    peer = modelscope_peer()
    return peer, unet_state(peer)


@pytest.mark.parametrize("how", ["with its configuration", "alone", "the file", "old torch.save"])
def test_modelscope_matches_diffusers(how, modelscope, tmp_path):
    peer, state = modelscope
    file = tmp_path / "text2video_pytorch_model.pth"
    torch.save(state, file, _use_new_zipfile_serialization=how != "old torch.save")
    cfg = MODEL_CFG
    if how != "with its configuration":  # what shapes do not say: 8 heads in the first transformer
        source = file if how == "the file" else tmp_path
    else:
        source = tmp_path
        text = json.dumps({"task": "text-to-video-synthesis", "model": {"model_cfg": cfg}})
        (tmp_path / "configuration.json").write_text(text)
    unet = read_unet(source, torch.float32)
    x, t, context = normal(2, 3, 4, 8, 12), torch.tensor([1, 981]), normal(2, 5, 12, seed=2)
    assert error(unet(x, t, context), run_peer(peer, x, t, context)) < 1e-5


def test_a_configuration_may_name_another_file(modelscope, tmp_path):
    torch.save(modelscope[1], tmp_path / "other.pth")
    model = {"model_cfg": MODEL_CFG, "model_args": {"ckpt_unet": "other.pth"}}
    (tmp_path / "configuration.json").write_text(json.dumps({"model": model}))
    assert read_unet(tmp_path).config.is_video


def test_modelscope_keys_are_the_published_ones(modelscope):
    """Spelling and places that the published file is known by."""
    _, state = modelscope
    for key in (
        "input_blocks.0.1.proj_in.weight",
        "input_blocks.1.0.temopral_conv.conv1.2.weight",
        "input_blocks.1.0.temopral_conv.conv4.3.bias",
        "input_blocks.3.op.weight",
        "input_blocks.4.2.transformer_blocks.0.attn2.to_out.0.weight",
        "middle_block.3.emb_layers.1.weight",
        "output_blocks.2.1.conv.weight",
        "output_blocks.5.3.conv.weight",
        "time_embed.2.bias",
    ):
        assert key in state


def test_refuses_other_modelscope_networks(modelscope, tmp_path):
    _, state = modelscope
    torch.save({"model": state["out.2.bias"]}, tmp_path / "text2video_pytorch_model.pth")
    with pytest.raises(ValueError, match="not a ModelScope text-to-video UNet"):
        read_unet(tmp_path)
    for entries, message in (
        ({"temporal_attention": "False"}, "temporal_attention"),
        ({"unet_use_fps": True}, "unet_use_fps = true is an unknown entry"),
        ({"unet_head_dim": 24}, "unet_head_dim = 24 does not divide 32"),
        (None, "no model_cfg"),
    ):
        model = {} if entries is None else {"model_cfg": {**MODEL_CFG, **entries}}
        (tmp_path / "configuration.json").write_text(json.dumps({"model": model}))
        with pytest.raises(ValueError, match=message):
            read_unet(tmp_path)
