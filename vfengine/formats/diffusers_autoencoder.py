"""The autoencoder as diffusers publishes it: AutoencoderKL, of which the decoder is read.

A setting that would change the result, and that has no counterpart here, is refused by name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ..models.autoencoder import AutoencoderConfig, decoder_steps
from .published import Unsupported

# Entries that are read: our names of them, and their defaults.
_DEFAULTS = {
    "latent_channels": ("latent_channels", 4),
    "out_channels": ("out_channels", 3),
    "block_out_channels": ("block_out_channels", (64,)),
    "layers_per_block": ("layers_per_block", 1),
    "norm_num_groups": ("norm_groups", 32),
    "mid_block_add_attention": ("mid_attention", True),
    "use_post_quant_conv": ("post_quant_conv", True),
}
# Entries that do not change what a decoder gives: of the encoder, and of pipelines.
_IGNORED = (
    *("in_channels", "down_block_types", "use_quant_conv", "sample_size", "force_upcast"),
    *("scaling_factor", "shift_factor", "latents_mean", "latents_std"),
)
_OTHER_PARTS = ("encoder.", "quant_conv.")
_ATTENTION = {"norm": "group_norm", "attention.to_q": "to_q", "attention.to_k": "to_k"}
_ATTENTION |= {"attention.to_v": "to_v", "attention.to_out": "to_out.0"}
_OLD_ATTENTION = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def diffusers_autoencoder_config(values: Mapping[str, Any]) -> AutoencoderConfig:
    """The configuration of a config.json; ValueError, naming it, for an unsupported entry."""
    if values.get("_class_name") != "AutoencoderKL":
        raise Unsupported("_class_name", values.get("_class_name"), "is not AutoencoderKL")
    known = {*_DEFAULTS, *_IGNORED, "act_fn", "up_block_types"}
    for entry, value in values.items():
        if entry not in known and not entry.startswith("_"):
            raise Unsupported(entry, value, "is an unknown entry")
    if values.get("act_fn", "silu") not in ("silu", "swish"):
        raise Unsupported("act_fn", values["act_fn"])
    config = AutoencoderConfig(
        **{ours: values.get(entry, default) for entry, (ours, default) in _DEFAULTS.items()}
    )
    blocks = values.get("up_block_types", ("UpDecoderBlock2D",))
    if list(blocks) != ["UpDecoderBlock2D"] * len(config.block_out_channels):
        raise Unsupported("up_block_types", blocks, "must be UpDecoderBlock2D at every level")
    return config


def decoder_weights(names: Iterable[str]) -> set[str]:
    """The names, of all in a file, of the decoder's weights."""
    return {name for name in names if not name.startswith(_OTHER_PARTS)}


def decoder_layers(config: AutoencoderConfig, names: Iterable[str]) -> dict[str, str]:
    """diffusers' names of our layers; names: those in the file, whose attention may have old ones.

    diffusers reads old names too: Stable Diffusion's autoencoders have them.
    """
    attention = _ATTENTION
    if any(name.endswith(".proj_attn.weight") for name in names):
        attention = {ours: _OLD_ATTENTION.get(now, now) for ours, now in _ATTENTION.items()}
    layers = {name: f"decoder.{name}" for name in ("conv_in", "conv_norm_out", "conv_out")}
    layers["post_quant_conv"] = "post_quant_conv"
    for index, step in enumerate(decoder_steps(config)):
        block = "mid_block" if step.block is None else f"up_blocks.{step.block}"
        ours, theirs = f"layers.{index}", f"decoder.{block}.{step.kind}s.{step.number}"
        if step.kind == "resnet":
            layers[ours] = theirs
        elif step.kind == "upsample":
            layers[ours] = f"decoder.{block}.upsamplers.0.conv"
        else:
            layers |= {f"{ours}.{part}": f"{theirs}.{name}" for part, name in attention.items()}
    return layers
