"""Objectives: each owns its networks and their loss, and samples clips from them.

`Decomposed` is VideoFusion (the joint loss of `decompose.py`). `PlainVideo` is plain video
diffusion, the baseline (VDM* in the paper). `Trainer` does everything else, and is the same for
both. Everything random in a step comes from its `BatchSampler`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..diffusion.decompose import add_noise, base_index, joint_loss
from ..diffusion.noise import decomposed_noise, residual_noise
from ..diffusion.schedule import NoiseSchedule
from ..formats.checkpoint import CheckpointConfig, build_network
from ..sampling.api import sample, sample_video
from .batch import BatchSampler
from .options import TrainingOptions

Losses = dict[str, tuple[Tensor, Tensor]]  # per network: each sample's loss, and its timestep


class _Objective:
    """The common part: a model's configuration, how to train it, its networks by name."""

    networks: dict[str, nn.Module]

    def __init__(
        self, config: CheckpointConfig, options: TrainingOptions, device: torch.device | str
    ):
        self.config, self.options = config, options
        self.schedule: NoiseSchedule = config.noise_schedule()
        self.networks = {name: net.to(device) for name, net in build_networks(config).items()}

    def _eps_loss(
        self, network: nn.Module, x: Tensor, labels: Tensor, batch: BatchSampler
    ) -> tuple[Tensor, Tensor]:
        """‖ε - ε̂‖² of a network on its own, weighted as `clean_weight`: (loss [B], t [B])."""
        t, eps = batch.timesteps(len(x)), batch.normal(x.shape)
        error = eps - network(add_noise(x, eps, t, self.schedule), t, class_labels=labels)
        weight = self.clean_weight(t, 1.0, network.data_std)
        return error.square().flatten(1).mean(1) * weight, t

    def clean_weight(self, t: Tensor, noise_share: float, data_std: float) -> Tensor:
        """Factor [B] on the squared ε error: clean-pixel errors weigh min(1/σ², 10) + 1/std².

        σ² = share (1-ᾱ)/ᾱ is the noise a network sees beside unit signal, and (1-ᾱ)/ᾱ turns ε
        errors (of the frame's whole noise) into pixel errors: the weighting of EDM (arXiv
        2206.00364, Table 1), capped.
        """
        signal, noise = self.schedule.signal_and_noise(t, torch.empty(len(t), device=t.device))
        pixels = (noise / signal).square()
        return pixels * ((1 / (noise_share * pixels)).clamp(max=10) + data_std**-2)


class Decomposed(_Objective):
    """A base and a residual network, by the joint loss; the base network on further frames too.

    The configuration records the clean_share that it is trained with.
    """

    def __init__(self, config, options, device):
        super().__init__(replace(config, clean_share=options.clean_share), options, device)

    @staticmethod
    def sources(config: CheckpointConfig) -> dict[str, str]:
        """The network of such a checkpoint from which each of ours may start, by our names."""
        if config.objective != "decomposed":
            raise ValueError("a decomposed model starts from a decomposed model, not from a VDM*")
        return {"base": "base", "residual": "residual"}

    def losses(self, batch: BatchSampler) -> Losses:
        """The base network's losses on B + extra_images samples, the residual network's on B."""
        base, residual = self.networks["base"], self.networks["residual"]
        options, lam = self.options, self.config.lam
        x, labels = batch.clips(options.batch_size)
        m = base_index(x.shape[1])
        t = batch.timesteps(len(x))
        b, r = batch.normal(x[:, m].shape), batch.normal(x.shape)
        exact = batch.uniform(len(x)) < options.clean_share
        jitter = self._jitter(batch, exact, x[:, m].shape)
        signal, _ = self.schedule.signal_and_noise(t, x[:, m])

        def base_model(z, t):
            return base(z, t, class_labels=labels)

        def residual_model(z, t):
            z = z.clone()
            z[:, m] += signal * jitter
            return residual(z, t, class_labels=labels)

        weights = (
            self.clean_weight(t, 1.0, base.data_std),
            self.clean_weight(t, 1 - lam, residual.data_std),
        )
        base_loss, residual_loss = joint_loss(
            base_model,
            residual_model,
            x,
            t,
            b,
            r,
            schedule=self.schedule,
            lam=lam,
            exact_base=exact,
            weights=weights,
        )
        base_t = t
        if options.extra_images:  # eq. (4) on further base frames
            images, labels_of_images = batch.clips(options.extra_images, only_base=True)
            loss, image_t = self._eps_loss(base, images, labels_of_images, batch)
            base_loss, base_t = torch.cat([base_loss, loss]), torch.cat([t, image_t])
        return {"base": (base_loss, base_t), "residual": (residual_loss, t)}

    def _jitter(self, batch: BatchSampler, exact: Tensor, shape) -> Tensor:
        """Noise [B, C, H, W] for the base frames in the residual network's input.

        Zero for samples with the base network's b̂.
        """
        std = batch.uniform(len(exact), 1, 1, 1) * self.options.base_jitter
        return batch.normal(shape) * std * exact.view(-1, 1, 1, 1)

    def sample(self, networks: Mapping[str, nn.Module], labels: Tensor, steps: int) -> Tensor:
        """One clip [B, N, C, H, W] of each label."""
        noise = decomposed_noise(
            _clip_shape(self.config, labels), base_seed=0, residual_seed=1, device=labels.device
        )
        return sample(
            lambda z, t: networks["base"](z, t, class_labels=labels),
            lambda z, t: networks["residual"](z, t, class_labels=labels),
            noise.base,
            noise.residual,
            schedule=self.schedule,
            num_inference_steps=steps,
            lam=self.config.lam,
            base_path=self.config.base_path,
        )


class PlainVideo(_Objective):
    """Plain video diffusion: one network of whole clips, each frame with noise of its own."""

    @staticmethod
    def sources(config: CheckpointConfig) -> dict[str, str]:
        """The network of such a checkpoint from which ours may start."""
        return {"video": config.networks[0]}  # a base network is one without temporal layers

    def losses(self, batch: BatchSampler) -> Losses:
        x, labels = batch.clips(self.options.batch_size)
        return {"video": self._eps_loss(self.networks["video"], x, labels, batch)}

    def sample(self, networks: Mapping[str, nn.Module], labels: Tensor, steps: int) -> Tensor:
        """One clip [B, N, C, H, W] of each label."""
        return sample_video(
            lambda z, t: networks["video"](z, t, class_labels=labels),
            residual_noise(_clip_shape(self.config, labels), 1, device=labels.device),
            schedule=self.schedule,
            num_inference_steps=steps,
        )


OBJECTIVES = {"decomposed": Decomposed, "vdm": PlainVideo}


def build_networks(config: CheckpointConfig) -> dict[str, nn.Module]:
    """A model's networks by name, with freshly initialised weights."""
    return {name: build_network(config, name) for name in config.networks}


def _clip_shape(config: CheckpointConfig, labels: Tensor) -> tuple[int, ...]:
    return (len(labels), config.num_frames, config.channels, config.height, config.width)
