"""Configurations and weights of other types than they should be: refused by the file's own name."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import tiny_config
from safetensors.torch import load_file, save_file
from test_load import copied
from test_peers import peer_of

from vfengine.formats.checkpoint_config import CheckpointConfig
from vfengine.formats.diffusers import diffusers_unet
from vfengine.formats.diffusers_autoencoder import diffusers_autoencoder_config
from vfengine.formats.modelscope import modelscope_config
from vfengine.formats.published import read_json
from vfengine.formats.scheduler import diffusers_schedule
from vfengine.formats.text_encoder import clip_config
from vfengine.models import UNetConfig, read_unet

WRONG = [None, True, -1, 0, 10**12, 1.5, "x", "4", [], ["a", "b"], {}, {"a": 1}, [[1], [2]]]
WRONG += [float("nan"), float("inf"), [65536] * 2, [True] * 2, [None] * 2, 65536]
UNET = {
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [16, 24],
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "norm_eps": 1e-5,
    "attention_head_dim": 8,
    "mid_block_scale_factor": 1,
    "downsample_padding": 1,
    "act_fn": "silu",
}
IMAGES = {
    **{"flip_sin_to_cos": True, "freq_shift": 0, "class_embed_type": None},
    **{"num_class_embeds": None, "resnet_time_scale_shift": "default"},
}


def blocks(down: str, up: str, kind: str, middle: str | None = None) -> dict:
    plain = [f"DownBlock{kind}", f"UpBlock{kind}"]
    entries = {"down_block_types": [down + kind, plain[0]], "up_block_types": [plain[1], up + kind]}
    return {**entries, **({} if middle is None else {"mid_block_type": middle})}


FORMATS: dict[str, tuple[Callable, dict]] = {
    "2D": (
        diffusers_unet,
        {
            "_class_name": "UNet2DConditionModel",
            **UNET,
            **IMAGES,
            **blocks("CrossAttnDownBlock", "CrossAttnUpBlock", "2D", "UNetMidBlock2DCrossAttn"),
            **{"cross_attention_dim": 12, "transformer_layers_per_block": 1},
        },
    ),
    "3D": (
        diffusers_unet,
        {
            "_class_name": "UNet3DConditionModel",
            **UNET,
            **blocks("CrossAttnDownBlock", "CrossAttnUpBlock", "3D"),
            "cross_attention_dim": 12,
        },
    ),
    "unconditional": (
        diffusers_unet,
        {
            "_class_name": "UNet2DModel",
            **UNET,
            **IMAGES,
            **blocks("AttnDownBlock", "AttnUpBlock", "2D", "UNetMidBlock2D"),
            "add_attention": True,
        },
    ),
    "autoencoder": (
        diffusers_autoencoder_config,
        {
            **{"_class_name": "AutoencoderKL", "latent_channels": 4, "in_channels": 3},
            **{"out_channels": 3, "layers_per_block": 1, "norm_num_groups": 8, "act_fn": "silu"},
            **{"mid_block_add_attention": True, "use_post_quant_conv": True},
            **{"use_quant_conv": True, "block_out_channels": [16, 24]},
            **{"up_block_types": ["UpDecoderBlock2D"] * 2},
            **{"down_block_types": ["DownEncoderBlock2D"] * 2},
        },
    ),
    "text encoder": (
        clip_config,
        {
            **{"model_type": "clip_text_model", "vocab_size": 99, "hidden_size": 64},
            **{"max_position_embeddings": 77, "num_hidden_layers": 2, "num_attention_heads": 4},
            **{"intermediate_size": 64, "hidden_act": "gelu", "layer_norm_eps": 1e-5},
        },
    ),
    "modelscope": (
        modelscope_config,
        {
            **{"unet_in_dim": 4, "unet_out_dim": 4, "unet_dim": 32, "unet_dim_mult": [1, 2]},
            **{"unet_res_blocks": 1, "unet_attn_scales": [1, 0.5], "unet_context_dim": 12},
            **{"unet_num_heads": 8, "unet_head_dim": 8},
        },
    ),
    "scheduler": (
        diffusers_schedule,
        {
            **{"_class_name": "DDIMScheduler", "num_train_timesteps": 9, "beta_start": 0.1},
            **{"beta_end": 0.2, "beta_schedule": "linear", "prediction_type": "epsilon"},
            **{"timestep_spacing": "leading", "steps_offset": 0, "set_alpha_to_one": True},
            **{"clip_sample": False, "thresholding": False, "rescale_betas_zero_snr": False},
        },
    ),
}
# Entries that another one is measured by: a list of one width at two levels of blocks.
MEASURED = {"block_out_channels": r"(up|down)_block_types|channels are no multiple"}
MEASURED |= {"down_block_types": "up_block_types", "num_train_timesteps": "alphas_cumprod"}


@pytest.mark.parametrize("form", FORMATS)
def test_mistyped_entries_are_refused_by_their_own_names(form):
    """As a ValueError, and at once: none is a traceback, or a network that is built for hours."""
    read, values = FORMATS[form]
    read(values)
    refused = 0
    for entry in values:
        for wrong in WRONG:
            try:
                read({**values, entry: wrong})
            except ValueError as error:
                refused += 1
                assert re.search(f"{entry}|{MEASURED.get(entry, entry)}", str(error)), (
                    entry,
                    wrong,
                )
    assert refused > 0.7 * len(values) * len(WRONG)


def test_mistyped_entries_of_our_own_checkpoints_are_refused_by_name():
    values = json.loads(tiny_config().to_json())
    places = [(values, {}), (values["base"], {"base": None}), (values["schedule"], {"schedule": 0})]
    for place, inside in places:
        for entry in place:
            for wrong in [None, True, -1, 10**12, "x", {}, [[1]], float("nan")]:
                changed = {**place, entry: wrong}
                whole = {**values, **dict.fromkeys(inside, changed)} if inside else changed
                try:
                    CheckpointConfig.from_json(json.dumps(whole))
                except ValueError as error:
                    # an empty schedule lacks its name; other words stand for counts of classes
                    assert re.search(f"{entry}|classes|name must be", str(error)), (entry, wrong)


@pytest.mark.parametrize("name", ["base", "residual"])
@pytest.mark.parametrize("wrong", [None, 3, "x", ["in_channels"]])
def test_networks_of_a_checkpoint_must_be_objects(name, wrong):
    values = {**json.loads(tiny_config().to_json()), name: wrong}
    with pytest.raises(ValueError, match=f"{name} must be an object, got "):
        CheckpointConfig.from_json(json.dumps(values))


def test_json_that_is_too_deep_is_no_traceback(tmp_path):
    file, text = tmp_path / "config.json", "[" * 10**5
    file.write_text(text)
    with pytest.raises(ValueError, match="is not JSON"):
        read_json(file)
    with pytest.raises(ValueError, match="not JSON"):
        CheckpointConfig.from_json(text)


@pytest.mark.parametrize(
    "fields",
    [
        {"layers_per_block": (500, 9, 9)},
        {"transformer_depths": (1, 1, 2000)},
        {"temporal_conv_depth": 2000},
        {"mid_blocks": 2000},
    ],
)
def test_networks_of_thousands_of_layers_are_refused(fields):
    with pytest.raises(ValueError, match=f"{next(iter(fields))}=.* layers, 1024 at most"):
        UNetConfig(**fields)
    UNetConfig(layers_per_block=(100, 100, 100), transformer_depths=(1, 2, 3))


# -- weights ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    peer_of("plain").save_pretrained(folder)
    return folder


def stored(plain: Path, folder: Path, dtype: torch.dtype) -> tuple[Path, torch.Tensor]:
    """A copy of the folder with one of its weights in another dtype, and that weight."""
    file = copied(plain, folder) / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    state["conv_in.weight"] = state["conv_in.weight"].to(dtype)
    save_file(state, file)
    return folder, state["conv_in.weight"]


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn], ids=str
)
def test_weights_of_any_float_dtype_are_read(dtype, plain, tmp_path):
    folder, weight = stored(plain, tmp_path, dtype)
    assert torch.equal(read_unet(folder, torch.float32).conv_in.weight, weight.float())


# By the names that safetensors gives them in the file.
OTHERS = {"I8": torch.int8, "I64": torch.int64, "BOOL": torch.bool, "C64": torch.complex64}


@pytest.mark.parametrize("kind", OTHERS)
def test_weights_of_other_dtypes_are_refused_by_name(kind, plain, tmp_path):
    folder, _ = stored(plain, tmp_path, OTHERS[kind])
    with pytest.raises(ValueError, match=rf"conv_in.weight holds {kind}, not weights") as refused:
        read_unet(folder)
    assert str(folder) in str(refused.value)


def test_weights_of_any_strides_are_the_same(plain, tmp_path):
    """Pickles keep strides: a transposed weight, and one that is a part of a larger tensor."""
    folder = copied(plain, tmp_path / "strided")
    file = folder / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    file.unlink()
    part = torch.zeros(2 * state["conv_in.bias"].numel())[::2]
    part.copy_(state["conv_in.bias"])
    state["conv_in.bias"] = part
    name = "time_embedding.linear_1.weight"
    state[name] = state[name].T.contiguous().T
    torch.save(state, file.with_suffix(".bin"))
    ours, expected = (read_unet(place, torch.float32).state_dict() for place in (folder, plain))
    assert all(torch.equal(ours[name], expected[name]) for name in expected)
