"""A small text-to-image model as diffusers stores it, and decomposed models made of it."""

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from conftest import benchmark_file, tiny_config
from seeded import filled
from torch import nn

from vfengine.formats.checkpoint import DecomposedConfig, build_network, save_checkpoint
from vfengine.formats.text_to_image import linked_parts, read_text_to_image

published_model = benchmark_file("lib.published_model")
WIDTH, FRAMES, SIDE = 32, 4, 8  # of texts; of a clip; of its latents
UNET = {
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": WIDTH,
    "attention_head_dim": (2, 4),  # heads, as Stable Diffusion 2 has them
    "use_linear_projection": True,
    "norm_num_groups": 8,
    "sample_size": SIDE,
}
SCHEDULER = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "prediction_type": "v_prediction",
}


class ImageNetworks(NamedTuple):
    """Of transformers and diffusers."""

    text: nn.Module
    unet: nn.Module
    vae: nn.Module
    scheduler: Any


def image_networks(seed: int = 0, scheduler: dict | None = None, **unet: Any) -> ImageNetworks:
    """In fp32; the seed decides every weight. Latents of SIDE x SIDE, of 2 x 2 pixels each."""
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    text = CLIPTextConfig(
        hidden_act="gelu",
        hidden_size=unet.get("cross_attention_dim", WIDTH),
        intermediate_size=64,
        num_attention_heads=2,
        num_hidden_layers=2,
    )
    vae = AutoencoderKL(
        latent_channels=4,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )
    nets = CLIPTextModel(text), UNet2DConditionModel(**{**UNET, **unet}), vae
    nets = [filled(net, seed=seed + number) for number, net in enumerate(nets)]
    return ImageNetworks(*nets, DDIMScheduler(**{**SCHEDULER, **(scheduler or {})}))


def save_images(folder: Path, networks: ImageNetworks | None = None) -> Path:
    """A folder as Stable Diffusion's, with CLIP's own vocabulary."""
    published_model.quiet()
    text, unet, vae, scheduler = networks or image_networks()
    for name, part in (
        ("text_encoder", text),
        ("unet", unet),
        ("vae", vae),
        ("scheduler", scheduler),
        ("tokenizer", published_model.clip_tokenizer()),
    ):
        part.save_pretrained(folder / name)
    return folder


def decomposed_config(images: Path, trained: bool = False, **changes: Any) -> DecomposedConfig:
    """A decomposed model on the base network in a folder of `save_images`."""
    tiny, model = tiny_config(), read_text_to_image(images)
    residual = replace(
        tiny.residual,
        in_channels=8,
        out_channels=7,
        patch_size=1,
        num_classes=None,
        context_dim=model.text_encoder.width,
    )
    values = {
        **model.entries(trained),
        **{"height": SIDE, "width": SIDE, "residual": residual, "clean_share": 0.5},
        "prompts": ("a cartwheel", "a jump", "a walk"),
        **changes,
    }
    return replace(tiny, **values)


def save_decomposed(folder: Path, images: Path, seed: int = 0, **changes: Any) -> Path:
    """Writes such a model, with an untrained residual network whose weights the seed decides."""
    config = decomposed_config(images, **changes)
    residual = filled(build_network(config, "residual").unet, gain=0.5, seed=seed)
    dtype = residual.conv_in.weight.dtype
    parts = linked_parts(images, config.foreign)
    save_checkpoint(folder, config, residual.state_dict(), parts=parts, dtype=dtype)
    return folder
