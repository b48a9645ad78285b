"""The common part of pipelines: a model on a device.

Those of our own checkpoints have labels, and noise of a size that the checkpoint names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..diffusion.base_path import BaseTrajectory
from ..diffusion.noise import NoisePlace, check_seed, residual_noise
from ..diffusion.solvers import SolverTable, solver_table
from ..formats.checkpoint import CheckpointConfig
from ..sampling.guidance import Condition
from .request import TextRequest, VideoRequest
from .session import Session

if TYPE_CHECKING:
    from .base_unet import PretrainedBase


@dataclass(frozen=True, eq=False)
class VideoFusionOutput:
    """The result of a call of a pipeline.

    frames:     "np": float32 [B, N, H, W, C] in 0..1; "pt": float32 tensor [B, N, C, H, W] in 0..1
                on the pipeline's device; "pil": B clips, each a list of N PIL images
    trajectory: the base path, to save and to use again; None for a plain video model
    timings:    seconds, {"load", "base", "residual"}: reading weights, and the two phases; phases
                that overlap count as "residual", and so do all steps of a plain video model
    """

    frames: np.ndarray | Tensor | list[list[Image.Image]]
    trajectory: BaseTrajectory | None
    timings: dict[str, float]


class Pipeline:
    """A model, ready to sample on one device.

    request_type: the dataclass of its requests
    lacks:        for error texts: why it refuses settings that its requests do not have
    labels:       the labels that the model knows
    fingerprint:  16 hex digits that name its first network; None where no file holds its SHA-256
    """

    request_type: ClassVar[type[VideoRequest | TextRequest]]
    lacks: ClassVar[str]
    labels: tuple[str, ...] = ()
    fingerprint: str | None = None
    folder: Path
    device: torch.device
    dtype: torch.dtype

    def check_fields(self, names: Iterable[str], spell: Callable[[str], str] = str) -> None:
        """ValueError for settings that only models of another kind have.

        spell: how the caller writes a setting's name
        """
        foreign = self.request_type.foreign(names)
        if foreign:
            raise ValueError(
                f"{self.folder}: {self.lacks}, so it takes no {', '.join(map(spell, foreign))}"
            )


class CheckpointPipeline(Pipeline):
    """A checkpoint of our own, ready to sample on one device."""

    request_type: ClassVar[type[VideoRequest]]

    def __init__(
        self,
        config: CheckpointConfig,
        folder: Path,
        device: torch.device,
        dtype: torch.dtype,
        capture: bool,
        base: PretrainedBase | None = None,
    ) -> None:
        if base is not None:  # base paths and caches name the network that made them
            config = replace(config, sha256={**config.sha256, "base": base.fingerprint})
        self.config = config
        self.schedule = config.noise_schedule()
        self.folder = folder
        self.device = device
        self.dtype = dtype
        self._session = Session(config, folder, device, dtype, capture, base)

    @property
    def labels(self) -> tuple[str, ...]:
        return self.config.labels

    @property
    def fingerprint(self) -> str:
        return self.config.fingerprint()

    def work(self, request: VideoRequest) -> dict[str, int]:
        """The steps of each phase that a request has, as its callback names them."""
        return dict.fromkeys(self.phases(request), request.num_inference_steps)

    # -- from a request to the values that travel below it -----------------------------------------

    def _classes(self, request: VideoRequest) -> Tensor:
        """The class index of every video, int64 [labels times num_videos]."""
        for label in request.labels:
            if label is not None and label not in self.labels:
                known = ", ".join(self.labels) or "none: this model takes no label"
                raise ValueError(f"unknown label {label!r}, expected one of: {known}")
        indices = [
            self.config.null_class if label is None else self.labels.index(label)
            for label in request.labels
        ]
        return torch.tensor(indices, device=self.device).repeat_interleave(request.num_videos)

    def _table(self, request: VideoRequest) -> SolverTable:
        steps, eta = request.num_inference_steps, request.eta
        return solver_table(request.solver, self.schedule, steps, eta)

    def _clip_condition(self, request: VideoRequest) -> Condition:
        """The condition of every clip; clips that share a base path share its condition."""
        classes = self._classes(request).expand(request.num_clips)
        return Condition(classes, request.guidance_scale)

    def _clip_place(self, request: VideoRequest) -> NoisePlace:
        check_seed(request.residual_seed, "residual_seed")
        return NoisePlace(request.residual_seed, request.sample_offset)

    def _clip_noise(self, request: VideoRequest, place: NoisePlace) -> Tensor:
        """The initial noise of the clips, r [B, N, C, H, W]."""
        config, offset = self.config, place.sample_offset
        size = (config.channels, config.height, config.width)
        shape = (request.num_clips, request.num_frames, *size)
        return residual_noise(shape, place.seed, sample_offset=offset, device=self.device)
