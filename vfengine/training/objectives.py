"""Objectives: each owns its networks and their loss, and samples clips from them.

`Decomposed` is VideoFusion (the joint loss of `decompose.py`). `PlainVideo` is plain video
diffusion, the baseline (VDM* in the paper). `Trainer` does everything else, and is the same for
both. Everything random in a step comes from its `BatchSampler`. Clips are pixels or latents, and
what conditions the networks is a class label or a context: nothing here depends on which.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

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


class Objective:
    """The common part: a model's configuration, how to train it, its networks by name.

    condition: the argument of the networks that says what to draw
    """

    networks: dict[str, nn.Module]

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

    def _eps_loss(
        self,
        network: nn.Module,
        x: Tensor,
        condition: Tensor,
        batch: BatchSampler,
        count: int,
        cells: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """‖ε - ε̂‖² of a network on its own, weighted as `clean_weight`: (loss [B], t [B]).

        count: of the samples of which x are the batch's rows
        cells: factors [B, 1, H, W] or [B, N, 1, H, W] on the squared errors
        """
        t, eps = batch.timesteps(count), batch.normal((count, *x.shape[1:]))
        estimate = self._model(network, condition)(add_noise(x, eps, t, self.schedule), t)
        error = (eps - estimate).square()
        if cells is not None:
            error = error * cells
        weight = self.clean_weight(t, 1.0, network.data_std)
        return error.flatten(1).mean(1) * weight, t

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
        losses = {}
        extra = options.extra_images
        if options.train == "base":
            extra += options.batch_size
        else:
            losses = self._clip_losses(batch)
        if options.train != "residual" and _some(
            batch.rows(extra)
        ):  # eq. (4) on further base frames
            loss, t = self._image_loss(batch, extra)
            if "base" in losses:
                loss = torch.cat([losses["base"][0], loss])
                t = torch.cat([losses["base"][1], t])
            losses["base"] = loss, t
        return losses

    def _clip_losses(self, batch: BatchSampler) -> Losses:
        """The joint loss on B clips."""
        base, residual = self.networks.get("base"), self.networks["residual"]
        options, lam = self.options, self.config.lam
        count = options.batch_size
        x, condition, figure = batch.clips(count)
        m, of_frames = base_index(x.shape[1]), (count, *x.shape[2:])
        t = batch.timesteps(count)
        b, r = batch.normal(of_frames), batch.normal((count, *x.shape[1:]))
        exact = batch.uniform(count) < options.clean_share
        jitter = self._jitter(batch, exact, of_frames)
        signal, _ = self.schedule.signal_and_noise(t, x[:, m])
        paint = self._model(residual, condition)

        def residual_model(z, t):
            z = z.clone()
            z[:, m] += signal * jitter
            return paint(z, t)

        alone = options.only_exact_bases  # no estimate of b is needed
        base_loss, residual_loss = joint_loss(
            (lambda z, t: torch.zeros_like(z)) if alone else self._model(base, condition),
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
        return {name: losses[name] for name in self.trained}

    def _image_loss(self, batch: BatchSampler, count: int) -> tuple[Tensor, Tensor]:
        """The base network's loss on the base frames of `count` clips."""
        x, condition, figure = batch.clips(count, only_base=True)
        cells = self._cells(figure)
        return self._eps_loss(self.networks["base"], x, condition, batch, count, cells)

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
        return {"video": self._eps_loss(self.networks["video"], x, condition, batch, count)}

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
