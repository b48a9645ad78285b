"""Text encoders as published: transformers' CLIPTextModel, and open_clip's ViT-H-14.

A setting that would change the result, and that has no counterpart here, is refused by name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from ..models.text_encoder import ACTIVATIONS, TextEncoderConfig
from .published import Unsupported, entries_named
from .weights import StoredWeights

_ENTRIES = {  # of a CLIPTextModel's config.json: our names of them, and their defaults
    "vocab_size": ("vocab_size", 49408),
    "max_position_embeddings": ("max_length", 77),
    "hidden_size": ("width", 512),
    "num_hidden_layers": ("num_layers", 12),
    "num_attention_heads": ("num_heads", 8),
    "intermediate_size": ("mlp_width", 2048),
    "hidden_act": ("activation", "quick_gelu"),
    "layer_norm_eps": ("norm_eps", 1e-5),
}
_CLIP_LAYERS = {
    "embeddings.token_embedding": "embeddings.token_embedding",
    "embeddings.position_embedding": "embeddings.position_embedding",
    "norm": "final_layer_norm",
}
_CLIP_BLOCK = {
    "norm1": "layer_norm1",
    "attention.to_q": "self_attn.q_proj",
    "attention.to_k": "self_attn.k_proj",
    "attention.to_v": "self_attn.v_proj",
    "attention.to_out": "self_attn.out_proj",
    "norm2": "layer_norm2",
    "fc1": "mlp.fc1",
    "fc2": "mlp.fc2",
}
_OPEN_CLIP_BLOCK = {
    "norm1": "ln_1",
    "attention.to_out": "attn.out_proj",
    "norm2": "ln_2",
    "fc1": "mlp.c_fc",
    "fc2": "mlp.c_proj",
}
_HEAD_DIM = 64  # of open_clip's text encoders: shapes do not say it
_UNUSED_BLOCKS = 1  # the last: ModelScope takes the rows before it
_BLOCKS = "transformer.resblocks."


# -- transformers ----------------------------------------------------------------------------------


def clip_config(values: Mapping[str, Any]) -> TextEncoderConfig:
    """The configuration of a config.json; ValueError, naming it, for an unsupported entry."""
    for entry, only in (
        ("model_type", "clip_text_model"),
        ("architectures", ["CLIPTextModel"]),
        ("use_attention_mask", False),
    ):
        if values.get(entry, only) != only:
            raise Unsupported(entry, values[entry])
    if values.get("hidden_act", ACTIVATIONS[0]) not in ACTIVATIONS:
        raise Unsupported("hidden_act", values["hidden_act"])
    entries = {ours: values.get(name, default) for name, (ours, default) in _ENTRIES.items()}
    with entries_named({ours: name for name, (ours, _) in _ENTRIES.items()}):
        return TextEncoderConfig(**entries)


def clip_weights(weights: StoredWeights) -> StoredWeights:
    """Those of a CLIPTextModel: older files list the numbers of positions as well."""
    return weights.only(name for name in weights.shapes if not name.endswith("position_ids"))


def clip_names(ours: Iterable[str], found: Iterable[str]) -> dict[str, str]:
    """Names in the file by ours; found: those in the file, which may begin with text_model."""
    prefix = "text_model." if any(name.startswith("text_model.") for name in found) else ""
    return {
        name: prefix + _renamed(name, _CLIP_LAYERS, "encoder.layers.", _CLIP_BLOCK) for name in ours
    }


def _renamed(name: str, layers: Mapping[str, str], blocks: str, block: Mapping[str, str]) -> str:
    layer, _, parameter = name.rpartition(".")
    if layer.startswith("layers."):
        _, number, part = layer.split(".", 2)
        return f"{blocks}{number}.{block[part]}.{parameter}"
    return f"{layers[layer]}.{parameter}"


# -- open_clip -------------------------------------------------------------------------------------


def open_clip_config(shapes: Mapping[str, tuple[int, ...]]) -> TextEncoderConfig:
    """The configuration of weights that have none, by their shapes; all blocks but the last."""
    try:
        vocabulary, width = shapes["token_embedding.weight"]
        length, _ = shapes["positional_embedding"]
        blocks = {name.split(".")[2] for name in shapes if name.startswith(_BLOCKS)}
        return TextEncoderConfig(
            vocab_size=vocabulary,
            max_length=length,
            width=width,
            num_layers=len(blocks) - _UNUSED_BLOCKS,
            num_heads=width // _HEAD_DIM,
            mlp_width=shapes[f"{_BLOCKS}0.mlp.c_fc.weight"][0],
        )
    except (KeyError, IndexError) as error:
        raise ValueError(f"not an open_clip text encoder: no {error}") from error


def open_clip_weights(weights: StoredWeights, config: TextEncoderConfig) -> StoredWeights:
    """Those of the text encoder, with q, k and v, which lie below each other, one by one."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in weights.shapes.items():
        block = name.removeprefix(_BLOCKS).partition(".")[0]
        used = name.startswith(_BLOCKS) and block.isdecimal() and int(block) < config.num_layers
        if ".attn.in_proj_" in name and used and shape and shape[0] % 3 == 0:
            shapes |= {f"{name}.{part}": (shape[0] // 3, *shape[1:]) for part in "qkv"}
        elif (
            used
            or name in ("token_embedding.weight", "positional_embedding")
            or name.startswith("ln_final.")
        ):
            shapes[name] = shape
    joined: dict[str, dict[str, Tensor]] = {}

    def read(name: str) -> Tensor:
        whole, _, part = name.rpartition(".")
        if part not in tuple("qkv"):
            return weights.read(name)
        if whole not in joined:  # a file's weights are read once
            joined[whole] = dict(zip("qkv", weights.read(whole).chunk(3), strict=True))
        rows = joined[whole].pop(part)
        if not joined[whole]:
            del joined[whole]
        return rows

    return StoredWeights(shapes, read)


def open_clip_names(ours: Iterable[str]) -> dict[str, str]:
    """Names in the file by ours."""
    layers = {"embeddings.token_embedding": "token_embedding", "norm": "ln_final"}
    names = {}
    for name in ours:
        layer, _, parameter = name.rpartition(".")
        if name == "embeddings.position_embedding.weight":
            names[name] = "positional_embedding"
        elif layer.endswith((".to_q", ".to_k", ".to_v")):
            number = layer.split(".")[1]
            names[name] = f"{_BLOCKS}{number}.attn.in_proj_{parameter}.{layer[-1]}"
        else:
            names[name] = _renamed(name, layers, _BLOCKS, _OPEN_CLIP_BLOCK)
    return names
