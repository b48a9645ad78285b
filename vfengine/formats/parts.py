"""The parts of a checkpoint beside its networks: an autoencoder, and a text encoder.

In a checkpoint their weights lie beside the networks', with their configurations in its
config.json (checkpoint.py). Each is trained by itself, into a folder of its own:

autoencoder  config.json, autoencoder.safetensors
text         config.json, text_encoder.safetensors, tokenizer.json
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..models.autoencoder import Autoencoder, AutoencoderConfig, empty_decoder, empty_encoder
from ..models.text_encoder import TextEncoderConfig, empty_text_encoder
from .checkpoint import KINDS, CheckpointConfig
from .folders import Part, read_tensors, read_text, write_folder
from .load import ready_autoencoder, ready_text_encoder
from .lora import Updates
from .published import read_json
from .stored import StoredNetwork
from .text_to_image import load_published_autoencoder, load_published_text_encoder
from .weights import StoredWeights
from .word_tokenizer import WordTokenizer

_AUTOENCODER, _TEXT = "vfengine-autoencoder-1", "vfengine-text-1"  # the formats of their folders


# -- of a checkpoint -------------------------------------------------------------------------------


def load_checkpoint_autoencoder(
    folder: Path,
    config: CheckpointConfig,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    encodes: bool = True,
    capture: bool = True,
) -> Autoencoder:
    """A checkpoint's autoencoder, for inference, as `models.load_autoencoder` gives it.

    encodes: whether the encoder is made ready too

    Raises FileNotFoundError without the file; ValueError for one that is damaged, exchanged or of
    another architecture.
    """
    if "autoencoder" in config.foreign:
        options = {"encodes": encodes, "capture": capture}
        return load_published_autoencoder(folder, config, device, dtype, **options)
    state = read_tensors(folder, "autoencoder", config.sha256)
    found = _stored_autoencoder(folder, config.autoencoder, state)
    return ready_autoencoder(found, dtype, device, encodes=encodes, capture=capture)


def load_checkpoint_text_encoder(
    folder: Path,
    config: CheckpointConfig,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    updates: Updates | None = None,
) -> nn.Module:
    """A checkpoint's text encoder with its tokenizer, as `models.load_text_encoder` gives it.

    updates: of LoRA, added to the weights

    Raises what `load_checkpoint_autoencoder` does, for either file.
    """
    if "text_encoder" in config.foreign:
        return load_published_text_encoder(folder, config, device, dtype, updates)
    text = read_text(folder, "tokenizer", config.sha256)
    tokenize = _tokenizer(folder, config.text_encoder, text)
    state = read_tensors(folder, "text_encoder", config.sha256)
    found = _stored_text_encoder(folder, config.text_encoder, state)
    return ready_text_encoder(found, tokenize, dtype, device, updates)


def _stored_autoencoder(
    folder: Path, config: AutoencoderConfig, state: Mapping[str, Tensor]
) -> dict[str, StoredNetwork]:
    """Its "decoder" and "encoder"; ValueError, naming them, for other weights than theirs."""
    file = folder / "autoencoder.safetensors"
    encoder = {name: value for name, value in state.items() if name.startswith("encoder.")}
    others = {name: value for name, value in state.items() if name not in encoder}
    return {
        "decoder": _stored(file, empty_decoder(config), others, "decoder."),
        "encoder": _stored(file, empty_encoder(config), encoder, "encoder."),
    }


def _stored_text_encoder(
    folder: Path, config: TextEncoderConfig, state: Mapping[str, Tensor]
) -> StoredNetwork:
    """ValueError, naming them, for other weights than its own."""
    return _stored(folder / "text_encoder.safetensors", empty_text_encoder(config), state)


def _stored(
    file: Path, network: nn.Module, state: Mapping[str, Tensor], prefix: str = ""
) -> StoredNetwork:
    names = {name: prefix + name for name in network.state_dict()}
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    return StoredNetwork(file, network, names, StoredWeights(shapes, state.__getitem__))


def _tokenizer(folder: Path, config: TextEncoderConfig, text: str) -> WordTokenizer:
    """ValueError for a file that is no tokenizer, or that knows more words than the encoder."""
    file = folder / "tokenizer.json"
    try:
        tokenizer = WordTokenizer(text, config.max_length)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    if len(tokenizer.vocabulary) > config.vocab_size:
        raise ValueError(
            f"{file} has {len(tokenizer.vocabulary)} words, the text encoder {config.vocab_size}"
        )
    return tokenizer


# -- by themselves ---------------------------------------------------------------------------------


def save_autoencoder(
    folder: str | Path,
    config: AutoencoderConfig,
    state: Mapping[str, Tensor],
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> None:
    """Writes the folder of an autoencoder, in float16; an interrupted write leaves the old one.

    state:     of an `Autoencoder`
    mean, std: of its latents, per channel, over the data

    Raises ValueError for weights or statistics that are not its own, and rather than replace what
    is no such folder.
    """
    mean, std = list(map(float, mean)), list(map(float, std))
    _check_statistics(config, mean, std)
    _stored_autoencoder(Path(folder), config, state)
    entries = {"autoencoder": asdict(config), "latent_mean": mean, "latent_std": std}
    _save(folder, _AUTOENCODER, {"autoencoder": state}, entries)


def read_autoencoder(
    folder: str | Path,
) -> tuple[AutoencoderConfig, dict[str, Tensor], tuple[float, ...], tuple[float, ...]]:
    """What `save_autoencoder` wrote: configuration, weights, mean and std of the latents.

    A model's checkpoint is read likewise: it has an autoencoder of its own.

    Raises FileNotFoundError for what is missing; ValueError, naming it, for what is damaged.
    """
    folder = Path(folder)
    entries = _entries(folder, _AUTOENCODER, "autoencoder", "latent_mean", "latent_std")
    try:
        config = AutoencoderConfig(**entries["autoencoder"])
        mean, std = entries["latent_mean"], entries["latent_std"]
        _check_statistics(config, mean, std)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{folder / 'config.json'}: {error}") from error
    state = read_tensors(folder, "autoencoder", entries["sha256"])
    _stored_autoencoder(folder, config, state)
    return config, state, tuple(mean), tuple(std)


def save_text_encoder(
    folder: str | Path,
    config: TextEncoderConfig,
    state: Mapping[str, Tensor],
    tokenizer_json: str,
) -> None:
    """Writes the folder of a text encoder, as `save_autoencoder` does.

    state:          of a `TextEncoder`
    tokenizer_json: the text of its tokenizer's file
    """
    _tokenizer(Path(folder), config, tokenizer_json)
    _stored_text_encoder(Path(folder), config, state)
    parts = {"text_encoder": state, "tokenizer": tokenizer_json}
    _save(folder, _TEXT, parts, {"text_encoder": asdict(config)})


def read_text_encoder(folder: str | Path) -> tuple[TextEncoderConfig, dict[str, Tensor], str]:
    """What `save_text_encoder` wrote: configuration, weights, and the tokenizer's file.

    A model's checkpoint is read likewise: it has a text encoder of its own.

    Raises FileNotFoundError for what is missing; ValueError, naming it, for what is damaged.
    """
    folder = Path(folder)
    entries = _entries(folder, _TEXT, "text_encoder")
    try:
        config = TextEncoderConfig(**entries["text_encoder"])
    except (TypeError, ValueError) as error:
        raise ValueError(f"{folder / 'config.json'}: {error}") from error
    text = read_text(folder, "tokenizer", entries["sha256"])
    _tokenizer(folder, config, text)
    state = read_tensors(folder, "text_encoder", entries["sha256"])
    _stored_text_encoder(folder, config, state)
    return config, state, text


def _check_statistics(config: AutoencoderConfig, mean: Any, std: Any) -> None:
    """ValueError unless they are a number for each latent channel, std above 0."""
    for name, values, least in (("latent_mean", mean, -math.inf), ("latent_std", std, 0.0)):
        fits = isinstance(values, list) and len(values) == config.latent_channels
        if not fits or not all(type(x) in (int, float) and least < x < math.inf for x in values):
            raise ValueError(f"{name} must be {config.latent_channels} numbers, got {values!r}")


def _save(folder: str | Path, form: str, parts: Mapping[str, Part], entries: dict) -> None:
    def text(sha256: dict[str, str]) -> str:
        return json.dumps({"format": form, **entries, "sha256": sha256}, indent=2)

    write_folder(folder, parts, text, torch.float16)


def _entries(folder: Path, form: str, *names: str) -> dict[str, Any]:
    """The entries of a folder's config.json, which must be these and "sha256"."""
    file = folder / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{folder} has no config.json of the format {form}")
    entries = read_json(file)
    if entries.get("format") in (kind._format for kind in KINDS.values()):  # a whole model's
        if entries.get("published"):
            raise ValueError(f"{folder} has a published model's {names[0]}, none of its own")
        own = {name: entries[name] for name in ("sha256", *names) if entries.get(name)}
        entries = {"format": form, **own}
    if entries.get("format") != form:
        raise ValueError(f'{file}: "format" is not {form}')
    if entries.keys() != {"format", "sha256", *names} or not isinstance(entries["sha256"], dict):
        raise ValueError(
            f"{file}: expected {', '.join(names)} and sha256, got {', '.join(entries)}"
        )
    return entries
