"""VideoFusionPipeline: from a checkpoint and a label to the frames of a clip.

Two phases (vfengine/sampling.py): the base generator walks the base frame's path, at the cost of
one image; then the residual generator makes all frames along that path. Each network's weights are
read when its phase first needs them, and with keep_base=False the base network leaves memory
between the phases, so that the peak is the larger of the two and not their sum.

States are kept in fp32 whatever the dtype of the weights. The noise of sample k depends on the
seeds and on k alone (vfengine/noise.py), never on the batch it is made in.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from .checkpoint import DEFAULT, CheckpointConfig, load_base, load_residual, read_config
from .decompose import Model, base_noise, frame_weights, residual_noise
from .noise import check_seed
from .sampling import Lam, sample_base, sample_residual
from .solvers import solver_table
from .trajectory import BASE_PATHS, BaseTrajectory

OUTPUT_TYPES = ("np", "pt", "pil")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_GUIDANCE_SCALE = 100.0

Callback = Callable[[str, int, int], None]


@dataclass(frozen=True, eq=False)
class VideoFusionOutput:
    """What a call of the pipeline returns.

    frames:     "np": float32 [B, N, H, W, C] in 0..1; "pt": float32 tensor [B, N, C, H, W] in 0..1
                on the pipeline's device; "pil": B clips, each a list of N PIL images
    trajectory: the base path, to save and to use again
    timings:    seconds, {"load", "base", "residual"}: reading weights, and the two phases
    """

    frames: np.ndarray | Tensor | list[list[Image.Image]]
    trajectory: BaseTrajectory
    timings: dict[str, float]


class VideoFusionPipeline:
    """A decomposed video diffusion model, ready to sample; made by `from_pretrained`."""

    def __init__(
        self,
        config: CheckpointConfig,
        folder: Path,
        device: torch.device,
        dtype: torch.dtype,
        keep_base: bool,
    ) -> None:
        self.config = config
        self.schedule = config.noise_schedule()
        self.folder = folder
        self.device = device
        self.dtype = dtype
        self.keep_base = keep_base
        self._networks: dict[str, nn.Module] = {}

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path | None = None,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        keep_base: bool = True,
    ) -> VideoFusionPipeline:
        """The pipeline of a checkpoint folder; None is the default checkpoint of the package.

        device:    "cpu", "cuda" or "cuda:<index>"
        dtype:     of weights and activations: float32, bfloat16 or float16
        keep_base: False drops the base network after each base phase (it is read again if needed)

        Raises FileNotFoundError for a missing checkpoint; ValueError for one that is broken, and
        for a device or dtype that cannot be used. The weights are read by the first call.
        """
        if dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {DTYPES}, got {dtype!r}")
        folder = DEFAULT if path is None else Path(path)
        return cls(read_config(folder), folder, usable_device(device), dtype, keep_base)

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
        solver: str = "ddim",
        eta: float = 0.0,
        lam: Lam | None = None,
        trajectory: BaseTrajectory | None = None,
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
        solver, eta:    see `solvers.solver_table`
        lam:            λ, a number or [N]; None is the λ of training
        trajectory:     a base path to use instead of walking one, of 1 or of B clips; see
                        `check_trajectory`
        sample_offset:  index of the first sample, where the call is a part of a larger batch
        callback:       called as callback(phase, steps done, steps in all), first with 0 done;
                        phase is "base", then "residual"

        Raises ValueError for an unknown label and for anything out of range, TypeError for a seed
        that is no int, and for the checkpoint's files what `from_pretrained` raises.
        """
        config = self.config
        num_frames = config.num_frames if num_frames is None else num_frames
        lam = config.lam if lam is None else lam
        base_path = _checked_choice("base_path", base_path, (None, *BASE_PATHS))
        _checked_choice("output_type", output_type, OUTPUT_TYPES)
        _check_count("num_frames", num_frames)
        frame_weights(lam, num_frames)
        check_seed(residual_seed, "residual_seed")
        classes = self._classes(label, num_videos, guidance_scale)
        walk = {"num_inference_steps": num_inference_steps, "solver": solver, "eta": eta}
        if trajectory is not None:
            self.check_trajectory(trajectory, len(classes), base_path=base_path, **walk)
        self._check_complete("residual")

        timings = {"load": 0.0, "base": 0.0, "residual": 0.0}
        if trajectory is None:
            trajectory = self.walk_base(
                label, num_videos=num_videos, guidance_scale=guidance_scale, base_seed=base_seed,
                sample_offset=sample_offset, callback=callback, timings=timings, **walk,
            )  # fmt: skip
        path = trajectory
        if (base_path or config.base_path) == "clean" and trajectory.base_path == "stepwise":
            path = trajectory.clean()

        model = self._guided("residual", classes, guidance_scale, timings, lam=lam)
        shape = (len(classes), num_frames, config.channels, config.height, config.width)
        noise = residual_noise(
            shape, residual_seed, sample_offset=sample_offset, device=self.device
        )
        with self._timed("residual", timings):
            if callback is not None:
                callback("residual", 0, num_inference_steps)
            video = sample_residual(
                model, path, noise, lam=lam, residual_seed=residual_seed,
                sample_offset=sample_offset, callback=callback,
            )  # fmt: skip
        return VideoFusionOutput(_frames(video, output_type), trajectory, timings)

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
        callback: Callback | None = None,
        timings: dict[str, float] | None = None,
    ) -> BaseTrajectory:
        """The base phase alone: a stepwise path; its `final` [B, C, H, W] previews the base frames.

        timings: a dict to add the seconds to ("load", "base"); the rest as in `__call__`.
        """
        config, timings = self.config, {} if timings is None else timings
        classes = self._classes(label, num_videos, guidance_scale)
        solver_table(solver, self.schedule, num_inference_steps, eta)
        shape = (len(classes), config.channels, config.height, config.width)
        noise = base_noise(shape, base_seed, sample_offset=sample_offset, device=self.device)
        notes = {
            "model": config.fingerprint(),
            "labels": json.dumps([label] if label is None or isinstance(label, str) else [*label]),
            "base_seed": str(base_seed),
            "guidance_scale": repr(float(guidance_scale)),
        }
        model = self._guided("base", classes, guidance_scale, timings)
        with self._timed("base", timings):
            if callback is not None:
                callback("base", 0, num_inference_steps)
            trajectory = sample_base(
                model, noise, schedule=self.schedule, num_inference_steps=num_inference_steps,
                solver=solver, eta=eta, base_seed=base_seed, sample_offset=sample_offset,
                metadata=notes, callback=callback,
            )  # fmt: skip
        if not self.keep_base:
            self._networks.pop("base")
        return trajectory

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
            raise ValueError(
                f"the base trajectory holds {clips} clips, neither 1 nor the {num_clips} asked for"
            )

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

    def _guided(
        self, name: str, classes: Tensor, scale: float, timings: dict[str, float], **conditions: Any
    ) -> Model:
        """The named network as (z, t) -> ε = ε_u + s (ε_c - ε_u)   (Ho & Salimans 2022, eq. 6).

        Both estimates come from one call on a doubled batch; where they are the same, or s = 1, the
        second is left out.
        """
        if name not in self._networks:
            load = {"base": load_base, "residual": load_residual}[name]
            with self._timed("load", timings):
                self._networks[name] = load(self.folder, self.config, self.device, self.dtype)
        network = self._networks[name]
        null = torch.full_like(classes, self.config.null_class)
        if self.config.labels == ():
            return lambda z, t: network(z, t, **conditions)
        if scale == 1.0 or torch.equal(classes, null):
            return lambda z, t: network(z, t, class_labels=classes, **conditions)
        both = torch.cat([classes, null])

        def guided(z: Tensor, t: Tensor) -> Tensor:
            conditional, unconditional = network(
                torch.cat([z, z]), torch.cat([t, t]), class_labels=both, **conditions
            ).chunk(2)
            return torch.lerp(unconditional, conditional, scale)

        return guided

    def _check_complete(self, name: str) -> None:
        """Finds a missing or cut-off weight file before the other network works for nothing."""
        if name in self._networks:
            return
        file = self.folder / f"{name}.safetensors"
        if not file.is_file():
            raise FileNotFoundError(f"checkpoint {self.folder} has no {file.name}")
        try:
            with safe_open(str(file), framework="pt"):  # compares the header with the file's length
                return
        except SafetensorError as error:
            raise ValueError(f"{file} is not a complete safetensors file: {error}") from error

    @contextmanager
    def _timed(self, name: str, timings: dict[str, float]) -> Iterator[None]:
        """Adds the seconds of the `with` block to timings[name], the device's work included."""
        started = self._now()
        yield
        timings[name] = timings.get(name, 0.0) + self._now() - started

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def usable_device(device: torch.device | str) -> torch.device:
    """The device, once it is known to be there; ValueError when it is not."""
    try:
        device = torch.device(device)
    except RuntimeError as error:
        raise ValueError(
            f"unknown device {device!r}, expected cpu, cuda or cuda:<index>"
        ) from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device {str(device)!r} is not supported, expected cpu or cuda")
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            found = f"{count} CUDA devices" if count else "no CUDA device"
            raise ValueError(f"device {str(device)!r} asked for, but torch finds {found} here")
    return device


def to_uint8(frames: np.ndarray) -> np.ndarray:
    """Frames in 0..1, any shape, rounded to uint8 0..255."""
    return (frames * 255.0).round().astype(np.uint8)


def _frames(video: Tensor, output_type: str) -> np.ndarray | Tensor | list[list[Image.Image]]:
    """[B, N, C, H, W] in -1..1 to the asked form, in 0..1."""
    video = (video * 0.5 + 0.5).clamp(0.0, 1.0)
    if output_type == "pt":
        return video
    frames = video.permute(0, 1, 3, 4, 2).cpu().numpy()  # [B, N, H, W, C]
    if output_type == "np":
        return np.ascontiguousarray(frames)
    pictures = to_uint8(frames)
    pictures = pictures[..., 0] if pictures.shape[-1] == 1 else pictures
    return [[Image.fromarray(picture) for picture in clip] for clip in pictures]


def _check_count(name: str, value: int) -> None:
    if type(value) is not int or value < 1:
        raise ValueError(f"{name} must be an int of at least 1, got {value!r}")


def _checked_choice(name: str, value: str | None, choices: Sequence[str | None]) -> str | None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {choices}, got {value!r}")
    return value
