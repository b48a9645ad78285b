"""Tiny untrained models whose networks are as if they had been distilled."""

from dataclasses import replace
from pathlib import Path

from conftest import save_random, tiny_config
from latent_models import latent_config, save_latent_model

from vfengine.formats.checkpoint import DecomposedConfig
from vfengine.training.distillation import distilled_config

GUIDANCE = (1.0, 4.0)
BOTH = ("base", "residual")


def student_config(
    config: DecomposedConfig | None = None, names=BOTH, steps: int = 4, **changes
) -> DecomposedConfig:
    """The configuration of a student of the tiny model, or of another."""
    config = tiny_config(base_path="clean", clean_share=0.5) if config is None else config
    return replace(distilled_config(config, tuple(names), steps, GUIDANCE), **changes)


def save_student(folder: Path, names=BOTH, steps: int = 4, **changes) -> Path:
    """Writes a tiny model of labels, all weights of which are random."""
    return save_random(folder, student_config(names=names, steps=steps, **changes))


def save_latent_student(folder: Path, names=BOTH) -> Path:
    """The same of latents and prompts."""
    return save_latent_model(folder, student_config(latent_config(base_path="clean"), names))
