"""The parts that a model on latents is trained with: an autoencoder and a text encoder, at work."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from ..formats.checkpoint import DecomposedConfig
from ..formats.parts import read_autoencoder, read_text_encoder
from ..formats.weights import hash_tensors
from ..formats.word_tokenizer import WordTokenizer
from ..media.pictures import network_to_pixels, pixels_to_network
from ..models.autoencoder import AutoencoderConfig, Decoder, Encoder
from ..models.empty import new_weights
from ..models.text_encoder import TextEncoder, TextEncoderConfig
from ..plan.decoder import PlannedDecoder, PlannedEncoder
from ..plan.network import for_inference, inference_dtype
from ..plan.text import PlannedTextEncoder
from .options import TrainingOptions

if TYPE_CHECKING:
    from .published import PublishedParts


class Coding(NamedTuple):
    """The networks of a model's parts, on a device.

    tokenize: texts to int64 [B, L]
    mean, std: of latents, by channel: networks see (z - mean) / std
    """

    encoder: nn.Module
    decoder: nn.Module
    text: nn.Module
    tokenize: Callable[[Sequence[str]], Tensor]
    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass(frozen=True)
class Parts:
    """What the folders of both trainings hold (vfengine/formats/parts.py)."""

    autoencoder: AutoencoderConfig
    autoencoder_state: dict[str, Tensor]
    latent_mean: tuple[float, ...]
    latent_std: tuple[float, ...]
    text_encoder: TextEncoderConfig
    text_state: dict[str, Tensor]
    tokenizer: str

    at_once: ClassVar[dict[str, int]] = {
        "cpu": 16,
        "cuda": 2048,
    }  # frames, or texts, in a call of a network

    @classmethod
    def read(cls, autoencoder: Path, text_encoder: Path) -> Parts:
        """Raises FileNotFoundError for what is missing; ValueError for what is damaged."""
        return cls(*read_autoencoder(autoencoder), *read_text_encoder(text_encoder))

    def files(self) -> dict[str, Any]:
        """As `save_checkpoint` takes them."""
        return {
            "autoencoder": self.autoencoder_state,
            "text_encoder": self.text_state,
            "tokenizer": self.tokenizer,
        }

    def entries(self) -> dict[str, Any]:
        """Those of a checkpoint's configuration, without its prompts."""
        names = ("autoencoder", "latent_mean", "latent_std", "text_encoder")
        return {name: getattr(self, name) for name in names}

    def identity(self) -> tuple[str, ...]:
        """What the names of training states have of these parts: nothing beyond their entries."""
        return ()

    def networks(
        self, config: DecomposedConfig, options: TrainingOptions, device: torch.device
    ) -> dict[str, nn.Module]:
        """Networks that a training begins with, by name: none, all are new."""
        return {}

    def coding(self, device: torch.device, dtype: torch.dtype) -> Coding:
        """The networks; see `Coding`."""
        state = self.autoencoder_state
        with new_weights():
            encoder, decoder = Encoder(self.autoencoder), Decoder(self.autoencoder)
            text = TextEncoder(self.text_encoder)
        for network, own in (
            (encoder, _under(state, "encoder.")),
            (decoder, _under(state, "decoder.")),
            (text, self.text_state),
        ):
            network.load_state_dict(own)
            network.to(device, dtype)
        tokenize = WordTokenizer(self.tokenizer, self.text_encoder.max_length)
        return Coding(encoder, decoder, text, tokenize, self.latent_mean, self.latent_std)

    def digests(self) -> tuple[str, str]:
        """8 hex digits that name the autoencoder, and the text encoder, for caches."""
        scale = (self.autoencoder, self.latent_mean, self.latent_std)
        return (
            _digest(self.autoencoder_state, repr(scale)),
            _digest(self.text_state, repr(self.text_encoder) + self.tokenizer),
        )


def _digest(state: dict[str, Tensor], text: str) -> str:
    digest = hashlib.sha256(text.encode())
    hash_tensors(digest, dict(sorted(state.items())))  # files are read in any order
    return digest.hexdigest()[:8]


class Coder:
    """Frames to normalised latents and back, and texts to token states, on one device.

    It computes in bf16, but in fp32 on a CPU that would emulate it. Latents and states are fp16.
    """

    def __init__(self, parts: Parts | PublishedParts, device: torch.device | str = "cpu"):
        self.device = torch.device(device)
        on_cpu = self.device.type == "cpu"
        self.dtype = inference_dtype(torch.bfloat16) if on_cpu else torch.bfloat16
        self.at_once = parts.at_once[self.device.type]
        self.latent_channels = parts.autoencoder.latent_channels
        coding = parts.coding(self.device, self.dtype)
        self._encoder = self._ready(coding.encoder, PlannedEncoder)
        self._decoder = self._ready(coding.decoder, PlannedDecoder)
        self._text = self._ready(coding.text, PlannedTextEncoder)
        self._tokenize = coding.tokenize
        self._mean, self._std = (
            torch.tensor(values, device=self.device, dtype=torch.float32)[:, None, None]
            for values in (coding.mean, coding.std)
        )

    def _ready(self, network: nn.Module, planned: type) -> nn.Module:
        network = network.eval().requires_grad_(False)
        if self.device.type == "cpu":
            return for_inference(network, self.dtype, self.device, planned)
        return network  # many frames at once keep a GPU busy without a plan

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """uint8 [..., H, W, 3] -> fp16 [..., C, h, w], of mean 0 and variance 1."""
        out = []
        for frames in pixels.flatten(0, -4).split(self.at_once):
            x = pixels_to_network(frames.to(self.device)).contiguous()
            z = self._encoder(x.to(self.dtype)).float()
            out.append(((z - self._mean) / self._std).half())
        return torch.cat(out).unflatten(0, pixels.shape[:-3])

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """[..., C, h, w] -> uint8 [..., H, W, 3]."""
        out = []
        for z in latents.flatten(0, -4).split(self.at_once):
            z = z.to(self.device).float() * self._std + self._mean
            out.append(network_to_pixels(self._decoder(z.to(self.dtype)).float()))
        return torch.cat(out).unflatten(0, latents.shape[:-3])

    @torch.no_grad()
    def states(self, texts: Sequence[str]) -> Tensor:
        """Token states fp16 [len(texts), L, D]."""
        ids = self._tokenize(list(texts)).split(self.at_once)
        return torch.cat([self._text(part.to(self.device)).half() for part in ids])


def _under(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
