"""What the layers of each model are called in files of LoRA (lora.py).

Networks of our checkpoints have our own names, after "base.", "residual.", "video." or
"text_encoder.". Published ones have diffusers' and transformers' names, whatever file they are
stored in, and those of that file.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from torch import nn

from ..models.config import UNetConfig
from ..models.text_encoder import empty_text_encoder
from ..models.unet import empty_unet
from . import text_encoder as text
from .checkpoint_config import CheckpointConfig
from .diffusers import diffusers_names
from .load import find_text_encoder, find_unet
from .lora import Target
from .stored import StoredNetwork
from .text_to_image import find_part

_UNET = ("unet.", "lora_unet_", "")
_TEXT = ("text_encoder.", "lora_te_", "lora_te1_", "")


def checkpoint_targets(
    config: CheckpointConfig, base_unet: object = None, folder: Path | None = None
) -> dict[str, Target]:
    """Those of a checkpoint of our own: "base", "residual", "video", "text".

    folder:    that it lies in, which those on published models need
    base_unet: what is in the place of the base network, a source of `load_unet`; a network in
               memory stays as it is
    """
    targets = {}
    for name in config.networks:
        if name in config.foreign and base_unet is None:
            targets[name] = _unet(find_part(folder, config, name), f"{name}.")
        elif name != "base" or base_unet is None:
            targets[name] = _own(name, empty_unet(config.unet_config(name)))
        elif isinstance(base_unet, Path):
            targets[name] = _unet(find_unet(base_unet), "base.")
    if "text_encoder" in config.foreign:
        targets["text"] = _texts(find_part(folder, config, "text_encoder"))
    elif config.text_encoder is not None:
        targets["text"] = _own("text_encoder", empty_text_encoder(config.text_encoder))
    return targets


def published_targets(folder: Path) -> dict[str, Target]:
    """Those of a published text-to-video model: "video" and "text"."""
    return {"video": _unet(find_unet(folder)), "text": _texts(find_text_encoder(folder))}


def _own(name: str, network: nn.Module) -> Target:
    names = [layer for layer, _ in network.named_modules()]
    return Target(network, (f"{name}.",), zip(names, names, strict=True))


def _texts(found: StoredNetwork) -> Target:
    return Target(found.network, _TEXT, _of_texts(found))


def _unet(found: StoredNetwork, *prefixes: str) -> Target:
    return Target(found.network, (*_UNET, *prefixes), _of_unet(found))


def _of_unet(found: StoredNetwork) -> Iterator[tuple[str, str]]:
    config: UNetConfig = found.config
    published = diffusers_names(config)
    for ours in map(_layer, found.names):
        theirs = _layer(published.name(f"{ours}.weight"))
        yield theirs, ours
        if theirs.endswith(".to_out.0"):  # of old, without the list around it
            yield theirs.removesuffix(".0"), ours
    yield from ((_layer(theirs), _layer(ours)) for ours, theirs in found.names.items())


def _of_texts(found: StoredNetwork) -> Iterator[tuple[str, str]]:
    for ours, theirs in text.clip_names(found.names, ()).items():
        layer, own = _layer(theirs), _layer(ours)
        inner, _, last = layer.rpartition(".")
        old = last.removesuffix("_proj")  # self_attn.to_q of old for self_attn.q_proj
        for name in {layer, f"{inner}.to_{old}"} if old != last else {layer}:
            yield name, own
            yield f"text_model.{name}", own


def _layer(weight: str) -> str:
    return weight.rpartition(".")[0]
