"""What a request will do, without doing it: steps, calls of networks, windows, memory.

No weights are read, but for the headers of their files. What a pipeline refuses before its first
step is refused here.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch

from ..diffusion.noise import check_seed
from ..formats.folders import stored_weights
from ..models import UNetConfig
from ..models.autoencoder import AutoencoderConfig
from ..sampling.cycle import plan_cycle
from ..sampling.run import Run
from ..sampling.windows import plan_windows
from .base_cache import find_path
from .batches import Batches
from .given_path import check_animates
from .pipeline import CheckpointPipeline
from .request import SamplingRequest, TextRequest, VideoRequest
from .text_to_video import TextToVideoPipeline

_FILES = {"text": "text_encoder", "decode": "autoencoder"}  # of phases; others are a network's name
# Packed for the kernels of a CPU, some convolutions in float32 take 16/9 of their weights' room.
_PACKED = 1.4
_BUFFERS = 4  # of a UNet's finest level, beside those that skip to its second half
_DECODER_BUFFERS = 5  # of a decoder's finest level, a frame at a time


@dataclass(frozen=True)
class Memory:
    """Bytes, estimated.

    weights, activations: of the network of each phase
    clips: states, noise, base paths and pictures of one batch
    peaks: of each device the most at one time, without the process itself
    """

    weights: dict[str, int]
    activations: dict[str, int]
    clips: int
    peaks: dict[str, int]

    @property
    def peak(self) -> int:
        """The most on all devices together."""
        return sum(self.peaks.values())


@dataclass(frozen=True, eq=False)
class Forecast:
    """What a request will do.

    request:    with its defaults filled in
    batches:    their number
    steps:      of each phase, over all batches
    calls:      of each phase: how often its network is called on one picture, clip or window
    starts:     first frames of windows; one of them for a clip without windows
    size:       height and width in pixels
    base_paths: how many are found in the cache; None without a cache
    """

    request: VideoRequest | TextRequest
    batches: int
    steps: dict[str, int]
    calls: dict[str, int]
    starts: tuple[int, ...]
    size: tuple[int, int]
    base_paths: int | None
    memory: Memory


Pipe = CheckpointPipeline | TextToVideoPipeline


def forecast(
    pipe: Pipe,
    request: VideoRequest | TextRequest,
    batch_size: int = 1,
    base_needed_again: bool = False,
) -> Forecast:
    """What a request will do in batches; the arguments are those of `Batches`.

    Raises ValueError, TypeError or OSError for what the pipeline would refuse.
    """
    batches = Batches(pipe, request, batch_size, base_needed_again)
    request = batches.request
    if isinstance(pipe, CheckpointPipeline):
        _check(pipe, request)
    starts = _starts(pipe, request)
    steps, calls, found = Counter(), Counter(), 0
    for index, part in enumerate(batches.parts()):
        work = pipe.work(part)
        shared = request.shares_path and index > 0
        if "base" in work and (shared or _is_cached(pipe, part)):
            found += not shared
            del work["base"]
        if "text" in work and index > 0:
            del work["text"]  # rows of texts are kept
        steps.update(work)
        calls.update(_calls(pipe, part, work, len(starts)))
    cache = getattr(request, "base_cache", None)
    return Forecast(
        request,
        len(batches.firsts),
        dict(steps),
        dict(calls),
        starts,
        _size(pipe, request),
        None if cache is None else found,
        _memory(pipe, next(batches.parts())),
    )


def _check(pipe: CheckpointPipeline, request: VideoRequest) -> None:
    """What `sample` refuses before its first step."""
    for phase in pipe._sampled_phases(request):
        pipe._table(request, phase)
    check_seed(request.residual_seed, "residual_seed")
    if request.prompt is None:
        pipe._check_labels(request)
    phases = pipe.phases(request)
    pipe._session.check_complete(
        *(_FILES.get(phase, phase) for phase in phases if _is_own(pipe, phase))
    )
    if isinstance(request, SamplingRequest):
        check_seed(request.base_seed, "base_seed")
        if request.image is not None:
            check_animates(pipe.config, pipe.folder)
        else:
            pipe._given_path(request, Run(None, {}))


def _is_own(pipe: CheckpointPipeline, phase: str) -> bool:
    """Whether the phase's network is the checkpoint's own."""
    return phase != "base" or pipe._session.pretrained is None


def _is_cached(pipe: Pipe, part: SamplingRequest) -> bool:
    """Whether a batch's base path is in its cache."""
    if part.base_cache is None:
        return False
    return find_path(part.base_cache, pipe.base_cache_key(part)) is not None


# -- steps and calls -------------------------------------------------------------------------------


def _starts(pipe: Pipe, request: VideoRequest | TextRequest) -> tuple[int, ...]:
    window = getattr(request, "window", None)
    if not window or getattr(request, "preview", False):
        return (0,)
    base = isinstance(request, SamplingRequest)
    options = {"lam": request.lam} if base else {}
    plan = plan_cycle if request.loop else plan_windows
    return plan(request.num_frames, window, request.window_overlap, base=base, **options).starts


def _calls(
    pipe: Pipe, part: VideoRequest | TextRequest, work: dict[str, int], windows: int
) -> dict[str, int]:
    calls = {}
    for phase, steps in work.items():
        if phase == "text":
            negatives = part.negatives if _guided(pipe, part, phase) else []
            calls[phase] = len({*part.labels, *negatives})
        elif phase == "decode":
            calls[phase] = steps
        else:
            clips = part.num_paths if phase == "base" else part.num_clips
            estimates = 2 if _guided(pipe, part, phase) else 1
            calls[phase] = steps * clips * estimates * (1 if phase == "base" else windows)
    return calls


def _guided(pipe: Pipe, request: VideoRequest | TextRequest, phase: str) -> bool:
    """Whether a phase's network is called with and without the condition."""
    if request.guidance_scale == 1.0:
        return False
    if phase in (getattr(pipe.config, "distilled", None) or {}):
        return False
    if isinstance(pipe, TextToVideoPipeline):
        return True
    network = None if phase == "text" else pipe.config.unet_config(phase)
    if not _is_own(pipe, phase):
        network = pipe._session.pretrained.config
        if pipe.config.text_encoder is None:
            return False
    if pipe.config.text_encoder is None:
        return network.num_classes is not None and request.labels != [None]
    reads = network is None or network.context_dim is not None
    return reads and pipe._prompts(request) != request.negatives


def _size(pipe: Pipe, request: VideoRequest | TextRequest) -> tuple[int, int]:
    if isinstance(request, TextRequest):
        return request.height, request.width
    return pipe.config.picture_size


# -- memory ----------------------------------------------------------------------------------------


def _memory(pipe: Pipe, part: VideoRequest | TextRequest) -> Memory:
    """The memory of a batch."""
    phases = pipe.phases(part)
    weights = {phase: _weights(pipe, phase) for phase in phases}
    activations = {phase: _activations(pipe, part, phase) for phase in phases}
    clips = _clips(pipe, part)
    kept, peaks = Counter[str](), {str(pipe.device): 0}
    published, offload = isinstance(pipe, TextToVideoPipeline), getattr(part, "offload_base", False)
    for phase in phases:
        place, on_cpu = str(pipe.place(phase)), pipe.place(phase).type == "cpu"
        # A checkpoint's weights lie in memory twice while a CPU's kernels get them in their order.
        read = weights[phase] if on_cpu and not published else 0
        most = kept[place] + weights[phase] + max(activations[phase], read)
        peaks[place] = max(peaks.get(place, 0), most)
        leaves = on_cpu and (
            published
            or (phase == "text" and not pipe._session.stays)
            or (offload and phase in ("base", "residual"))
        )
        kept[place] += 0 if leaves else weights[phase] + activations[phase]
    peaks[str(pipe.device)] += clips
    if "base" in phases and pipe.place("base") != pipe.device:
        peaks[str(pipe.place("base"))] += _path(pipe, part)
    return Memory(weights, activations, clips, peaks)


def _weights(pipe: Pipe, phase: str) -> int:
    """Bytes of a network's weights in the pipeline's dtype, by the headers of its file."""
    if isinstance(pipe, TextToVideoPipeline):
        count = pipe.config.num_weights[phase]
    elif not _is_own(pipe, phase):
        source = pipe._session.pretrained.source
        return (
            stored_weights(source) if isinstance(source, Path) else 0
        )  # a UNet in memory is there
    else:
        count = stored_weights(pipe.config.place(pipe.folder, _FILES.get(phase, phase)))
    on_cpu = pipe.place(phase).type == "cpu"
    packed = _PACKED if on_cpu and pipe.dtype == torch.float32 else 1.0
    return int(count * pipe.dtype.itemsize * packed)


def _activations(pipe: Pipe, part: VideoRequest | TextRequest, phase: str) -> int:
    config, item = pipe.config, pipe.dtype.itemsize
    if phase == "text":
        return 0  # small
    if phase == "decode":
        height, width = _size(pipe, part)
        return _decoder(config.autoencoder, height, width) * item
    if isinstance(pipe, TextToVideoPipeline):
        unet, height, width = config.unet, part.height // config.scale, part.width // config.scale
    elif _is_own(pipe, phase):
        unet, height, width = config.unet_config(phase), config.height, config.width
    else:
        return 0
    frames = 1 if phase == "base" else part.num_frames
    frames = min(frames, getattr(part, "window", None) or frames)
    clips = part.num_paths if phase == "base" else part.num_clips
    estimates = 2 if _guided(pipe, part, phase) else 1
    return clips * estimates * frames * _unet(unet, height, width) * item


def _unet(config: UNetConfig, height: int, width: int) -> int:
    """Numbers that a UNet keeps of one frame: what skips to its second half, and its buffers."""
    height, width = height // config.patch_size, width // config.patch_size
    skipped, largest = 0, 0
    for channels, layers in zip(config.block_out_channels, config.layers_per_block, strict=True):
        level = height * width * channels
        skipped += (layers + 1) * level
        largest = max(largest, level)
        height, width = math.ceil(height / 2), math.ceil(width / 2)
    return skipped + _BUFFERS * largest


def _decoder(config: AutoencoderConfig, height: int, width: int) -> int:
    """Numbers that a decoder keeps of one frame."""
    pixels = (height // config.patch_size) * (width // config.patch_size)
    return _DECODER_BUFFERS * pixels * config.block_out_channels[0]


def _clips(pipe: Pipe, part: VideoRequest | TextRequest) -> int:
    """Bytes of a batch's states and pictures, in float32 but for the pixels that are written."""
    height, width = _size(pipe, part)
    frames = 1 if getattr(part, "preview", False) else part.num_frames
    pictures = part.num_clips * frames * 3 * height * width
    # of the clip, its noise and two estimates
    states = 4 * part.num_clips * frames * _state(pipe, part)
    path = _path(pipe, part) if isinstance(part, SamplingRequest) else 0
    return 4 * states + path + (2 * 4 + 1) * pictures


def _state(pipe: Pipe, part: VideoRequest | TextRequest) -> int:
    """Numbers of a frame's state."""
    height, width = _size(pipe, part)
    scale = 1 if pipe.config.autoencoder is None else pipe.config.autoencoder.scale
    channels = 3 if scale == 1 else pipe.config.autoencoder.latent_channels
    return channels * (height // scale) * (width // scale)


def _path(pipe: Pipe, part: SamplingRequest) -> int:
    """Bytes of a batch's base paths."""
    return 4 * (len(pipe._table(part, "base")) + 1) * part.num_paths * _state(pipe, part)
