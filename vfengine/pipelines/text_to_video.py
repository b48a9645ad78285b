"""TextToVideoPipeline: from a sentence to a clip, with a published text-to-video model.

Three networks work one after another: the text encoder turns the prompts into rows of numbers, a
video UNet samples latents that attend to them (vfengine/sampling, as a plain video model), and the
autoencoder decodes the latents frame by frame. On a CPU each leaves memory before the next one is
read, so that peak memory is that of the largest (published_session.py).

Latents are kept in fp32 whatever the dtype of the weights. The noise of sample k depends on the
seed and on k alone (vfengine/diffusion/noise.py), never on the batch it is made in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..devices import chosen_device, chosen_dtype
from ..diffusion.noise import NoisePlace, check_seed, residual_noise
from ..diffusion.solvers import SolverTable
from ..formats.lora_targets import published_targets
from ..formats.text_to_video import TextToVideoModel, read_text_to_video
from ..media.pictures import to_frames
from ..names import AUTO
from ..sampling.finite import check_given
from ..sampling.guidance import Prompts
from ..sampling.run import Callback, Run
from ..sampling.windows import choose_windows
from .latents import LatentsFile
from .loras import Loras, open_loras
from .pipeline import Pipeline
from .published_session import PublishedSession
from .request import TextRequest

_KEPT = (
    "finished",
    "latents",
    "save_latents",
    "output_type",
)  # fields that no file of latents notes


@dataclass(frozen=True, eq=False)
class TextToVideoOutput:
    """The result of a call of a `TextToVideoPipeline`.

    frames:  "np": float32 [B, N, H, W, 3] in 0..1; "pt": float32 tensor [B, N, 3, H, W] in 0..1 on
             the pipeline's device; "pil": B clips, each a list of N PIL images; "latent": latents
    latents: float32 [B, N, C, H/8, W/8], finished, as `decode` takes them
    timings: seconds, {"load", "text", "video", "decode"}: reading weights, and the three networks
    """

    frames: np.ndarray | Tensor | list[list[Image.Image]]
    latents: Tensor
    timings: dict[str, float]
    trajectory: None = None  # there is no base path


class TextToVideoPipeline(Pipeline):
    """A published text-to-video model, ready to sample; made by `from_pretrained`."""

    request_type = TextRequest
    lacks = "a text-to-video model has neither labels nor a base path"
    _session: PublishedSession

    def __init__(
        self,
        model: TextToVideoModel,
        device: torch.device,
        dtype: torch.dtype,
        capture: bool,
        loras: Loras | None = None,
    ) -> None:
        self.config, self.folder, self.loras = model, model.folder, loras or Loras()
        self.device, self.dtype, self.schedule = device, dtype, model.schedule
        self._session = PublishedSession(model, device, dtype, capture, self.loras.updates)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        device: torch.device | str = AUTO,
        dtype: torch.dtype | str = AUTO,
        capture: bool = True,
        lora: Any = None,
    ) -> TextToVideoPipeline:
        """The pipeline in a folder of diffusers (TextToVideoSDPipeline) or of ModelScope.

        device, dtype, capture, lora: as for `VideoFusionPipeline.from_pretrained`

        Nothing is fetched. Every part is found, and names and shapes of all weights are compared
        with its configuration; the weights are read by the first call. Raises FileNotFoundError,
        naming it, for what is missing; ValueError for what is damaged or not supported, and for a
        device or dtype that cannot be used.
        """
        device = chosen_device(device)
        dtype = chosen_dtype(dtype, device)
        model = read_text_to_video(folder)
        loras = open_loras(lora, published_targets(model.folder)) if lora else None
        return cls(model, device, dtype, capture, loras)

    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        negative_prompt: str | Sequence[str] = "",
        num_frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 9.0,
        solver: str = "ddim",
        eta: float = 0.0,
        seed: int = 0,
        latents: Tensor | None = None,
        save_latents: str | Path | None = None,
        output_type: str = "np",
        num_videos: int = 1,
        window: int | None = None,
        window_overlap: int | None = None,
        loop: bool = False,
        sample_offset: int = 0,
        reuse_every: int = 1,
        callback: Callback | None = None,
    ) -> TextToVideoOutput:
        """Makes num_videos clips of each prompt; B = num_videos times the number of prompts.

        prompt, negative_prompt: what to show and what to avoid; a negative prompt for each prompt,
                        or one for all
        num_frames:     N; None is 16
        height, width:  of the clips in pixels, multiples of 8; None is what the model names
        guidance_scale: s of classifier-free guidance, ε_n + s (ε_p - ε_n), in [0, 100]; 1 is off
        solver, eta:    see `solvers.solver_table`
        seed:           of the noise that the clips begin with, and of that of eta > 0
        latents:        that noise itself, [B, N, C, H/8, W/8] of any float dtype, as sampled from a
                        unit Gaussian; N, H and W are its own
        save_latents:   a .safetensors file that gets the finished latents before they are decoded
        output_type:    see `TextToVideoOutput`; "latent" decodes nothing
        window, window_overlap: frames that the UNet sees at a time, and how many of them two
                        neighbouring windows share (sampling/windows.py). None: windows of the
                        trained length where the model names one and num_frames is larger;
                        window=0: none
        loop:           make a cycle, whose last and first frames are neighbours (sampling/cycle.py)
        sample_offset:  index of the first sample, where the call is a part of a larger batch
        reuse_every:    run the whole UNet on every N-th step, and its shallow part on the others
        callback:       called as callback(phase, steps done, steps in all), first with 0 done;
                        phase is "text", "video", whose steps are the solver's, then "decode", whose
                        steps are frames. What it raises stops the call there, and leaves nothing in
                        memory but what was there before

        Raises ValueError for a value out of range or settings that do not go together; TypeError
        for a prompt that is no text or a seed that is no int; RuntimeError for a step that cannot
        be captured; OSError for save_latents that cannot be written.
        """
        names = {field.name for field in fields(TextRequest)}
        settings = {name: value for name, value in locals().items() if name in names}
        return self.sample(TextRequest(**settings), callback)

    def decode(
        self, latents: Tensor, output_type: str = "np", callback: Callback | None = None
    ) -> np.ndarray | Tensor | list[list[Image.Image]]:
        """Frames of finished latents [B, N, C, h, w], as a call's `latents` are; see `__call__`."""
        return self.sample(TextRequest(finished=latents, output_type=output_type), callback).frames

    def sample(self, request: TextRequest, callback: Callback | None = None) -> TextToVideoOutput:
        """Runs a request; `__call__` makes one of its keywords."""
        request = self.fill_defaults(request)
        run = Run(callback, dict.fromkeys(("load", "text", "video", "decode"), 0.0))
        latents = request.finished
        if latents is None:
            latents = self._sampled(request, run)
            if request.save_latents is not None:
                request.save_latents.add(latents, _notes(request))
        latents = latents.to(self.device, torch.float32)
        if request.output_type == "latent":
            return TextToVideoOutput(latents, latents, run.timings)
        video = self._session.decoded(latents / self.config.scaling_factor, run)
        return TextToVideoOutput(to_frames(video, request.output_type), latents, run.timings)

    def fill_defaults(
        self, request: TextRequest, base_needed_again: bool | None = None
    ) -> TextRequest:
        """The request, with the model's values for settings that are None.

        Raises ValueError for sizes, windows and latents that do not fit the model or each other.
        """
        if request.finished is not None:
            _, frames, _, *sides = self._latents_shape("finished latents", request.finished)
            height, width = (side * self.config.scale for side in sides)
            return replace(request, num_frames=frames, height=height, width=width)
        check_seed(request.seed, "seed")
        self.table(request.solver, request.num_inference_steps, request.eta)
        values = self._sizes(request)
        windows = choose_windows(
            values["num_frames"],
            self.config.trained_frames or values["num_frames"],
            request.window,
            request.window_overlap,
            base=False,
            loop=request.loop,
        )
        values["window"], values["window_overlap"] = windows or (0, None)
        if isinstance(request.save_latents, (str, Path)):
            values["save_latents"] = LatentsFile(request.save_latents)
        return replace(request, **values)

    def table(self, solver: str, num_inference_steps: int, eta: float = 0.0) -> SolverTable:
        """What the solver does, step by step, on the model's schedule."""
        return self.schedule.table(solver, num_inference_steps, eta)

    def work(self, request: TextRequest) -> dict[str, int]:
        """The steps of each phase that a request has, as its callback names them.

        The text encoder's is one, and is left out where its result is known.
        """
        work = {}
        if request.finished is None:
            work = {"text": 1, "video": request.num_inference_steps}
        if request.output_type != "latent":
            work["decode"] = request.num_clips * request.num_frames
        return work

    def phases(self, request: TextRequest) -> tuple[str, ...]:
        """The phases that a request has, as its callback names them."""
        return tuple(self.work(request))

    # -- sampling ----------------------------------------------------------------------------------

    def _sampled(self, request: TextRequest, run: Run) -> Tensor:
        """The finished latents of a request, fp32 [B, N, C, h, w]."""
        guided = request.guidance_scale != 1.0
        texts = [*request.labels, *(request.negatives if guided else ())]
        rows = self._session.embedded(texts, run).repeat_interleave(request.num_videos, dim=0)
        context, negative = rows.chunk(2) if guided else (rows, rows)
        place = NoisePlace(request.seed, request.sample_offset)
        return self._session.sampled(
            self._noise(request, place),
            Prompts(context, negative, request.guidance_scale),
            self.table(request.solver, request.num_inference_steps, request.eta),
            place,
            (request.window, request.window_overlap) if request.window else None,
            request.loop,
            run,
            request.reuses("video"),
        )

    def _noise(self, request: TextRequest, place: NoisePlace) -> Tensor:
        if request.latents is not None:
            return request.latents.to(self.device, torch.float32)
        config, sides = self.config, (request.height, request.width)
        size = (config.autoencoder.latent_channels, *(side // config.scale for side in sides))
        shape = (request.num_clips, request.num_frames, *size)
        offset = place.sample_offset
        return residual_noise(shape, place.seed, sample_offset=offset, device=self.device)

    # -- checks ------------------------------------------------------------------------------------

    def _sizes(self, request: TextRequest) -> dict[str, int]:
        """num_frames, height and width: of the latents, as asked for, or the model's."""
        config, scale = self.config, self.config.scale
        height, width = (side * scale for side in config.sample_size)
        sizes = {"num_frames": config.num_frames, "height": height, "width": width}
        asked = {name: getattr(request, name) for name in sizes}
        asked = {name: value for name, value in asked.items() if value is not None}
        if request.latents is None:
            sizes |= asked
        else:
            clips, frames, _, *sides = self._latents_shape("latents", request.latents)
            if clips != request.num_clips:
                raise ValueError(
                    f"latents hold {clips} clips, but {request.num_clips} are asked for"
                )
            sizes = {"num_frames": frames, "height": sides[0] * scale, "width": sides[1] * scale}
            for name, value in asked.items():
                if value != sizes[name]:
                    raise ValueError(f"{name} is {value}, but the latents make {sizes[name]}")
        for name in ("height", "width"):
            if sizes[name] % scale:
                raise ValueError(f"{name} must be a multiple of {scale}, got {sizes[name]}")
        return sizes

    def _latents_shape(self, name: str, latents: Tensor) -> tuple[int, ...]:
        """[B, N, C, h, w] of latents; TypeError or ValueError for what are none."""
        if not isinstance(latents, Tensor) or not latents.is_floating_point():
            found = getattr(latents, "dtype", type(latents).__name__)
            raise TypeError(f"{name} must be a tensor of a float dtype, got {found}")
        channels = self.config.autoencoder.latent_channels
        if latents.dim() != 5 or latents.shape[2] != channels or not latents.numel():
            found = list(latents.shape)
            raise ValueError(f"{name} must be [B, N, {channels}, h, w], not empty, got {found}")
        check_given(**{name: latents})
        return tuple(latents.shape)


def _notes(request: TextRequest) -> dict[str, object]:
    """The settings that made latents, for their file; loop and reuse_every where they are set."""
    unset = {"loop": False, "reuse_every": 1}
    return {
        field.name: getattr(request, field.name)
        for field in fields(request)
        if field.name not in _KEPT
        and (field.name not in unset or getattr(request, field.name) != unset[field.name])
    }
