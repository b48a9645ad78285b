"""The UNet of ModelScope's text-to-video model.

A setting that would change the result, and that has no counterpart here, is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..models.config import UNetConfig
from ..models.topology import topology
from .published import (
    COMMON,
    COMMON_VIDEO,
    MODELSCOPE_PIPELINE,
    PublishedUNet,
    Unsupported,
    entries_named,
    read_json,
)

WEIGHTS = "text2video_pytorch_model.pth"
# each part's file: the entry of model_args that names it, and its published name
_FILES = {
    "ckpt_unet": WEIGHTS,
    "ckpt_clip": "open_clip_pytorch_model.bin",
    "ckpt_autoencoder": "VQGAN_autoencoder.pth",
}
_GROUPS = 32  # of every GroupNorm
_HEADS = 8  # of the published network: shapes do not say it
_MODEL_CFG = {"unet_in_dim", "unet_out_dim", "unet_dim", "unet_dim_mult", "unet_res_blocks"}
_MODEL_CFG |= {"unet_attn_scales", "unet_context_dim", "unet_num_heads", "unet_head_dim"}
_LISTS = {"unet_dim_mult": 1, "unet_attn_scales": 0}  # and their least lengths
# Names of entries by our fields'.
_ENTRIES = {"block_out_channels": "unet_dim * unet_dim_mult", "layers_per_block": "unet_res_blocks"}
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


# -- files -----------------------------------------------------------------------------------------


def locate(folder: Path, chosen: Path | None) -> tuple[Path | None, list[Path]]:
    """The configuration, or None if it is missing, and the file of weights in a folder."""
    config = folder / MODELSCOPE_PIPELINE
    return (config if config.is_file() else None), [chosen or weights_file(folder, "ckpt_unet")]


def weights_file(folder: Path, entry: str) -> Path:
    """The file of a part, named by an entry of model_args or by its published name.

    Raises ValueError for a name that leads out of the folder, FileNotFoundError without the file.
    """
    config, name = folder / MODELSCOPE_PIPELINE, _FILES[entry]
    if config.is_file():
        model = read_json(config).get("model")
        args = model.get("model_args") if isinstance(model, dict) else None
        name = args.get(entry, name) if isinstance(args, dict) else name
        if not isinstance(name, str) or Path(name).name != name:
            raise ValueError(f"{config}: {Unsupported(entry, name, 'is no name of a file')}")
    if not (folder / name).is_file():
        raise FileNotFoundError(f"{folder} has no {name}")
    return folder / name


# -- names -----------------------------------------------------------------------------------------


def modelscope_unet(
    values: Mapping[str, Any] | None, shapes: Mapping[str, tuple[int, ...]]
) -> PublishedUNet:
    """The UNet of a configuration.json; values: None if that is missing: shapes replace it.

    Raises ValueError, naming it, for an entry that is not supported.
    """
    config = modelscope_config(model_cfg_of(shapes) if values is None else _model_cfg(values))
    return PublishedUNet(config, _layer_names(config), _RESNET)


def _layer_names(config: UNetConfig) -> dict[str, str]:
    """The names of our layers in its files, where blocks are numbered through all levels."""
    layers = {"conv_in": "input_blocks.0.0", "transformer_in": "input_blocks.0.1"}
    layers |= {"time_embedding": "time_embed", "conv_norm_out": "out.0", "conv_out": "out.2"}
    inputs, outputs = 0, -1  # numbers of the last blocks
    for step in topology(config):
        inputs += step.part in ("down", "downsamplers")
        outputs += step.part == "up"
        if step.kind == "downsample":
            layers[step.name] = f"input_blocks.{inputs}.op"
        elif step.kind == "upsample":
            after = 3 if config.spatial_attention[step.level] else 1
            layers[step.name] = f"output_blocks.{outputs}.{after}.conv"
        else:
            block, first = f"input_blocks.{inputs}", 0
            if step.part == "up":
                block = f"output_blocks.{outputs}"
            elif step.part == "mid":  # one block of two stages
                block, first = "middle_block", 3 * int(step.name.removeprefix("mid."))
            layers[f"{step.name}.resnet"] = f"{block}.{first}"
            layers[f"{step.name}.temp_conv"] = f"{block}.{first}.temopral_conv"  # spelt so there
            layers[f"{step.name}.spatial"] = f"{block}.{first + 1}"
            layers[f"{step.name}.temporal"] = f"{block}.{first + 2}"
    return layers


# -- configurations --------------------------------------------------------------------------------


def _model_cfg(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """configuration.json holds it below "model"."""
    model = values.get("model", values)
    model_cfg = model.get("model_cfg") if isinstance(model, dict) else None
    if not isinstance(model_cfg, dict):
        raise ValueError("no model_cfg")
    return model_cfg


def modelscope_config(model_cfg: Mapping[str, Any]) -> UNetConfig:
    """The configuration of a model_cfg; ValueError, naming it, for an unsupported entry."""
    no_effect = {"unet_y_dim", "unet_dropout"}  # the first is read, and not used
    for entry, value in model_cfg.items():
        if entry.startswith("unet_") and entry not in _MODEL_CFG | no_effect:
            raise Unsupported(entry, value, "is an unknown entry")
    missing = _MODEL_CFG - set(model_cfg)
    if missing:
        raise ValueError(f"no {', '.join(sorted(missing))}")
    for entry in _MODEL_CFG:
        value = model_cfg[entry]
        if entry in _LISTS:
            fits = isinstance(value, list) and _LISTS[entry] <= len(value) <= 16
            if not fits or not all(type(one) in (int, float) and one > 0 for one in value):
                why = f"must be a list of {_LISTS[entry]} to 16 positive numbers"
                raise Unsupported(entry, value, why)
        elif type(value) is not int or not 1 <= value <= 2**16:
            raise Unsupported(entry, value, f"must be an int from 1 to {2**16}")
    if str(model_cfg.get("temporal_attention", True)) != "True":  # a string, in the published file
        raise Unsupported("temporal_attention", model_cfg["temporal_attention"])
    entries = {name.removeprefix("unet_"): value for name, value in model_cfg.items()}
    widths = tuple(entries["dim"] * mult for mult in entries["dim_mult"])
    attention = tuple(0.5**level in entries["attn_scales"] for level in range(len(widths)))
    used = (*attention[:-1], True)  # the middle always has attention
    for width, has in zip(widths, used, strict=True):
        if has and width % entries["head_dim"]:
            raise Unsupported("unet_head_dim", entries["head_dim"], f"does not divide {width}")
    head_dims = tuple(
        entries["head_dim"] if has else width for width, has in zip(widths, used, strict=True)
    )
    with entries_named(_ENTRIES):
        return UNetConfig(
            **COMMON,
            **COMMON_VIDEO,
            in_channels=entries["in_dim"],
            out_channels=entries["out_dim"],
            block_out_channels=widths,
            layers_per_block=(entries["res_blocks"],) * len(widths),
            spatial_attention=attention,
            temporal_attention=attention,
            temporal_conv=(True,) * len(widths),
            mid_spatial_attention=True,
            mid_temporal_attention=True,
            context_dim=entries["context_dim"],
            needs_context=True,
            head_dim=entries["head_dim"],
            head_dims=head_dims,
            transformer_in_heads=entries["num_heads"],
            norm_groups=_GROUPS,
        )


def model_cfg_of(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """The model_cfg of weights without one, by their shapes."""
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
            "unet_num_heads": _HEADS,
            "unet_head_dim": shapes["input_blocks.0.1.proj_in.weight"][0] // _HEADS,
        }
    except (KeyError, IndexError, ZeroDivisionError) as error:
        raise ValueError(f"not a ModelScope text-to-video UNet: no {error}") from error
