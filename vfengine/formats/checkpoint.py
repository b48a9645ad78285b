"""A model on disk: a folder of config.json and one .safetensors file per network.

There are two kinds. A decomposed model has base.safetensors and residual.safetensors. Plain video
diffusion, the baseline (VDM* in the paper, "vdm" in files), has video.safetensors. The
configuration holds everything that sampling needs to know (shapes, labels, schedule, λ). Weights
are read without executing code, and checked against the SHA-256 in the configuration.

Either kind may have parts (parts.py). With an autoencoder, autoencoder.safetensors, the networks
denoise its latents in place of pixels. With a text encoder, text_encoder.safetensors and
tokenizer.json, they attend to prompts in place of class labels; a label then stands for a prompt.

Where the base network is a published one, it and the parts lie in folders as diffusers keeps them
(text_to_image.py): unet/, vae/, text_encoder/ and tokenizer/.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ..models import UNet
from ..models.empty import new_weights
from ..models.unet import empty_unet
from .checkpoint_config import (
    KINDS,
    CheckpointConfig,
    DecomposedConfig,
    FewSteps,
    Generator,
    PlainConfig,
)
from .folders import Part, read_tensors, write_folder
from .lora import Updates, merged

__all__ = [
    "DEFAULT",
    "KINDS",
    "CheckpointConfig",
    "DecomposedConfig",
    "FewSteps",
    "Generator",
    "PlainConfig",
    "build_network",
    "load_network",
    "read_config",
    "read_weights",
    "save_checkpoint",
]

DEFAULT = Path(__file__).parent.parent / "assets" / "default"


def read_config(folder: str | Path | None = None) -> CheckpointConfig:
    """The configuration of a checkpoint folder; None is the default checkpoint in the package.

    Raises FileNotFoundError when there is none, ValueError when it is not one of ours.
    """
    folder = _folder(folder)
    file = folder / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"no checkpoint in {folder}: it has no config.json")
    try:
        return CheckpointConfig.from_json(file.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not the configuration of a model: {error}") from error


def build_network(config: CheckpointConfig, name: str) -> Generator:
    """A network with freshly initialised weights; ValueError for a name that is none of config's.

    name: one of config.networks: "base" or "residual" of a decomposed model, "video" of a plain one
    """
    with new_weights():
        return config.generator(name, UNet(config.unet_config(name)))


def load_network(
    folder: str | Path | None,
    config: CheckpointConfig,
    name: str,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    updates: Updates | None = None,
) -> Generator:
    """A network of a checkpoint, in eval mode on `device`, with exactly its file's weights.

    name:    as for `build_network`
    updates: of LoRA, added to the weights

    Raises FileNotFoundError without the file, ValueError for a name that is none of the model's and
    for a file that is damaged, exchanged or of another architecture.
    """
    folder = _folder(folder)
    try:
        unet_config = config.unet_config(name)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error
    state = read_weights(folder, name, config)
    unet = empty_unet(unet_config)
    expected = {k: v.shape for k, v in unet.state_dict().items()}
    found = {k: v.shape for k, v in state.items()}
    if found != expected:
        odd = next(k for k in sorted({**expected, **found}) if expected.get(k) != found.get(k))
        raise ValueError(
            f"{folder / name}.safetensors is of another architecture than its config.json: {odd} "
            f"should be {_shape(expected.get(odd))}, is {_shape(found.get(odd))}"
        )
    state = {k: merged(v, (updates or {}).get(k, ())).to(device, dtype) for k, v in state.items()}
    unet.load_state_dict(state, assign=True)
    generator = config.generator(name, unet.to(memory_format=torch.channels_last))
    return generator.to(device).eval().requires_grad_(False)


def save_checkpoint(
    folder: str | Path,
    config: CheckpointConfig,
    *states: dict[str, Tensor],
    parts: Mapping[str, Part] | None = None,
    dtype: torch.dtype = torch.float16,
) -> CheckpointConfig:
    """Write a checkpoint from the UNets' state dicts; an interrupted write leaves the old one.

    states: one per network, in the order of config.networks, without config.foreign
    parts:  those of config.parts and config.foreign, by name: state dicts, of an `Autoencoder` and
            a `TextEncoder`, and the text of the tokenizer's file; `Linked` of foreign ones

    Returns the configuration as written, with the SHA-256 of the files. Raises ValueError rather
    than replace a folder or file that is no checkpoint.
    """
    parts = parts or {}
    networks = [name for name in config.networks if name not in config.foreign]
    if len(states) != len(networks):
        raise ValueError(
            f"a {config.objective} model has the networks {', '.join(networks)}, "
            f"got {len(states)} state dicts"
        )
    expected = dict.fromkeys((*config.parts, *config.foreign))
    if parts.keys() != expected.keys():
        raise ValueError(
            f"the model has the parts {', '.join(expected) or 'none'}, got "
            f"{', '.join(parts) or 'none'}"
        )
    files = {**dict(zip(networks, states, strict=True)), **parts}
    sha256 = write_folder(
        folder, files, lambda found: replace(config, sha256=found).to_json(), dtype
    )
    return replace(config, sha256=sha256)


def read_weights(
    folder: str | Path | None, name: str, config: CheckpointConfig
) -> dict[str, Tensor]:
    """The tensors of `name`.safetensors ("base", "residual", "video"), as stored, once found whole.

    Raises FileNotFoundError without the file, ValueError for a damaged or exchanged one.
    """
    return read_tensors(_folder(folder), name, config.sha256)


def _folder(folder: str | Path | None) -> Path:
    return DEFAULT if folder is None else Path(folder)


def _shape(shape: torch.Size | None) -> str:
    return "absent" if shape is None else str(list(shape))
