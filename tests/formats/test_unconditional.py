"""UNets of images without a prompt (UNet2DModel), against diffusers' own."""

import json

import pytest
import torch
from diffusers import UNet2DModel
from safetensors.torch import load_file, save_file
from seeded import filled, normal
from test_load import copied
from test_peers import error

from vfengine.formats.diffusers import diffusers_unet
from vfengine.models import PlannedUNet, UNet, load_unet, read_unet
from vfengine.models.unet import empty_unet
from vfengine.native import vfengine_native
from vfengine.plan.cuda import CudaUNet

# What the published configurations share: of google/ddpm-cifar10-32, ddpm-celebahq-256,
# ddpm-church-256, ddpm-bedroom-256 and their averages.
PUBLISHED = {
    "act_fn": "silu",
    "attention_head_dim": None,
    "center_input_sample": False,
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "in_channels": 3,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-06,
    "norm_num_groups": 32,
    "out_channels": 3,
    "time_embedding_type": "positional",
}
CIFAR = {
    **PUBLISHED,
    "sample_size": 32,
    "block_out_channels": (128, 256, 256, 256),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
}
LARGE = {  # of 256 pixels
    **PUBLISHED,
    "sample_size": 256,
    "block_out_channels": (128, 128, 256, 256, 512, 512),
    "down_block_types": (*("DownBlock2D",) * 4, "AttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D", *("UpBlock2D",) * 4),
}
SMALL = {**CIFAR, "block_out_channels": (16, 24, 24, 24), "norm_num_groups": 8}
TWO = {
    **SMALL,
    "block_out_channels": (16, 24),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}
CASES = {  # a configuration, and the size of images
    "cifar10-32": (SMALL, (16, 8)),
    "256 pixels": (
        {**LARGE, "block_out_channels": (8, 8, 16, 16, 24, 24), "norm_num_groups": 4},
        (32, 32),
    ),
    "heads of 8": ({**TWO, "attention_head_dim": 8}, (8, 6)),
    "heads of 3": ({**TWO, "attention_head_dim": 3, "block_out_channels": (24, 24)}, (4, 4)),
    "padded around": ({**TWO, "downsample_padding": 1}, (8, 6)),
    "no attention": ({**TWO, "add_attention": False}, (4, 4)),
    "no middle": ({**TWO, "mid_block_type": None}, (4, 4)),
    "classes": ({**TWO, "num_class_embeds": 5}, (4, 4)),
    "timestep class": ({**TWO, "class_embed_type": "timestep"}, (4, 4)),
    "scale shift": (
        {**TWO, "resnet_time_scale_shift": "scale_shift", "attn_norm_num_groups": 8},
        (4, 4),
    ),
    "scale shift, no attention": (
        {**TWO, "resnet_time_scale_shift": "scale_shift", "add_attention": False},
        (4, 4),
    ),
    "cosines first": ({**TWO, "flip_sin_to_cos": True, "freq_shift": 0, "norm_eps": 1e-5}, (4, 4)),
}
NEW_NAMES = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def peer_of(case: str, folder, gain: float = 1.6) -> UNet2DModel:
    """A network of diffusers, saved in the folder."""
    peer = filled(UNet2DModel(**CASES[case][0]), gain)
    peer.save_pretrained(folder)
    return peer


def inputs(case: str) -> dict:
    values = {"x": normal(2, 3, *CASES[case][1]), "t": torch.tensor([7, 801])}
    if "class" in case:
        values["class_labels"] = torch.tensor([4, 2])
    return values


@torch.no_grad()
def run_peer(peer: UNet2DModel, x, t, **classes):
    return peer(x, t, **classes).sample


@pytest.mark.parametrize("case", CASES)
def test_unconditional_networks_match_diffusers(case, tmp_path, monkeypatch):
    """The module, its plan on a CPU, and its walk on CUDA with the references of its ops."""
    given = inputs(case)
    expected = run_peer(peer_of(case, tmp_path), **given)
    for load, kind in ((read_unet, UNet), (load_unet, PlannedUNet)):
        unet = load(tmp_path, torch.float32)
        assert type(unet) is kind
        assert error(unet(**given), expected) < 1e-5
    monkeypatch.setenv("VFENGINE_KERNEL_BACKEND", "reference")
    walk = CudaUNet(read_unet(tmp_path, torch.float32), torch.float32)
    assert error(walk(**given), expected) < 1e-5


@pytest.mark.parametrize("isa", vfengine_native.cpu_isas)
def test_unconditional_networks_match_diffusers_on_every_isa(isa, isas, tmp_path):
    isas(isa)
    case = "heads of 3"
    given = inputs(case)
    expected = run_peer(peer_of(case, tmp_path), **given)
    assert error(load_unet(tmp_path, torch.float32)(**given), expected) < 1e-5


def test_unconditional_networks_in_bfloat16_are_as_exact_as_diffusers(tmp_path):
    peer, given = peer_of("heads of 8", tmp_path, 1.0), inputs("heads of 8")
    out = load_unet(tmp_path)(**given)
    expected = run_peer(peer.double(), given["x"].double(), given["t"])
    theirs = run_peer(peer.bfloat16(), given["x"].bfloat16(), given["t"])
    assert error(out, expected) < 1.5 * error(theirs, expected)


@pytest.mark.parametrize("published", [CIFAR, LARGE], ids=["cifar10-32", "256 pixels"])
@pytest.mark.parametrize("names", ["to_q", "query"])
def test_published_configurations_have_our_weights(published, names):
    """At their widths, by names and shapes; older files have other names in attention."""
    with torch.device("meta"):
        peer = UNet2DModel(**published)
    theirs = {name: tuple(value.shape) for name, value in peer.state_dict().items()}
    if names == "query":
        theirs = {renamed(name): shape for name, shape in theirs.items()}
    values = {"_class_name": "UNet2DModel", "_diffusers_version": "0.0.4", **published}
    found = diffusers_unet(json.loads(json.dumps(values)), theirs)
    ours = {found.name(k): tuple(v.shape) for k, v in empty_unet(found.config).state_dict().items()}
    assert ours == theirs
    assert found.config.size_multiple == 2 ** (len(published["block_out_channels"]) - 1)


def renamed(name: str) -> str:
    for new, old in NEW_NAMES.items():
        name = name.replace(f".{new}.", f".{old}.")
    return name


def test_weights_of_old_names_are_the_same_network(tmp_path):
    """query, key, value and proj_attn, and 1x1 convolutions in their places."""
    case, given = "cifar10-32", inputs("cifar10-32")
    expected = run_peer(peer_of(case, tmp_path), **given)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    state = {renamed(name): value for name, value in load_file(file).items()}
    assert any(name.endswith(".proj_attn.weight") for name in state)
    for name in [name for name in state if name.endswith((".query.weight", ".proj_attn.weight"))]:
        state[name] = state[name][:, :, None, None].contiguous()
    save_file(state, file)
    assert error(load_unet(tmp_path, torch.float32)(**given), expected) < 1e-5


def test_sizes_that_cannot_be_halved_are_refused_as_by_diffusers(tmp_path):
    peer = peer_of("padded around", tmp_path)
    x, t = normal(1, 3, 7, 8), torch.tensor([3])
    with pytest.raises(RuntimeError):
        run_peer(peer, x, t)
    with pytest.raises(ValueError, match="multiples of 2"):
        load_unet(tmp_path, torch.float32)(x, t)


@pytest.mark.parametrize(
    "entries, message",
    [
        ({"time_embedding_type": "fourier"}, 'time_embedding_type = "fourier"'),
        ({"time_embedding_type": "learned"}, 'time_embedding_type = "learned"'),
        ({"time_embedding_dim": 32}, "time_embedding_dim = 32"),
        ({"center_input_sample": True}, "center_input_sample = true"),
        ({"mid_block_scale_factor": 1.41}, "mid_block_scale_factor = 1.41"),
        ({"mid_block_type": "UNetMidBlock2DCrossAttn"}, "mid_block_type = .*CrossAttn"),
        ({"down_block_types": ["SkipDownBlock2D", "DownBlock2D"]}, "block SkipDownBlock2D"),
        ({"down_block_types": ["DownBlock2D", "AttnSkipDownBlock2D"]}, "AttnSkipDownBlock2D"),
        ({"down_block_types": ["ResnetDownsampleBlock2D"] * 2}, "block ResnetDownsampleBlock2D"),
        ({"down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"]}, "CrossAttnDownBlock2D"),
        ({"up_block_types": ["UpBlock2D", "AttnUpBlock2D"]}, "must mirror down_block_types"),
        ({"downsample_padding": 2}, "downsample_padding = 2 is not 0 or 1"),
        ({"downsample_type": "resnet"}, 'downsample_type = "resnet"'),
        ({"upsample_type": "resnet"}, 'upsample_type = "resnet"'),
        ({"attention_head_dim": 5}, "attention_head_dim = 5 does not divide 24"),
        ({"attention_head_dim": [8, 8]}, "attention_head_dim = .* one number in a UNet2DModel"),
        ({"attention_head_dim": 0}, "attention_head_dim = 0"),
        ({"attn_norm_num_groups": 4}, "attn_norm_num_groups = 4 is not norm_num_groups"),
        ({"resnet_time_scale_shift": "scale_shift"}, "attn_norm_num_groups = null"),
        ({"resnet_time_scale_shift": "spatial"}, 'resnet_time_scale_shift = "spatial"'),
        ({"add_attention": "yes"}, 'add_attention = "yes" is not true or false'),
        ({"flip_sin_to_cos": "yes"}, 'flip_sin_to_cos = "yes" is not true or false'),
        ({"class_embed_type": "identity"}, 'class_embed_type = "identity"'),
        ({"class_embed_type": "projection"}, 'class_embed_type = "projection"'),
        ({"cross_attention_dim": 12}, "cross_attention_dim = 12 is an unknown entry"),
        ({"act_fn": "mish"}, 'act_fn = "mish"'),
    ],
)
def test_unconditional_configurations_are_refused_by_name(entries, message):
    values = {"_class_name": "UNet2DModel", **TWO, **entries}
    with pytest.raises(ValueError, match=message):
        diffusers_unet(values)


def test_blocks_have_older_names_too():
    values = {"_class_name": "UNet2DModel", **TWO}
    older = {
        side: [f"UNetRes{name}" for name in TWO[side]]
        for side in ("down_block_types", "up_block_types")
    }
    assert diffusers_unet({**values, **older}).config == diffusers_unet(values).config


def test_weights_of_another_unconditional_network_are_refused(tmp_path):
    peer_of("heads of 8", tmp_path / "peer")
    with pytest.raises(ValueError, match=r"no known layer: mid_block\.attentions\.0"):
        read_unet(copied(tmp_path / "peer", tmp_path / "other", add_attention=False))
