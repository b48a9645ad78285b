"""What the configurations of published UNets say, as a UNetConfig.

`diffusers_config` reads those of UNet2DConditionModel and UNet3DConditionModel, `modelscope_config`
that of ModelScope's text-to-video UNet. Whatever would change the result and has no counterpart
here is refused by name.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from ..models.config import UNetConfig

# -- diffusers -------------------------------------------------------------------------------------

# entry: what it is where there is none. Those of UNet3DConditionModel, where it differs, below
_READ = {
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "down_block_types": (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "up_block_types": ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
    "attention_head_dim": 8,
    "cross_attention_dim": 1280,
    "transformer_layers_per_block": 1,
    "norm_num_groups": 32,
    "norm_eps": 1e-5,
    "resnet_time_scale_shift": "default",
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "class_embed_type": None,
    "num_class_embeds": None,
    "projection_class_embeddings_input_dim": None,
}
_READ_3D = {
    "down_block_types": (*("CrossAttnDownBlock3D",) * 3, "DownBlock3D"),
    "mid_block_type": "UNetMidBlock3DCrossAttn",  # it has no such entry
    "up_block_types": ("UpBlock3D", *("CrossAttnUpBlock3D",) * 3),
    "attention_head_dim": 64,
    "cross_attention_dim": 1024,
}
# what may be there, but only with one of these values
_FIXED = {
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
}
# what changes no result: of training, of linear layers written as 1x1 convolutions, of attention
# that is computed in fp32 (diffusers' fused one is not either)
_FREE = (
    *("sample_size", "dropout", "use_linear_projection", "upcast_attention"),
    "addition_embed_type_num_heads",
)
_ATTENTION = {"CrossAttnDownBlock": True, "DownBlock": False}
_ATTENTION |= {"CrossAttnUpBlock": True, "UpBlock": False}
_MIDDLE = {  # mid_block_type: residual blocks, and whether attention follows the first
    "UNetMidBlock2DCrossAttn": (2, True),
    "UNetMidBlock2D": (1, False),
    "UNetMidBlock3DCrossAttn": (2, True),
    None: (0, False),
}
_CLASSES = {"UNet2DConditionModel": "2D", "UNet3DConditionModel": "3D"}

# what every network of both formats has
_PEER = {
    "position_buckets": 0,
    "feed_forward_mult": 4,
    "transformer_norm_eps": 1e-6,
    "any_size": True,
}
_PEER_VIDEO = {
    "temporal_conv_depth": 4,
    "frequency_shift": 0,
    "temporal_self_attentions": 2,
    "norm_over_frames": True,
    "scale_shift": False,
}


class Unsupported(ValueError):
    """An entry of a configuration that there is no counterpart for."""

    def __init__(self, entry: str, value: object, why: str = "is not supported"):
        super().__init__(f"{entry} = {json.dumps(value, default=str)} {why}")


def diffusers_config(values: Mapping[str, Any]) -> UNetConfig:
    """The UNet of a config.json of diffusers; ValueError, by name, for what there is not here."""
    kind = _CLASSES.get(values.get("_class_name"))
    if kind is None:
        why = f"is not one of {', '.join(_CLASSES)}"
        raise Unsupported("_class_name", values.get("_class_name"), why)
    defaults = {**_READ, **(_READ_3D if kind == "3D" else {})}
    for entry, value in values.items():
        if entry in _FIXED:
            if any(one not in _FIXED[entry] for one in _entries(value)):
                raise Unsupported(entry, value)
        elif entry not in defaults and entry not in _FREE and not entry.startswith("_"):
            raise Unsupported(entry, value, "is an unknown entry")
    said = {entry: values.get(entry, default) for entry, default in defaults.items()}

    widths = tuple(_entries(said["block_out_channels"]))
    levels = len(widths)
    if type(widths[0]) is not int or widths[0] % 2:
        raise Unsupported("block_out_channels", widths, "must begin with an even number")
    attention = tuple(_attends(said, "down_block_types", kind))
    if tuple(_attends(said, "up_block_types", kind))[::-1] != attention or len(attention) != levels:
        raise Unsupported(
            "up_block_types", said["up_block_types"], "must mirror down_block_types, level by level"
        )
    middle = said["mid_block_type"]
    if middle not in _MIDDLE or kind not in str(middle or "2D"):
        raise Unsupported("mid_block_type", middle)
    mid_blocks, mid_attention = _MIDDLE[middle]
    context_dims = set(_per_level(said, "cross_attention_dim", levels))
    if len(context_dims) > 1:
        raise Unsupported("cross_attention_dim", said["cross_attention_dim"])
    context_dim = context_dims.pop() if mid_attention or any(attention) else None
    if context_dim is None and any(attention):
        raise Unsupported("cross_attention_dim", None, "cannot go with cross-attention blocks")
    used = (*attention[:-1], attention[-1] or mid_attention)
    shape = {
        "in_channels": said["in_channels"],
        "out_channels": said["out_channels"],
        "block_out_channels": widths,
        "layers_per_block": _per_level(said, "layers_per_block", levels),
        "spatial_attention": attention,
        "head_dims": _head_dims(said, kind, widths, used),
        "mid_blocks": mid_blocks,
        "mid_spatial_attention": mid_attention,
        "context_dim": context_dim,
        "needs_context": context_dim is not None,
        "norm_groups": said["norm_num_groups"],
        "norm_eps": said["norm_eps"],
    }
    variants = (_of_3d if kind == "3D" else _of_2d)(said, attention)
    return UNetConfig(**_PEER, **shape, **variants)


def _of_2d(said: dict[str, Any], attention: tuple[bool, ...]) -> dict[str, Any]:
    """The entries that UNet2DConditionModel alone has."""
    levels = len(attention)
    embedding, classes = said["class_embed_type"], said["num_class_embeds"]
    if embedding not in (None, "timestep", "projection"):
        raise Unsupported("class_embed_type", embedding)
    if said["resnet_time_scale_shift"] not in ("default", "scale_shift"):
        raise Unsupported("resnet_time_scale_shift", said["resnet_time_scale_shift"])
    features = said["projection_class_embeddings_input_dim"]
    return {
        "temporal_attention": (False,) * levels,
        "temporal_conv": (False,) * levels,
        "transformer_depths": _per_level(said, "transformer_layers_per_block", levels),
        "scale_shift": said["resnet_time_scale_shift"] == "scale_shift",
        "sin_first": not said["flip_sin_to_cos"],
        "frequency_shift": said["freq_shift"],
        "class_embedding": embedding or ("null" if classes is None else "table"),
        "num_classes": classes if embedding is None else None,
        "class_features": features if embedding == "projection" else None,
    }


def _of_3d(said: dict[str, Any], attention: tuple[bool, ...]) -> dict[str, Any]:
    """UNet3DConditionModel: what it adds to a UNet of images, and none of the other's variants."""
    read = ("in_channels", "out_channels", "block_out_channels", "layers_per_block")
    read += ("norm_num_groups", "norm_eps", *_READ_3D)
    for entry in set(_READ) - set(read):
        if said[entry] != _READ[entry]:
            raise Unsupported(entry, said[entry])
    return {
        **_PEER_VIDEO,
        "temporal_attention": attention,
        "mid_temporal_attention": True,
        "temporal_conv": (True,) * len(attention),
        "head_dim": said["attention_head_dim"],
        "transformer_in_heads": 8,
    }


def _attends(said: dict[str, Any], entry: str, kind: str) -> Iterable[bool]:
    """Which blocks have attention, of names such as "CrossAttnDownBlock2D"."""
    side = "Down" if "down" in entry else "Up"
    for name in _entries(said[entry]):
        stem = str(name).removesuffix(kind)
        if stem == name or side not in stem or stem not in _ATTENTION:
            raise Unsupported(entry, said[entry], f"has the unknown block {name}")
        yield _ATTENTION[stem]


def _head_dims(said: dict[str, Any], kind: str, widths, used: tuple[bool, ...]) -> tuple[int, ...]:
    """Channels of a head, per level.

    What diffusers calls attention_head_dim is the number of heads in UNet2DConditionModel, a slip
    that its published configurations depend on. UNet3DConditionModel, which carries it on and then
    swaps the two again, means what it says.
    """
    entry = "attention_head_dim"
    given = _per_level(said, entry, len(widths))
    if kind == "3D" and not isinstance(said[entry], int):
        raise Unsupported(entry, said[entry], "must be one number in a UNet3DConditionModel")
    for width, value, has in zip(widths, given, used, strict=True):
        if has and (type(value) is not int or value < 1 or width % value):
            raise Unsupported(entry, said[entry], f"does not divide {width} channels")
    return tuple(
        width if not has else value if kind == "3D" else width // value
        for width, value, has in zip(widths, given, used, strict=True)
    )


def _entries(value: Any) -> Iterable[Any]:
    return value if isinstance(value, (list, tuple)) else (value,)


def _per_level(said: dict[str, Any], entry: str, levels: int) -> tuple[Any, ...]:
    """One entry per level, of one for all or of a list."""
    value = said[entry]
    values = tuple(value) if isinstance(value, (list, tuple)) else (value,) * levels
    if len(values) != levels or any(isinstance(one, (list, tuple)) for one in values):
        raise Unsupported(entry, value, f"is not one value for each of {levels} levels")
    return values


# -- ModelScope -----------------------------------------------------------

_GROUPS = 32  # of every GroupNorm
_MODEL_CFG = {"unet_in_dim", "unet_out_dim", "unet_dim", "unet_dim_mult", "unet_res_blocks"}
_MODEL_CFG |= {"unet_attn_scales", "unet_context_dim", "unet_num_heads", "unet_head_dim"}


def modelscope_config(model_cfg: Mapping[str, Any]) -> UNetConfig:
    """The UNet of a configuration.json's model_cfg; ValueError, by name, as `diffusers_config`."""
    no_effect = {"unet_y_dim", "unet_dropout"}  # the first is read, and not used
    for entry, value in model_cfg.items():
        if entry.startswith("unet_") and entry not in _MODEL_CFG | no_effect:
            raise Unsupported(entry, value, "is an unknown entry")
    missing = _MODEL_CFG - set(model_cfg)
    if missing:
        raise ValueError(f"no {', '.join(sorted(missing))}")
    if str(model_cfg.get("temporal_attention", True)) != "True":  # a string, in the published file
        raise Unsupported("temporal_attention", model_cfg["temporal_attention"])
    said = {name.removeprefix("unet_"): value for name, value in model_cfg.items()}
    widths = tuple(said["dim"] * mult for mult in said["dim_mult"])
    attention = tuple(0.5**level in said["attn_scales"] for level in range(len(widths)))
    used = (*attention[:-1], True)  # the middle always has attention
    for width, has in zip(widths, used, strict=True):
        if has and width % said["head_dim"]:
            raise Unsupported("unet_head_dim", said["head_dim"], f"does not divide {width}")
    return UNetConfig(
        **_PEER,
        **_PEER_VIDEO,
        in_channels=said["in_dim"],
        out_channels=said["out_dim"],
        block_out_channels=widths,
        layers_per_block=(said["res_blocks"],) * len(widths),
        spatial_attention=attention,
        temporal_attention=attention,
        temporal_conv=(True,) * len(widths),
        mid_spatial_attention=True,
        mid_temporal_attention=True,
        context_dim=said["context_dim"],
        needs_context=True,
        head_dim=said["head_dim"],
        head_dims=tuple(
            said["head_dim"] if has else width for width, has in zip(widths, used, strict=True)
        ),
        transformer_in_heads=said["num_heads"],
        norm_groups=_GROUPS,
    )


def model_cfg_of(shapes: Mapping[str, tuple[int, ...]], num_heads: int = 8) -> dict[str, Any]:
    """The model_cfg of weights that come without one; num_heads is what shapes do not say."""
    try:
        dim = shapes["input_blocks.0.0.weight"][0]
        widths, blocks, scales = [], [], []
        number = 1
        while f"input_blocks.{number}.0.in_layers.2.weight" in shapes:
            width, count = 0, 0
            while (name := f"input_blocks.{number}.0.in_layers.2.weight") in shapes:
                width, count = shapes[name][0], count + 1
                attends = f"input_blocks.{number}.1.norm.weight" in shapes
                number += 1
            if attends:
                scales.append(0.5 ** len(widths))
            widths.append(width)
            blocks.append(count)
            number += 1  # the downsampling convolution
        context = shapes["middle_block.1.transformer_blocks.0.attn2.to_k.weight"][1]
        return {
            "unet_in_dim": shapes["input_blocks.0.0.weight"][1],
            "unet_out_dim": shapes["out.2.weight"][0],
            "unet_dim": dim,
            "unet_dim_mult": [width // dim for width in widths],
            "unet_res_blocks": blocks[0],
            "unet_attn_scales": scales,
            "unet_context_dim": context,
            "unet_num_heads": num_heads,
            "unet_head_dim": shapes["input_blocks.0.1.proj_in.weight"][0] // num_heads,
        }
    except (KeyError, IndexError) as error:
        raise ValueError(f"not a ModelScope text-to-video UNet: no {error}") from error
