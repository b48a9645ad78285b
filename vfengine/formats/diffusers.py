"""UNets as diffusers publishes them: UNet2DConditionModel, UNet3DConditionModel, UNet2DModel.

A setting that would change the result, and that has no counterpart here, is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ..models.config import UNetConfig
from ..models.topology import topology
from .published import (
    AVERAGING,
    COMMON,
    COMMON_VIDEO,
    PublishedUNet,
    Unsupported,
    entries_named,
    pixel_attention,
)

# -- names -----------------------------------------------------------------------------------------


def diffusers_unet(values: Mapping[str, Any], names: Iterable[str] = ()) -> PublishedUNet:
    """The UNet of a config.json; names: of the weights in its files.

    Raises ValueError, naming it, for an entry that is not supported.
    """
    config = diffusers_config(values)
    return PublishedUNet(config, _layer_names(config, pixel_attention(names)))


def diffusers_names(config: UNetConfig) -> PublishedUNet:
    """The names that diffusers has for the layers of a UNet, whatever format it is stored in."""
    return PublishedUNet(config, _layer_names(config, pixel_attention(())))


def _layer_names(config: UNetConfig, attention: Mapping[str, str]) -> dict[str, str]:
    """The names of our layers in diffusers' files; attention: those in an attention of pixels."""
    layers = {name: name for name in ("conv_in", "transformer_in", "conv_norm_out", "conv_out")}
    for name in ("time_embedding", "class_embedding"):
        layers |= {name: name, f"{name}.0": f"{name}.linear_1", f"{name}.2": f"{name}.linear_2"}
    parts = {"resnet": "resnets", "temp_conv": "temp_convs"}
    parts |= {"spatial": "attentions", "temporal": "temp_attentions"}
    for step in topology(config):
        side, *numbers = step.name.split(".")
        if step.kind == "stage":
            block = "mid_block" if side == "mid" else f"{side}_blocks.{numbers[0]}"
            for part, theirs in parts.items():
                layers[f"{step.name}.{part}"] = f"{block}.{theirs}.{numbers[-1]}"
            for part, theirs in attention.items():
                layers[f"{step.name}.pixels.{part}"] = f"{block}.attentions.{numbers[-1]}.{theirs}"
        else:
            block = side.removesuffix("samplers") + "_blocks"
            layers[step.name] = f"{block}.{numbers[0]}.{side}.0.conv"
    return layers


# -- configurations --------------------------------------------------------------------------------

# Entries that all classes have and that are read, with their defaults.
_SHARED = {
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "norm_eps": 1e-5,
}
# Entries of both classes of images, with their defaults.
_IMAGES = {
    "resnet_time_scale_shift": "default",
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "class_embed_type": None,
    "num_class_embeds": None,
}
_DEFAULTS_2D = {
    **_SHARED,
    **_IMAGES,
    "down_block_types": (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "up_block_types": ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
    "attention_head_dim": 8,
    "cross_attention_dim": 1280,
    "transformer_layers_per_block": 1,
    "projection_class_embeddings_input_dim": None,
}
_DEFAULTS_3D = {
    **_SHARED,
    "down_block_types": (*("CrossAttnDownBlock3D",) * 3, "DownBlock3D"),
    "mid_block_type": "UNetMidBlock3DCrossAttn",  # it has no such entry
    "up_block_types": ("UpBlock3D", *("CrossAttnUpBlock3D",) * 3),
    "attention_head_dim": 64,
    "cross_attention_dim": 1024,
}
_DEFAULTS_UNCONDITIONAL = {
    **_SHARED,
    **_IMAGES,
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": (224, 448, 672, 896),
    "down_block_types": ("DownBlock2D", *("AttnDownBlock2D",) * 3),
    "mid_block_type": "UNetMidBlock2D",
    "up_block_types": (*("AttnUpBlock2D",) * 3, "UpBlock2D"),
    "attention_head_dim": 8,
    "attn_norm_num_groups": None,
    "add_attention": True,
    "downsample_padding": 1,
}
# Names of entries by our fields', where they differ.
_ENTRIES = {
    "norm_groups": "norm_num_groups",
    "frequency_shift": "freq_shift",
    "num_classes": "num_class_embeds",
    "context_dim": "cross_attention_dim",
    "transformer_depths": "transformer_layers_per_block",
    "class_features": "projection_class_embeddings_input_dim",
}
# Entries that may only have one of these values, where a class does not read them.
_ONLY_THESE_VALUES = {
    "act_fn": ("silu", "swish"),
    "addition_embed_type": (None,),
    "addition_time_embed_dim": (None,),
    "attention_type": ("default",),
    "center_input_sample": (False,),
    "class_embeddings_concat": (False,),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "cross_attention_norm": (None,),
    "downsample_padding": (1,),
    "downsample_type": ("conv",),
    "dual_cross_attention": (False,),
    "encoder_hid_dim": (None,),
    "encoder_hid_dim_type": (None,),
    "mid_block_only_cross_attention": (None, False),
    "mid_block_scale_factor": (1,),
    "num_attention_heads": (None,),
    "only_cross_attention": (False,),
    "resnet_out_scale_factor": (1,),
    "resnet_skip_time_act": (False,),
    "reverse_transformer_layers_per_block": (None,),
    "time_cond_proj_dim": (None,),
    "time_embedding_act_fn": (None,),
    "time_embedding_dim": (None,),
    "time_embedding_type": ("positional",),
    "timestep_post_act": (None,),
    "transformer_layers_per_block": (1,),
    "projection_class_embeddings_input_dim": (None,),
    "upsample_type": ("conv",),
    **{entry: (default,) for entry, default in _IMAGES.items()},
}
# Entries that change no result: of training, of linear layers stored as 1x1 convolutions, and of
# fp32 attention, which diffusers' fused attention ignores too.
_IGNORED = (
    *("sample_size", "dropout", "use_linear_projection", "upcast_attention"),
    *("addition_embed_type_num_heads", "num_train_timesteps", *AVERAGING),
)


def diffusers_config(values: Mapping[str, Any]) -> UNetConfig:
    """The configuration of a config.json; ValueError, naming it, for an unsupported entry."""
    name = values.get("_class_name")
    form = _CLASSES.get(name) if isinstance(name, str) else None
    if form is None:
        raise Unsupported("_class_name", name, f"is not one of {', '.join(_CLASSES)}")
    for entry, value in values.items():
        if entry in form.defaults or entry in _IGNORED or entry.startswith("_"):
            continue
        if entry not in _ONLY_THESE_VALUES:
            raise Unsupported(entry, value, "is an unknown entry")
        if any(one not in _ONLY_THESE_VALUES[entry] for one in _as_sequence(value) or (value,)):
            raise Unsupported(entry, value)
    entries = {entry: values.get(entry, default) for entry, default in form.defaults.items()}

    widths = tuple(_as_sequence(entries["block_out_channels"]))
    if not widths or type(widths[0]) is not int or widths[0] % 2:
        raise Unsupported("block_out_channels", widths, "must begin with an even number")
    attention = tuple(_attends(entries, "down_block_types", form))
    if tuple(_attends(entries, "up_block_types", form))[::-1] != attention or len(attention) != len(
        widths
    ):
        raise Unsupported(
            "up_block_types",
            entries["up_block_types"],
            "must mirror down_block_types, level by level",
        )
    middle = entries["mid_block_type"]
    if not isinstance(middle, str | None) or middle not in form.middles:
        raise Unsupported("mid_block_type", middle)
    mid_blocks, mid_attention = form.middles[middle]
    shape = {
        "in_channels": entries["in_channels"],
        "out_channels": entries["out_channels"],
        "block_out_channels": widths,
        "layers_per_block": _per_level(entries, "layers_per_block", len(widths)),
        "spatial_attention": attention,
        "mid_blocks": mid_blocks,
        "mid_spatial_attention": mid_attention,
        "norm_groups": entries["norm_num_groups"],
        "norm_eps": entries["norm_eps"],
    }
    fields = {**COMMON, **shape, **form.variants(entries, shape)}
    with entries_named(_ENTRIES):
        return UNetConfig(**fields)


def _of_2d(entries: dict[str, Any], shape: dict[str, Any]) -> dict[str, Any]:
    """The entries that UNet2DConditionModel alone has.

    Its attention_head_dim is by mistake the number of heads, and published configurations depend
    on that.
    """
    levels = len(shape["block_out_channels"])
    features = entries["projection_class_embeddings_input_dim"]
    images = _of_images(entries, levels, ("timestep", "projection"))
    return {
        **images,
        **_context(entries, shape),
        "head_dims": _head_dims(entries, shape, _of_number),
        "transformer_depths": _per_level(entries, "transformer_layers_per_block", levels),
        "class_features": features if images["class_embedding"] == "projection" else None,
    }


def _of_3d(entries: dict[str, Any], shape: dict[str, Any]) -> dict[str, Any]:
    """The entries that UNet3DConditionModel adds."""
    attention, head_dim = shape["spatial_attention"], entries["attention_head_dim"]
    _one_number(entries, "UNet3DConditionModel")
    return {
        **COMMON_VIDEO,
        **_context(entries, shape),
        "head_dims": _head_dims(entries, shape, lambda width, dim: dim),
        "temporal_attention": attention,
        "mid_temporal_attention": True,
        "temporal_conv": (True,) * len(attention),
        "head_dim": head_dim,
        "transformer_in_heads": 8,
    }


def _of_unconditional(entries: dict[str, Any], shape: dict[str, Any]) -> dict[str, Any]:
    """The entries that UNet2DModel adds: no context, and attention of the pixels alone."""
    images = _of_images(entries, len(shape["block_out_channels"]), ("timestep",))
    padding, add, scaled = (
        entries[name] for name in ("downsample_padding", "add_attention", "resnet_time_scale_shift")
    )
    if padding not in (0, 1):
        raise Unsupported("downsample_padding", padding, "is not 0 or 1")
    if not isinstance(add, bool):
        raise Unsupported("add_attention", add, "is not true or false")
    groups = entries["attn_norm_num_groups"]
    middle = {"mid_spatial_attention": shape["mid_spatial_attention"] and add}
    # without a number of its own, the attention of a middle that is scaled has no norm
    if middle["mid_spatial_attention"] and groups != shape["norm_groups"]:
        if groups is not None or scaled != "default":
            raise Unsupported("attn_norm_num_groups", groups, "is not norm_num_groups")
    if entries["attention_head_dim"] is not None:
        _one_number(entries, "UNet2DModel")
    used = {**shape, **middle}
    return {
        **images,
        **middle,
        "head_dims": _head_dims(entries, used, lambda width, dim: dim or width),
        "pixel_attention": True,
        "padded_after": padding == 0,
        "any_size": False,
    }


@dataclass(frozen=True)
class _Class:
    """A class of diffusers.

    suffix:   of the names of its blocks
    defaults: the entries that are read
    blocks:   stems of its blocks' names, and whether they have attention
    middles:  residual blocks by mid_block_type, and whether attention follows the first
    variants: what it adds to a UNetConfig
    """

    suffix: str
    defaults: Mapping[str, Any]
    blocks: Mapping[str, bool]
    middles: Mapping[str | None, tuple[int, bool]]
    variants: Callable[[dict[str, Any], dict[str, Any]], dict[str, Any]]


_PLAIN = {"DownBlock": False, "UpBlock": False}
_CROSSED = {**_PLAIN, "CrossAttnDownBlock": True, "CrossAttnUpBlock": True}
_CLASSES = {
    "UNet2DConditionModel": _Class(
        "2D",
        _DEFAULTS_2D,
        _CROSSED,
        {"UNetMidBlock2DCrossAttn": (2, True), "UNetMidBlock2D": (1, False), None: (0, False)},
        _of_2d,
    ),
    "UNet3DConditionModel": _Class(
        "3D", _DEFAULTS_3D, _CROSSED, {"UNetMidBlock3DCrossAttn": (2, True)}, _of_3d
    ),
    "UNet2DModel": _Class(
        "2D",
        _DEFAULTS_UNCONDITIONAL,
        {**_PLAIN, "AttnDownBlock": True, "AttnUpBlock": True},
        {"UNetMidBlock2D": (2, True), None: (0, False)},
        _of_unconditional,
    ),
}


def _of_images(entries: dict[str, Any], levels: int, embeddings: tuple[str, ...]) -> dict[str, Any]:
    """The entries of both classes of images; embeddings: its values of class_embed_type."""
    embedding, classes = entries["class_embed_type"], entries["num_class_embeds"]
    if embedding not in (None, *embeddings):
        raise Unsupported("class_embed_type", embedding)
    if entries["resnet_time_scale_shift"] not in ("default", "scale_shift"):
        raise Unsupported("resnet_time_scale_shift", entries["resnet_time_scale_shift"])
    if not isinstance(entries["flip_sin_to_cos"], bool):
        raise Unsupported("flip_sin_to_cos", entries["flip_sin_to_cos"], "is not true or false")
    return {
        "temporal_attention": (False,) * levels,
        "temporal_conv": (False,) * levels,
        "scale_shift": entries["resnet_time_scale_shift"] == "scale_shift",
        "sin_first": not entries["flip_sin_to_cos"],
        "frequency_shift": entries["freq_shift"],
        "class_embedding": embedding or ("null" if classes is None else "table"),
        "num_classes": classes if embedding is None else None,
    }


def _context(entries: dict[str, Any], shape: dict[str, Any]) -> dict[str, Any]:
    """Width of the context that the spatial transformers need, if they attend to one."""
    entry, attention = "cross_attention_dim", shape["spatial_attention"]
    widths = _per_level(entries, entry, len(attention))
    if any(width != widths[0] for width in widths):
        raise Unsupported(entry, entries[entry])
    width = widths[0] if shape["mid_spatial_attention"] or any(attention) else None
    if width is None and any(attention):
        raise Unsupported(entry, None, "cannot go with cross-attention blocks")
    return {"context_dim": width, "needs_context": width is not None}


def _attends(entries: dict[str, Any], entry: str, form: _Class) -> Iterable[bool]:
    """Which blocks have attention, of names such as "CrossAttnDownBlock2D"."""
    side = "Down" if "down" in entry else "Up"
    for name in _as_sequence(entries[entry]):
        stem = str(name).removesuffix(form.suffix).removeprefix("UNetRes")
        if not str(name).endswith(form.suffix) or side not in stem or stem not in form.blocks:
            raise Unsupported(entry, entries[entry], f"has the unknown block {name}")
        yield form.blocks[stem]


def _head_dims(
    entries: dict[str, Any], shape: dict[str, Any], dim: Callable[[int, Any], int]
) -> tuple[int, ...]:
    """Channels of a head, per level; dim: those of (channels, attention_head_dim)."""
    entry, widths = "attention_head_dim", shape["block_out_channels"]
    *used, last = shape["spatial_attention"]
    used.append(last or shape["mid_spatial_attention"])
    given = _per_level(entries, entry, len(widths))
    found = []
    for width, value, has in zip(widths, given, used, strict=True):
        fits = value is None or (type(value) is int and value > 0)
        heads = dim(width, value) if has and fits else width
        if has and (not fits or not heads or width % heads):
            raise Unsupported(entry, entries[entry], f"does not divide {width} channels")
        found.append(heads)
    return tuple(found)


def _of_number(width: int, heads: int | None) -> int:
    """Channels of a head where these many heads share the width; 0 where they cannot."""
    return 0 if not heads or width % heads else width // heads


def _one_number(entries: dict[str, Any], name: str) -> None:
    value = entries["attention_head_dim"]
    if type(value) is not int:
        raise Unsupported("attention_head_dim", value, f"must be one number in a {name}")


def _as_sequence(value: Any) -> Iterable[Any]:
    return value if isinstance(value, (list, tuple)) else (value,)


def _per_level(entries: dict[str, Any], entry: str, levels: int) -> tuple[Any, ...]:
    """The entry's value per level; it is one value for all levels, or a list."""
    value = entries[entry]
    values = tuple(value) if isinstance(value, (list, tuple)) else (value,) * levels
    if len(values) != levels or any(isinstance(one, (list, tuple)) for one in values):
        raise Unsupported(entry, value, f"is not one value for each of {levels} levels")
    return values
