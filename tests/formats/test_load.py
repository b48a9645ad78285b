"""Folders of diffusers: every way of saving, what a network says of itself, what is refused."""

import json
from pathlib import Path

import pytest
import torch
from test_peers import inputs, peer_of

from vfengine.formats.load import fingerprint
from vfengine.models import UNet, read_unet


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
    ],
    ids=["shards", "bin", "bin shards"],
)
def test_every_way_of_saving_gives_the_same_weights(how, cross, tmp_path):
    peer_of("cross").save_pretrained(tmp_path, **how)
    files = sorted(path.name for path in tmp_path.iterdir())
    assert len(files) > 3 if "max_shard_size" in how else len(files) == 2
    assert same_weights(read_unet(tmp_path, torch.float32), read_unet(cross, torch.float32))


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
        ({"class_embed_type": "projection"}, "projection_class_embeddings_input_dim"),
        ({"resnet_time_scale_shift": "spatial"}, 'resnet_time_scale_shift = "spatial"'),
        ({"attention_head_dim": [2, 2, 2]}, "attention_head_dim = .* 2 levels"),
        ({"attention_head_dim": 5}, "attention_head_dim = 5 does not divide 16"),
        ({"cross_attention_dim": [12, 13]}, "cross_attention_dim = .12, 13."),
        ({"cross_attention_dim": None}, "cross_attention_dim = null"),
        ({"transformer_layers_per_block": [[1], 1]}, "transformer_layers_per_block"),
        ({"norm_num_groups": None}, "norm_num_groups must be"),
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
        "_name_or_path": "somewhere",
        "dropout": 0.1,
        "sample_size": 64,
        "act_fn": "swish",
        "mid_block_only_cross_attention": False,
        "only_cross_attention": [False, False],
        **{"decay": 0.9999, "inv_gamma": 1.0, "min_decay": 0.0, "optimization_step": 120000},
        **{"power": 0.75, "update_after_step": 0, "use_ema_warmup": True},
    }
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
        (
            lambda s: s.update({"conv_in.bias": torch.zeros(16).int()}),
            "conv_in.bias holds I32, not weights",
        ),
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
    with pytest.raises(ValueError, match=r"it names _sitebuiltins\.Quitter, and code is not run$"):
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


@pytest.mark.parametrize(
    "change",
    [
        lambda state: {**state, 7: torch.zeros(1)},
        lambda state: {**state, "conv_in.bias": state["conv_in.bias"].to_sparse()},
        lambda state: {**state, "conv_in.bias": state["conv_in.bias"].to("meta")},
        lambda state: {**state, "conv_in.bias": [1.0]},
        lambda state: {**state, "conv_in.bias": None},
        lambda state: [*state.values()],
    ],
)
def test_pickles_of_other_things_are_refused(change, tmp_path):
    peer = peer_of("plain")
    peer.save_pretrained(tmp_path, safe_serialization=False)
    file = tmp_path / "diffusion_pytorch_model.bin"
    assert read_unet(tmp_path)
    torch.save(change(peer.state_dict()), file)
    with pytest.raises(ValueError, match=r"model\.bin (is not a dict of|has .* no dense) tensors"):
        read_unet(tmp_path)
