"""The common part of pipelines: a model on a device.

Those of our own checkpoints have labels, and noise of a size that the checkpoint names.
"""

from __future__ import annotations

import json
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
from ..diffusion.solvers import SolverTable
from ..formats.checkpoint import CheckpointConfig
from ..media.pictures import to_frames
from ..sampling.guidance import Condition, Prompts
from ..sampling.run import Callback, Run, zero_timings
from .few_steps import check_guidance, chosen_steps, distilled, network_table
from .loras import Loras
from .networks import Networks
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
                that overlap count as "residual", and so do all steps of a plain video model. Also
                "text" of a model with a text encoder, and "decode" of one with an autoencoder
    """

    frames: np.ndarray | Tensor | list[list[Image.Image]]
    trajectory: BaseTrajectory | None
    timings: dict[str, float]


class Pipeline:
    """A model, ready to sample.

    device:       of clips and base paths, and of all networks but for a base phase elsewhere
    request_type: the dataclass of its requests
    lacks:        for error texts: why it refuses settings that its requests do not have
    labels:       the labels that the model knows
    fingerprint:  16 hex digits that name its first network; None where no file holds its SHA-256
    loras:        the LoRA that is added to its weights
    """

    request_type: ClassVar[type[VideoRequest | TextRequest]]
    lacks: ClassVar[str]
    labels: tuple[str, ...] = ()
    fingerprint: str | None = None
    loras: Loras = Loras()
    folder: Path
    device: torch.device
    dtype: torch.dtype
    _session: Networks

    def place(self, phase: str) -> torch.device:
        """The device of a phase's network."""
        return self._session.place(phase)

    def keep_parts(self) -> None:
        """Readies the model for many calls: of our own, all of it may stay in memory.

        A text-to-video model's networks are large, and still take turns on a CPU.
        """

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
    """A checkpoint of our own, ready to sample."""

    request_type: ClassVar[type[VideoRequest]]
    _session: Session

    def __init__(
        self,
        config: CheckpointConfig,
        folder: Path,
        device: torch.device,
        dtype: torch.dtype,
        capture: bool,
        base: PretrainedBase | None = None,
        loras: Loras | None = None,
        base_device: torch.device | None = None,
    ) -> None:
        self.base_unet, self.loras = base, loras or Loras()
        if base is not None:
            config = replace(
                config,
                sha256={**config.sha256, "base": base.fingerprint},
                base=replace(config.base, guidance_embedding=False),
                distilled=distilled(config, ("residual",)) or None,
            )
        how = device, dtype, capture, base, self.loras.updates, base_device
        self._session = Session(config, folder, *how)
        # base paths and caches name the network that made them, with its LoRA
        self.config = config = replace(config, sha256=self.loras.digests(config.sha256))
        self.schedule = config.noise_schedule()
        self.folder = folder
        self.device = device
        self.dtype = dtype

    @property
    def labels(self) -> tuple[str, ...]:
        return self.config.labels

    @property
    def fingerprint(self) -> str:
        return self.config.fingerprint()

    def keep_parts(self) -> None:
        self._session.stays = True

    def check_fields(self, names: Iterable[str], spell: Callable[[str], str] = str) -> None:
        """Also ValueError for prompts, if the model knows labels alone."""
        names = list(names)
        super().check_fields(names, spell)
        prompts = [name for name in names if name in ("prompt", "negative_prompt")]
        if prompts and self.config.text_encoder is None:
            raise ValueError(
                f"{self.folder}: this model knows labels alone, so it takes no "
                f"{', '.join(map(spell, prompts))}"
            )

    def _check_prompts(self, request: VideoRequest) -> None:
        """ValueError for prompts of a request, if the model knows labels alone."""
        defaults = {"prompt": None, "negative_prompt": ""}
        self.check_fields(n for n, default in defaults.items() if getattr(request, n) != default)

    def phases(self, request: VideoRequest) -> tuple[str, ...]:
        """The phases that a request has, as its callback names them."""
        sampled = self._sampled_phases(request)
        text = ("text",) if sampled and self.config.text_encoder is not None else ()
        return (*text, *sampled, *(() if self.config.autoencoder is None else ("decode",)))

    def _sampled_phases(self, request: VideoRequest) -> tuple[str, ...]:
        """Those whose steps are the solver's."""
        raise NotImplementedError

    def work(self, request: VideoRequest) -> dict[str, int]:
        """The steps of each phase that a request has, as its callback names them.

        The text encoder's is one, and is left out where its result is known; a frame is a step of
        decoding.
        """
        work = {phase: len(self._table(request, phase)) for phase in self._sampled_phases(request)}
        frames = 1 if getattr(request, "preview", False) else request.num_frames
        counts = {"text": 1, "decode": request.num_clips * (frames or self.config.num_frames)}
        return {phase: work.get(phase) or counts[phase] for phase in self.phases(request)}

    def shown(self, request: VideoRequest) -> dict[str, str]:
        """What a request shows, as base paths note it: its labels, or its prompts; of JSON."""
        shown = {"labels": request.labels}
        if self.config.text_encoder is not None:
            shown = {"prompts": self._prompts(request), "negative_prompts": request.negatives}
        return {name: json.dumps(texts) for name, texts in shown.items()}

    # -- from a request to the values that travel below it -----------------------------------------

    def _run(self, callback: Callback | None) -> Run:
        """A run, whose timings are those of the phases that this model has."""
        text = () if self.config.text_encoder is None else ("text",)
        decode = () if self.config.autoencoder is None else ("decode",)
        return Run(callback, zero_timings(*text, *decode))

    def _condition(self, request: VideoRequest, run: Run) -> Condition | Prompts:
        """The condition of each of the labels or prompts, num_videos times."""
        scale = request.guidance_scale
        if self.config.text_encoder is None:
            return Condition(self._classes(request), scale)
        prompts, negatives = self._prompts(request), request.negatives
        guided = scale != 1.0 and prompts != negatives
        told = bool(self.config.distilled)  # the scale, even where it would change nothing
        rows = self._session.embedded([*prompts, *(negatives if guided else ())], run)
        rows = rows.repeat_interleave(request.num_videos, dim=0)
        context, negative = rows.chunk(2) if guided else (rows, rows)
        return Prompts(context, negative, scale if guided or told else 1.0)

    def _prompts(self, request: VideoRequest) -> list[str]:
        """The prompts of a request, or those that its labels stand for: "" for no label.

        Raises ValueError for an unknown label.
        """
        if request.prompt is not None:
            return request.labels
        self._check_labels(request)
        known = {None: "", **dict(zip(self.labels, self.config.prompts, strict=True))}
        return [known[label] for label in request.labels]

    def _classes(self, request: VideoRequest) -> Tensor:
        """The class index of every video, int64 [labels times num_videos]."""
        self._check_labels(request)
        indices = [
            self.config.null_class if label is None else self.labels.index(label)
            for label in request.labels
        ]
        return torch.tensor(indices, device=self.device, dtype=torch.int64).repeat_interleave(
            request.num_videos
        )

    def _check_labels(self, request: VideoRequest) -> None:
        """ValueError for an unknown label."""
        for label in request.labels:
            if label is not None and label not in self.labels:
                known = ", ".join(self.labels) or "none: this model takes no label"
                raise ValueError(f"unknown label {label!r}, expected one of: {known}")

    def _table(self, request: VideoRequest, name: str) -> SolverTable:
        """The steps of a phase; ValueError for steps that its network was not made for."""
        how = request.num_inference_steps, request.solver, request.eta
        return network_table(self.config, name, *how)

    def _chosen_steps(self, request: VideoRequest) -> dict[str, object]:
        """Its steps, by their fields; ValueError for how a distilled network cannot be sampled."""
        names = self._sampled_phases(request)
        check_guidance(self.config, names, request)
        how = request.num_inference_steps, request.solver, request.eta
        return chosen_steps(self.config, names, *how)._asdict()

    def _clip_place(self, request: VideoRequest) -> NoisePlace:
        check_seed(request.residual_seed, "residual_seed")
        return NoisePlace(request.residual_seed, request.sample_offset)

    def _clip_noise(self, request: VideoRequest, place: NoisePlace) -> Tensor:
        """The initial noise of the clips, r [B, N, C, H, W]."""
        config, offset = self.config, place.sample_offset
        size = (config.channels, config.height, config.width)
        shape = (request.num_clips, request.num_frames, *size)
        return residual_noise(shape, place.seed, sample_offset=offset, device=self.device)

    # -- from what was sampled to frames -----------------------------------------------------------

    def _frames(
        self, video: Tensor, output_type: str, run: Run, keep: bool = False
    ) -> np.ndarray | Tensor | list[list[Image.Image]]:
        """Frames of what the networks made, pixels or latents [B, N, C, h, w].

        keep: whether the autoencoder stays in memory on a CPU
        """
        if self.config.autoencoder is not None:
            mean, std = self._latent_scale()
            video = self._session.decoded(video * std + mean, run, keep)
        return to_frames(video, output_type)

    def _latent_scale(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the autoencoder's latents, [C, 1, 1]."""
        values = (self.config.latent_mean, self.config.latent_std)
        return tuple(
            torch.tensor(v, device=self.device, dtype=torch.float32).view(-1, 1, 1) for v in values
        )
