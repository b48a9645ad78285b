"""Objectives: each owns its networks and their loss, and samples clips from them.

`Decomposed` is VideoFusion (the joint loss of `decompose.py`). `PlainVideo` is plain video
diffusion, the baseline (VDM* in the paper). `Trainer` does everything else, and is the same for
both. Everything random in a step comes from its `BatchSampler`. Clips are pixels or latents, and
what conditions the networks is a class label or a context: nothing here depends on which.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..diffusion.base_path import BaseTrajectory
from ..diffusion.decompose import Model, add_noise, base_index, joint_loss
from ..diffusion.noise import decomposed_noise, residual_noise
from ..diffusion.schedule import NoiseSchedule
from ..formats.checkpoint import CheckpointConfig, build_network
from ..sampling.api import sample_base, sample_residual, sample_video
from .batch import BatchSampler
from .options import TrainingOptions

Losses = dict[str, tuple[Tensor, Tensor]]  # per network: each sample's loss, and its timestep


class Noisy(NamedTuple):
    """Samples [B, ...] at timesteps t [B] for a network on its own: z is of x and the noise eps.

    cells: factors [B, 1, H, W] or [B, N, 1, H, W] on the squared errors; None: all 1
    """

    z: Tensor
    t: Tensor
    eps: Tensor
    condition: Tensor
    cells: Tensor | None


class Objective:
    """The common part: a model's configuration, how to train it, its networks by name.

    condition: the argument of the networks that says what to draw
    """

    networks: dict[str, nn.Module]
    captures = True  # whether a CUDA graph can hold its losses: their draws alone change

    def __init__(
        self,
        config: CheckpointConfig,
        options: TrainingOptions,
        device: torch.device | str,
        given: Mapping[str, nn.Module] | None = None,
    ):
        """given: networks that are not new; a foreign one that is not given has no part in it"""
        self.config, self.options, self.device = config, options, torch.device(device)
        self.schedule: NoiseSchedule = config.noise_schedule()
        given = given or {}
        self.networks = {
            name: given[name] if name in given else build_network(config, name).to(device)
            for name in config.networks
            if name in given or name not in config.foreign
        }
        has_classes = config.unet_config(config.networks[0]).num_classes is not None
        self.condition = "class_labels" if has_classes else "context"

    @property
    def trained(self) -> tuple[str, ...]:
        """The names of the networks that this training changes."""
        return self.config.networks

    def count(self, name: str) -> int:
        """The samples of a step whose losses a network's loss is the mean of."""
        return self.options.batch_size + (self.options.extra_images if name == "base" else 0)

    def _noisy(
        self,
        batch: BatchSampler,
        x: Tensor,
        condition: Tensor,
        count: int,
        cells: Tensor | None = None,
    ) -> Noisy:
        """Draws the noise of x, the batch's rows of `count` samples, for a network on its own."""
        t, eps = batch.timesteps(count), batch.normal((count, *x.shape[1:]))
        return Noisy(add_noise(x, eps, t, self.schedule), t, eps, condition, cells)

    def _eps_loss(self, noisy: Noisy, estimate: Tensor, data_std: float) -> tuple[Tensor, Tensor]:
        """‖ε - ε̂‖² of an estimate ε̂, weighted as `clean_weight`: (loss [B], t [B])."""
        error = (noisy.eps - estimate).square()
        if noisy.cells is not None:
            error = error * noisy.cells
        weight = self.clean_weight(noisy.t, 1.0, data_std)
        return error.flatten(1).mean(1) * weight, noisy.t

    def _model(self, network: nn.Module, condition: Tensor, null: Tensor | None = None) -> Model:
        """(z, t) -> ε̂ under a condition; with `null`, under guidance of scale 2 away from it."""

        def model(z: Tensor, t: Tensor) -> Tensor:
            t = t.to(z.device, non_blocking=True)
            estimate = network(z, t, **{self.condition: condition})
            if null is None:
                return estimate
            return 2 * estimate - network(z, t, **{self.condition: null})

        return model

    def clean_weight(self, t: Tensor, noise_share: float, data_std: float) -> Tensor:
        """Factor [B] on the squared ε error: clean-pixel errors weigh min(1/σ², 10) + 1/std².

        σ² = share (1-ᾱ)/ᾱ is the noise a network sees beside unit signal, and (1-ᾱ)/ᾱ turns ε
        errors (of the frame's whole noise) into pixel errors: the weighting of EDM (arXiv
        2206.00364, Table 1), capped.
        """
        like = torch.empty(len(t), device=self.device, dtype=torch.float32)
        signal, noise = self.schedule.signal_and_noise(t, like)
        pixels = (noise / signal).square()
        return pixels * ((1 / (noise_share * pixels)).clamp(max=10) + data_std**-2)


class Decomposed(Objective):
    """A base and a residual network, by the joint loss; the base network on further frames too.

    Either alone: the base network on base frames, the residual network under the exact base noise.
    The configuration records the clean_share that it is trained with.
    """

    def __init__(self, config, options, device, given=None):
        options.check_base(config.published is not None or options.teacher_steps > 0)
        super().__init__(replace(config, clean_share=options.clean_share), options, device, given)

    @property
    def trained(self) -> tuple[str, ...]:
        return self.config.networks if self.options.train == "both" else (self.options.train,)

    @staticmethod
    def sources(config: CheckpointConfig) -> dict[str, str]:
        """The network of such a checkpoint from which each of ours may start, by our names."""
        if config.objective != "decomposed":
            raise ValueError("a decomposed model starts from a decomposed model, not from a VDM*")
        return {"base": "base", "residual": "residual"}

    def losses(self, batch: BatchSampler) -> Losses:
        """The base network's losses on B + extra_images samples, the residual network's on B."""
        options = self.options
        if options.train != "base":
            return self._clip_losses(batch)
        base = self.networks["base"]
        images = self._images(batch, options.batch_size + options.extra_images)
        estimate = self._model(base, images.condition)(images.z, images.t)
        return {"base": self._eps_loss(images, estimate, base.data_std)}

    def _clip_losses(self, batch: BatchSampler) -> Losses:
        """The joint loss on B clips and, where the base network is trained, eq. (4) on images.

        The base network is called once, on base frames and images.
        """
        base, residual = self.networks.get("base"), self.networks["residual"]
        options, lam = self.options, self.config.lam
        count = options.batch_size
        x, condition, figure = batch.clips(count)
        m, of_frames = base_index(x.shape[1]), (count, *x.shape[2:])
        t = batch.timesteps(count)
        b, r = batch.normal(of_frames), batch.normal((count, *x.shape[1:]))
        exact = batch.uniform(count) < options.clean_share
        jitter = self._jitter(batch, exact, of_frames)
        images = None
        if options.train == "both" and _some(batch.rows(options.extra_images)):
            images = self._images(batch, options.extra_images)
        signal, _ = self.schedule.signal_and_noise(t, x[:, m])
        paint = self._model(residual, condition)
        of_images = []

        def base_model(z, t):
            if options.only_exact_bases:  # no estimate of b is needed
                return torch.zeros_like(z)
            if images is None:
                return self._model(base, condition)(z, t)
            both = self._model(base, torch.cat([condition, images.condition]))(
                torch.cat([z, images.z]), torch.cat([t, images.t])
            )
            of_images.append(both[len(z) :])
            return both[: len(z)]

        def residual_model(z, t):
            z = z.clone()
            z[:, m] += signal * jitter
            return paint(z, t)

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
            weights=(
                self.clean_weight(t, 1.0, self.config.base_std),
                self.clean_weight(t, 1 - lam, residual.data_std),
            ),
            cell_weights=self._cells(figure, m),
        )
        losses = {"base": (base_loss, t), "residual": (residual_loss, t)}
        if images is not None:
            loss, of_t = self._eps_loss(images, of_images[0], base.data_std)
            losses["base"] = torch.cat([base_loss, loss]), torch.cat([t, of_t])
        return {name: losses[name] for name in self.trained}

    def _images(self, batch: BatchSampler, count: int) -> Noisy:
        """The base frames of `count` clips, for the base network alone."""
        x, condition, figure = batch.clips(count, only_base=True)
        return self._noisy(batch, x, condition, count, self._cells(figure))

    def _cells(self, figure: Tensor | None, m: int | None = None) -> Tensor | None:
        """Factors of cells, of mean 1 in each picture, larger where the figure is; None: all 1.

        A figure is a small part of a picture, and most of what there is to learn. In a clip, a
        frame's figure is also where that of the base frame m has to give way.
        """
        if self.options.cell_weight == 1:
            return None
        if figure is None:
            raise ValueError("cell_weight needs clips of which it is known where the figure is")
        if m is not None:
            figure = torch.maximum(figure, figure[:, m : m + 1])
        weights = 1 + (self.options.cell_weight - 1) * figure
        return weights / weights.mean((-3, -2, -1), keepdim=True)

    def _jitter(self, batch: BatchSampler, exact: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Noise [B, C, H, W] for the base frames in the residual network's input.

        Zero for samples with the base network's b̂; shape: that of the whole batch's
        """
        std = batch.uniform(shape[0], 1, 1, 1) * self.options.base_jitter
        return batch.normal(shape) * std * exact.view(-1, 1, 1, 1)

    def sample(
        self,
        networks: Mapping[str, nn.Module],
        condition: Tensor,
        steps: int,
        null: Tensor | None = None,
        base: Tensor | None = None,
    ) -> Tensor:
        """One clip [B, N, C, H, W] of each condition, under guidance where `null` is given.

        The base network alone draws clips of one frame. The residual network alone animates the
        frames `base` [B, C, H, W]; None: those that the base network draws.
        """
        noise = decomposed_noise(
            clip_shape(self.config, condition), base_seed=0, residual_seed=1, device=self.device
        )
        own, path = self.options.train, None
        if base is None or own != "residual":
            model, at = self._shown("base", networks.get("base"), condition, steps, null)
            path = sample_base(model, noise.base, schedule=self.schedule, **at)
            base = path.final
        if own == "base":
            return base[:, None]
        model, at = self._shown("residual", networks["residual"], condition, steps, null)
        if own == "residual" or self.config.base_path == "clean":
            path = BaseTrajectory.from_image(base, schedule=self.schedule, **at)
        return sample_residual(model, path, noise.residual, lam=self.config.lam)

    def _shown(
        self,
        name: str,
        network: nn.Module,
        condition: Tensor,
        steps: int,
        null: Tensor | None,
    ) -> tuple[Model, dict[str, Any]]:
        """A network as (z, t) -> ε̂, and which steps it takes, as `sample_base` is told them."""
        return self._model(network, condition, null), {"num_inference_steps": steps}


class PlainVideo(Objective):
    """Plain video diffusion: one network of whole clips, each frame with noise of its own."""

    @staticmethod
    def sources(config: CheckpointConfig) -> dict[str, str]:
        """The network of such a checkpoint from which ours may start."""
        return {"video": config.networks[0]}  # a base network is one without temporal layers

    def losses(self, batch: BatchSampler) -> Losses:
        count = self.options.batch_size
        x, condition, _ = batch.clips(count)
        noisy, video = self._noisy(batch, x, condition, count), self.networks["video"]
        estimate = self._model(video, condition)(noisy.z, noisy.t)
        return {"video": self._eps_loss(noisy, estimate, video.data_std)}

    def sample(
        self,
        networks: Mapping[str, nn.Module],
        condition: Tensor,
        steps: int,
        null: Tensor | None = None,
        base: Tensor | None = None,
    ) -> Tensor:
        """One clip [B, N, C, H, W] of each condition, under guidance where `null` is given."""
        return sample_video(
            self._model(networks["video"], condition, null),
            residual_noise(clip_shape(self.config, condition), 1, device=self.device),
            schedule=self.schedule,
            num_inference_steps=steps,
        )


OBJECTIVES = {"decomposed": Decomposed, "vdm": PlainVideo}


def build_networks(config: CheckpointConfig) -> dict[str, nn.Module]:
    """A model's networks by name, with freshly initialised weights."""
    return {name: build_network(config, name) for name in config.networks}


def _some(rows: slice) -> bool:
    """Whether a slice of rows has any."""
    return rows.stop > rows.start


def clip_shape(config: CheckpointConfig, condition: Tensor) -> tuple[int, ...]:
    """[B, N, C, H, W] of a clip of each condition."""
    return (len(condition), config.num_frames, config.channels, config.height, config.width)
