"""Published networks, read into our own: `load_unet`, `load_text_encoder`, `load_autoencoder`.

Each format has a module beside this one. It finds the files, translates the configuration, and maps
the names of our layers to those of its weights.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

from ..devices import NETWORK_DTYPES
from ..models.autoencoder import Autoencoder, AutoencoderConfig, empty_decoder, empty_encoder
from ..models.config import UNetConfig
from ..models.text_encoder import empty_text_encoder
from ..models.unet import UNet, empty_unet
from ..plan.decoder import PlannedDecoder, PlannedEncoder
from ..plan.network import InferenceUNet, PlannedUNet, for_inference, inference_dtype
from ..plan.text import PlannedTextEncoder
from ..sampling.captured_call import CapturedCall
from . import diffusers, diffusers_autoencoder, diffusers_files, ldm_autoencoder, modelscope
from . import text_encoder as text
from .diffusers_files import read_scheduler
from .lora import Updates
from .published import MODELSCOPE_PIPELINE, PublishedUNet, read_json
from .stored import StoredNetwork
from .tokenizer import ClipTokenizer, open_clip_tokenizer, read_tokenizer
from .weights import StoredWeights, hash_files, hash_tensors, open_weights

__all__ = [
    "fingerprint",
    "load_autoencoder",
    "load_text_encoder",
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
    updates: Updates | None = None,
) -> UNet | InferenceUNet:
    """A published UNet, for inference: forward(x, t, context=None, class_labels=None).

    It is the UNet of `read_unet` in its fastest form: on a CPU with packed weights, on CUDA as ops
    (vfengine/plan). A CPU without bfloat16 instructions runs it in float32, with a warning.
    """
    device, read = torch.device(device), _read_dtype(dtype, device)
    return for_inference(read_unet(source, read, device, updates), read, device)


def load_autoencoder(
    source: str | Path,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
    *,
    encodes: bool = True,
    capture: bool = True,
) -> Autoencoder:
    """A published autoencoder, for inference: `decode` and `encode` clips.

    source:  the folder of diffusers' AutoencoderKL, or of a pipeline with one in vae/; one of its
             weight files; a folder of ModelScope, or a .pth, .pt or .ckpt file of latent diffusion
    dtype:   of weights and activations: float32, bfloat16 or float16
    encodes: whether the encoder is read too; files may hold the decoder alone
    capture: on CUDA, replay each frame from a graph

    On a CPU its weights are packed, on CUDA it runs as ops (vfengine/plan). A CPU without bfloat16
    instructions runs it in float32, with a warning. Raises what `read_unet` does.
    """
    _check_dtype("load_autoencoder", dtype)
    found = find_autoencoder(source)
    return ready_autoencoder(found, dtype, device, encodes=encodes, capture=capture)


def ready_autoencoder(
    found: Mapping[str, StoredNetwork],
    dtype: torch.dtype,
    device: torch.device | str,
    *,
    encodes: bool,
    capture: bool,
) -> Autoencoder:
    """A "decoder", and an "encoder" if there is one, for inference, as `load_autoencoder` says."""
    device, read = torch.device(device), _read_dtype(dtype, device)
    parts = {"decoder": PlannedDecoder} | ({"encoder": PlannedEncoder} if encodes else {})
    networks = {
        name: for_inference(found[name].read(read, device), read, device, planned)
        for name, planned in parts.items()
        if name in found
    }
    if capture and device.type == "cuda":
        networks = {name: CapturedCall(network) for name, network in networks.items()}
    return Autoencoder(found["decoder"].config, **networks).eval()


def load_text_encoder(
    source: str | Path,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
    updates: Updates | None = None,
) -> nn.Module:
    """A published text encoder, for inference: forward(ids int64 [B, L]) -> [B, L, D] in `dtype`.

    Its `tokenize` makes ids of texts: list of str -> int64 [B, L].

    source: the folder of a CLIPTextModel, with its tokenizer inside or in tokenizer/ beside it; the
            folder of a diffusers pipeline, or of ModelScope; or a file of open_clip's ViT-H-14
    dtype:  of weights and activations: float32, bfloat16 or float16
    updates: of LoRA (lora.py), added to the weights

    On a CPU its weights are packed (vfengine/plan); without bfloat16 instructions it runs in
    float32, with a warning. On CUDA it is plain PyTorch: it runs once a prompt, on 77 rows. Raises
    what `read_unet` does, and ImportError without the packages of the extra [text].
    """
    _check_dtype("load_text_encoder", dtype)
    tokenize, found = find_tokenizer(source), find_text_encoder(source)
    if tokenize.length > found.config.max_length:
        raise ValueError(
            f"{source}: its tokenizer makes {tokenize.length} tokens of a text, its text encoder "
            f"takes {found.config.max_length}"
        )
    return ready_text_encoder(found, tokenize, dtype, device, updates)


def ready_text_encoder(
    found: StoredNetwork,
    tokenize: Callable[[Sequence[str]], Tensor],
    dtype: torch.dtype,
    device: torch.device | str,
    updates: Updates | None = None,
) -> nn.Module:
    """A text encoder for inference, with its tokenizer, as `load_text_encoder` says."""
    device, read = torch.device(device), _read_dtype(dtype, device)
    encoder = for_inference(found.read(read, device, updates), read, device, PlannedTextEncoder)
    encoder.tokenize = tokenize
    return encoder


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
    updates: Updates | None = None,
) -> UNet:
    """A published UNet as a module of our own: forward(x, t, context=None, class_labels=None).

    source: diffusers: the folder of a UNet2DConditionModel or UNet3DConditionModel, or of a
            pipeline with one in unet/; or one of its weight files, such as a variant.
            ModelScope: the folder, or the file text2video_pytorch_model.pth; without a
            configuration.json beside it, the shapes of the weights replace it
    dtype:  of weights and activations: float32, bfloat16 or float16
    updates: of LoRA (lora.py), added to the weights

    A clip's frames come second here, x [B, N, C, H, W]; the context [B, M, C'] serves all of them.
    Weights are read without executing code, and cast one by one: memory holds the network once.

    Raises FileNotFoundError where there is no network; ValueError, naming it, for a dtype, an
    architecture, an entry of the configuration or a set of weights that is not supported.
    """
    _check_dtype("read_unet", dtype)
    return find_unet(source).read(dtype, device, updates)


def read_unet_config(source: str | Path) -> UNetConfig:
    """The configuration of the UNet that `read_unet` reads; raises what that does."""
    config, files = locate(source)
    return _published_unet(config, files, open_weights(files)).config


# -- networks on disk ------------------------------------------------------------------------------


def find_unet(source: str | Path) -> StoredNetwork:
    """The UNet that `read_unet` reads; raises what that does."""
    config, files = locate(source)
    weights = open_weights(files)
    published = _published_unet(config, files, weights)
    unet = empty_unet(published.config)
    names = {name: published.name(name) for name in unet.state_dict()}
    return StoredNetwork(files[0], unet, names, weights)


def _published_unet(
    config: Path | None, files: list[Path], weights: StoredWeights
) -> PublishedUNet:
    try:
        values = None if config is None else read_json(config)
        if config is not None and config.name == "config.json":
            return diffusers.diffusers_unet(values, weights.shapes)
        return modelscope.modelscope_unet(values, weights.shapes)
    except (ValueError, TypeError) as error:  # TypeError: a string where a number belongs
        raise ValueError(f"{config or files[0]}: {error}") from error


def find_autoencoder(source: str | Path) -> dict[str, StoredNetwork]:
    """The "decoder" that `load_autoencoder` reads, and the "encoder" if the files hold one.

    Raises what `load_autoencoder` does.
    """
    file, config, weights, form = _autoencoder(source)
    networks = {"decoder": empty_decoder(config), "encoder": empty_encoder(config)}
    names: dict[str, dict[str, str]] = {}
    for part, network in networks.items():
        layers = getattr(form, f"{part}_layers")(config, weights.shapes)
        names[part] = {}
        for weight in network.state_dict():
            ours = max((layer for layer in layers if weight.startswith(f"{layer}.")), key=len)
            names[part][weight] = layers[ours] + weight.removeprefix(ours)
    known = {theirs for own in names.values() for theirs in own.values()}
    unknown = weights.shapes.keys() - known  # refused with either part
    stored = {}
    for part, own in names.items():
        there = weights.shapes.keys() & own.values()
        if there or part == "decoder":
            found = weights.only(there | unknown)
            stored[part] = StoredNetwork(file, networks[part], own, found)
    return stored


def _autoencoder(
    source: str | Path,
) -> tuple[Path, AutoencoderConfig, StoredWeights, ModuleType]:
    """Its first file of weights, its configuration and weights, and the module of its format."""
    folder, chosen = _folder(source, "vae")
    ldm = chosen is not None and chosen.suffix in (".pth", ".ckpt", ".pt")
    if not ldm and (folder / "config.json").is_file():
        file, files = diffusers_files.locate(folder, chosen)
        weights = open_weights(files)
        try:
            config = diffusers_autoencoder.diffusers_autoencoder_config(read_json(file))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{file}: {error}") from error
        return files[0], config, weights, diffusers_autoencoder
    if chosen is None:
        if not (folder / MODELSCOPE_PIPELINE).is_file():
            raise FileNotFoundError(f"no autoencoder in {source}: no config.json, of diffusers")
        chosen = modelscope.weights_file(folder, "ckpt_autoencoder")
    weights = ldm_autoencoder.ldm_weights(open_weights([chosen]))
    try:
        return chosen, ldm_autoencoder.ldm_config(weights.shapes), weights, ldm_autoencoder
    except ValueError as error:
        raise ValueError(f"{chosen}: {error}") from error


def find_text_encoder(source: str | Path) -> StoredNetwork:
    """The text encoder that `load_text_encoder` reads; raises what that does."""
    folder, chosen = _folder(source, "text_encoder")
    if (folder / "config.json").is_file():
        file, files = diffusers_files.locate(folder, chosen, diffusers_files.TRANSFORMERS_FILES)
        weights = open_weights(files)
        try:
            config = text.clip_config(read_json(file))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{file}: {error}") from error
        encoder = empty_text_encoder(config)
        names = text.clip_names(encoder.state_dict(), weights.shapes)
        return StoredNetwork(files[0], encoder, names, text.clip_weights(weights))
    if chosen is None:
        if not (folder / MODELSCOPE_PIPELINE).is_file():
            raise FileNotFoundError(
                f"no text encoder in {source}: neither config.json, of transformers, nor "
                f"{MODELSCOPE_PIPELINE}, of ModelScope"
            )
        chosen = modelscope.weights_file(folder, "ckpt_clip")
    weights = open_weights([chosen])
    try:
        config = text.open_clip_config(weights.shapes)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{chosen}: {error}") from error
    encoder = empty_text_encoder(config)
    names = text.open_clip_names(encoder.state_dict())
    return StoredNetwork(chosen, encoder, names, text.open_clip_weights(weights, config))


def find_tokenizer(source: str | Path) -> ClipTokenizer:
    """The tokenizer of the text encoder that `load_text_encoder` reads.

    Raises FileNotFoundError or ValueError for its files, ImportError without the extra [text].
    """
    folder, _ = _folder(source, "text_encoder")
    if not (folder / "config.json").is_file():
        return open_clip_tokenizer()
    beside = folder.parent / "tokenizer"
    return read_tokenizer(beside if beside.is_dir() else folder)


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
    has_config = (folder / "config.json").is_file()
    own = (modelscope.WEIGHTS,) if has_config else (modelscope.WEIGHTS, MODELSCOPE_PIPELINE)
    if chosen.suffix == ".pth" if chosen else any((folder / name).is_file() for name in own):
        return modelscope.locate(folder, chosen)
    if not has_config:
        raise FileNotFoundError(
            f"no UNet in {source}: neither config.json, of diffusers, nor {modelscope.WEIGHTS}"
        )
    return diffusers_files.locate(folder, chosen)


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
