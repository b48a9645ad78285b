"""VideoFusionPipeline: from a checkpoint and a label or a prompt to the frames of a clip.

There are two phases (vfengine/sampling). The base generator samples the base frame and keeps its
path, at the cost of one image. Then the residual generator makes all frames along that path. Each
network's weights are read when its phase first needs them. On a CPU the base network is freed
between the phases, so that peak memory is the larger of the two and not their sum (`offload_base`).

A model may have a text encoder, which turns prompts into rows before the first phase, and an
autoencoder, which decodes frames after the last. Base paths are then latents.

A call becomes a request (request.py), which checks it. `sample` resolves the request into four
kinds of values, and passes on no others: the solver's table, the condition and the noise place of
each phase, and the motion of the residual phase.

States are kept in fp32 whatever the dtype of the weights. The noise of sample k depends on the
seeds and on k alone (vfengine/diffusion/noise.py), never on the batch it is made in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..devices import chosen_devices, chosen_dtype, usable_device
from ..diffusion.base_path import BaseTrajectory
from ..diffusion.decompose import Lam, frame_weights
from ..diffusion.solvers import SolverTable
from ..formats.checkpoint import DEFAULT, DecomposedConfig, PlainConfig, read_config
from ..media.pictures import Picture, to_uint8
from ..models import UNet
from ..names import AUTO
from ..plan.network import InferenceUNet
from ..sampling.run import Callback
from ..sampling.two_phase import Motion
from ..sampling.windows import choose_windows
from .base_phase import BasePhase
from .loras import open_loras
from .pipeline import VideoFusionOutput
from .plain_video import PlainVideoPipeline
from .request import SamplingRequest, field_names
from .reuse_every import ReuseEvery

__all__ = ["VideoFusionOutput", "VideoFusionPipeline", "to_uint8", "usable_device"]


class VideoFusionPipeline(BasePhase):
    """A decomposed video diffusion model, ready to sample; made by `from_pretrained`."""

    request_type = SamplingRequest
    lacks = "a decomposed model of ours knows labels and one size"

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path | None = None,
        *,
        device: torch.device | str = AUTO,
        dtype: torch.dtype | str = AUTO,
        capture: bool = True,
        base_unet: str | Path | UNet | InferenceUNet | None = None,
        base_prediction_type: str | None = None,
        lora: Any = None,
        base_device: torch.device | str | None = None,
        residual_device: torch.device | str | None = None,
    ) -> VideoFusionPipeline | PlainVideoPipeline:
        """The pipeline of a checkpoint folder; None is the default checkpoint of the package.

        For a plain video model it is a `PlainVideoPipeline`. Its call is the same, but has no
        settings of the base path.

        device:  "cpu", "cuda" or "cuda:<index>"; "auto" is CUDA where torch can use it, else the
                 CPU
        dtype:   of weights and activations: float32, bfloat16 or float16; "auto" is bfloat16 where
                 that is faster (vfengine/devices.py), else float32. On CUDA float32 is never TF32,
                 not even in convolutions, unless torch.set_float32_matmul_precision allows it
        capture: on CUDA, replay each phase's step from a graph. Later calls replay the same graph
                 if only noise, labels or (where η = 0) seeds differ. It is freed with its network
                 (offload_base). A CPU ignores this
        base_unet: an image UNet in place of the checkpoint's base network: a source of
                 `models.load_unet`, or a UNet, whose device and dtype "auto" then stands for. It
                 must fit the clips' channels and the noise schedule. One that attends to prompts
                 needs a model with its text encoder. If it has no classes, labels condition the
                 residual network alone
        base_prediction_type: what it predicts, "epsilon" or "v_prediction"; None is what the
                 scheduler of its pipeline says, or "epsilon"
        lora:    LoRA to add to the weights: a path, (path, scale), or a list of these
                 (docs/lora.md)
        base_device, residual_device: of one phase's networks in place of `device`. The text encoder
                 goes with the base phase, the autoencoder with the residual phase, and so do clips
                 and base paths: the residual device is the pipeline's `device`

        Raises FileNotFoundError for a missing checkpoint; ValueError for one that is broken, for a
        device, dtype, base_unet or lora that cannot be used, and for the device of a phase that a
        plain video model has not. The first call reads the weights; the files of a base_unet and of
        lora are read at once.
        """
        if isinstance(base_unet, UNet | InferenceUNet):
            device = next(base_unet.parameters()).device if device == AUTO else device
            dtype = base_unet.dtype if dtype == AUTO else dtype
        base_place, place = chosen_devices(device, base_device, residual_device)
        dtype = chosen_dtype(dtype, *{base_place, place})
        folder = DEFAULT if path is None else Path(path)
        config = read_config(folder)
        kind = {DecomposedConfig: cls, PlainConfig: PlainVideoPipeline}[type(config)]
        if kind is PlainVideoPipeline:
            for name, own in (("base_device", base_device), ("residual_device", residual_device)):
                if own is not None:
                    raise ValueError(f"{folder}: {kind.lacks}, so it takes no {name}")
        base, loras = None, None
        if base_unet is not None:
            from .base_unet import pretrained_base  # with the formats of published networks

            base = pretrained_base(base_unet, config, base_place, dtype, base_prediction_type)
        elif base_prediction_type is not None:
            raise ValueError("base_prediction_type is that of a base_unet, and none is given")
        if lora:
            from ..formats.lora_targets import checkpoint_targets  # with them too

            source = None if base is None else base.source
            loras = open_loras(lora, checkpoint_targets(config, source, folder))
        how = place, dtype, capture, base, loras
        return kind(config, folder, *how, base_device=None if base_place == place else base_place)

    def __call__(
        self,
        label: str | Sequence[str] | None = None,
        *,
        prompt: str | Sequence[str] | None = None,
        negative_prompt: str | Sequence[str] = "",
        num_frames: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float = 2.0,
        base_seed: int = 0,
        base_offset: int | None = None,
        residual_seed: int = 1,
        base_path: str | None = None,
        output_type: str = "np",
        num_videos: int = 1,
        num_residuals: int = 1,
        solver: str | None = None,
        eta: float = 0.0,
        lam: Lam | None = None,
        trajectory: BaseTrajectory | None = None,
        image: Picture | None = None,
        base_cache: str | Path | None = None,
        window: int | None = None,
        window_overlap: int | None = None,
        loop: bool = False,
        overlap_phases: bool = False,
        offload_base: bool | None = None,
        sample_offset: int = 0,
        reuse_every: ReuseEvery = 1,
        callback: Callback | None = None,
    ) -> VideoFusionOutput:
        """Makes num_videos clips of each label or prompt; B = num_videos times their number.

        label:          one of `labels`, several of them, or None for no condition
        prompt, negative_prompt: what to show and what to avoid, in words, for a model with a text
                        encoder, whose labels stand for prompts; a negative prompt for each label
                        or prompt, or one for all
        num_frames:     N; None is what the model was trained on
        num_inference_steps: None: as many as the checkpoint names for its solver, else 50. A model
                        that was distilled takes no others than it was made for
        guidance_scale: s of classifier-free guidance, ε_u + s (ε_c - ε_u), in [0, 100]; 1 is off
        base_seed, residual_seed: seeds of the base frames' noise and of each frame's own noise
        base_offset:    sample whose base path the first clip follows; None is the clip's own, or
                        sample 0 with num_residuals
        base_path:      "stepwise" (the paper) or "clean" (the base frame is finished, then
                        animated); None is the one that the checkpoint names
        num_residuals:  K clips along one base path, each with its own residual noise, B = K; needs
                        one label and one video
        solver, eta:    see `solvers.solver_table`; None: the checkpoint's, or "ddim", which alone
                        takes an eta
        lam:            λ, a number or [N]; None is the λ of training
        trajectory:     a base path of 1 or B clips, in place of the base phase; see
                        `check_trajectory`
        image:          what `media.pictures.as_picture` takes, to animate: cropped and resized, it
                        becomes the base frame. Only for models with `config.animates_pictures`
        base_cache:     a folder in which base paths are looked up and kept (base_cache.py)
        window, window_overlap: frames that the residual network sees at a time, and how many of
                        them two neighbouring windows share (sampling/windows.py). None: windows of
                        the trained length where num_frames is larger; window=0: none
        loop:           make a cycle, whose last and first frames are neighbours (sampling/cycle.py)
        overlap_phases: run both phases at once, see `sampling.sample`; stepwise paths only
        offload_base:   free the base network before the residual phase, and read it again when it
                        is next needed. None: on a CPU for a call of one label, on CUDA only if the
                        residual network has no room beside it
        sample_offset:  index of the first sample, where the call is a part of a larger batch
        reuse_every:    N: run the whole network on every N-th step, and its shallow part on the
                        others, with features that were kept (sampling/features.py); of both phases,
                        or as {"base": 2, "residual": 3}
        callback:       called as callback(phase, steps done, steps in all), first with 0 done;
                        phase is "base", then "residual"; before them "text" of a model with a text
                        encoder, after them "decode" of one with an autoencoder, a step a frame

        Raises ValueError for an unknown label, a prompt that the model cannot take, a value out of
        range or settings that cannot go together; TypeError for a prompt that is no text or a seed
        that is no int; RuntimeError for a step that cannot be captured; and for the checkpoint's
        files what `from_pretrained` raises.
        """
        fields = field_names(SamplingRequest)  # the keywords, but for the callback
        settings = {name: value for name, value in locals().items() if name in fields}
        return self.sample(SamplingRequest(**settings), callback)

    def sample(
        self, request: SamplingRequest, callback: Callback | None = None
    ) -> VideoFusionOutput:
        """Runs a request; `__call__` makes one of its keywords.

        With request.preview the frames are the base frames alone, as clips of one frame.
        """
        request = self.fill_defaults(request)
        table = self._table(request, "residual")
        run = self._run(callback)
        self._session.check_complete(*self._later_files(request))
        path = self._given_path(request, run)
        if request.preview:
            if path is None:
                path = self._base_phase(request, self._condition(request, run), run)
            video = path.final[:, None].expand(request.num_clips, -1, -1, -1, -1)
            frames = self._frames(video, request.output_type, run)
            return VideoFusionOutput(frames, path, run.timings)
        place, motion = self._clip_place(request), self._motion(request)
        noise = self._clip_noise(request, place)
        condition = self._condition(request, run)
        clips_condition = condition.expand(request.num_clips)
        if request.overlap_phases:
            conditions = (condition, clips_condition)
            places = (self._base_place(request), place)
            noises = (self._base_noise(request, places[0]), noise)
            every = (request.reuses("base"), request.reuses("residual"))
            how = (motion, places, run, every)
            video, states = self._session.overlapped(noises, conditions, table, *how)
            frames = self._frames(video, request.output_type, run)
            return VideoFusionOutput(frames, self._path(request, states, table), run.timings)
        path = self._base_phase(request, condition, run) if path is None else path
        offload = request.offload_base
        if offload is None:
            offload = self.lets_base_go(needed_again=len(request.labels) > 1)
        if offload:
            self._session.release("base")
        follows_frame = motion.clean and path.base_path == "stepwise"
        followed = path.clean(table) if follows_frame else path
        how = (motion, place, run, request.reuses("residual"))
        video = self._session.residual(noise, clips_condition, followed, *how)
        if offload and self.config.autoencoder is not None and self.device.type == "cpu":
            self._session.release("residual")
        frames = self._frames(video, request.output_type, run, keep=not offload)
        return VideoFusionOutput(frames, path, run.timings)

    def fill_defaults(
        self, request: SamplingRequest, base_needed_again: bool | None = None
    ) -> SamplingRequest:
        """The request, with the checkpoint's values for settings that are None.

        base_needed_again: whether later calls need the base network: decides on offload_base now.
                           None: that is decided after the base phase

        Raises ValueError for λ or windows that do not fit, for settings that cannot go with the
        checkpoint's own base_path, and for a prompt that the model cannot take.
        """
        self._check_prompts(request)
        request = replace(request, **self._chosen_steps(request))
        if request.preview:
            return request
        config, offload = self.config, request.offload_base
        lam = config.lam if request.lam is None else request.lam
        num_frames = config.num_frames if request.num_frames is None else request.num_frames
        frame_weights(lam, num_frames)
        asked = num_frames, config.num_frames, request.window, request.window_overlap
        window, overlap = choose_windows(*asked, lam=lam, loop=request.loop) or (0, None)
        given = request.trajectory
        is_clean = request.image is not None or (given is not None and given.base_path == "clean")
        base_path = request.base_path or ("clean" if is_clean else config.base_path)
        self._check_stepwise(request, base_path)
        if offload is None and base_needed_again is not None:
            offload = not request.overlap_phases and self.lets_base_go(base_needed_again)
        return replace(
            request,
            num_frames=num_frames,
            lam=lam,
            window=window,
            window_overlap=overlap,
            base_path=base_path,
            offload_base=offload,
        )

    def _check_stepwise(self, request: SamplingRequest, base_path: str) -> None:
        """ValueError where the residual network would follow other steps than its own."""
        if base_path == "clean" and not request.overlap_phases:
            return
        own, walked = (self._table(request, name) for name in ("residual", "base"))
        if own != walked:
            raise ValueError(
                f"the base network takes {_steps(walked)}, and the residual network {_steps(own)}: "
                "base_path must be 'clean', and phases cannot overlap"
            )

    def _sampled_phases(self, request: SamplingRequest) -> tuple[str, ...]:
        has_base = request.trajectory is None and request.image is None
        return (("base",) if has_base else ()) + (() if request.preview else ("residual",))

    def lets_base_go(self, needed_again: bool) -> bool:
        """Whether offload_base=None frees the base network: `Session.lets_base_go`."""
        return self._session.lets_base_go(needed_again)

    # -- inside ------------------------------------------------------------------------------------

    def _later_files(self, request: SamplingRequest) -> list[str]:
        """The files that are read after the first phase, by name."""
        later = [] if request.preview else ["residual"]
        return later if self.config.autoencoder is None else [*later, "autoencoder"]

    def _motion(self, request: SamplingRequest) -> Motion:
        windows = (request.window, request.window_overlap) if request.window else None
        return Motion(request.lam, windows, request.base_path == "clean", request.loop)


def _steps(table: SolverTable) -> str:
    return f"{len(table)} steps of {table.solver} from t = {int(table.timesteps[0])}"
