"""The autoencoder in the names of latent diffusion's own code, as ModelScope publishes it.

There is no configuration: shapes say all but the groups of the norms, which are 32.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ..models.autoencoder import AutoencoderConfig, Step, decoder_steps, encoder_steps
from .weights import StoredWeights

_GROUPS = 32
_PREFIX = "first_stage_model."
_PARTS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
_RESNET = {"norm1": "norm1", "conv1": "conv1", "norm2": "norm2", "conv2": "conv2"}
_RESNET |= {"conv_shortcut": "nin_shortcut"}
_ATTENTION = {"norm": "norm", "attention.to_q": "q", "attention.to_k": "k"}
_ATTENTION |= {"attention.to_v": "v", "attention.to_out": "proj_out"}
_ENDS = {"conv_in": "conv_in", "conv_norm_out": "norm_out", "conv_out": "conv_out"}


def ldm_weights(weights: StoredWeights) -> StoredWeights:
    """Those of the autoencoder, without the prefix that a whole model's file has."""
    names = {name.removeprefix(_PREFIX): name for name in weights.shapes}
    names = {ours: name for ours, name in names.items() if ours.startswith(_PARTS)}
    shapes = {ours: weights.shapes[name] for ours, name in names.items()}
    return StoredWeights(shapes, lambda ours: weights.read(names[ours]))


def ldm_config(shapes: Mapping[str, tuple[int, ...]]) -> AutoencoderConfig:
    """The configuration of weights, by their shapes; ValueError for those of no autoencoder.

    The decoder's shapes say it: files may hold no encoder.
    """
    try:
        widths = []
        while (name := f"decoder.up.{len(widths)}.block.0.conv1.weight") in shapes:
            widths.append(shapes[name][0])
        blocks = {name.split(".")[4] for name in shapes if name.startswith("decoder.up.0.block.")}
        pictures = shapes["decoder.conv_out.weight"][0]
        return AutoencoderConfig(
            latent_channels=shapes["decoder.conv_in.weight"][1],
            in_channels=shapes.get("encoder.conv_in.weight", (0, pictures))[1],
            out_channels=pictures,
            block_out_channels=tuple(widths),
            layers_per_block=len(blocks) - 1,
            norm_groups=_GROUPS,
            mid_attention="decoder.mid.attn_1.q.weight" in shapes,
            post_quant_conv="post_quant_conv.weight" in shapes,
            quant_conv="quant_conv.weight" in shapes,
        )
    except (KeyError, IndexError) as error:
        raise ValueError(f"not an autoencoder of latent diffusion: no {error}") from error


def decoder_layers(config: AutoencoderConfig, names: Iterable[str] = ()) -> dict[str, str]:
    """Its names of a decoder's layers, by ours. It counts levels from the finest."""
    finest = len(config.block_out_channels) - 1
    layers = _layers("decoder", decoder_steps(config), "up", lambda block: finest - block)
    return {**layers, "post_quant_conv": "post_quant_conv"}


def encoder_layers(config: AutoencoderConfig, names: Iterable[str] = ()) -> dict[str, str]:
    """Its names of an encoder's layers, by ours."""
    layers = _layers("encoder", encoder_steps(config), "down", lambda block: block)
    return {**layers, "quant_conv": "quant_conv"}


def _layers(part: str, steps: Iterable[Step], side: str, level) -> dict[str, str]:
    """level: its number of a level, by ours"""
    layers = {ours: f"{part}.{theirs}" for ours, theirs in _ENDS.items()}
    for index, step in enumerate(steps):
        if step.block is None:
            kind = "attn_1" if step.kind == "attention" else f"block_{step.number + 1}"
            place = f"{part}.mid.{kind}"
        else:
            place = f"{part}.{side}.{level(step.block)}"
            place += f".block.{step.number}" if step.kind == "resnet" else f".{step.kind}.conv"
        inner = {"resnet": _RESNET, "attention": _ATTENTION}.get(step.kind, {})
        ours = f"layers.{index}"
        layers |= {f"{ours}.{name}": f"{place}.{theirs}" for name, theirs in inner.items()}
        if not inner:
            layers[ours] = place
    return layers
