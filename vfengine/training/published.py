"""A published text-to-image model as the ground of a training: its UNet is the base network."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from ..formats.checkpoint import DecomposedConfig
from ..formats.folders import Linked
from ..formats.load import find_autoencoder, find_text_encoder, find_tokenizer, find_unet
from ..formats.published_base import FOLDERS
from ..formats.text_to_image import TextToImageModel, linked_parts, read_text_to_image
from ..models.autoencoder import AutoencoderConfig
from ..models.text_encoder import TextEncoderConfig
from .options import TrainingOptions
from .parts import Coding


@dataclass(frozen=True)
class PublishedParts:
    """What such a model gives to a decomposed one; it stands where `parts.Parts` do.

    trained: whether its UNet is trained further, and is a part of checkpoints no more
    linked:  the files of all parts
    """

    model: TextToImageModel
    trained: bool
    linked: dict[str, Linked]

    at_once: ClassVar[dict[str, int]] = {"cpu": 2, "cuda": 16}

    @classmethod
    def read(cls, folder: Path, trained: bool) -> PublishedParts:
        """Raises what `read_text_to_image` does; reads all files once, for their SHA-256."""
        model = read_text_to_image(folder)
        return cls(model, trained, linked_parts(folder, tuple(FOLDERS)))

    @property
    def autoencoder(self) -> AutoencoderConfig:
        return self.model.autoencoder

    @property
    def text_encoder(self) -> TextEncoderConfig:
        return self.model.text_encoder

    def files(self) -> dict[str, Any]:
        """As `save_checkpoint` takes them."""
        names = self.entries()["published"].parts
        return {name: self.linked[name] for name in names}

    def entries(self) -> dict[str, Any]:
        """Those of a checkpoint's configuration, without its prompts."""
        return self.model.entries(self.trained)

    def digests(self) -> tuple[str, str]:
        """8 hex digits that name the autoencoder, and the text encoder, for caches."""
        text = self.linked["text_encoder"].sha256 + self.linked["tokenizer"].sha256
        both = self.linked["autoencoder"].sha256, hashlib.sha256(text.encode()).hexdigest()
        return tuple(digest[:8] for digest in both)

    def identity(self) -> tuple[str, ...]:
        """Names the base network that a training began with."""
        return (self.linked["base"].sha256,)

    def networks(
        self, config: DecomposedConfig, options: TrainingOptions, device: torch.device
    ) -> dict[str, nn.Module]:
        """The base network in fp32, ready to be trained; none where no step asks for it."""
        if options.only_exact_bases:
            return {}
        unet = find_unet(self.model.folder).read(torch.float32, device)
        base = config.generator("base", unet.to(memory_format=torch.contiguous_format))
        return {"base": base.to(device).requires_grad_(True)}

    def coding(self, device: torch.device, dtype: torch.dtype) -> Coding:
        """Its other networks; see `Coding`."""
        folder, entries = self.model.folder, self.entries()
        found = find_autoencoder(folder)
        return Coding(
            found["encoder"].read(dtype, device),
            found["decoder"].read(dtype, device),
            find_text_encoder(folder).read(dtype, device),
            find_tokenizer(folder),
            entries["latent_mean"],
            entries["latent_std"],
        )
