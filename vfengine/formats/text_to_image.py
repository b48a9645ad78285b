"""Published text-to-image models whose UNet can be the base network of a decomposed model.

A folder of diffusers as Stable Diffusion's: scheduler/, tokenizer/, text_encoder/, unet/ and vae/.
A decomposed model made of one keeps all but the first in its own folder (published_base.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..models.autoencoder import Autoencoder, AutoencoderConfig
from ..models.config import UNetConfig
from ..models.text_encoder import TextEncoderConfig
from . import load
from .checkpoint_config import DecomposedConfig, Generator
from .diffusers_files import TRANSFORMERS_FILES, locate
from .folders import Linked
from .lora import Updates
from .published import DIFFUSERS_PIPELINE, Unsupported, read_json
from .published_base import FOLDERS, PublishedBase
from .scheduler import PublishedSchedule
from .text_to_video import check_parts_fit, diffusers_settings

_PIPELINES = ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline")


@dataclass(frozen=True)
class TextToImageModel:
    """A text-to-image model on disk, apart from its weights; see `TextToVideoModel`."""

    folder: Path
    text_encoder: TextEncoderConfig
    unet: UNetConfig
    autoencoder: AutoencoderConfig
    schedule: PublishedSchedule
    scaling_factor: float
    sample_size: tuple[int, int]

    def entries(self, trained: bool) -> dict[str, Any]:
        """Those of a decomposed model's configuration that it decides.

        trained: whether the model's base network is to be trained further
        """
        channels, schedule = self.autoencoder.latent_channels, self.schedule
        return {
            "channels": channels,
            "base": self.unet,
            "base_std": 1.0,
            "schedule": schedule.schedule.to_dict(),
            "autoencoder": self.autoencoder,
            "latent_mean": (0.0,) * channels,
            "latent_std": (1 / self.scaling_factor,) * channels,
            "text_encoder": self.text_encoder,
            "published": PublishedBase(
                schedule.prediction_type,
                schedule.spacing,
                schedule.steps_offset,
                schedule.set_alpha_to_one,
                trained,
            ),
        }


def read_text_to_image(folder: str | Path) -> TextToImageModel:
    """The model in a folder: every part found, and names and shapes of all weights checked.

    Raises FileNotFoundError, naming it, for what is missing; ValueError, naming it, for a class, an
    entry or a set of weights that is not supported, and for parts that do not fit each other.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"no text-to-image model in {folder}: it is no folder")
    index = folder / DIFFUSERS_PIPELINE
    values = read_json(index) if index.is_file() else {"_class_name": _PIPELINES[0]}
    if values.get("_class_name") not in _PIPELINES:
        wrong = Unsupported(
            "_class_name", values.get("_class_name"), f"is not one of {', '.join(_PIPELINES)}"
        )
        raise ValueError(f"{index}: {wrong}")
    settings = diffusers_settings(folder, values, "UNet2DConditionModel")
    load.find_tokenizer(folder)
    autoencoder = load.find_autoencoder(folder)
    if "encoder" not in autoencoder:
        raise ValueError(f"{folder / 'vae'} has no encoder: clips cannot become its latents")
    model = TextToImageModel(
        folder=folder,
        text_encoder=load.find_text_encoder(folder).config,
        unet=load.find_unet(folder).config,
        autoencoder=autoencoder["decoder"].config,
        **settings,
    )
    if model.unet.is_video:
        raise ValueError(f"{folder}: its UNet makes clips, not images")
    check_parts_fit(folder, model.unet, model.autoencoder, model.text_encoder)
    return model


def linked_parts(folder: Path, names: tuple[str, ...]) -> dict[str, Linked]:
    """The files of a model's parts, by our names, with what tells each part from others.

    Reads all of them once, for their SHA-256. Raises FileNotFoundError for what is missing.
    """
    return {name: Linked(FOLDERS[name], tuple(_files(folder, name))) for name in names}


def _files(folder: Path, name: str) -> list[Path]:
    place = folder / FOLDERS[name]
    if name == "tokenizer":
        return sorted(file for file in place.iterdir() if file.is_file())
    if name == "base":
        config, files = load.locate(place)
    else:
        names = (TRANSFORMERS_FILES,) if name == "text_encoder" else ()
        config, files = locate(place, None, *names)
    index = [file for file in place.glob("*.json") if len(files) > 1 and ".index." in file.name]
    return [*([] if config is None else [config]), *sorted(index), *files]


# -- of a decomposed model's folder ----------------------------------------------------------------


def load_base(
    folder: Path,
    config: DecomposedConfig,
    device: torch.device,
    dtype: torch.dtype,
    updates: Updates | None = None,
) -> Generator:
    """A model's published base network with the updates of LoRA, in eval mode.

    This and the functions below raise FileNotFoundError for what is missing; ValueError for files
    that are damaged, exchanged or of another architecture.
    """
    found = find_part(folder, config, "base")
    _check_whole(folder, config, "base")
    return config.generator("base", found.read(dtype, device, updates)).to(device).eval()


def load_published_autoencoder(
    folder: Path,
    config: DecomposedConfig,
    device: torch.device | str,
    dtype: torch.dtype,
    *,
    encodes: bool,
    capture: bool,
) -> Autoencoder:
    """As `parts.load_checkpoint_autoencoder`."""
    found = find_part(folder, config, "autoencoder")
    _check_whole(folder, config, "autoencoder")
    return load.ready_autoencoder(found, dtype, device, encodes=encodes, capture=capture)


def load_published_text_encoder(
    folder: Path,
    config: DecomposedConfig,
    device: torch.device | str,
    dtype: torch.dtype,
    updates: Updates | None = None,
) -> nn.Module:
    """As `parts.load_checkpoint_text_encoder`."""
    found = find_part(folder, config, "text_encoder")
    for name in ("text_encoder", "tokenizer"):
        _check_whole(folder, config, name)
    return load.ready_text_encoder(found, load.find_tokenizer(folder), dtype, device, updates)


def find_part(folder: Path, config: DecomposedConfig, name: str) -> Any:
    """What `load` finds of a part, the headers of its files read alone, once found to fit."""
    place = folder / FOLDERS[name]
    if not place.is_dir():
        raise FileNotFoundError(f"checkpoint {folder} has no {place.name}/")
    if name == "tokenizer":
        return load.find_tokenizer(folder)
    found = _FINDERS[name](place)
    if asdict(_config_of(found)) != asdict(getattr(config, name)):
        raise ValueError(f"{place} is of another architecture than {folder / 'config.json'} says")
    return found


def part_config(folder: Path, name: str) -> Any:
    """The configuration of the network in a part's subfolder."""
    return _config_of(_FINDERS[name](folder / FOLDERS[name]))


def _config_of(found: Any) -> Any:
    return (found["decoder"] if isinstance(found, dict) else found).config


_FINDERS: dict[str, Callable[[Path], Any]] = {
    "base": load.find_unet,
    "autoencoder": load.find_autoencoder,
    "text_encoder": load.find_text_encoder,
}


def _check_whole(folder: Path, config: DecomposedConfig, name: str) -> None:
    """ValueError for other files than those that the configuration was written with."""
    recorded, place = config.sha256.get(name), folder / FOLDERS[name]
    if recorded is not None and linked_parts(folder, (name,))[name].sha256 != recorded:
        raise ValueError(f"{place} is not the folder its config.json was written with")
