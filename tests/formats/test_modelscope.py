"""ModelScope's text-to-video UNet, from files in its own names: diffusers' is the oracle."""

import json

import pytest
import torch
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
RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
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


def modelscope_state(peer: nn.Module) -> dict[str, torch.Tensor]:
    """The weights of a UNet3DConditionModel of three levels, two blocks each, as ModelScope's."""
    state = {}
    for key, value in peer.state_dict().items():
        block, _, rest = key.partition(".")
        if block == "time_embedding":
            name = rest.replace("linear_1", "time_embed.0").replace("linear_2", "time_embed.2")
        elif block in ("conv_in", "conv_norm_out", "conv_out"):
            place = {"conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2"}
            name = f"{place[block]}.{rest}"
        elif block == "transformer_in":
            name = f"input_blocks.0.1.{rest}"
        elif block == "mid_block":
            part, index, inner = rest.split(".", 2)
            number = {"attentions": 1, "temp_attentions": 2}.get(part, 3 * int(index))
            name = f"middle_block.{number}.{_inner(part, inner)}"
        else:
            level, part, index, inner = rest.split(".", 3)
            down = block == "down_blocks"
            first = 1 + 3 * int(level) if down else 3 * int(level)
            if part == "downsamplers":
                name = f"input_blocks.{first + 2}.op.{inner.removeprefix('conv.')}"
            elif part == "upsamplers":
                name = f"output_blocks.{first + 2}.{1 if level == '0' else 3}.{inner}"
            else:
                number = {"attentions": 1, "temp_attentions": 2}.get(part, 0)
                side = "input_blocks" if down else "output_blocks"
                name = f"{side}.{first + int(index)}.{number}.{_inner(part, inner)}"
        if "temp_attentions" in key or block == "transformer_in":
            if "proj_in.weight" in key or "proj_out.weight" in key:
                value = value[..., None]  # 1x1 convolutions over frames
        state[name] = value.clone()
    assert len(state) == len(peer.state_dict())
    return state


def _inner(part: str, inner: str) -> str:
    if part == "resnets":
        layer, _, parameter = inner.partition(".")
        return f"{RESNET[layer]}.{parameter}"
    return f"temopral_conv.{inner}" if part == "temp_convs" else inner


@pytest.fixture(scope="module")
def modelscope(tmp_path_factory) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    peer = modelscope_peer()
    return peer, modelscope_state(peer)


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
