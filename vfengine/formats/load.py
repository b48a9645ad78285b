"""Published UNets, read into our own: `read_unet`, `load_unet`.

Each format has a module beside this one. It finds the files, translates the configuration, and maps
the names of our layers to those of its weights.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch

from ..devices import NETWORK_DTYPES
from ..models.config import UNetConfig
from ..models.unet import UNet, empty_unet
from ..plan.network import PlannedUNet, for_inference, inference_dtype
from . import diffusers, modelscope
from .diffusers import read_scheduler
from .published import PublishedUNet, read_json
from .weights import StoredWeights, check_weights, hash_files, hash_tensors, open_weights

__all__ = ["fingerprint", "load_unet", "locate", "read_scheduler", "read_unet", "read_unet_config"]


def load_unet(
    source: str | Path,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
) -> UNet | PlannedUNet:
    """A published UNet, for inference: forward(x, t, context=None, class_labels=None).

    It is the UNet of `read_unet` in its fastest form. On a CPU its weights are packed
    (vfengine/plan). A CPU without bfloat16 instructions runs it in float32, with a warning.
    """
    device = torch.device(device)
    planned = device.type == "cpu" and dtype in (torch.float32, torch.bfloat16)
    read = inference_dtype(dtype) if planned else dtype
    return for_inference(read_unet(source, read, device), read, device)


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
    if dtype not in NETWORK_DTYPES:
        raise ValueError(f"read_unet: dtype must be one of {NETWORK_DTYPES}, got {dtype!r}")
    found = _find(source)
    unet = empty_unet(found.unet.config)
    shapes = {name: tuple(value.shape) for name, value in unet.state_dict().items()}
    names = {name: found.unet.name(name) for name in shapes}
    check_weights(found.file, shapes, names, found.weights.shapes)
    state = {}
    for ours, theirs in names.items():
        tensor = found.weights.read(theirs)
        if not tensor.is_floating_point():
            raise ValueError(f"{found.file}: {theirs} holds {tensor.dtype}, not weights")
        tensor = tensor.reshape(shapes[ours])
        form = torch.channels_last if tensor.dim() == 4 else torch.preserve_format
        state[ours] = tensor.to(device, dtype, copy=True, memory_format=form)
    unet.load_state_dict(state, assign=True)
    return unet.eval().requires_grad_(False)


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


def locate(source: str | Path) -> tuple[Path | None, list[Path]]:
    """The configuration, or None if ModelScope's is missing, and the weight files of a network.

    Raises FileNotFoundError where there is none, ValueError for an index that points elsewhere.
    """
    source = Path(source)
    if source.is_file():
        folder, chosen = source.parent, source
    else:
        nested = (source / "unet" / "config.json").is_file()
        folder, chosen = (source / "unet" if nested else source), None
    if chosen.suffix == ".pth" if chosen else (folder / modelscope.WEIGHTS).is_file():
        return modelscope.locate(folder, chosen)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"no UNet in {source}: neither config.json, of diffusers, nor {modelscope.WEIGHTS}"
        )
    return diffusers.locate(folder, chosen)


def fingerprint(source: str | Path | UNet | PlannedUNet, *notes: str) -> str:
    """16 hex digits that name a network: of its files, or of a module's configuration and weights.

    notes: other values that are part of the name
    """
    digest = hashlib.sha256("\n".join(notes).encode())
    if isinstance(source, (UNet, PlannedUNet)):
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
