"""What made a clip, as JSON values: the text that its file carries, and that makes it again.

    {"vfengine": version, "device": "cpu",
     "model": {"name": folder, "fingerprint": 16 hex digits, "networks": {name: 16 hex digits}},
     "settings": {"label": "walk", "base_seed": 0, …},
     "files": {"image": {"name": "cat.png", "sha256": 64 hex digits}, "lora": [{…}, …]},
     "beyond": {"lam": 0.5}}

"settings" are those of the command line, by name, with the values in use. They make this one clip,
whatever batch it was a part of. "files" says which files the settings name. "beyond" holds what the
command line has no setting for, "base_device" the base network's kind of device where it is
another; as "files", they are there only where they say something. The same clip has the same text:
no path, no date, nothing of the machine but the kind of device. Nothing here imports torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..files import sha256_of
from .request import SamplingRequest, TextRequest, VideoRequest

if TYPE_CHECKING:
    from .pipeline import Pipeline

FILES = ("image", "base_trajectory", "latents")  # settings that name a file
RECORDED = (
    *("label", "prompt", "negative_prompt", "num_frames", "height", "width"),
    *("num_inference_steps", "guidance_scale", "solver", "eta", "seed", "base_seed"),
    *("base_offset", "residual_seed", "sample_offset", "num_videos", "window", "window_overlap"),
    *("loop", "reuse_every", "base_path", "preview", "base_unet", "lora", *FILES, "dtype"),
    *("fps", "scale", "scale_filter", "codec", "crf", "chroma"),
)


def clip_settings(
    pipe: Pipeline,
    request: VideoRequest | TextRequest,
    number: int = 0,
    *,
    files: Mapping[str, Mapping[str, str]] | None = None,
    fps: float | None = None,
    scale: int = 1,
    scale_filter: str = "nearest",
    codec: str | None = None,
    crf: int | None = None,
    chroma: str | None = None,
) -> dict[str, Any]:
    """The record of a clip (see the module).

    number: of the clip within the request
    files:  what `file_record` says of the files that the request was made of, by FILES
    fps:    None is the model's
    scale, scale_filter: how the frames are enlarged
    codec, crf, chroma:  of `media.codecs.check_encoding`
    """
    request, files = pipe.fill_defaults(request), dict[str, Any](files or {})
    if isinstance(request, TextRequest):
        settings, beyond = _of_text(request, number, files)
    else:
        settings, beyond = _of_labels(pipe, request, number, files)
    for name, record in files.items():
        settings[name] = record["name"]
    base = getattr(pipe, "base_unet", None)
    if base is not None:
        source = base.source
        settings["base_unet"] = source.resolve().name if isinstance(source, Path) else None
    if names := pipe.loras.names():
        settings["lora"], files["lora"] = names, pipe.loras.records()
    settings["dtype"] = str(pipe.dtype).removeprefix("torch.")
    settings |= {"fps": float(pipe.config.fps if fps is None else fps), "scale": scale}
    settings |= {"scale_filter": scale_filter} if scale > 1 else {}
    encoding = {"codec": codec, "crf": crf, "chroma": chroma}
    settings |= {name: value for name, value in encoding.items() if value is not None}
    base_place = pipe.place("base").type
    return {
        "vfengine": __version__,
        "device": pipe.device.type,
        **({} if base_place == pipe.device.type else {"base_device": base_place}),
        "model": model_record(pipe),
        "settings": settings,
        **({"files": files} if files else {}),
        **({"beyond": beyond} if beyond else {}),
    }


def settings_text(record: Mapping[str, Any]) -> str:
    """The record as a file carries it: JSON in ASCII."""
    return json.dumps(record, separators=(",", ":"))


def model_record(pipe: Pipeline) -> dict[str, Any]:
    """What names a model: its folder's name, and the SHA-256 of its weights where they have one."""
    digests = getattr(pipe.config, "sha256", {})
    networks = {name: digest[:16] for name, digest in sorted(digests.items())}
    return {
        "name": pipe.folder.resolve().name,
        "fingerprint": pipe.fingerprint or None,
        **({"networks": networks} if networks else {}),
    }


def file_record(file: str | Path) -> dict[str, str]:
    """Name and SHA-256 of a file that a clip is made of; raises OSError."""
    return {"name": Path(file).name, "sha256": sha256_of(Path(file))}


# -- from a request --------------------------------------------------------------------------------


def _of_text(
    request: TextRequest, number: int, files: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Settings of a text-to-video model's clip, and what is beyond them."""
    if request.finished is not None:
        settings = {"sample_offset": request.sample_offset + number, "num_videos": 1}
        return settings, {} if "latents" in files else {"latents": "finished"}
    index = number // request.num_videos
    settings = {"prompt": request.labels[index], "negative_prompt": request.negatives[index]}
    settings |= _sizes(request) | _how(request)
    settings |= {"seed": request.seed, "sample_offset": request.sample_offset + number}
    settings |= _windows(request)
    return settings, {} if request.latents is None else {"latents": "initial noise"}


def _of_labels(
    pipe: Pipeline, request: VideoRequest, number: int, files: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Settings of the clip of a model of our own, and what is beyond them."""
    index, sample = number // request.num_videos, request.sample_offset + number
    index = 0 if request.shares_path else index
    shown, settings, beyond = request.labels[index], {}, {}
    if shown is not None:
        settings["label" if request.prompt is None else "prompt"] = shown
    if pipe.config.text_encoder is not None:
        settings["negative_prompt"] = request.negatives[index]
    preview = getattr(request, "preview", False)
    settings |= {"preview": True} if preview else {"num_frames": request.num_frames}
    settings |= _how(request)
    if isinstance(request, SamplingRequest):
        base, beyond = _base_of(pipe, request, number, sample, files)
        settings |= base
        if not preview:
            settings |= _windows(request) | {"base_path": request.base_path}
            if (lam := _plain(request.lam)) != pipe.config.lam:
                beyond["lam"] = lam
    if not preview:
        settings["residual_seed"] = request.residual_seed
    return settings | {"sample_offset": sample}, beyond


def _base_of(
    pipe: Pipeline, request: SamplingRequest, number: int, sample: int, files: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Settings of the base frame, and what is beyond them."""
    place = request.first_base_sample + (0 if request.shares_path else number)
    if "image" in files:
        return {}, {}
    if request.image is not None:
        return {}, {"image": "a picture"}
    path = request.trajectory
    if "base_trajectory" in files:  # the place counts within the file
        inside = request.base_offset is not None or path.final.shape[0] > 1
        number = (request.base_offset or 0) + (0 if request.shares_path else number)
        return ({"base_offset": number} if inside else {}), {}
    if path is not None and not _is_walked_for(pipe, request):
        notes = {name: text for name, text in path.metadata.items() if name != "cache_key"}
        return {}, {"base_trajectory": notes}
    settings = {"base_seed": request.base_seed}
    return settings | ({} if place == sample else {"base_offset": place}), {}


def _is_walked_for(pipe: Pipeline, request: SamplingRequest) -> bool:
    """Whether a given base path is the one that the request would walk, as its notes say."""
    wanted = {
        "model": pipe.fingerprint,
        **pipe.shown(request),
        "base_seed": str(request.base_seed),
        "guidance_scale": repr(float(request.guidance_scale)),
        "reuse_every": str(request.reuses("base")),
    }
    path = request.trajectory
    notes = {"reuse_every": "1", **path.metadata}
    return path.base_path == "stepwise" and wanted.items() <= notes.items()


def _how(request: VideoRequest | TextRequest) -> dict[str, Any]:
    return {
        "num_inference_steps": request.num_inference_steps,
        "guidance_scale": float(request.guidance_scale),
        "solver": request.solver,
        "eta": float(request.eta),
        **({} if request.reuse_every == 1 else {"reuse_every": request.reuse_every}),
    }


def _sizes(request: TextRequest) -> dict[str, int]:
    return {name: getattr(request, name) for name in ("num_frames", "height", "width")}


def _windows(request: SamplingRequest | TextRequest) -> dict[str, Any]:
    window = {"window": request.window}
    window |= {"loop": True} if getattr(request, "loop", False) else {}
    return window | ({"window_overlap": request.window_overlap} if request.window else {})


def _plain(lam: Any) -> Any:
    """λ as a JSON value: a number, or a list of numbers."""
    return lam.tolist() if hasattr(lam, "tolist") else lam
