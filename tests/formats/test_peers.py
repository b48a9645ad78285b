"""Published networks, loaded into our UNet family and compared with diffusers' own."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from vfengine.formats.load import fingerprint
from vfengine.models import PlannedUNet, UNet, load_unet, read_unet

SHAPE_2D = {
    "sample_size": 8,
    "block_out_channels": (16, 24),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "cross_attention_dim": 12,
    "attention_head_dim": 2,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
PLAIN = {
    "down_block_types": ("DownBlock2D",) * 2,
    "mid_block_type": "UNetMidBlock2D",
    "up_block_types": ("UpBlock2D",) * 2,
}
THREE = {
    "block_out_channels": (16, 24, 32),
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
}
SHAPE_3D = {
    "sample_size": 8,
    "block_out_channels": (16, 24),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "cross_attention_dim": 12,
    "attention_head_dim": 8,
    "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
    "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"),
}
CASES = {  # changes to a shape, and the shape of x: [B, C, H, W] or [B, N, C, H, W]
    "plain": (PLAIN, (2, 4, 8, 8)),
    "cross": ({}, (2, 4, 8, 8)),
    "one level": (
        {
            "block_out_channels": (16,),
            "down_block_types": ("CrossAttnDownBlock2D",),
            "up_block_types": ("CrossAttnUpBlock2D",),
        },
        (2, 4, 5, 8),
    ),
    "no middle": ({"mid_block_type": None}, (1, 4, 8, 8)),
    "no context": (
        {**PLAIN, "mid_block_type": "UNetMidBlock2DCrossAttn", "cross_attention_dim": (None, None)},
        (2, 4, 8, 8),
    ),
    "linear": ({"use_linear_projection": True, "upcast_attention": True}, (2, 4, 8, 8)),
    "depth": ({**THREE, "transformer_layers_per_block": (1, 3, 2)}, (1, 4, 12, 8)),
    "heads": (
        {**THREE, "attention_head_dim": (2, 3, 8), "layers_per_block": (1, 2, 1)},
        (1, 4, 8, 8),
    ),
    "odd size": (THREE, (2, 4, 11, 7)),
    "classes": ({"num_class_embeds": 5, "class_embed_type": None}, (2, 4, 8, 8)),
    "timestep class": ({"class_embed_type": "timestep"}, (2, 4, 8, 8)),
    "projected class": (
        {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 7},
        (2, 4, 8, 8),
    ),
    "embedding": ({"flip_sin_to_cos": False, "freq_shift": 1}, (2, 4, 8, 8)),
    "wide": ({"block_out_channels": (40, 40), "attention_head_dim": 8}, (1, 4, 8, 8)),
    "scale shift": ({"resnet_time_scale_shift": "scale_shift", "norm_eps": 1e-6}, (2, 4, 8, 8)),
    "channels": ({"in_channels": 9, "out_channels": 3, "center_input_sample": False}, (1, 9, 8, 8)),
    "video": ({}, (2, 3, 4, 8, 8)),
    "video, one frame": ({}, (2, 1, 4, 8, 8)),
    "video, odd size": ({"layers_per_block": 2, "norm_eps": 1e-6}, (1, 4, 4, 9, 7)),
    "video, many heads": ({"attention_head_dim": 4}, (1, 5, 4, 8, 8)),
    "video, plain": (
        {"down_block_types": ("DownBlock3D",) * 2, "up_block_types": ("UpBlock3D",) * 2},
        (1, 3, 4, 8, 8),
    ),
}  # fmt: skip


def normal(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def filled(module: nn.Module, gain: float = 1.0, seed: int = 0) -> nn.Module:
    """Weights everywhere, in biases and layers that start at zero too; norms about one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(drawn * gain / parameter[0].numel() ** 0.5)
            else:
                parameter.copy_(drawn * 0.3 + ("norm" in name and name.endswith("weight")))
    return module.eval()


def peer_of(case: str, gain: float = 1.0) -> nn.Module:
    from diffusers import UNet2DConditionModel, UNet3DConditionModel

    changes, shape = CASES[case]
    kind, base = (
        (UNet2DConditionModel, SHAPE_2D) if len(shape) == 4 else (UNet3DConditionModel, SHAPE_3D)
    )
    return filled(kind(**{**base, **changes}), gain)


def inputs(case: str) -> dict:
    changes, shape = CASES[case]
    batch = shape[0]
    values = {"x": normal(*shape), "t": torch.tensor([7, 801])[:batch], "context": None}
    if "cross_attention_dim" not in changes:
        values["context"] = normal(batch, 5, 12, seed=2)
    if case in ("classes", "timestep class"):
        values["class_labels"] = torch.tensor([4, 2])[:batch]
    if case == "projected class":
        values["class_labels"] = normal(batch, 7, seed=3)
    return values


@torch.no_grad()
def run_peer(peer: nn.Module, x, t, context, class_labels=None, dtype=torch.float32):
    x, context = x.to(dtype), None if context is None else context.to(dtype)
    if class_labels is not None and class_labels.is_floating_point():
        class_labels = class_labels.to(dtype)
    video = x.dim() == 5
    out = peer(
        x.transpose(1, 2) if video else x, t, encoder_hidden_states=context,
        class_labels=class_labels,
    ).sample  # fmt: skip
    return out.transpose(1, 2) if video else out


def run_ours(unet: UNet, x, t, context, class_labels=None):
    if context is not None and unet.config.context_dim is None:
        context = None  # the peer takes one and leaves it
    return unet(x, t, context, class_labels=class_labels)


def error(out: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative L2."""
    assert out.shape == expected.shape
    out, expected = out.double(), expected.double()
    return float((out - expected).norm() / expected.norm())


@pytest.mark.parametrize("gain", [1.0, 1.6], ids=["unit", "large"])
@pytest.mark.parametrize("case", CASES)
def test_matches_diffusers(case, gain, tmp_path):
    """The module, and the planned network that `load_unet` makes of it on a CPU."""
    peer = peer_of(case, gain)
    peer.save_pretrained(tmp_path)
    given = inputs(case)
    expected = run_peer(peer, **given)
    for load, kind in ((read_unet, UNet), (load_unet, PlannedUNet)):
        unet = load(tmp_path, torch.float32)
        assert type(unet) is kind
        assert not unet.training
        assert not any(p.requires_grad for p in unet.parameters())
        assert error(run_ours(unet, **given), expected) < 1e-5


@pytest.mark.parametrize("case", CASES)
def test_bfloat16_is_as_exact_as_diffusers(case, tmp_path):
    peer, given = peer_of(case), inputs(case)
    peer.save_pretrained(tmp_path)
    out = run_ours(load_unet(tmp_path), **given)
    assert out.dtype == given["x"].dtype
    expected = run_peer(peer.double(), **given, dtype=torch.float64)
    theirs = run_peer(peer.bfloat16(), **given, dtype=torch.bfloat16)
    assert error(out, expected) < 1.5 * error(theirs, expected)


# -- files -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cross(tmp_path_factory) -> Path:
    """A folder of diffusers."""
    folder = tmp_path_factory.mktemp("cross")
    peer_of("cross").save_pretrained(folder)
    return folder


def copied(folder: Path, to: Path, **entries) -> Path:
    """The folder with other entries in its config.json; None takes one out."""
    to.mkdir(exist_ok=True)
    for file in folder.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    values = {**json.loads((to / "config.json").read_text()), **entries}
    (to / "config.json").write_text(json.dumps(values))
    return to


def same_weights(a: UNet, b: UNet) -> bool:
    ours, others = a.state_dict(), b.state_dict()
    return ours.keys() == others.keys() and all(torch.equal(ours[k], others[k]) for k in ours)


@pytest.mark.parametrize(
    "how",
    [
        {"max_shard_size": "40KB"},
        {"safe_serialization": False},
        {"safe_serialization": False, "max_shard_size": "40KB"},
        {"variant": "fp16"},
    ],
    ids=["shards", "bin", "bin shards", "variant"],
)
def test_every_way_of_saving_gives_the_same_weights(how, cross, tmp_path):
    peer_of("cross").save_pretrained(tmp_path, **how)
    files = sorted(path.name for path in tmp_path.iterdir())
    assert len(files) > 3 if "max_shard_size" in how else len(files) == 2
    source = tmp_path / files[-1] if "variant" in how else tmp_path
    assert same_weights(read_unet(source, torch.float32), read_unet(cross, torch.float32))


def test_pipeline_folders_hold_it_in_unet(cross, tmp_path):
    copied(cross, tmp_path / "unet")
    assert same_weights(read_unet(tmp_path), read_unet(str(cross)))


def test_weights_are_cast_copies_in_channels_last(cross, tmp_path):
    unet = read_unet(copied(cross, tmp_path / "a"), torch.float16)
    assert {p.dtype for p in unet.parameters()} == {torch.float16}
    assert unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    assert unet.dtype == torch.float16
    held = read_unet(tmp_path / "a", torch.float32)
    before = held.conv_norm_out.weight.clone()
    weights = tmp_path / "a" / "diffusion_pytorch_model.safetensors"
    with weights.open("r+b") as file:  # no mapping of the file is left behind
        file.seek(weights.stat().st_size // 2)
        file.write(b"\0" * (weights.stat().st_size // 2))
    assert torch.equal(held.conv_norm_out.weight, before)


def test_networks_of_others_say_what_they_are(cross):
    config = read_unet(cross).config
    assert not config.is_video
    assert config.context_dim == 12
    assert config.size_multiple == 1
    assert type(config)(**json.loads(json.dumps(config.to_dict()))) == config


def test_fingerprint_names_weights_and_notes(cross, tmp_path):
    other = copied(cross, tmp_path / "other", norm_eps=1e-6)
    unet = read_unet(cross, torch.float32)
    prints = [fingerprint(cross), fingerprint(other), fingerprint(cross, "v"), fingerprint(unet)]
    assert len(set(prints)) == 4
    assert prints[0] == fingerprint(cross)
    unet.conv_out.bias[0] += 1
    assert fingerprint(unet) != prints[3]


# -- ModelScope ------------------------------------------------------------------------------------

# of the tests' own making, from the published list of keys
MODEL_CFG = {
    "unet_in_dim": 4, "unet_dim": 32, "unet_y_dim": 768, "unet_context_dim": 12, "unet_out_dim": 4,
    "unet_dim_mult": [1, 2, 2], "unet_num_heads": 8, "unet_head_dim": 16, "unet_res_blocks": 2,
    "unet_attn_scales": [1, 0.5], "unet_dropout": 0.1, "temporal_attention": "True",
    "num_timesteps": 1000, "mean_type": "eps",
}  # fmt: skip
RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0", "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip


def modelscope_peer(**changes) -> nn.Module:
    from diffusers import UNet3DConditionModel

    shape = {
        "block_out_channels": (32, 64, 64), "attention_head_dim": 16, "cross_attention_dim": 12,
        "down_block_types": (*("CrossAttnDownBlock3D",) * 2, "DownBlock3D"),
        "up_block_types": ("UpBlock3D", *("CrossAttnUpBlock3D",) * 2), "layers_per_block": 2,
    }  # fmt: skip
    return filled(UNet3DConditionModel(**{**shape, **changes}))


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
    """Names of weights that are known from the published file."""
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


# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "entries, message",
    [
        ({"_class_name": "UNetMotionModel"}, '_class_name = "UNetMotionModel"'),
        ({"down_block_types": ["AttnDownBlock2D", "DownBlock2D"]}, "block AttnDownBlock2D"),
        ({"down_block_types": ["DownBlock3D", "DownBlock2D"]}, "block DownBlock3D"),
        ({"down_block_types": ["DownBlock2D", "DownBlock2D"]}, "must mirror down_block_types"),
        ({"up_block_types": ["UpBlock2D"]}, "must mirror down_block_types"),
        ({"mid_block_type": "UNetMidBlock2DSimpleCrossAttn"}, "mid_block_type = .*Simple"),
        ({"mid_block_type": "UNetMidBlock3DCrossAttn"}, "mid_block_type = .*3D"),
        ({"addition_embed_type": "text_time"}, 'addition_embed_type = "text_time"'),
        ({"encoder_hid_dim": 64}, "encoder_hid_dim = 64"),
        ({"dual_cross_attention": True}, "dual_cross_attention = true"),
        ({"only_cross_attention": [True, False]}, "only_cross_attention = .true, false."),
        ({"act_fn": "gelu"}, 'act_fn = "gelu"'),
        ({"mid_block_scale_factor": 2}, "mid_block_scale_factor = 2"),
        ({"downsample_padding": 0}, "downsample_padding = 0"),
        ({"time_embedding_type": "fourier"}, 'time_embedding_type = "fourier"'),
        ({"time_cond_proj_dim": 8}, "time_cond_proj_dim = 8"),
        ({"class_embed_type": "identity"}, 'class_embed_type = "identity"'),
        ({"class_embed_type": "projection"}, "class_features"),
        ({"resnet_time_scale_shift": "spatial"}, 'resnet_time_scale_shift = "spatial"'),
        ({"attention_head_dim": [2, 2, 2]}, "attention_head_dim = .* 2 levels"),
        ({"attention_head_dim": 5}, "attention_head_dim = 5 does not divide 16"),
        ({"cross_attention_dim": [12, 13]}, "cross_attention_dim = .12, 13."),
        ({"cross_attention_dim": None}, "cross_attention_dim = null"),
        ({"transformer_layers_per_block": [[1], 1]}, "transformer_layers_per_block"),
        ({"norm_num_groups": None}, "norm_groups"),
        ({"in_channels": "four"}, "in_channels"),
        ({"block_out_channels": [15, 24]}, "block_out_channels = .15, 24. must begin"),
        ({"new_trick": True}, "new_trick = true is an unknown entry"),
    ],
)
def test_refuses_configurations_by_name(entries, message, cross, tmp_path):
    with pytest.raises(ValueError, match=message) as refused:
        read_unet(copied(cross, tmp_path, **entries))
    assert str(tmp_path) in str(refused.value)


@pytest.mark.parametrize(
    "entries, message",
    [
        ({"attention_head_dim": [8, 8]}, "attention_head_dim"),
        ({"flip_sin_to_cos": False}, "flip_sin_to_cos = false"),
        ({"num_class_embeds": 4}, "num_class_embeds = 4"),
        ({"mid_block_type": None}, "mid_block_type = null"),
    ],
)
def test_refuses_variants_that_videos_do_not_have(entries, message, tmp_path):
    peer_of("video").save_pretrained(tmp_path / "peer")
    with pytest.raises(ValueError, match=message):
        read_unet(copied(tmp_path / "peer", tmp_path, **entries))


def test_entries_of_no_effect_are_taken(cross, tmp_path):
    entries = {
        "_name_or_path": "somewhere", "dropout": 0.1, "sample_size": 64, "act_fn": "swish",
        "mid_block_only_cross_attention": False, "only_cross_attention": [False, False],
    }  # fmt: skip
    assert same_weights(read_unet(copied(cross, tmp_path, **entries)), read_unet(cross))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda s: s.pop("conv_in.weight"), "misses weights: conv_in.weight$"),
        (lambda s: [s.pop(k) for k in sorted(s)[:9]], "misses weights: .* and 5 more"),
        (lambda s: s.update({"extra.weight": torch.zeros(1)}), "no known layer: extra.weight"),
        (
            lambda s: s.update({"conv_in.weight": torch.zeros(16, 4, 3, 1)}),
            r"other shapes: conv_in.weight \[16, 4, 3, 1\] instead of \[16, 4, 3, 3\]",
        ),
        (lambda s: s.update({"conv_in.bias": torch.zeros(16).int()}), "conv_in.bias holds .*int32"),
    ],
)
def test_refuses_other_weights_by_name(change, message, cross, tmp_path):
    from safetensors.torch import load_file, save_file

    file = copied(cross, tmp_path) / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    change(state)
    save_file(state, file)
    with pytest.raises(ValueError, match=message):
        read_unet(tmp_path)


class _Trap:
    def __reduce__(self):
        return (exit, (1,))


def test_refuses_files_that_are_no_weights(cross, tmp_path):
    folder = copied(cross, tmp_path / "peer")
    file = folder / "diffusion_pytorch_model.safetensors"
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text("[")
    with pytest.raises(ValueError, match=r"config\.json is not JSON"):
        read_unet(folder / "config.json")
    (folder / "config.json").write_text(text)
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(ValueError, match="not a complete safetensors file"):
        read_unet(folder)
    file.unlink()
    with pytest.raises(FileNotFoundError, match="has none of diffusion"):
        read_unet(folder)
    torch.save({"conv_in.weight": _Trap()}, folder / "diffusion_pytorch_model.bin")
    with pytest.raises(ValueError, match="not a file of weights alone"):
        read_unet(folder)
    index = {"weight_map": {"conv_in.weight": "../elsewhere.bin"}}
    (folder / "diffusion_pytorch_model.bin").rename(
        folder / "diffusion_pytorch_model.bin.index.json"
    )
    (folder / "diffusion_pytorch_model.bin.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="weight_map must name files beside it"):
        read_unet(folder)
    with pytest.raises(FileNotFoundError, match="no UNet in"):
        read_unet(tmp_path)


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


@pytest.mark.parametrize(
    "case, without, message",
    [
        ("cross", "context", "needs a context"),
        ("video", "context", "needs a context"),
        ("classes", "class_labels", "class_labels are needed"),
        ("timestep class", "class_labels", "class_labels are needed"),
    ],
)
def test_calls_need_what_the_network_was_trained_with(case, without, message, tmp_path):
    peer_of(case).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        read_unet(tmp_path)(**{**inputs(case), without: None})


def test_refuses_dtypes(cross):
    with pytest.raises(ValueError, match="dtype must be one of"):
        read_unet(cross, torch.int8)
