"""The parts of the tiny model of latents (latent_models.py), as their trainings leave them."""

from __future__ import annotations

from pathlib import Path

from latent_models import AUTOENCODER, LATENTS, TEXT, latent_config, part_modules

from vfengine.formats.parts import save_autoencoder, save_text_encoder
from vfengine.models import Autoencoder, TextEncoder

LATENT_MEAN, LATENT_STD = LATENTS["latent_mean"], LATENTS["latent_std"]


def tiny_autoencoder(seed: int = 0) -> Autoencoder:
    return part_modules(latent_config(), seed)["autoencoder"]


def tiny_text_encoder(seed: int = 0) -> TextEncoder:
    return part_modules(latent_config(), seed)["text_encoder"]


def save_tiny_parts(folder: Path, seed: int = 0) -> tuple[Path, Path]:
    """Writes both; returns the autoencoder's folder and the text encoder's."""
    autoencoder, text = folder / "autoencoder", folder / "text"
    parts = part_modules(latent_config(), seed)
    state = parts["autoencoder"].state_dict()
    save_autoencoder(autoencoder, AUTOENCODER, state, LATENT_MEAN, LATENT_STD)
    save_text_encoder(text, TEXT, parts["text_encoder"].state_dict(), parts["tokenizer"])
    return autoencoder, text
