"""A pipeline's session: its networks in memory, and the phases run with them.

A network is read when it is first needed, and can be released. Its loop is kept with it
(sampling/reuse.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..diffusion.base_path import BaseTrajectory
from ..diffusion.noise import NoisePlace
from ..diffusion.solvers import SolverTable
from ..files import open_tensors
from ..formats.checkpoint import CheckpointConfig, load_network
from ..formats.folders import stored_weights
from ..formats.lora import Updates
from ..models import UNet, for_inference
from ..sampling.finite import check_finite
from ..sampling.guidance import Condition, ModelSpec, Prompts, guided, prompted, told
from ..sampling.run import Run
from ..sampling.two_phase import Motion
from .networks import Networks

if TYPE_CHECKING:
    from .base_unet import PretrainedBase


class Session(Networks):
    """The networks of one checkpoint, and the phases that they run.

    capture: on CUDA, replay steps from graphs
    base:    a base network in place of the checkpoint's own
    updates: of LoRA, by network
    base_device: of the base network and the text encoder; None: that of the others

    In pairs, the base phase's comes first. Noise is on its phase's device, conditions on any.
    reuse_every: as in `LoopSpec`.
    """

    def __init__(
        self,
        config: CheckpointConfig,
        folder: Path,
        device: torch.device,
        dtype: torch.dtype,
        capture: bool,
        base: PretrainedBase | None = None,
        updates: Mapping[str, Updates] | None = None,
        base_device: torch.device | None = None,
    ) -> None:
        super().__init__(device, dtype, capture)
        self.config, self.folder, self.pretrained = config, folder, base
        self.updates, self.base_device = updates or {}, base_device

    def place(self, name: str) -> torch.device:
        """The device of a network: text encoders go with the base network, decoders do not."""
        of_base = name in ("text", "base") and self.base_device is not None
        return self.base_device if of_base else self.device

    # -- phases --------------------------------------------------------------------------------

    def base(
        self,
        noise: Tensor,
        condition: Condition | Prompts,
        table: SolverTable,
        place: NoisePlace,
        run: Run,
        reuse_every: int = 1,
    ) -> Tensor:
        """The base phase on b [B, C, H, W]: its states [S+1, B, C, H, W], on `device`."""
        model = self._model("base", condition, run)
        states = self.driver.base(model, noise, table, place, run, reuse_every)
        # where the residual phase reads them
        return states if self.base_device is None else states.to(self.device)

    def residual(
        self,
        noise: Tensor,
        condition: Condition | Prompts,
        path: BaseTrajectory,
        motion: Motion,
        place: NoisePlace,
        run: Run,
        reuse_every: int = 1,
    ) -> Tensor:
        """The residual phase on r [B, N, C, H, W] along a base path, stepwise or clean: clips."""
        lam = motion.frame_weights(noise.shape[1])
        model = self._model("residual", condition, run, lam)
        return self.driver.residual(model, noise, path, motion, place, run, reuse_every)

    def overlapped(
        self,
        noises: tuple[Tensor, Tensor],
        conditions: tuple[Condition | Prompts, Condition | Prompts],
        table: SolverTable,
        motion: Motion,
        places: tuple[NoisePlace, NoisePlace],
        run: Run,
        reuse_every: tuple[int, int] = (1, 1),
    ) -> tuple[Tensor, Tensor]:
        """Both phases at once: the clips, and the base path's states."""
        lam = motion.frame_weights(noises[1].shape[1])
        base = self._model("base", conditions[0], run)
        models = base, self._model("residual", conditions[1], run, lam)
        return self.driver.overlapped(models, noises, table, motion, places, run, reuse_every)

    def video(
        self,
        noise: Tensor,
        condition: Condition | Prompts,
        table: SolverTable,
        place: NoisePlace,
        run: Run,
        reuse_every: int = 1,
    ) -> Tensor:
        """A plain video model on noise [B, N, C, H, W]: clips."""
        model = self._model("video", condition, run)
        return self.driver.video(model, noise, table, place, run, reuse_every=reuse_every)

    # -- networks ------------------------------------------------------------------------------

    def _model(
        self, name: str, condition: Condition | Prompts, run: Run, lam: Tensor | None = None
    ) -> ModelSpec:
        """The spec of a network under a condition; one that takes no such condition ignores it."""
        network = self.network(name, run)
        if self.base_device is not None:  # conditions are made once, for both phases
            condition = condition.to(self.place(name))
        lam = None if lam is None else tuple(lam.tolist())
        if name in (self.config.distilled or {}):
            return told(network, condition, lam)
        if isinstance(condition, Prompts):
            if network.unet.config.context_dim is None:
                return ModelSpec(network, lam=lam)
            rows = condition.context, condition.negative
            return prompted(network, *rows, condition.guidance_scale, lam)
        if self.config.labels == () or not network.takes_labels:
            return ModelSpec(network, lam=lam)
        return guided(network, condition, self.config.null_class, lam)

    def load(self, name: str) -> nn.Module:
        """Reads "base", "residual", "video", "text" or "decode", in its fastest form."""
        place, updates = (self.folder, self.config), self.updates.get(name)
        device = self.place(name)
        if name in ("text", "decode"):
            from ..formats import parts  # with the formats of published networks

            if name == "text":
                return parts.load_checkpoint_text_encoder(*place, device, self.dtype, updates)
            capture = self.driver.capture
            return parts.load_checkpoint_autoencoder(*place, device, self.dtype, capture=capture)
        if name == "base" and self.pretrained is not None:
            schedule = self.config.noise_schedule()
            network = self.pretrained.load(schedule, device, self.dtype, updates)
        elif name in self.config.foreign:
            from ..formats.text_to_image import load_base

            network = load_base(*place, device, self.dtype, updates)
        else:
            network = load_network(*place, name, device, self.dtype, updates)
        if isinstance(network.unet, UNet):
            network.unet = for_inference(network.unet, self.dtype, device)
        return network

    def encoded(self, pictures: Tensor, run: Run, keep: bool) -> Tensor:
        """Latents [B, C, h, w] of pictures [B, 3, H, W] in -1..1."""

        def encode(autoencoder: nn.Module) -> Tensor:
            with run.timed("base", self.device), torch.inference_mode():
                return check_finite(autoencoder.encode(pictures), "encoder", self.dtype)

        return self.with_network("decode", run, encode, keep)

    def lets_base_go(self, needed_again: bool) -> bool:
        """Whether offload_base=None frees the base network before the residual phase.

        needed_again: whether a later batch of the call or command needs it

        On a CPU it is freed unless it is needed again. On CUDA, reading and capturing it again
        takes longer than sampling. It is freed there only if memory has no room for twice the
        weights that are still to be read: for themselves, and as much again to work in. On a device
        of its own nothing else needs its room.
        """
        if self.place("base") != self.device:
            return False
        if self.device.type != "cuda":
            return not needed_again
        places = (
            self.config.place(self.folder, name)
            for name in ("base", "residual")
            if name not in self.networks
        )
        weights = sum(stored_weights(place) for place in places if place.exists())
        return not self.has_room(weights)

    def check_complete(self, *names: str) -> None:
        """FileNotFoundError or ValueError for a missing or truncated file of weights.

        To be called before another network runs, which would be in vain.
        """
        for name in names:
            if name in self.networks:
                continue
            if name in self.config.foreign:
                from ..formats.text_to_image import find_part

                find_part(self.folder, self.config, name)
                continue
            file = self.folder / f"{name}.safetensors"
            if not file.is_file():
                raise FileNotFoundError(f"checkpoint {self.folder} has no {file.name}")
            with open_tensors(file):
                continue
