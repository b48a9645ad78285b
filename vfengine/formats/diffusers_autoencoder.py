"""The autoencoder as diffusers publishes it: AutoencoderKL.

A setting that would change the result, and that has no counterpart here, is refused by name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ..models.autoencoder import AutoencoderConfig, Step, decoder_steps, encoder_steps
from .published import AVERAGING, Unsupported, entries_named, pixel_attention

# Entries that are read: our names of them, and their defaults.
_DEFAULTS = {
    "latent_channels": ("latent_channels", 4),
    "out_channels": ("out_channels", 3),
    "block_out_channels": ("block_out_channels", (64,)),
    "layers_per_block": ("layers_per_block", 1),
    "norm_num_groups": ("norm_groups", 32),
    "mid_block_add_attention": ("mid_attention", True),
    "use_post_quant_conv": ("post_quant_conv", True),
    "in_channels": ("in_channels", 3),
    "use_quant_conv": ("quant_conv", True),
}
# Entries that do not change what an autoencoder gives: of pipelines.
_IGNORED = ("sample_size", "force_upcast", "scaling_factor", "shift_factor")
_IGNORED += ("latents_mean", "latents_std")
_BLOCKS = {"up_block_types": "UpDecoderBlock2D", "down_block_types": "DownEncoderBlock2D"}


def diffusers_autoencoder_config(values: Mapping[str, Any]) -> AutoencoderConfig:
    """The configuration of a config.json; ValueError, naming it, for an unsupported entry."""
    if values.get("_class_name") != "AutoencoderKL":
        raise Unsupported("_class_name", values.get("_class_name"), "is not AutoencoderKL")
    known = {*_DEFAULTS, *_IGNORED, *_BLOCKS, *AVERAGING, "act_fn"}
    for entry, value in values.items():
        if entry not in known and not entry.startswith("_"):
            raise Unsupported(entry, value, "is an unknown entry")
    if values.get("act_fn", "silu") not in ("silu", "swish"):
        raise Unsupported("act_fn", values["act_fn"])
    with entries_named({ours: entry for entry, (ours, _) in _DEFAULTS.items()}):
        config = AutoencoderConfig(
            **{ours: values.get(entry, default) for entry, (ours, default) in _DEFAULTS.items()}
        )
    levels = len(config.block_out_channels)
    for entry, block in _BLOCKS.items():
        blocks = values.get(entry, (block,))
        if not isinstance(blocks, list | tuple) or list(blocks) != [block] * levels:
            raise Unsupported(entry, blocks, f"must be {block} at every level")
    return config


def decoder_layers(config: AutoencoderConfig, names: Iterable[str]) -> dict[str, str]:
    """diffusers' names of a decoder's layers, by ours; names: those in the file."""
    layers = _layers("decoder", decoder_steps(config), "up_blocks", names)
    return {**layers, "post_quant_conv": "post_quant_conv"}


def encoder_layers(config: AutoencoderConfig, names: Iterable[str]) -> dict[str, str]:
    """diffusers' names of an encoder's layers, as `decoder_layers`."""
    layers = _layers("encoder", encoder_steps(config), "down_blocks", names)
    return {**layers, "quant_conv": "quant_conv"}


def _layers(part: str, steps: Iterable[Step], blocks: str, names: Iterable[str]) -> dict[str, str]:
    attention = pixel_attention(names)
    layers = {name: f"{part}.{name}" for name in ("conv_in", "conv_norm_out", "conv_out")}
    for index, step in enumerate(steps):
        block = "mid_block" if step.block is None else f"{blocks}.{step.block}"
        ours, theirs = f"layers.{index}", f"{part}.{block}.{step.kind}s.{step.number}"
        if step.kind == "resnet":
            layers[ours] = theirs
        elif step.kind == "attention":
            layers |= {f"{ours}.{inner}": f"{theirs}.{name}" for inner, name in attention.items()}
        else:
            layers[ours] = f"{part}.{block}.{step.kind}rs.0.conv"
    return layers
