"""The base phase of a decomposed model: base paths that are walked, given, of a picture or cached.

The part of `VideoFusionPipeline` that ends where the residual phase begins.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..diffusion.base_path import BaseTrajectory
from ..diffusion.noise import NoisePlace, base_noise, check_seed
from ..diffusion.solvers import SolverTable
from ..media.pictures import Picture, to_network
from ..sampling.guidance import Condition, Prompts
from ..sampling.run import Callback, Run
from .base_cache import cache_key, cached_path
from .few_steps import network_table
from .given_path import check_animates, check_path
from .pipeline import CheckpointPipeline, VideoFusionOutput
from .request import SamplingRequest


class BasePhase(CheckpointPipeline):
    """A pipeline of our own that can walk base paths."""

    def walk_base(
        self,
        label: str | Sequence[str] | None = None,
        *,
        prompt: str | Sequence[str] | None = None,
        negative_prompt: str | Sequence[str] = "",
        num_inference_steps: int | None = None,
        guidance_scale: float = 2.0,
        base_seed: int = 0,
        num_videos: int = 1,
        solver: str | None = None,
        eta: float = 0.0,
        sample_offset: int = 0,
        base_cache: str | Path | None = None,
        reuse_every: int = 1,
        callback: Callback | None = None,
        timings: dict[str, float] | None = None,
    ) -> BaseTrajectory:
        """The base phase alone: a stepwise path; its `final` [B, C, H, W] is the base frames.

        timings: a dict to add the seconds to ("load", "base"); the rest as in `__call__`.
        """
        request = SamplingRequest(
            label=label,
            prompt=prompt,
            negative_prompt=negative_prompt,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            base_seed=base_seed,
            num_videos=num_videos,
            solver=solver,
            eta=eta,
            sample_offset=sample_offset,
            base_cache=base_cache,
            preview=True,
            reuse_every=reuse_every,
        )
        return self.base_path_of(request, callback, timings)

    def base_path_of(
        self,
        request: SamplingRequest,
        callback: Callback | None = None,
        timings: dict[str, float] | None = None,
    ) -> BaseTrajectory:
        """The base path that a request walks: what `sample` would follow, bit for bit.

        timings: a dict to add the seconds to ("load", "base")
        """
        request = self.fill_defaults(request)
        run = self._run(callback) if timings is None else Run(callback, timings)
        return self._base_phase(request, self._condition(request, run), run)

    def base_cache_key(self, request: SamplingRequest) -> dict[str, object]:
        """The key in a base cache of the path that a request walks; no network runs.

        ValueError for an unknown label, and for a model that cannot be told from others.
        """
        scale = request.guidance_scale
        if self.config.text_encoder is None:
            return self._cache_key(request, Condition(self._classes(request), scale))
        # a key has the prompts' words and number, not their rows
        rows = torch.empty(request.num_paths, 0, 0, dtype=torch.float32, device="cpu")
        return self._cache_key(request, Prompts(rows, rows, scale))

    def preview(
        self,
        label: str | Sequence[str] | None = None,
        *,
        output_type: str = "np",
        callback: Callback | None = None,
        **settings: Any,
    ) -> VideoFusionOutput:
        """The base frames alone, as clips of one frame: bit for bit those that the clips will have.

        settings: of `walk_base`. This costs one image; pass its trajectory on to make the clips.
        """
        request = SamplingRequest(label=label, output_type=output_type, preview=True, **settings)
        return self.sample(request, callback)

    def image_path(
        self,
        image: Picture,
        *,
        num_inference_steps: int | None = None,
        solver: str | None = None,
        eta: float = 0.0,
    ) -> BaseTrajectory:
        """The base path of an image, cropped in the middle and resized to the model's size.

        Raises ValueError for a model whose residual network was not trained for it.
        """
        how = num_inference_steps, solver, eta
        table = network_table(self.config, "residual", *how)
        return self._image_path(image, table, self._run(None))

    def check_trajectory(
        self,
        trajectory: BaseTrajectory,
        num_clips: int = 1,
        *,
        num_inference_steps: int | None = None,
        solver: str | None = None,
        eta: float = 0.0,
        base_path: str | None = None,
    ) -> None:
        """ValueError, naming both sides, when this model cannot follow a base path.

        The path must come from this base network, or from an image. Its noise schedule, steps,
        solver and eta must be the same. It must hold 1 or num_clips clips of this size. A clean
        path (of an image) cannot be followed stepwise.
        """
        name = "residual" if trajectory.base_path == "clean" else "base"
        how = num_inference_steps, solver, eta
        table = network_table(self.config, name, *how)
        check_path(trajectory, self.config, self.schedule, table, num_clips, base_path)

    # -- inside ------------------------------------------------------------------------------------

    def _given_path(self, request: SamplingRequest, run: Run) -> BaseTrajectory | None:
        """The request's trajectory or the path of its image, checked; None without either."""
        path = request.trajectory
        if request.image is not None:
            table = self._table(request, "residual")
            path = self._image_path(request.image, table, run, keep=True)
        if path is not None:
            table = self._table(request, "residual" if path.base_path == "clean" else "base")
            paths, mode = request.num_paths, request.base_path
            check_path(path, self.config, self.schedule, table, paths, mode)
        return path

    def _image_path(
        self, image: Picture, table: SolverTable, run: Run, keep: bool = False
    ) -> BaseTrajectory:
        """`image_path`; keep: whether the autoencoder stays in memory on a CPU."""
        config = self.config
        check_animates(config, self.folder)
        x = to_network(image, config.picture_channels, *config.picture_size).to(self.device)
        if config.autoencoder is not None:
            mean, std = self._latent_scale()
            x = (self._session.encoded(x, run, keep) - mean) / std
        return BaseTrajectory.along(x, table, self.schedule, {"model": config.fingerprint()})

    def _base_phase(
        self,
        request: SamplingRequest,
        condition: Condition | Prompts,
        run: Run,
    ) -> BaseTrajectory:
        """The base path of a request, from its cache or sampled."""
        place, table = self._base_place(request), self._table(request, "base")

        def sample_path() -> BaseTrajectory:
            noise = self._base_noise(request, place)
            every = request.reuses("base")
            states = self._session.base(noise, condition, table, place, run, every)
            return self._path(request, states, table)

        if request.base_cache is None:
            return sample_path()
        key = self._cache_key(request, condition)
        return cached_path(request.base_cache, key, sample_path).to(self.device)

    def _cache_key(
        self, request: SamplingRequest, condition: Condition | Prompts
    ) -> dict[str, object]:
        """What a base path is found by; ValueError for a model that cannot be told from others."""
        if not self.config.fingerprint():
            raise ValueError(f"{self.folder}: no base cache for weights without a recorded SHA-256")
        found = (
            self._notes(request),
            self._table(request, "base"),
            condition,
            self._base_place(request),
        )
        return cache_key(self.config, *found, self.dtype)

    def _base_place(self, request: SamplingRequest) -> NoisePlace:
        """The place of the base frames' noise."""
        check_seed(request.base_seed, "base_seed")
        return NoisePlace(request.base_seed, request.first_base_sample)

    def _base_noise(self, request: SamplingRequest, place: NoisePlace) -> Tensor:
        """The initial noise of the base frames, b [B, C, H, W]."""
        config, offset = self.config, place.sample_offset
        shape = (request.num_paths, config.channels, config.height, config.width)
        device = self._session.base_device or self.device
        return base_noise(shape, place.seed, sample_offset=offset, device=device)

    def _path(self, request: SamplingRequest, states: Tensor, table: SolverTable) -> BaseTrajectory:
        notes = self._notes(request)
        return BaseTrajectory(states, table, self.schedule.fingerprint(), metadata=notes)

    def _notes(self, request: SamplingRequest) -> dict[str, str]:
        """The metadata of a base path; features that are reused are named only where they are."""
        every = request.reuses("base")
        return {
            "model": self.config.fingerprint(),
            **self.shown(request),
            "base_seed": str(request.base_seed),
            "guidance_scale": repr(float(request.guidance_scale)),
            **({} if every == 1 else {"reuse_every": str(every)}),
        }
