"""LoRA: low-rank changes of a network's weights, added to them as they are read.

    W + scale · alpha / rank · up @ down        up [out, rank], down [rank, in]

Of a convolution, down has its kernel, and up is 1x1: the product is their composition. Files come
in the names of diffusers, of its older releases, of PEFT and of kohya's scripts (docs/lora.md). A
file says by name which layers it changes: lora_targets.py says what a network's are called.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..files import open_tensors, parse_json
from .lora_files import LoraFile, lora_parts, lora_record
from .published import read_json
from .weights import StoredWeights, open_weights

_WEIGHTS = (  # of a layer: its name, and which of its two matrices
    re.compile(r"(?P<layer>.+)\.lora_(?P<part>A|B)(?:\.[^.]+)?\.weight"),  # PEFT, diffusers
    re.compile(r"(?P<layer>.+)\.processor\.(?P<inner>to_\w+)_lora\.(?P<part>down|up)\.weight"),
    re.compile(r"(?P<layer>.+)\.(?P<inner>to_\w+)_lora\.(?P<part>down|up)\.weight"),  # of texts
    re.compile(r"(?P<layer>.+)\.(?:lora|lora_linear_layer)\.(?P<part>down|up)\.weight"),
    re.compile(r"(?P<layer>.+)\.lora_(?P<part>down|up)\.weight"),  # kohya
)
_ALPHA = re.compile(r"(?P<layer>.+?)(?:\.lora)?\.alpha")
_PARTS = {"A": "down", "B": "up"}
_OTHERS = {  # words in the names of what is no LoRA of two matrices
    **{".lora_magnitude_vector": "DoRA", ".dora_scale": "DoRA"},
    **{".hada_": "LoHa", ".lokr_": "LoKr", ".oft_": "OFT", ".lora_mid": "LoRA of three matrices"},
    **{".lora_embedding_": "LoRA of embeddings"},
    **{".diff.": "a difference of whole weights", ".diff_b.": "a difference of biases"},
}
_PEFT = "base_model.model."
_DIFFUSERS_METADATA = "lora_adapter_metadata"
_ONLY = {"peft_type": ("LORA",), "use_dora": (False,), "fan_in_fan_out": (False,)}
_ONLY |= {"bias": ("none",), "lora_bias": (False,), "modules_to_save": (None,)}


class Update(NamedTuple):
    """What is added to one weight: scale · up @ down, up [out, rank], down [rank, in · kernel]."""

    up: Tensor
    down: Tensor
    scale: float


Updates = Mapping[str, Sequence[Update]]  # of a network, by our names of weights


def merged(weight: Tensor, updates: Sequence[Update]) -> Tensor:
    """A weight with its updates, in fp32 or better; without any, the weight as it is."""
    for up, down, scale in updates:
        weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
        change = up.to(weight.dtype) @ down.to(weight.dtype)
        weight = weight + scale * change.to(weight.device).reshape(weight.shape)
    return weight


# -- files -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Lora:
    """A LoRA that was read: `record` names its file; layers, by its own names, are scaled."""

    file: LoraFile
    record: Mapping[str, str]
    layers: Mapping[str, Update]


def read_lora(file: LoraFile) -> Lora:
    """A LoRA from its file, whole and finite.

    Raises FileNotFoundError for what is missing; ValueError, naming the file, for one that is
    damaged, not finite, or holds anything but LoRA.
    """
    weights, config = lora_parts(file.path)
    record, stored = lora_record(file.path), open_weights([weights])
    try:
        layers = _layers(stored, _settings(weights, config), file.scale)
    except (ValueError, TypeError, OverflowError, re.error) as error:
        raise ValueError(f"{file.path}: {error}") from error
    return Lora(file, record, layers)


def _layers(
    stored: StoredWeights, settings: Mapping[str, Mapping[str, Any]], scale: float
) -> dict[str, Update]:
    matrices: dict[str, dict[str, Tensor]] = {}
    alphas: dict[str, float] = {}
    for name in stored.shapes:
        tensor = stored.read(name)
        if not tensor.float().isfinite().all():
            raise ValueError(f"{name} is not finite")
        layer, part = _parsed(name)
        if part == "alpha":
            if tensor.numel() != 1:
                raise ValueError(f"{name} must be one number, got {list(tensor.shape)}")
            alphas[layer] = float(tensor)
        elif part in matrices.setdefault(layer, {}):
            raise ValueError(f"{name} is there twice, under other names or of two adapters")
        elif not tensor.is_floating_point() or tensor.dim() < 2 or not tensor.numel():
            raise ValueError(f"{name} is no matrix: {tensor.dtype} {list(tensor.shape)}")
        else:
            matrices[layer][part] = tensor
    if not matrices:
        raise ValueError("holds no LoRA")
    if lost := sorted(alphas.keys() - matrices.keys()):
        raise ValueError(f"has an alpha without matrices: {lost[0]}")
    layers = {}
    for layer, parts in matrices.items():
        if len(parts) < 2:
            missing = "down" if "up" in parts else "up"
            raise ValueError(f"{layer} misses its {missing} matrix")
        up, down = parts["up"], parts["down"]
        rank = down.shape[0]
        if up.shape[1] != rank or up.shape[:2].numel() != up.numel():
            raise ValueError(
                f"{layer}: up {list(up.shape)} and down {list(down.shape)} do not fit each other"
            )
        share = alphas[layer] / rank if layer in alphas else _share(layer, rank, settings)
        if not math.isfinite(scale * share):
            raise ValueError(f"{layer}: scale times alpha / rank is not finite")
        layers[layer] = Update(up, down, scale * share)
    return layers


def _parsed(name: str) -> tuple[str, str]:
    """The layer that an entry belongs to, and what it is of it: "up", "down" or "alpha"."""
    for word, kind in _OTHERS.items():
        if word in f"{name}.":
            raise ValueError(f"{name} is of {kind}, which is not supported")
    for form in _WEIGHTS:
        if found := form.fullmatch(name):
            parts = found.groupdict()
            inner = parts.get("inner")
            layer = found["layer"] + (f".{inner}" if inner else "")
            return layer.removeprefix(_PEFT), _PARTS.get(found["part"], found["part"])
    if found := _ALPHA.fullmatch(name):
        return found["layer"].removeprefix(_PEFT), "alpha"
    raise ValueError(f"{name} is no part of a LoRA")


def _settings(weights: Path, config: Path | None) -> dict[str, Mapping[str, Any]]:
    """PEFT's settings of layers, by the prefixes of their names: beside the file, or in it."""
    if config is not None:
        found: dict[str, Mapping[str, Any]] = {"": read_json(config)}
    else:
        found = _packed(weights)
    for values in found.values():
        for entry, allowed in _ONLY.items():
            if values.get(entry, allowed[0]) not in allowed and values[entry]:
                raise ValueError(f"{entry} = {values[entry]!r} is not supported")
    return found


def _packed(weights: Path) -> dict[str, Mapping[str, Any]]:
    """What diffusers writes into a .safetensors file: {"unet.lora_alpha": 8, …}."""
    if weights.suffix != ".safetensors":
        return {}
    with open_tensors(weights) as opened:
        text = (opened.metadata() or {}).get(_DIFFUSERS_METADATA)
    values = {} if text is None else parse_json(text)
    if not isinstance(values, dict):
        raise ValueError(f"{_DIFFUSERS_METADATA} holds no names and values")
    found: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        network, _, entry = name.partition(".")
        found.setdefault(f"{network}.", {})[entry] = value
    return dict(found)


def _share(layer: str, rank: int, settings: Mapping[str, Mapping[str, Any]]) -> float:
    """alpha / rank, or alpha / √rank, as PEFT's settings say; 1 without them."""
    for prefix, values in settings.items():
        if not layer.startswith(prefix):
            continue
        patterns, alpha = values.get("alpha_pattern") or {}, values.get("lora_alpha", rank)
        if not isinstance(patterns, dict):
            raise ValueError(f"alpha_pattern must be names and numbers, got {patterns!r}")
        for pattern, value in patterns.items():
            if re.fullmatch(rf"(.*\.)?({pattern})", layer.removeprefix(prefix)):
                alpha = value
                break
        if isinstance(alpha, bool) or not isinstance(alpha, (int, float)):
            raise ValueError(f"alpha of {layer} must be a number, got {alpha!r}")
        return alpha / (math.sqrt(rank) if values.get("use_rslora") else rank)
    return 1.0


# -- networks --------------------------------------------------------------------------------------


class Target:
    """A network that LoRA may change: its layers, by the names that files have for them.

    network:  our own; weights are not needed
    prefixes: what names begin with; before one that ends in "_", dots are underscores too
    names:    (theirs, ours) of layers; a layer may have several names
    """

    def __init__(
        self, network: nn.Module, prefixes: Sequence[str], names: Iterable[tuple[str, str]]
    ) -> None:
        self.shapes = {
            name: tuple(layer.weight.shape)
            for name, layer in network.named_modules()
            if isinstance(layer, (nn.Linear, nn.Conv2d))
        }
        self.prefixes = tuple(prefixes)
        self._dotted: dict[str, set[str]] = {}
        self._joined: dict[str, set[str]] = {}
        for theirs, ours in names:
            if ours in self.shapes:
                self._dotted.setdefault(theirs, set()).add(ours)
                self._joined.setdefault(theirs.replace(".", "_"), set()).add(ours)

    def layers(self, name: str) -> set[str]:
        """Our layers that a file may mean by a name: one, unless names are ambiguous."""
        found: set[str] = set()
        for prefix in self.prefixes:
            if name.startswith(prefix):
                table = self._joined if prefix.endswith("_") else self._dotted
                found |= table.get(name.removeprefix(prefix), set())
        return found


def updates_of(lora: Lora, targets: Mapping[str, Target]) -> dict[str, dict[str, Update]]:
    """What a LoRA changes: updates by network, then by our name of the weight.

    Raises ValueError, naming them, for layers that fit none of the networks, or several.
    """
    updates: dict[str, dict[str, Update]] = {}
    places: dict[str, list[tuple[str, str]]] = {
        name: [(key, ours) for key, target in targets.items() for ours in target.layers(name)]
        for name in lora.layers
    }
    for problem, wrong in (
        ("changes layers that this model does not have", [n for n, p in places.items() if not p]),
        ("has names of several layers", [n for n, p in places.items() if len(p) > 1]),
    ):
        if wrong:
            more = f" and {len(wrong) - 4} more" if len(wrong) > 4 else ""
            raise ValueError(f"{lora.file.path} {problem}: {', '.join(wrong[:4])}{more}")
    for name, [(key, ours)] in places.items():
        up, down, scale = lora.layers[name]
        shape = targets[key].shapes[ours]
        if (up.shape[0], *_kernel(down.shape)) != (shape[0], *_kernel(shape)):
            raise ValueError(
                f"{lora.file.path} is of another architecture: {name} changes a weight "
                f"{[up.shape[0], *down.shape[1:]]}, this model's is {list(shape)}"
            )
        if f"{ours}.weight" in updates.setdefault(key, {}):
            raise ValueError(f"{lora.file.path} changes a layer twice, the second time as {name}")
        updates[key][f"{ours}.weight"] = Update(up.flatten(1), down.flatten(1), scale)
    return updates


def _kernel(shape: Sequence[int]) -> tuple[int, ...]:
    """Inputs and kernel of a weight; files may write linear layers as 1x1 convolutions."""
    inputs, *sides = shape[1:]
    while sides and sides[-1] == 1:
        sides.pop()
    return (inputs, *sides)
