"""UNets that others have published, read into our own: `read_unet`, `load_unet`.

A format is a table of where our layers are in it (`_diffusers_places`, `_modelscope_places`), and a
function from its configuration to ours (peer_configs.py). Inside a layer both name things alike.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import re
import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..models.config import UNetConfig
from ..models.unet import UNet, empty_unet
from ..plan.network import PlannedUNet, for_inference, inference_dtype
from .peer_configs import diffusers_config, model_cfg_of, modelscope_config

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_DIFFUSERS = "diffusion_pytorch_model"
_DIFFUSERS_FILES = tuple(
    _DIFFUSERS + end
    for end in (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json")
)
_MODELSCOPE = "text2video_pytorch_model.pth"
_MAPPED_BYTES = 64 * 2**20


def load_unet(
    source: str | Path,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
) -> UNet | PlannedUNet:
    """A published UNet, for inference: forward(x, t, context=None, class_labels=None).

    What `read_unet` reads, as it runs fastest: on a CPU with its weights packed (planned.py), in
    float32 where bfloat16 is asked of a machine without the instructions (a warning says so).
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

    source: of diffusers, the folder of a UNet2DConditionModel or UNet3DConditionModel, or of a
            pipeline that has it in unet/; or one of the weight files in it, such as a variant
            of ModelScope, the folder or the file text2video_pytorch_model.pth; without a
            configuration.json beside it, shapes say what it would
    dtype:  of weights and activations: float32, bfloat16 or float16

    A clip's frames come second here, x [B, N, C, H, W]; the context [B, M, C'] serves all of them.
    Weights are read without executing code, and cast one by one: memory holds the network once.

    Raises FileNotFoundError where there is no network; ValueError for a dtype, an architecture, an
    entry of the configuration or a set of weights that is not taken, naming it.
    """
    if dtype not in DTYPES:
        raise ValueError(f"read_unet: dtype must be one of {DTYPES}, got {dtype!r}")
    found = _find(source)
    unet = empty_unet(found.config)
    shapes = {name: tuple(value.shape) for name, value in unet.state_dict().items()}
    names = {name: _name(name, found.places, found.resnet) for name in shapes}
    _check_weights(found.file, shapes, names, found.weights.shapes)
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
    """What `read_unet` would read, without its weights; raises what it does."""
    return _find(source).config


@dataclass(frozen=True)
class _Found:
    """A network on disk: what it is in our terms, and where its weights are.

    places, resnet: see `_name`
    """

    file: Path
    config: UNetConfig
    places: Mapping[str, str]
    resnet: Mapping[str, str]
    weights: _Weights


def _find(source: str | Path) -> _Found:
    config_file, files = locate(source)
    weights = _open(files)
    try:
        if config_file is not None and config_file.name == "config.json":
            config = diffusers_config(_read_json(config_file))
            return _Found(files[0], config, _diffusers_places(config), {}, weights)
        if config_file is None:
            model_cfg = model_cfg_of(weights.shapes)
        else:
            model_cfg = _model_cfg(_read_json(config_file))
        config = modelscope_config(model_cfg)
        return _Found(files[0], config, _modelscope_places(config), _MODELSCOPE_RESNET, weights)
    except (ValueError, TypeError) as error:  # TypeError: a string where a number belongs
        raise ValueError(f"{config_file or files[0]}: {error}") from error


# -- files -----------------------------------------------------------------------------------------


def locate(source: str | Path) -> tuple[Path | None, list[Path]]:
    """The configuration and the weight files of a network; the first may lack with ModelScope's.

    Raises FileNotFoundError where there is none, ValueError for an index that points elsewhere.
    """
    source = Path(source)
    if source.is_file():
        folder, chosen = source.parent, source
    else:
        nested = (source / "unet" / "config.json").is_file()
        folder, chosen = (source / "unet" if nested else source), None
    if chosen.suffix == ".pth" if chosen else (folder / _MODELSCOPE).is_file():
        config = folder / "configuration.json"
        return (config if config.is_file() else None), [chosen or folder / _MODELSCOPE]
    config = folder / "config.json"
    if not config.is_file():
        raise FileNotFoundError(
            f"no UNet in {source}: neither config.json, of diffusers, nor {_MODELSCOPE}"
        )
    if chosen is None or chosen == config:
        found = [folder / name for name in _DIFFUSERS_FILES if (folder / name).is_file()]
        if not found:
            raise FileNotFoundError(f"{folder} has none of {', '.join(_DIFFUSERS_FILES)}")
        chosen = found[0]
    if not chosen.name.endswith(".index.json"):
        return config, [chosen]
    shards = _read_json(chosen).get("weight_map")
    if not isinstance(shards, dict) or not all(
        isinstance(name, str) and Path(name).name == name for name in shards.values()
    ):
        raise ValueError(f"{chosen}: its weight_map must name files beside it")
    files = [folder / name for name in sorted(set(shards.values()))]
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"{chosen} names {file.name}, which is not there")
    return config, files


def fingerprint(source: str | Path | UNet | PlannedUNet, *notes: str) -> str:
    """16 hex digits that name a network: of its files, or of a module's configuration and weights.

    notes: what else it depends on
    """
    digest = hashlib.sha256("\n".join(notes).encode())
    if isinstance(source, (UNet, PlannedUNet)):
        digest.update(repr(source.config.identity()).encode())
        for name, tensor in source.state_dict().items():
            digest.update(f"{name} {tensor.dtype}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        if isinstance(source, PlannedUNet):  # whose first convolution was listed, without weights
            digest.update(b"unet.conv_in.weight torch.float64unet.conv_in.bias torch.float64")
        return digest.hexdigest()[:16]
    config, files = locate(source)
    for file in files if config is None else [config, *files]:
        with file.open("rb") as opened:
            while block := opened.read(2**20):
                digest.update(block)
    return digest.hexdigest()[:16]


def read_scheduler(source: str | Path) -> dict[str, Any]:
    """The scheduler's configuration in a diffusers pipeline; {} for a network by itself.

    Looked for in scheduler/ in the network's folder, or beside it.
    """
    source = Path(source)
    folder = source.parent if source.is_file() else source
    for place in (folder, folder.parent):
        file = place / "scheduler" / "scheduler_config.json"
        if file.is_file():
            return _read_json(file)
    return {}


def _read_json(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:  # of JSON, or text that is not UTF-8
        raise ValueError(f"{file} is not JSON ({error})") from error
    if not isinstance(values, dict):
        raise ValueError(f"{file}: expected names and values")
    return values


def _model_cfg(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """configuration.json holds it below "model"."""
    model = values.get("model", values)
    model_cfg = model.get("model_cfg") if isinstance(model, dict) else None
    if not isinstance(model_cfg, dict):
        raise ValueError("no model_cfg")
    return model_cfg


@dataclass(frozen=True)
class _Weights:
    """Weights on disk: their shapes, and a function that reads one by name, once."""

    shapes: dict[str, tuple[int, ...]]
    read: Callable[[str], Tensor]


def _open(files: Iterable[Path]) -> _Weights:
    """The weights of all files together. Raises ValueError for a damaged one."""
    shapes: dict[str, tuple[int, ...]] = {}
    readers: dict[str, Callable[[str], Tensor]] = {}
    for file in files:
        opened = _open_safetensors(file) if file.suffix == ".safetensors" else _open_pickle(file)
        shapes.update(opened.shapes)
        readers.update(dict.fromkeys(opened.shapes, opened.read))
    return _Weights(shapes, lambda name: readers[name](name))


def _open_safetensors(file: Path) -> _Weights:
    try:
        opened = safe_open(str(file), framework="pt")
        shapes = {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{file} is not a complete safetensors file: {error}") from error
    seen = 0

    def read(name: str) -> Tensor:
        """The file is mapped anew now and then: pages that were read count as the process's own."""
        nonlocal opened, seen
        if seen > _MAPPED_BYTES:
            opened, seen = safe_open(str(file), framework="pt"), 0
        tensor = opened.get_tensor(name)
        seen += tensor.nbytes
        return tensor

    return _Weights(shapes, read)


def _open_pickle(file: Path) -> _Weights:
    """A file of torch.save, by torch's reader that makes nothing but tensors; mapped if it can."""
    try:
        state = torch.load(
            file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file)
        )
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{file} is not a file of weights alone: {reason}") from error
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(f"{file} is not a dict of tensors")
    return _Weights({name: tuple(value.shape) for name, value in state.items()}, state.pop)


def _check_weights(
    file: Path,
    shapes: Mapping[str, tuple[int, ...]],
    names: Mapping[str, str],
    found: Mapping[str, tuple[int, ...]],
) -> None:
    """ValueError unless a file holds all weights, in their shapes, and no others."""
    expected = set(names.values())
    _refuse(file, "misses weights", sorted(expected - found.keys()))
    _refuse(file, "has weights of no known layer", sorted(found.keys() - expected))
    odd = []
    for ours, theirs in names.items():
        shape, other = shapes[ours], found[theirs]
        # linear layers may be written as 1x1 convolutions, and ours over frames are 2-D
        ones = 2 if ours.endswith(("proj_in.weight", "proj_out.weight")) else 0
        ones = 1 if ".convs." in ours and ours.endswith("weight") else ones
        if other not in [shape + (1,) * extra for extra in range(ones + 1)]:
            odd.append(f"{theirs} {list(other)} instead of {list(shape)}")
    _refuse(file, "has weights of other shapes", odd)


def _refuse(file: Path, problem: str, names: list[str]) -> None:
    if names:
        more = f" and {len(names) - 4} more" if len(names) > 4 else ""
        raise ValueError(f"{file} {problem}: {', '.join(names[:4])}{more}")


# -- names -----------------------------------------------------------------------------------------

_BLOCK = {"attn1.to_out": "attn1.to_out.0", "attn2.to_out": "attn2.to_out.0"}
_BLOCK |= {"ff.proj": "ff.net.0.proj", "ff.out": "ff.net.2"}
_MODELSCOPE_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_TRANSFORMERS = ("spatial", "temporal", "transformer_in")


def _diffusers_places(config: UNetConfig) -> dict[str, str]:
    """Where our layers are in UNet2DConditionModel and UNet3DConditionModel."""
    places = {name: name for name in ("conv_in", "transformer_in", "conv_norm_out", "conv_out")}
    for name in ("time_embedding", "class_embedding"):
        places |= {name: name, f"{name}.0": f"{name}.linear_1", f"{name}.2": f"{name}.linear_2"}
    parts = {"resnet": "resnets", "temp_conv": "temp_convs"}
    parts |= {"spatial": "attentions", "temporal": "temp_attentions"}

    def stage(ours: str, block: str, index: int) -> None:
        for part, theirs in parts.items():
            places[f"{ours}.{index}.{part}"] = f"{block}.{theirs}.{index}"

    for index, depth in enumerate(config.layers_per_block):
        for number in range(depth):
            stage(f"down.{index}", f"down_blocks.{index}", number)
        places[f"downsamplers.{index}"] = f"down_blocks.{index}.downsamplers.0.conv"
    for number in range(config.mid_blocks):
        stage("mid", "mid_block", number)
    for index, depth in enumerate(reversed(config.layers_per_block)):
        for number in range(depth + 1):
            stage(f"up.{index}", f"up_blocks.{index}", number)
        places[f"upsamplers.{index}"] = f"up_blocks.{index}.upsamplers.0.conv"
    return places


def _modelscope_places(config: UNetConfig) -> dict[str, str]:
    """Where our layers are in ModelScope's UNet: blocks are numbered through all levels."""
    places = {"conv_in": "input_blocks.0.0", "transformer_in": "input_blocks.0.1"}
    places |= {"time_embedding": "time_embed", "conv_norm_out": "out.0", "conv_out": "out.2"}

    def stage(ours: str, block: str, first: int = 0) -> None:
        places[f"{ours}.resnet"] = f"{block}.{first}"
        places[f"{ours}.temp_conv"] = f"{block}.{first}.temopral_conv"  # as it is spelt there
        places[f"{ours}.spatial"] = f"{block}.{first + 1}"
        places[f"{ours}.temporal"] = f"{block}.{first + 2}"

    block = 1
    for level, depth in enumerate(config.layers_per_block):
        for number in range(depth):
            stage(f"down.{level}.{number}", f"input_blocks.{block}")
            block += 1
        places[f"downsamplers.{level}"] = f"input_blocks.{block}.op"
        block += 1
    stage("mid.0", "middle_block")
    stage("mid.1", "middle_block", 3)
    block = 0
    for index, depth in enumerate(reversed(config.layers_per_block)):
        for number in range(depth + 1):
            stage(f"up.{index}.{number}", f"output_blocks.{block}")
            block += 1
        after = 3 if config.spatial_attention[-1 - index] else 1
        places[f"upsamplers.{index}"] = f"output_blocks.{block - 1}.{after}.conv"
    return places


def _name(ours: str, places: Mapping[str, str], resnet: Mapping[str, str]) -> str:
    """A weight's name in the other format.

    resnet: the names of a residual block's layers, where they are not ours
    """
    parts = ours.split(".")
    length = next(n for n in range(len(parts), 0, -1) if ".".join(parts[:n]) in places)
    place, inner = places[".".join(parts[:length])], parts[length:]
    kind = parts[length - 1]
    if kind == "resnet":
        inner[0] = resnet.get(inner[0], inner[0])
    elif kind == "temp_conv":  # after the first, a dropout stands before the convolution
        number = int(inner[1])
        layer = 0 if inner[0] == "norms" else 3 if number else 2
        inner = [f"conv{number + 1}", str(layer), inner[2]]
    elif kind in _TRANSFORMERS and inner[0] not in ("norm", "proj_in", "proj_out"):
        number, name = re.fullmatch(r"(?:rest\.(\d+)\.)?(.+)", ".".join(inner)).groups()
        layer, _, parameter = name.rpartition(".")
        block = 0 if number is None else int(number) + 1
        inner = [f"transformer_blocks.{block}", _BLOCK.get(layer, layer), parameter]
    return ".".join([place, *inner])
