"""The networks of a published text-to-video model, one after another.

A network is read when it is needed. On a CPU it leaves memory when it is done. On CUDA, where
reading and capturing it again takes longer than the work itself, it leaves only if the next one
has no room beside it.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..diffusion.noise import NoisePlace
from ..diffusion.solvers import SolverTable
from ..formats.load import load_autoencoder, load_text_encoder, load_unet
from ..formats.lora import Updates
from ..formats.text_to_video import TextToVideoModel
from ..models.denoisers import PretrainedGenerator
from ..sampling.guidance import Prompts, prompted
from ..sampling.run import Run
from .networks import Networks


class PublishedSession(Networks):
    """Text encoder, UNet and autoencoder of one model on one device.

    capture: on CUDA, replay steps and frames from graphs
    updates: of LoRA, by network
    """

    def __init__(
        self,
        model: TextToVideoModel,
        device: torch.device,
        dtype: torch.dtype,
        capture: bool,
        updates: Mapping[str, Updates] | None = None,
    ) -> None:
        super().__init__(device, dtype, capture)
        self.model, self.updates = model, updates or {}

    def sampled(
        self,
        noise: Tensor,
        prompts: Prompts,
        table: SolverTable,
        place: NoisePlace,
        windows: tuple[int, int] | None,
        loop: bool,
        run: Run,
        reuse_every: int = 1,
    ) -> Tensor:
        """Latents of noise [B, N, C, h, w]; windows, loop: as in `Motion`.

        reuse_every: as in `LoopSpec`
        """
        untimed = Run(run.callback, timings=None)

        def sample(denoiser: nn.Module) -> Tensor:
            with run.timed("video", self.device):
                scale = prompts.guidance_scale
                model = prompted(denoiser, prompts.context, prompts.negative, scale)
                how = windows, loop, reuse_every
                return self.driver.video(model, noise, table, place, untimed, *how)

        return self.with_network("video", run, sample)

    def load(self, name: str) -> nn.Module:
        """Reads "text", "video" or "decode", in its fastest form."""
        place = self.model.folder, self.dtype, self.device
        if name == "text":
            return load_text_encoder(*place, self.updates.get(name))
        if name == "decode":
            return load_autoencoder(*place, encodes=False, capture=self.driver.capture)
        published = self.model.schedule
        unet = load_unet(*place, self.updates.get(name))
        denoiser = PretrainedGenerator(unet, published.schedule, published.prediction_type)
        return denoiser.to(self.device).eval()

    def make_room(self, name: str) -> None:
        """Releases the other networks if CUDA's memory has no room for this one beside them."""
        if self.device.type != "cuda" or not self.networks:
            return
        if not self.has_room(self.model.num_weights[name]):
            for other in list(self.networks):
                self.release(other)
