"""A tiny autoencoder and a tiny text encoder of random weights, as their trainings leave them."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from vfengine.formats.parts import save_autoencoder, save_text_encoder
from vfengine.formats.word_tokenizer import word_tokenizer_json
from vfengine.models.autoencoder import Autoencoder, AutoencoderConfig, Decoder, Encoder
from vfengine.models.text_encoder import TextEncoder, TextEncoderConfig

WORDS = ("a", "person", "kicking", "walking", "in", "on", "red", "blue", "green", "sweater", "lawn")
AUTOENCODER = AutoencoderConfig(  # latents of a quarter of the size
    latent_channels=4,
    block_out_channels=(8, 16, 16),
    layers_per_block=1,
    norm_groups=8,
    mid_attention=False,
    quant_conv=False,
    post_quant_conv=False,
)
TEXT_ENCODER = TextEncoderConfig(
    vocab_size=len(WORDS) + 2,
    max_length=6,
    width=16,
    num_layers=1,
    num_heads=2,
    mlp_width=32,
    causal=False,
)
LATENT_MEAN, LATENT_STD = (0.1, -0.2, 0.0, 0.3), (0.5, 0.6, 0.7, 0.8)


def tiny_autoencoder(seed: int = 0) -> Autoencoder:
    torch.manual_seed(seed)
    return Autoencoder(AUTOENCODER, Decoder(AUTOENCODER), Encoder(AUTOENCODER))


def tiny_text_encoder(seed: int = 0) -> TextEncoder:
    torch.manual_seed(seed)
    encoder = TextEncoder(TEXT_ENCODER)
    nn.init.normal_(encoder.embeddings.token_embedding.weight)
    return encoder


def save_tiny_parts(folder: Path, seed: int = 0) -> tuple[Path, Path]:
    """Writes both; returns the autoencoder's folder and the text encoder's."""
    autoencoder, text = folder / "autoencoder", folder / "text"
    state = tiny_autoencoder(seed).state_dict()
    save_autoencoder(autoencoder, AUTOENCODER, state, LATENT_MEAN, LATENT_STD)
    state = tiny_text_encoder(seed).state_dict()
    save_text_encoder(text, TEXT_ENCODER, state, word_tokenizer_json(WORDS))
    return autoencoder, text
