"""The common part of the formats of published networks: a UNet, and the names of its weights."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..files import parse_json
from ..models.config import UNetConfig

# what describes a whole pipeline, in its folder
DIFFUSERS_PIPELINE, MODELSCOPE_PIPELINE = "model_index.json", "configuration.json"
# entries that all networks of both formats have
COMMON = {
    "position_buckets": 0,
    "feed_forward_mult": 4,
    "transformer_norm_eps": 1e-6,
    "any_size": True,
}
COMMON_VIDEO = {
    "temporal_conv_depth": 4,
    "frequency_shift": 0,
    "temporal_self_attentions": 2,
    "norm_over_frames": True,
    "scale_shift": False,
}

# entries of a network whose weights are averages over training, of that averaging
AVERAGING = ("decay", "inv_gamma", "min_decay", "optimization_step", "power")
AVERAGING += ("update_after_step", "use_ema_warmup")

# in an attention of pixels: diffusers' names by ours, and its names of old for them
_PIXEL_ATTENTION = {"norm": "group_norm", "attention.to_q": "to_q", "attention.to_k": "to_k"}
_PIXEL_ATTENTION |= {"attention.to_v": "to_v", "attention.to_out": "to_out.0"}
_OLD = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
_BLOCK = {"attn1.to_out": "attn1.to_out.0", "attn2.to_out": "attn2.to_out.0"}
_BLOCK |= {"ff.proj": "ff.net.0.proj", "ff.out": "ff.net.2"}
_TRANSFORMERS = ("spatial", "temporal", "transformer_in")


class Unsupported(ValueError):
    """An entry of a configuration without a counterpart here."""

    def __init__(self, entry: str, value: object, why: str = "is not supported"):
        super().__init__(f"{entry} = {json.dumps(value, default=str)} {why}")
        self.entry, self.value = entry, value


@dataclass(frozen=True)
class PublishedUNet:
    """A UNet of another format: our configuration of it, and its names of our layers.

    layers: its names of layers, by ours
    resnet: its names of the layers in a residual block, by ours, where they differ
    """

    config: UNetConfig
    layers: Mapping[str, str]
    resnet: Mapping[str, str] = field(default_factory=dict)

    def name(self, ours: str) -> str:
        """The other format's name of a weight; inside most layers names are the same."""
        parts = ours.split(".")
        length = next(n for n in range(len(parts), 0, -1) if ".".join(parts[:n]) in self.layers)
        prefix, inner = self.layers[".".join(parts[:length])], parts[length:]
        kind = parts[length - 1]
        if kind == "resnet":
            inner[0] = self.resnet.get(inner[0], inner[0])
        elif kind == "temp_conv":  # after the first, a dropout stands before the convolution
            number = int(inner[1])
            layer = 0 if inner[0] == "norms" else 3 if number else 2
            inner = [f"conv{number + 1}", str(layer), inner[2]]
        elif kind in _TRANSFORMERS and inner[0] not in ("norm", "proj_in", "proj_out"):
            number, name = re.fullmatch(r"(?:rest\.(\d+)\.)?(.+)", ".".join(inner)).groups()
            layer, _, parameter = name.rpartition(".")
            block = 0 if number is None else int(number) + 1
            inner = [f"transformer_blocks.{block}", _BLOCK.get(layer, layer), parameter]
        return ".".join([prefix, *inner])


@contextmanager
def entries_named(names: Mapping[str, str]) -> Iterator[None]:
    """Errors of our configurations name a file's entries; names: of entries, by our fields'."""
    try:
        yield
    except ValueError as error:
        words = re.sub(r"^\w+Config: ", "", str(error))
        raise ValueError(re.sub(r"\w+", lambda word: names.get(word[0], word[0]), words)) from error


def pixel_attention(names: Iterable[str]) -> dict[str, str]:
    """diffusers' names of the layers in an attention of pixels, by ours; names: in the file.

    They may be old ones, which diffusers reads too: Stable Diffusion's autoencoder has them.
    """
    if any(name.endswith(".proj_attn.weight") for name in names):
        return {ours: _OLD.get(now, now) for ours, now in _PIXEL_ATTENTION.items()}
    return _PIXEL_ATTENTION


def holds_pipeline(folder: str | Path) -> bool:
    """Whether a folder holds a published pipeline; a checkpoint of our own is none."""
    names = (DIFFUSERS_PIPELINE, MODELSCOPE_PIPELINE)
    return any((Path(folder) / name).is_file() for name in names)


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file; ValueError for a file that is not JSON, or holds no object."""
    try:
        values = parse_json(file.read_text(encoding="utf-8"))
    except ValueError as error:  # of JSON, or text that is not UTF-8
        raise ValueError(f"{file} is not JSON ({error})") from error
    if not isinstance(values, dict):
        raise ValueError(f"{file}: expected names and values")
    return values
