"""Tiny untrained models of latents and prompts, every weight of which a seed decides."""

from dataclasses import replace
from pathlib import Path

from conftest import tiny_config
from seeded import filled

from vfengine.formats.checkpoint import (
    CheckpointConfig,
    DecomposedConfig,
    PlainConfig,
    build_network,
    save_checkpoint,
)
from vfengine.formats.word_tokenizer import word_tokenizer_json
from vfengine.models import (
    Autoencoder,
    AutoencoderConfig,
    Decoder,
    Encoder,
    TextEncoder,
    TextEncoderConfig,
    vdm_config,
)

PROMPTS = ("a person doing a cartwheel", "a person jumping", "a person walking")
WORDS = [
    *dict.fromkeys(" ".join(PROMPTS).split()),
    "red",
    "blue",
    "sweater",
    "in",
    "on",
    "lawn",
    ",",
]
SIZE = 32  # pixels of a side

AUTOENCODER = AutoencoderConfig(
    latent_channels=4,
    block_out_channels=(8, 16),
    layers_per_block=1,
    norm_groups=4,
    mid_attention=False,
    patch_size=2,
)
TEXT = TextEncoderConfig(
    vocab_size=24,
    max_length=8,
    width=16,
    num_layers=2,
    num_heads=2,
    mlp_width=32,
    causal=False,
    embedding_width=8,
)
LATENTS = {
    "autoencoder": AUTOENCODER,
    "latent_mean": (0.1, -0.2, 0.3, 0.0),
    "latent_std": (0.9, 1.1, 1.0, 0.8),
}
TEXTS = {"text_encoder": TEXT, "prompts": PROMPTS}


def latent_config(**changes) -> DecomposedConfig:
    """4 frames of 32 x 32 pixels, 4 x 8 x 8 latents; the tiny model's UNets, attending to texts."""
    tiny = tiny_config()
    shared = {"patch_size": 1, "num_classes": None, "context_dim": TEXT.width}
    values = {
        **{"channels": 4, "height": SIZE // AUTOENCODER.scale, "width": SIZE // AUTOENCODER.scale},
        "base": replace(tiny.base, in_channels=4, out_channels=5, **shared),
        "residual": replace(tiny.residual, in_channels=8, out_channels=7, **shared),
        "clean_share": 0.5,
        **LATENTS,
        **TEXTS,
    }
    return replace(tiny, **{**values, **changes})


def latent_video_config() -> PlainConfig:
    """The VDM* of the latent model's base network."""
    latent = latent_config()
    names = ("num_frames", "height", "width", "channels", "labels", "fps", "schedule")
    shared = {name: getattr(latent, name) for name in (*names, *LATENTS, *TEXTS)}
    return PlainConfig(**shared, video=vdm_config(latent.base))


def part_modules(config: CheckpointConfig, seed: int = 0) -> dict:
    """The parts of a model: an `Autoencoder`, a `TextEncoder`, and the tokenizer's text."""
    parts = {}
    if config.autoencoder is not None:
        own = config.autoencoder
        parts["autoencoder"] = filled(Autoencoder(own, Decoder(own), Encoder(own)), seed=seed)
    if config.text_encoder is not None:
        parts["text_encoder"] = filled(TextEncoder(config.text_encoder), seed=seed + 1)
        parts["tokenizer"] = word_tokenizer_json(WORDS)
    return parts


def save_latent_model(folder: Path, config: CheckpointConfig | None = None, seed: int = 0) -> Path:
    """Writes a model of `latent_config`, or of another configuration, and gives its folder."""
    config = latent_config() if config is None else config
    states = [
        filled(build_network(config, name).unet, gain=0.5, seed=seed + 2).state_dict()
        for name in config.networks
    ]
    parts = {
        name: part if isinstance(part, str) else part.state_dict()
        for name, part in part_modules(config, seed).items()
    }
    save_checkpoint(folder, config, *states, parts=parts, dtype=states[0]["conv_in.weight"].dtype)
    return folder
