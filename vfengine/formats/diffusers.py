"""UNets as diffusers publishes them: UNet2DConditionModel and UNet3DConditionModel.

A setting that would change the result, and that has no counterpart here, is refused by name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..models.config import UNetConfig
from ..models.topology import topology
from .published import COMMON, COMMON_VIDEO, PublishedUNet, Unsupported, read_json


def _files(safetensors: str, pickle: str) -> tuple[str, ...]:
    """Names of weight files by their stems; a half-precision variant counts where it is alone."""
    own = (f"{safetensors}.safetensors", f"{safetensors}.safetensors.index.json")
    own += (f"{pickle}.bin", f"{pickle}.bin.index.json")
    return (*own, f"{safetensors}.fp16.safetensors", f"{pickle}.fp16.bin")


FILES = _files("diffusion_pytorch_model", "diffusion_pytorch_model")
TRANSFORMERS_FILES = _files("model", "pytorch_model")


# -- files -----------------------------------------------------------------------------------------


def locate(
    folder: Path, chosen: Path | None, names: Sequence[str] = FILES
) -> tuple[Path, list[Path]]:
    """The configuration and the weight files in a folder; chosen: one of them, or None.

    names: of weight files, the first that is there counts

    Raises FileNotFoundError where there is none, ValueError for an index that points elsewhere.
    """
    config = folder / "config.json"
    if chosen is None or chosen == config:
        found = [folder / name for name in names if (folder / name).is_file()]
        if not found:
            raise FileNotFoundError(f"{folder} has none of {', '.join(names)}")
        chosen = found[0]
    if not chosen.name.endswith(".index.json"):
        return config, [chosen]
    shards = read_json(chosen).get("weight_map")
    if not isinstance(shards, dict) or not all(
        isinstance(name, str) and Path(name).name == name for name in shards.values()
    ):
        raise ValueError(f"{chosen}: its weight_map must name files beside it")
    files = [folder / name for name in sorted(set(shards.values()))]
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"{chosen} names {file.name}, which is not there")
    return config, files


def read_scheduler(source: str | Path) -> dict[str, Any]:
    """The scheduler's configuration in a diffusers pipeline; {} for a network by itself.

    Looked for in scheduler/ in the network's folder, or beside it.
    """
    source = Path(source)
    folder = source.parent if source.is_file() else source
    for place in (folder, folder.parent):
        file = place / "scheduler" / "scheduler_config.json"
        if file.is_file():
            return read_json(file)
    return {}


# -- names -----------------------------------------------------------------------------------------


def diffusers_unet(values: Mapping[str, Any]) -> PublishedUNet:
    """The UNet of a config.json; ValueError, naming it, for an entry that is not supported."""
    config = diffusers_config(values)
    return PublishedUNet(config, _layer_names(config))


def _layer_names(config: UNetConfig) -> dict[str, str]:
    """The names of our layers in diffusers' files."""
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
        else:
            block = side.removesuffix("samplers") + "_blocks"
            layers[step.name] = f"{block}.{numbers[0]}.{side}.0.conv"
    return layers


# -- configurations --------------------------------------------------------------------------------

# Entries that are read, and their defaults; below, those that UNet3DConditionModel has different.
_DEFAULTS = {
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
_DEFAULTS_3D = {
    "down_block_types": (*("CrossAttnDownBlock3D",) * 3, "DownBlock3D"),
    "mid_block_type": "UNetMidBlock3DCrossAttn",  # it has no such entry
    "up_block_types": ("UpBlock3D", *("CrossAttnUpBlock3D",) * 3),
    "attention_head_dim": 64,
    "cross_attention_dim": 1024,
}
# Entries that may only have one of these values.
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
# Entries that change no result: of training, of linear layers stored as 1x1 convolutions, and of
# fp32 attention, which diffusers' fused attention ignores too.
_IGNORED = (
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


def diffusers_config(values: Mapping[str, Any]) -> UNetConfig:
    """The configuration of a config.json; ValueError, naming it, for an unsupported entry."""
    kind = _CLASSES.get(values.get("_class_name"))
    if kind is None:
        why = f"is not one of {', '.join(_CLASSES)}"
        raise Unsupported("_class_name", values.get("_class_name"), why)
    defaults = {**_DEFAULTS, **(_DEFAULTS_3D if kind == "3D" else {})}
    for entry, value in values.items():
        if entry in _ONLY_THESE_VALUES:
            if any(one not in _ONLY_THESE_VALUES[entry] for one in _as_sequence(value)):
                raise Unsupported(entry, value)
        elif entry not in defaults and entry not in _IGNORED and not entry.startswith("_"):
            raise Unsupported(entry, value, "is an unknown entry")
    entries = {entry: values.get(entry, default) for entry, default in defaults.items()}

    widths = tuple(_as_sequence(entries["block_out_channels"]))
    levels = len(widths)
    if type(widths[0]) is not int or widths[0] % 2:
        raise Unsupported("block_out_channels", widths, "must begin with an even number")
    attention = tuple(_attends(entries, "down_block_types", kind))
    if (
        tuple(_attends(entries, "up_block_types", kind))[::-1] != attention
        or len(attention) != levels
    ):
        raise Unsupported(
            "up_block_types",
            entries["up_block_types"],
            "must mirror down_block_types, level by level",
        )
    middle = entries["mid_block_type"]
    if middle not in _MIDDLE or kind not in str(middle or "2D"):
        raise Unsupported("mid_block_type", middle)
    mid_blocks, mid_attention = _MIDDLE[middle]
    context_dims = set(_per_level(entries, "cross_attention_dim", levels))
    if len(context_dims) > 1:
        raise Unsupported("cross_attention_dim", entries["cross_attention_dim"])
    context_dim = context_dims.pop() if mid_attention or any(attention) else None
    if context_dim is None and any(attention):
        raise Unsupported("cross_attention_dim", None, "cannot go with cross-attention blocks")
    used = (*attention[:-1], attention[-1] or mid_attention)
    shape = {
        "in_channels": entries["in_channels"],
        "out_channels": entries["out_channels"],
        "block_out_channels": widths,
        "layers_per_block": _per_level(entries, "layers_per_block", levels),
        "spatial_attention": attention,
        "head_dims": _head_dims(entries, kind, widths, used),
        "mid_blocks": mid_blocks,
        "mid_spatial_attention": mid_attention,
        "context_dim": context_dim,
        "needs_context": context_dim is not None,
        "norm_groups": entries["norm_num_groups"],
        "norm_eps": entries["norm_eps"],
    }
    variants = (_of_3d if kind == "3D" else _of_2d)(entries, attention)
    return UNetConfig(**COMMON, **shape, **variants)


def _of_2d(entries: dict[str, Any], attention: tuple[bool, ...]) -> dict[str, Any]:
    """The entries that UNet2DConditionModel alone has."""
    levels = len(attention)
    embedding, classes = entries["class_embed_type"], entries["num_class_embeds"]
    if embedding not in (None, "timestep", "projection"):
        raise Unsupported("class_embed_type", embedding)
    if entries["resnet_time_scale_shift"] not in ("default", "scale_shift"):
        raise Unsupported("resnet_time_scale_shift", entries["resnet_time_scale_shift"])
    features = entries["projection_class_embeddings_input_dim"]
    return {
        "temporal_attention": (False,) * levels,
        "temporal_conv": (False,) * levels,
        "transformer_depths": _per_level(entries, "transformer_layers_per_block", levels),
        "scale_shift": entries["resnet_time_scale_shift"] == "scale_shift",
        "sin_first": not entries["flip_sin_to_cos"],
        "frequency_shift": entries["freq_shift"],
        "class_embedding": embedding or ("null" if classes is None else "table"),
        "num_classes": classes if embedding is None else None,
        "class_features": features if embedding == "projection" else None,
    }


def _of_3d(entries: dict[str, Any], attention: tuple[bool, ...]) -> dict[str, Any]:
    """The entries that UNet3DConditionModel adds; those of UNet2DConditionModel are refused."""
    read = ("in_channels", "out_channels", "block_out_channels", "layers_per_block")
    read += ("norm_num_groups", "norm_eps", *_DEFAULTS_3D)
    for entry in set(_DEFAULTS) - set(read):
        if entries[entry] != _DEFAULTS[entry]:
            raise Unsupported(entry, entries[entry])
    return {
        **COMMON_VIDEO,
        "temporal_attention": attention,
        "mid_temporal_attention": True,
        "temporal_conv": (True,) * len(attention),
        "head_dim": entries["attention_head_dim"],
        "transformer_in_heads": 8,
    }


def _attends(entries: dict[str, Any], entry: str, kind: str) -> Iterable[bool]:
    """Which blocks have attention, of names such as "CrossAttnDownBlock2D"."""
    side = "Down" if "down" in entry else "Up"
    for name in _as_sequence(entries[entry]):
        stem = str(name).removesuffix(kind)
        if stem == name or side not in stem or stem not in _ATTENTION:
            raise Unsupported(entry, entries[entry], f"has the unknown block {name}")
        yield _ATTENTION[stem]


def _head_dims(
    entries: dict[str, Any], kind: str, widths, used: tuple[bool, ...]
) -> tuple[int, ...]:
    """Channels of a head, per level.

    In UNet2DConditionModel, attention_head_dim is by mistake the number of heads, and published
    configurations depend on that. In UNet3DConditionModel it is the dimension of a head.
    """
    entry = "attention_head_dim"
    given = _per_level(entries, entry, len(widths))
    if kind == "3D" and not isinstance(entries[entry], int):
        raise Unsupported(entry, entries[entry], "must be one number in a UNet3DConditionModel")
    for width, value, has in zip(widths, given, used, strict=True):
        if has and (type(value) is not int or value < 1 or width % value):
            raise Unsupported(entry, entries[entry], f"does not divide {width} channels")
    return tuple(
        width if not has else value if kind == "3D" else width // value
        for width, value, has in zip(widths, given, used, strict=True)
    )


def _as_sequence(value: Any) -> Iterable[Any]:
    return value if isinstance(value, (list, tuple)) else (value,)


def _per_level(entries: dict[str, Any], entry: str, levels: int) -> tuple[Any, ...]:
    """The entry's value per level; it is one value for all levels, or a list."""
    value = entries[entry]
    values = tuple(value) if isinstance(value, (list, tuple)) else (value,) * levels
    if len(values) != levels or any(isinstance(one, (list, tuple)) for one in values):
        raise Unsupported(entry, value, f"is not one value for each of {levels} levels")
    return values
