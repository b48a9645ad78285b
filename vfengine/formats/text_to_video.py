"""Published text-to-video pipelines: the parts in a folder, checked before any weight is read.

diffusers   model_index.json, scheduler/, tokenizer/, text_encoder/, unet/, vae/
ModelScope  configuration.json and three files of weights, which it names

diffusers' pipelines of images have the same parts (text_to_image.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..models.autoencoder import AutoencoderConfig
from ..models.config import UNetConfig
from ..models.text_encoder import TextEncoderConfig
from . import load
from .published import DIFFUSERS_PIPELINE, MODELSCOPE_PIPELINE, Unsupported, read_json
from .scheduler import MODELSCOPE_SCHEDULE, PublishedSchedule, diffusers_schedule

_PIPELINE = "TextToVideoSDPipeline"
_PARTS = {  # of a diffusers pipeline: the classes that are read, and the file that must be there
    "scheduler": (None, "scheduler_config.json"),  # the scheduler's own entries name its class
    "tokenizer": (("CLIPTokenizer", "CLIPTokenizerFast"), None),
    "text_encoder": (("CLIPTextModel",), "config.json"),
    "unet": (("UNet3DConditionModel",), "config.json"),
    "vae": (("AutoencoderKL",), "config.json"),
}
_SCALING_FACTOR = 0.18215  # of latents, in both formats where a file does not say it
_MODELSCOPE_SIZE = 32  # of its latents by default: 256 pixels
_MODELSCOPE = {"mean_type": "eps", "num_timesteps": 1000}  # entries with one supported value
_TYPE = "latent-text-to-video-synthesis"


@dataclass(frozen=True)
class TextToVideoModel:
    """A text-to-video pipeline on disk, apart from its weights.

    scaling_factor: latents of the UNet are the autoencoder's times this
    sample_size:    height and width of latents by default
    num_weights:    of each network: "text", "video" and "decode"
    trained_frames: frames of the clips that it was trained on; None: the files do not say it
    """

    folder: Path
    text_encoder: TextEncoderConfig
    unet: UNetConfig
    autoencoder: AutoencoderConfig
    schedule: PublishedSchedule
    scaling_factor: float
    sample_size: tuple[int, int]
    num_weights: Mapping[str, int]
    trained_frames: int | None = None
    num_frames: int = 16  # of a clip by default
    fps: float = 8.0

    @property
    def channels(self) -> int:
        """Of the clips: 3."""
        return self.autoencoder.out_channels

    @property
    def scale(self) -> int:
        """Pixels of a clip for one of its latents, along height and along width."""
        return self.autoencoder.scale


def read_text_to_video(folder: str | Path) -> TextToVideoModel:
    """The pipeline in a folder: every part found, and names and shapes of all weights checked.

    Raises FileNotFoundError, naming it, for what is missing; ValueError, naming it, for a class, an
    entry or a set of weights that is not supported, and for parts that do not fit each other.
    """
    folder = Path(folder)
    if (folder / DIFFUSERS_PIPELINE).is_file():
        settings = _of_diffusers(folder)
    elif (folder / MODELSCOPE_PIPELINE).is_file():
        settings = _of_modelscope(folder)
    else:
        raise FileNotFoundError(
            f"no text-to-video model in {folder}: neither {DIFFUSERS_PIPELINE}, of diffusers, nor "
            f"{MODELSCOPE_PIPELINE}, of ModelScope"
        )
    load.find_tokenizer(folder)
    text, video = load.find_text_encoder(folder), load.find_unet(folder)
    decode = load.find_autoencoder(folder)["decoder"]
    model = TextToVideoModel(
        folder=folder,
        text_encoder=text.config,
        unet=video.config,
        autoencoder=decode.config,
        num_weights={
            "text": text.num_weights,
            "video": video.num_weights,
            "decode": decode.num_weights,
        },
        **settings,
    )
    _check_fits(model)
    return model


def _of_diffusers(folder: Path) -> dict[str, Any]:
    index = read_json(folder / DIFFUSERS_PIPELINE)
    if index.get("_class_name") != _PIPELINE:
        wrong = Unsupported("_class_name", index.get("_class_name"), f"is not {_PIPELINE}")
        raise ValueError(f"{folder / DIFFUSERS_PIPELINE}: {wrong}")
    return diffusers_settings(folder, index)


def diffusers_settings(
    folder: Path, index: Mapping[str, Any], unet: str = "UNet3DConditionModel"
) -> dict[str, Any]:
    """Schedule, scaling factor and sample size of the parts in a folder, once all are found.

    index: model_index.json, which must name the classes that are read; unet: that of its UNet

    Raises as `read_text_to_video` does.
    """
    missing = []
    for part, (classes, file) in {**_PARTS, "unet": ((unet,), "config.json")}.items():
        place = folder / part / file if file else folder / part
        if not place.exists():
            missing.append(f"{part}/{file}" if file else f"{part}/")
        named = index.get(part)
        if (
            classes
            and named is not None
            and (not isinstance(named, list) or named[-1] not in classes)
        ):
            wrong = Unsupported(part, named, f"is not {' or '.join(classes)}")
            raise ValueError(f"{folder / DIFFUSERS_PIPELINE}: {wrong}")
    if missing:
        raise FileNotFoundError(f"{folder} has no {', '.join(missing)}")
    vae, network = (folder / part / "config.json" for part in ("vae", "unet"))
    scheduler = folder / "scheduler" / "scheduler_config.json"
    return {
        "schedule": _read(scheduler, diffusers_schedule),
        "scaling_factor": _read(vae, _scaling_factor),
        "sample_size": _read(network, _sample_size),
    }


def _of_modelscope(folder: Path) -> dict[str, Any]:
    return {
        "schedule": MODELSCOPE_SCHEDULE,
        "scaling_factor": _SCALING_FACTOR,
        "sample_size": (_MODELSCOPE_SIZE, _MODELSCOPE_SIZE),
        "trained_frames": _read(folder / MODELSCOPE_PIPELINE, _max_frames),
    }


def _read(file: Path, read: Any) -> Any:
    """What `read` makes of the entries of a file; its errors name the file."""
    values = read_json(file)
    try:
        return read(values)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file}: {error}") from error


def _scaling_factor(vae: Mapping[str, Any]) -> float:
    value = vae.get("scaling_factor", _SCALING_FACTOR)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
        raise Unsupported("scaling_factor", value)
    for entry in ("shift_factor", "latents_mean", "latents_std"):
        if vae.get(entry) is not None:
            raise Unsupported(entry, vae[entry])
    return float(value)


def _sample_size(unet: Mapping[str, Any]) -> tuple[int, int]:
    value = unet.get("sample_size")
    value = _MODELSCOPE_SIZE if value is None else value
    sides = tuple(value) if isinstance(value, list) else (value, value)
    if len(sides) != 2 or not all(type(side) is int and side > 0 for side in sides):
        raise Unsupported("sample_size", value)
    return sides


def _max_frames(configuration: Mapping[str, Any]) -> int | None:
    model = configuration.get("model")
    if not isinstance(model, dict) or model.get("type", _TYPE) != _TYPE:
        raise ValueError(f"its model is not of the type {_TYPE}")
    cfg, args = model.get("model_cfg", {}), model.get("model_args", {})
    for entry, value in _MODELSCOPE.items():
        if cfg.get(entry, value) != value:
            raise Unsupported(entry, cfg[entry])
    frames = args.get("max_frames")
    if frames is not None and (type(frames) is not int or frames < 1):
        raise Unsupported("max_frames", frames)
    return frames


def _check_fits(model: TextToVideoModel) -> None:
    if not model.unet.is_video:
        raise ValueError(f"{model.folder}: its UNet makes images, not clips")
    check_parts_fit(model.folder, model.unet, model.autoencoder, model.text_encoder)


def check_parts_fit(
    folder: Path, unet: UNetConfig, autoencoder: AutoencoderConfig, text: TextEncoderConfig
) -> None:
    """ValueError where one part makes what the next cannot take."""
    latents, made = autoencoder.latent_channels, autoencoder.out_channels
    for wrong, problem in (
        (
            (unet.in_channels, unet.out_channels) != (latents, latents),
            f"its UNet has {unet.in_channels} input and {unet.out_channels} output channels, its "
            f"autoencoder {latents}",
        ),
        (
            unet.context_dim != text.width,
            f"its UNet takes texts of width {unet.context_dim}, its text encoder makes "
            f"{text.width}",
        ),
        (made != 3, f"its autoencoder makes {made} channels, not RGB"),
    ):
        if wrong:
            raise ValueError(f"{folder}: {problem}")
