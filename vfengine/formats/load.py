"""Published networks, read into our own: `read_unet`, `load_unet`, `load_autoencoder`.

Each format has a module beside this one. It finds the files, translates the configuration, and maps
the names of our layers to those of its weights.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from ..devices import NETWORK_DTYPES
from ..models.autoencoder import Autoencoder, AutoencoderConfig, empty_decoder
from ..models.config import UNetConfig
from ..models.unet import UNet, empty_unet
from ..plan.decoder import PlannedDecoder
from ..plan.network import InferenceUNet, PlannedUNet, for_inference, inference_dtype
from . import diffusers, modelscope
from .diffusers import read_scheduler
from .diffusers_autoencoder import decoder_layers, decoder_weights, diffusers_autoencoder_config
from .published import PublishedUNet, read_json
from .weights import StoredWeights, check_weights, hash_files, hash_tensors, open_weights

__all__ = [
    "fingerprint",
    "load_autoencoder",
    "load_unet",
    "locate",
    "read_scheduler",
    "read_unet",
    "read_unet_config",
]


def load_unet(
    source: str | Path,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
) -> UNet | InferenceUNet:
    """A published UNet, for inference: forward(x, t, context=None, class_labels=None).

    It is the UNet of `read_unet` in its fastest form: on a CPU with packed weights, on CUDA as ops
    (vfengine/plan). A CPU without bfloat16 instructions runs it in float32, with a warning.
    """
    device, read = torch.device(device), _read_dtype(dtype, device)
    return for_inference(read_unet(source, read, device), read, device)


def load_autoencoder(
    source: str | Path,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
) -> Autoencoder:
    """A published autoencoder, for inference: decode(z [B, N, C, h, w]) -> [B, N, 3, H, W].

    source: the folder of diffusers' AutoencoderKL, or of a pipeline with one in vae/; or one of its
            weight files
    dtype:  of weights and activations: float32, bfloat16 or float16

    On a CPU its weights are packed (vfengine/plan); without bfloat16 instructions it runs in
    float32, with a warning. Only the decoder is read. Raises what `read_unet` does.
    """
    _check_dtype("load_autoencoder", dtype)
    device, read = torch.device(device), _read_dtype(dtype, device)
    file, weights, config = _find_autoencoder(source)
    found = decoder_weights(weights.shapes)
    decoder = empty_decoder(config)
    layers = decoder_layers(config, found)
    names = {}
    for name in decoder.state_dict():
        ours = max((layer for layer in layers if name.startswith(f"{layer}.")), key=len)
        names[name] = layers[ours] + name.removeprefix(ours)
    weights = StoredWeights({name: weights.shapes[name] for name in found}, weights.read)
    _assign_weights(decoder, file, names, weights, read, device)
    return Autoencoder(config, for_inference(decoder, read, device, PlannedDecoder)).eval()


def _check_dtype(caller: str, dtype: torch.dtype) -> None:
    if dtype not in NETWORK_DTYPES:
        raise ValueError(f"{caller}: dtype must be one of {NETWORK_DTYPES}, got {dtype!r}")


def _read_dtype(dtype: torch.dtype, device: torch.device | str) -> torch.dtype:
    """The dtype in which weights are read that run on the device in `dtype`."""
    planned = torch.device(device).type == "cpu" and dtype in (torch.float32, torch.bfloat16)
    return inference_dtype(dtype) if planned else dtype


def read_unet(
    source: str | Path,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
) -> UNet:
    """A published UNet as a module of our own: forward(x, t, context=None, class_labels=None).

    source: diffusers: the folder of a UNet2DConditionModel or UNet3DConditionModel, or of a
            pipeline with one in unet/; or one of its weight files, such as a variant.
            ModelScope: the folder, or the file text2video_pytorch_model.pth; without a
            configuration.json beside it, the shapes of the weights replace it
    dtype:  of weights and activations: float32, bfloat16 or float16

    A clip's frames come second here, x [B, N, C, H, W]; the context [B, M, C'] serves all of them.
    Weights are read without executing code, and cast one by one: memory holds the network once.

    Raises FileNotFoundError where there is no network; ValueError, naming it, for a dtype, an
    architecture, an entry of the configuration or a set of weights that is not supported.
    """
    _check_dtype("read_unet", dtype)
    found = _find(source)
    unet = empty_unet(found.unet.config)
    names = {name: found.unet.name(name) for name in unet.state_dict()}
    _assign_weights(unet, found.file, names, found.weights, dtype, device)
    return unet.eval().requires_grad_(False)


def _assign_weights(
    network: nn.Module,
    file: Path,
    names: Mapping[str, str],
    weights: StoredWeights,
    dtype: torch.dtype,
    device: torch.device | str,
) -> None:
    """Gives an empty network its weights; names: those in the file, by our names."""
    shapes = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    check_weights(file, shapes, names, weights.shapes)
    state = {}
    for ours, theirs in names.items():
        tensor = weights.read(theirs)
        if not tensor.is_floating_point():
            raise ValueError(f"{file}: {theirs} holds {tensor.dtype}, not weights")
        tensor = tensor.reshape(shapes[ours])
        form = torch.channels_last if tensor.dim() == 4 else torch.preserve_format
        state[ours] = tensor.to(device, dtype, copy=True, memory_format=form)
    network.load_state_dict(state, assign=True)


def read_unet_config(source: str | Path) -> UNetConfig:
    """The configuration of the UNet that `read_unet` reads; raises what that does."""
    return _find(source).unet.config


@dataclass(frozen=True)
class _Found:
    """A network on disk; file: the first that holds its weights."""

    file: Path
    unet: PublishedUNet
    weights: StoredWeights


def _find(source: str | Path) -> _Found:
    config, files = locate(source)
    weights = open_weights(files)
    try:
        values = None if config is None else read_json(config)
        if config is not None and config.name == "config.json":
            unet = diffusers.diffusers_unet(values)
        else:
            unet = modelscope.modelscope_unet(values, weights.shapes)
    except (ValueError, TypeError) as error:  # TypeError: a string where a number belongs
        raise ValueError(f"{config or files[0]}: {error}") from error
    return _Found(files[0], unet, weights)


def _find_autoencoder(source: str | Path) -> tuple[Path, StoredWeights, AutoencoderConfig]:
    """The first weight file of an autoencoder on disk, all its weights, and its configuration."""
    folder, chosen = _folder(source, "vae")
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"no autoencoder in {source}: no config.json, of diffusers")
    file, files = diffusers.locate(folder, chosen)
    weights = open_weights(files)
    try:
        return files[0], weights, diffusers_autoencoder_config(read_json(file))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file}: {error}") from error


def _folder(source: str | Path, part: str) -> tuple[Path, Path | None]:
    """The folder of a network, `part` of a pipeline or by itself, and the file that was named."""
    source = Path(source)
    if source.is_file():
        return source.parent, source
    nested = source / part
    return (nested if (nested / "config.json").is_file() else source), None


def locate(source: str | Path) -> tuple[Path | None, list[Path]]:
    """The configuration, or None if ModelScope's is missing, and the weight files of a network.

    Raises FileNotFoundError where there is none, ValueError for an index that points elsewhere.
    """
    folder, chosen = _folder(source, "unet")
    if chosen.suffix == ".pth" if chosen else (folder / modelscope.WEIGHTS).is_file():
        return modelscope.locate(folder, chosen)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"no UNet in {source}: neither config.json, of diffusers, nor {modelscope.WEIGHTS}"
        )
    return diffusers.locate(folder, chosen)


def fingerprint(source: str | Path | UNet | InferenceUNet, *notes: str) -> str:
    """16 hex digits that name a network: of its files, or of a module's configuration and weights.

    notes: other values that are part of the name
    """
    digest = hashlib.sha256("\n".join(notes).encode())
    if isinstance(source, UNet | InferenceUNet):
        digest.update(repr(source.config.identity()).encode())
        hash_tensors(digest, source.state_dict())
        if isinstance(
            source, PlannedUNet
        ):  # older releases listed its first convolution, without weights
            digest.update(b"unet.conv_in.weight torch.float64unet.conv_in.bias torch.float64")
        return digest.hexdigest()[:16]
    config, files = locate(source)
    hash_files(digest, files if config is None else [config, *files])
    return digest.hexdigest()[:16]
