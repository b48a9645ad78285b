"""VideoFusionPipeline: from a checkpoint and a label to the frames of a clip.

Two phases (vfengine/sampling): the base generator walks the base frame's path, at the cost of
one image; then the residual generator makes all frames along that path. Each network's weights are
read when its phase first needs them, and on a CPU the base network leaves memory between the
phases, so that the peak is the larger of the two and not their sum (`offload_base`).

States are kept in fp32 whatever the dtype of the weights. The noise of sample k depends on the
seeds and on k alone (vfengine/diffusion/noise.py), never on the batch it is made in.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..devices import chosen_device, chosen_dtype, usable_device
from ..diffusion.base_path import BaseTrajectory
from ..diffusion.decompose import Lam, frame_weights
from ..diffusion.noise import NoisePlace, base_noise, check_seed, residual_noise
from ..diffusion.solvers import SolverTable, solver_table
from ..formats.checkpoint import DEFAULT, CheckpointConfig, read_config
from ..media.pictures import to_frames, to_network, to_uint8
from ..models import PlannedUNet, UNet
from ..names import AUTO, BASE_PATHS, OUTPUT_TYPES
from ..sampling.guidance import Condition
from ..sampling.loop import Callback
from ..sampling.run import Run, zero_timings
from ..sampling.two_phase import Motion
from ..sampling.windows import choose_windows
from .base_cache import cached_path
from .base_unet import PretrainedBase, pretrained_base
from .session import Session

__all__ = ["VideoFusionOutput", "VideoFusionPipeline", "to_uint8", "usable_device"]

MAX_GUIDANCE_SCALE = 100.0


@dataclass(frozen=True, eq=False)
class VideoFusionOutput:
    """What a call of the pipeline returns.

    frames:     "np": float32 [B, N, H, W, C] in 0..1; "pt": float32 tensor [B, N, C, H, W] in 0..1
                on the pipeline's device; "pil": B clips, each a list of N PIL images
    trajectory: the base path, to save and to use again; None for a plain video model
    timings:    seconds, {"load", "base", "residual"}: reading weights, and the two phases; phases
                that overlap count as "residual", and so do all steps of a plain video model
    """

    frames: np.ndarray | Tensor | list[list[Image.Image]]
    trajectory: BaseTrajectory | None
    timings: dict[str, float]


class VideoFusionPipeline:
    """A decomposed video diffusion model, ready to sample; made by `from_pretrained`.

    A VDM*, the plain video model that decomposed ones are compared with, is sampled by the same
    call, without what only a base path allows.
    """

    def __init__(
        self,
        config: CheckpointConfig,
        folder: Path,
        device: torch.device,
        dtype: torch.dtype,
        capture: bool,
        base: PretrainedBase | None = None,
    ) -> None:
        if base is not None:  # paths and caches name the network that walks
            config = replace(config, sha256={**config.sha256, "base": base.fingerprint})
        self.config = config
        self.schedule = config.noise_schedule()
        self.folder = folder
        self.device = device
        self.dtype = dtype
        self._session = Session(config, folder, device, dtype, capture, base)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path | None = None,
        *,
        device: torch.device | str = AUTO,
        dtype: torch.dtype | str = AUTO,
        capture: bool = True,
        base_unet: str | Path | UNet | PlannedUNet | None = None,
        base_prediction_type: str | None = None,
    ) -> VideoFusionPipeline:
        """The pipeline of a checkpoint folder; None is the default checkpoint of the package.

        device:  "cpu", "cuda" or "cuda:<index>"; "auto" is CUDA where torch can use it, else the
                 CPU
        dtype:   of weights and activations: float32, bfloat16 or float16; "auto" is bfloat16 where
                 that is faster (vfengine/devices.py), else float32. On CUDA float32 is no TF32, in
                 convolutions either, unless torch.set_float32_matmul_precision allows it
        capture: on CUDA, replay each phase's step from a graph, which later calls use again if only
                 noise, seeds (where η = 0) and labels differ; it goes with its network
                 (offload_base). Has no meaning on a CPU
        base_unet: an image UNet that walks the base path in place of the checkpoint's own network:
                 a source of `models.load_unet`, or a UNet of this device and dtype, which "auto"
                 then stands for. It must fit the clips' channels and the noise schedule; one that
                 needs a context (a prompt) is refused, and one without classes leaves labels to the
                 residual network
        base_prediction_type: what it predicts, "epsilon" or "v_prediction"; None is what the
                 scheduler of its pipeline says, or "epsilon"

        Raises FileNotFoundError for a missing checkpoint; ValueError for one that is broken, and
        for a device, dtype or base_unet that cannot be used. The weights are read by the first
        call, but those of a base_unet at once, for their SHA-256.
        """
        if isinstance(base_unet, (UNet, PlannedUNet)):
            device = next(base_unet.parameters()).device if device == AUTO else device
            dtype = base_unet.dtype if dtype == AUTO else dtype
        device = chosen_device(device)
        dtype = chosen_dtype(dtype, device)
        folder = DEFAULT if path is None else Path(path)
        config = read_config(folder)
        if base_unet is None:
            if base_prediction_type is not None:
                raise ValueError("base_prediction_type is that of a base_unet, and none is given")
            return cls(config, folder, device, dtype, capture)
        base = pretrained_base(base_unet, config, device, dtype, base_prediction_type)
        return cls(config, folder, device, dtype, capture, base)

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels that the model knows."""
        return self.config.labels

    def __call__(
        self,
        label: str | Sequence[str] | None = None,
        *,
        num_frames: int | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 2.0,
        base_seed: int = 0,
        residual_seed: int = 1,
        base_path: str | None = None,
        output_type: str = "np",
        num_videos: int = 1,
        num_residuals: int = 1,
        solver: str = "ddim",
        eta: float = 0.0,
        lam: Lam | None = None,
        trajectory: BaseTrajectory | None = None,
        image: Image.Image | None = None,
        base_cache: str | Path | None = None,
        window: int | None = None,
        window_overlap: int | None = None,
        overlap_phases: bool = False,
        offload_base: bool | None = None,
        sample_offset: int = 0,
        callback: Callback | None = None,
    ) -> VideoFusionOutput:
        """Makes num_videos clips of each label; B = num_videos times the number of labels.

        label:          one of `labels`, several of them, or None for no condition
        num_frames:     N; None is what the model was trained on
        guidance_scale: s of classifier-free guidance, ε_u + s (ε_c - ε_u), in [0, 100]; 1 is off
        base_seed, residual_seed: what the base frames and the frames' own noise are drawn from
        base_path:      "stepwise" (the paper) or "clean" (the base frame is finished, then
                        animated); None is the one that the checkpoint names as the better
        num_residuals:  K motions of one base path, B = K; of one label and one video. Their base
                        frame is that of sample 0, whatever the sample_offset of the motions
        solver, eta:    see `solvers.solver_table`
        lam:            λ, a number or [N]; None is the λ of training
        trajectory:     a base path to use instead of walking one, of 1 or of B clips; see
                        `check_trajectory`
        image:          a picture to animate, cropped and resized to the model's size; it becomes
                        the base frame. For models whose `config.animates_pictures` says so
        base_cache:     a folder where base paths are looked up, and kept (pipelines/base_cache.py)
        window, window_overlap: frames that the residual network sees at a time, and how many of
                        them two neighbouring windows share (sampling/windows.py). None: windows of
                        the trained length where num_frames is larger; window=0: none
        overlap_phases: run both phases at once, see `sampling.sample`; stepwise paths only
        offload_base:   let the base network's weights go before the residual phase, and read them
                        again when next needed; None does so on a CPU when one label is asked for,
                        on CUDA only where the residual network would find no room beside them
        sample_offset:  index of the first sample, where the call is a part of a larger batch
        callback:       called as callback(phase, steps done, steps in all), first with 0 done;
                        phase is "base", then "residual"; "video" for a plain video model

        Raises ValueError for an unknown label and for anything out of range or of no use together,
        TypeError for a seed that is no int, for the checkpoint's files what `from_pretrained`
        raises, and RuntimeError for a step that cannot be captured.
        """
        config = self.config
        num_frames = config.num_frames if num_frames is None else num_frames
        _checked_choice("base_path", base_path, (None, *BASE_PATHS))
        _checked_choice("output_type", output_type, OUTPUT_TYPES)
        _check_count("num_frames", num_frames)
        _check_count("num_residuals", num_residuals)
        check_seed(residual_seed, "residual_seed")
        classes = self._classes(label, num_videos, guidance_scale)
        walk = {"num_inference_steps": num_inference_steps, "solver": solver, "eta": eta}
        if config.objective == "vdm":
            self._refuse(
                base_path=base_path, trajectory=trajectory, image=image, base_cache=base_cache,
                window=window, window_overlap=window_overlap, lam=lam, offload_base=offload_base,
                overlap_phases=overlap_phases or None,
                num_residuals=None if num_residuals == 1 else num_residuals,
            )  # fmt: skip
            place = NoisePlace(residual_seed, sample_offset)
            condition = Condition(classes, guidance_scale)
            return self._video(condition, num_frames, output_type, Run(callback), place, **walk)
        lam = config.lam if lam is None else lam
        frame_weights(lam, num_frames)
        windows = choose_windows(num_frames, config.num_frames, window, window_overlap, lam=lam)
        if num_residuals > 1 and len(classes) > 1:
            raise ValueError(
                f"num_residuals={num_residuals} is of one base path, {len(classes)} are asked for"
            )
        trajectory = self._given(trajectory, image, base_path, base_cache, walk)
        if trajectory is not None:
            self.check_trajectory(trajectory, len(classes), base_path=base_path, **walk)
        clean = (base_path or config.base_path) == "clean"
        if overlap_phases:
            _check_overlap(clean, trajectory, base_cache, offload_base)
        self._session.check_complete("residual")

        run = Run(callback)
        batch = max(len(classes), num_residuals)
        noise = self._residual_noise(batch, num_frames, residual_seed, sample_offset)
        place = NoisePlace(residual_seed, sample_offset)
        motion = Motion(lam, windows)
        condition = Condition(classes.expand(batch), guidance_scale)
        base_offset = sample_offset if num_residuals == 1 else 0
        if overlap_phases:
            check_seed(base_seed, "base_seed")
            table = solver_table(schedule=self.schedule, **walk)
            drawn = self._base_noise(len(classes), base_seed, base_offset)
            conditions = Condition(classes, guidance_scale), condition
            places = NoisePlace(base_seed, base_offset), place
            video, states = self._session.overlapped(
                (drawn, noise), conditions, table, motion, places, run
            )
            trajectory = self._trajectory(states, table, label, guidance_scale, base_seed)
            return VideoFusionOutput(to_frames(video, output_type), trajectory, run.timings)
        if trajectory is None:
            trajectory = self.walk_base(
                label, num_videos=num_videos, guidance_scale=guidance_scale, base_seed=base_seed,
                sample_offset=base_offset, base_cache=base_cache, callback=callback,
                timings=run.timings, **walk,
            )  # fmt: skip
        if self.lets_base_go(not _is_one(label)) if offload_base is None else offload_base:
            self._session.release("base")
        stepwise = trajectory.base_path == "stepwise"
        path = trajectory.clean() if clean and stepwise else trajectory
        video = self._session.residual(noise, condition, path, motion, place, run)
        return VideoFusionOutput(to_frames(video, output_type), trajectory, run.timings)

    def walk_base(
        self,
        label: str | Sequence[str] | None = None,
        *,
        num_inference_steps: int = 50,
        guidance_scale: float = 2.0,
        base_seed: int = 0,
        num_videos: int = 1,
        solver: str = "ddim",
        eta: float = 0.0,
        sample_offset: int = 0,
        base_cache: str | Path | None = None,
        callback: Callback | None = None,
        timings: dict[str, float] | None = None,
    ) -> BaseTrajectory:
        """The base phase alone: a stepwise path; its `final` [B, C, H, W] previews the base frames.

        timings: a dict to add the seconds to ("load", "base"); the rest as in `__call__`.
        """
        if self.config.objective == "vdm":
            raise ValueError(f"{self.folder}: a plain video model has no base path")
        classes = self._classes(label, num_videos, guidance_scale)
        check_seed(base_seed, "base_seed")
        table = solver_table(solver, self.schedule, num_inference_steps, eta)

        def walk() -> BaseTrajectory:
            noise = self._base_noise(len(classes), base_seed, sample_offset)
            run = Run(callback, zero_timings() if timings is None else timings)
            condition = Condition(classes, guidance_scale)
            place = NoisePlace(base_seed, sample_offset)
            states = self._session.base(noise, condition, table, place, run)
            return self._trajectory(states, table, label, guidance_scale, base_seed)

        if base_cache is None:
            return walk()
        config = self.config
        if not config.fingerprint():
            raise ValueError(f"{self.folder}: no base cache for weights without a recorded SHA-256")
        key = {
            **self._notes(label, guidance_scale, base_seed),
            "network": config.base.identity(), "base_std": config.base_std,
            "shape": [len(classes), config.channels, config.height, config.width],
            "classes": classes.tolist(), "sample_offset": sample_offset,
            "schedule": self.schedule.fingerprint(), "timesteps": table.timesteps.tolist(),
            "solver": solver, "eta": table.eta, "dtype": str(self.dtype),
        }  # fmt: skip
        return cached_path(base_cache, key, walk).to(self.device)

    def preview(
        self,
        label: str | Sequence[str] | None = None,
        *,
        output_type: str = "np",
        **settings: Any,
    ) -> VideoFusionOutput:
        """The base frames alone, as clips of one frame: bit for bit those that the clips will have.

        settings: of `walk_base`. At the cost of one image; its trajectory goes on to the clips.
        """
        _checked_choice("output_type", output_type, OUTPUT_TYPES)
        timings = zero_timings()
        trajectory = self.walk_base(label, timings=timings, **settings)
        frames = to_frames(trajectory.final[:, None], output_type)
        return VideoFusionOutput(frames, trajectory, timings)

    def image_path(
        self,
        image: Image.Image,
        *,
        num_inference_steps: int = 50,
        solver: str = "ddim",
        eta: float = 0.0,
    ) -> BaseTrajectory:
        """The base path of a picture, cropped in the middle and resized to the model's size.

        Raises ValueError for a model whose residual network was not trained for it.
        """
        config = self.config
        if not config.animates_pictures:
            raise ValueError(
                f"{self.folder}: this model cannot animate a picture: its residual network was not "
                "trained for base_path='clean'"
            )
        return BaseTrajectory.from_image(
            to_network(image, config.channels, config.height, config.width).to(self.device),
            schedule=self.schedule, num_inference_steps=num_inference_steps, solver=solver,
            eta=eta, metadata={"model": config.fingerprint()},
        )  # fmt: skip

    def check_trajectory(
        self,
        trajectory: BaseTrajectory,
        num_clips: int = 1,
        *,
        num_inference_steps: int = 50,
        solver: str = "ddim",
        eta: float = 0.0,
        base_path: str | None = None,
    ) -> None:
        """ValueError, naming both sides, when this model cannot follow a base path as asked.

        The path must have been walked by this base network, or come from an image; on this noise
        schedule, with these steps, solver and eta; for 1 or num_clips clips of this size; and a
        clean one (of an image) cannot be followed stepwise.
        """
        config = self.config
        maker = trajectory.metadata.get("model", config.fingerprint())
        if maker != config.fingerprint():
            raise ValueError(
                f"the base trajectory was made by another model ({maker}, not "
                f"{config.fingerprint()})"
            )
        trajectory.check_schedule(self.schedule)
        table = solver_table(solver, self.schedule, num_inference_steps, eta)
        made, asked = trajectory.table, table
        for name, theirs, ours in (
            ("num_inference_steps", len(made), len(asked)),
            ("solver", made.solver, asked.solver),
            ("eta", made.eta, asked.eta),
            ("timesteps", made.timesteps.tolist(), asked.timesteps.tolist()),
        ):
            if theirs != ours:
                raise ValueError(
                    f"the base trajectory was made with {name} {theirs}, but {ours} is asked for"
                )
        if base_path == "stepwise" and trajectory.base_path == "clean":
            raise ValueError("the base trajectory is of an image: its base_path can only be clean")
        picture = [config.channels, config.height, config.width]
        clips, *theirs = trajectory.final.shape
        if theirs != picture:
            raise ValueError(
                f"the base trajectory's frames are [C, H, W] = {theirs}, this model's are {picture}"
            )
        if clips not in (1, num_clips):
            wanted = "not the 1" if num_clips == 1 else f"neither 1 nor the {num_clips}"
            raise ValueError(f"the base trajectory holds {clips} clips, {wanted} asked for")

    def lets_base_go(self, needed_again: bool) -> bool:
        """What offload_base=None does: `Session.lets_base_go`."""
        return self._session.lets_base_go(needed_again)

    # -- inside ------------------------------------------------------------------------------------

    def _classes(
        self, label: str | Sequence[str] | None, num_videos: int, guidance_scale: float
    ) -> Tensor:
        """The class index of every clip, int64 [B]; checks what conditions both phases."""
        _check_count("num_videos", num_videos)
        if not 0.0 <= guidance_scale <= MAX_GUIDANCE_SCALE:  # also refuses NaN
            limit = f"[0, {MAX_GUIDANCE_SCALE:g}]"
            raise ValueError(f"guidance_scale must be in {limit}, got {guidance_scale!r}")
        names = [label] if label is None or isinstance(label, str) else list(label)
        if not names:
            raise ValueError("label is an empty list")
        for name in names:
            if name is not None and name not in self.labels:
                known = ", ".join(self.labels) or "none: this model takes no label"
                raise ValueError(f"unknown label {name!r}, expected one of: {known}")
        null = self.config.null_class
        indices = [null if name is None else self.labels.index(name) for name in names]
        return torch.tensor(indices, device=self.device).repeat_interleave(num_videos)

    def _given(
        self,
        trajectory: BaseTrajectory | None,
        image: Image.Image | None,
        base_path: str | None,
        base_cache: str | Path | None,
        walk: dict[str, Any],
    ) -> BaseTrajectory | None:
        """The base path that the call brings along, its own or a picture's; None: it is walked."""
        if image is not None:
            if trajectory is not None or base_path == "stepwise":
                other = "a trajectory" if trajectory is not None else "base_path='stepwise'"
                raise ValueError(f"an image has a base path of its own: {other} cannot go with it")
            trajectory = self.image_path(image, **walk)
        if trajectory is not None and base_cache is not None:
            raise ValueError("base_cache keeps paths that are walked, but one is given")
        return trajectory

    def _video(
        self, condition: Condition, num_frames: int, output_type: str, run: Run,
        place: NoisePlace, **walk: Any,
    ) -> VideoFusionOutput:  # fmt: skip
        """A call of a plain video model."""
        table = solver_table(schedule=self.schedule, **walk)
        noise = self._residual_noise(
            len(condition.classes), num_frames, place.seed, place.sample_offset
        )
        video = self._session.video(noise, condition, table, place, run)
        return VideoFusionOutput(to_frames(video, output_type), None, run.timings)

    def _base_noise(self, batch: int, seed: int, sample_offset: int) -> Tensor:
        config = self.config
        shape = (batch, config.channels, config.height, config.width)
        return base_noise(shape, seed, sample_offset=sample_offset, device=self.device)

    def _residual_noise(self, batch: int, frames: int, seed: int, sample_offset: int) -> Tensor:
        config = self.config
        shape = (batch, frames, config.channels, config.height, config.width)
        return residual_noise(shape, seed, sample_offset=sample_offset, device=self.device)

    def _trajectory(
        self, states: Tensor, table: SolverTable, label, guidance_scale: float, base_seed: int
    ) -> BaseTrajectory:
        notes = self._notes(label, guidance_scale, base_seed)
        return BaseTrajectory(states, table, self.schedule.fingerprint(), metadata=notes)

    def _notes(self, label, guidance_scale: float, base_seed: int) -> dict[str, str]:
        """What is kept in a base path's metadata."""
        return {
            "model": self.config.fingerprint(),
            "labels": json.dumps([label] if label is None or isinstance(label, str) else [*label]),
            "base_seed": str(base_seed),
            "guidance_scale": repr(float(guidance_scale)),
        }

    def _refuse(self, **settings: Any) -> None:
        """ValueError for settings that a plain video model has no use for; None is not given."""
        given = [name for name, value in settings.items() if value is not None]
        if given:
            raise ValueError(
                f"{self.folder}: a plain video model has no base path, so it takes no "
                f"{', '.join(given)}"
            )


def _check_overlap(clean: bool, trajectory, base_cache, offload_base) -> None:
    """ValueError for what two phases at once cannot go with."""
    for asked, problem in (
        (trajectory is not None, "a given base path is there already"),
        (clean, "base_path='clean' finishes the base frame first; take 'stepwise'"),
        (base_cache is not None, "a base cache keeps finished paths"),
        (bool(offload_base), "offload_base frees the base network between them"),
    ):
        if asked:
            raise ValueError(f"overlap_phases runs both phases at once, but {problem}")


def _check_count(name: str, value: int) -> None:
    if type(value) is not int or value < 1:
        raise ValueError(f"{name} must be an int of at least 1, got {value!r}")


def _checked_choice(name: str, value: str | None, choices: Sequence[str | None]) -> str | None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {choices}, got {value!r}")
    return value


def _is_one(label: str | Sequence[str] | None) -> bool:
    return label is None or isinstance(label, str) or len(label) == 1
