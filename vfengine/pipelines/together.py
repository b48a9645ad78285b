"""Several requests in one batch, each of which keeps its own seeds, label or prompt, and base path.

The clips are those of each request made alone, as far as batches keep them: on a CPU to the bit, on
CUDA up to the order of sums (docs/reliability.md). Requests go together that differ in nothing else
than that. The base paths that are missing are walked in one batch, equal ones once, and each is
kept as if it had been walked alone. Then one residual phase makes all clips.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..diffusion.base_path import BaseTrajectory
from ..diffusion.noise import NoisePlace
from ..diffusion.solvers import SolverTable
from ..media.pictures import to_uint8
from ..sampling.guidance import Condition, Prompts
from ..sampling.run import Callback, Run
from .base_cache import cache_key, find_path, keep_path, path_file
from .pipeline import CheckpointPipeline, VideoFusionOutput
from .request import SamplingRequest
from .videofusion import VideoFusionPipeline

# Settings that requests of one batch must share.
SHARED = (
    *("num_frames", "num_inference_steps", "guidance_scale", "solver", "eta", "lam"),
    *("window", "window_overlap", "loop", "base_path", "output_type", "reuse_every"),
)


def sample_together(
    pipe: VideoFusionPipeline,
    requests: Sequence[SamplingRequest],
    *,
    looks: Sequence[SamplingRequest] | None = None,
    base_cache: str | Path | None = None,
    on_base: Callable[[int, BaseTrajectory], bool] | None = None,
    on_paths: Callable[[int, int], None] | None = None,
    callback: Callback | None = None,
) -> list[VideoFusionOutput | None]:
    """The clips of requests of one clip each, [1, N, H, W, C] each, in the order of the requests.

    looks:      whose base paths the clips follow, a request for each; None: their own. One differs
                from its clip's request in label, prompt and negative prompt alone
    base_cache: a folder in which base paths are looked up and kept (base_cache.py). It is ours: a
                file of it that is damaged is written anew, and one that is used is touched
    on_base:    called as on_base(index of the request, its base path) once all paths are there. A
                clip for which it returns False is no longer wanted: it is not made, and is None in
                the result
    on_paths:   called before that as on_paths(paths walked, clips that needed no walk as theirs was
                in the folder or another's); pictures' own paths are not counted
    callback:   as in `VideoFusionPipeline.__call__`, with the steps of the batch; a phase that has
                nothing to do is not reported

    All networks stay in memory. Timings are those of the whole batch, the same dict in all outputs.

    Raises ValueError for requests of several clips, for eta > 0, which adds noise by the batch's
    one seed, for settings that differ, and what `VideoFusionPipeline.sample` raises.
    """
    requests = [pipe.fill_defaults(request, base_needed_again=True) for request in requests]
    looks = requests if looks is None else [_with_steps(pipe, look) for look in looks]
    _check(requests, looks)
    run, table = pipe._run(callback), pipe._table(requests[0], "residual")
    pipe._session.check_complete(*pipe._later_files(requests[0]))
    conditions = _conditions(pipe, requests, run)
    paths, walked, found = _paths(pipe, requests, looks, base_cache, run)
    if on_paths is not None:
        on_paths(walked, found)
    wanted = range(len(requests))
    if on_base is not None:
        wanted = [k for k in wanted if on_base(k, paths[k])]
    outputs: list[VideoFusionOutput | None] = [None] * len(requests)
    if not wanted:
        return outputs
    motion = pipe._motion(requests[0])
    followed = [
        path.clean(table) if motion.clean and path.base_path == "stepwise" else path
        for path in (paths[k] for k in wanted)
    ]
    states = torch.cat([path.states for path in followed], dim=1)
    places = [pipe._clip_place(requests[k]) for k in wanted]
    noise = torch.cat(
        [pipe._clip_noise(requests[k], place) for k, place in zip(wanted, places, strict=True)]
    )
    video = pipe._session.residual(
        noise,
        _joined([conditions[k] for k in wanted]),
        replace(followed[0], states=states),
        motion,
        places[0],  # of noise that steps add: eta is 0
        run,
        requests[0].reuses("residual"),
    )
    frames = pipe._frames(video, requests[0].output_type, run, keep=True)
    for row, k in enumerate(wanted):
        outputs[k] = VideoFusionOutput(frames[row : row + 1], paths[k], run.timings)
    return outputs


def _with_steps(pipe: VideoFusionPipeline, look: SamplingRequest) -> SamplingRequest:
    return replace(look, **pipe._chosen_steps(look))


def keep_networks(pipe: CheckpointPipeline) -> None:
    """Reads all networks of a pipeline, for good: no call waits for one of them any more.

    Raises FileNotFoundError or ValueError for files that are missing or broken.
    """
    pipe._session.stays, config = True, pipe.config
    parts = {"text": config.text_encoder, "decode": config.autoencoder}
    for name in (*config.networks, *(name for name, part in parts.items() if part is not None)):
        pipe._session.network(name, Run())


def base_frame(pipe: VideoFusionPipeline, path: BaseTrajectory) -> np.ndarray:
    """The base frame of a path of one clip, uint8 [H, W, C]: bit for bit that of its clips."""
    frames = pipe._frames(path.final[:, None], "np", Run(), keep=True)
    return to_uint8(frames[0, 0])


def _check(requests: Sequence[SamplingRequest], looks: Sequence[SamplingRequest]) -> None:
    """ValueError for requests that cannot be made together."""
    if not requests or len(looks) != len(requests):
        raise ValueError(f"expected a look for each request, got {len(looks)} of {len(requests)}")
    first = requests[0]
    for request, look in zip(requests, looks, strict=True):
        if request.num_clips != 1 or request.preview or request.overlap_phases:
            raise ValueError("expected requests of one clip, whose phases do not overlap")
        if request.base_cache is not None:
            raise ValueError("a base cache is the batch's own: its requests have none")
        if request.eta:
            raise ValueError(f"requests with eta {request.eta} cannot be made together")
        for name in SHARED:
            if getattr(request, name) != getattr(first, name):
                raise ValueError(
                    f"requests of one batch must have one {name}, got {getattr(first, name)!r} "
                    f"and {getattr(request, name)!r}"
                )
        of_base = ("num_inference_steps", "guidance_scale", "solver", "eta", "base_seed")
        for name in (*of_base, "reuse_every"):
            if getattr(request, name) != getattr(look, name):
                raise ValueError(f"a look has its request's {name}, got {getattr(look, name)!r}")


def _conditions(
    pipe: VideoFusionPipeline, requests: Sequence[SamplingRequest], run: Run
) -> list[Condition | Prompts]:
    """The condition of each request, as it has it alone.

    Texts are embedded in one call; after it each request finds its own.
    """
    if requests and pipe.config.text_encoder is not None:
        texts = [text for request in requests for text in pipe._prompts(request)]
        negatives = [text for request in requests for text in request.negatives]
        pipe._session.embedded([*texts, *negatives], run)
    return [pipe._condition(request, run) for request in requests]


def _joined(conditions: Sequence[Condition | Prompts]) -> Condition | Prompts:
    """The condition of a batch, of one row each.

    One that is not guided, for it equals what it would be guided from, is guided in the batch if
    others are: ε_u + s (ε_c - ε_u) is then ε_u itself.
    """
    scale = max(conditions, key=lambda one: one.guidance_scale != 1.0).guidance_scale
    if isinstance(conditions[0], Condition):
        return Condition(torch.cat([one.classes for one in conditions]), scale)
    context, negative = (
        torch.cat([getattr(one, name) for one in conditions]) for name in ("context", "negative")
    )
    return Prompts(context, negative, scale)


def _paths(
    pipe: VideoFusionPipeline,
    requests: Sequence[SamplingRequest],
    looks: Sequence[SamplingRequest],
    folder: str | Path | None,
    run: Run,
) -> tuple[list[BaseTrajectory], int, int]:
    """The base path of each clip: given, found, or walked together with the others.

    Also how many were walked, and for how many clips one was found.
    """
    paths = [pipe._given_path(request, run) for request in requests]
    own = [k for k, path in enumerate(paths) if path is None]
    if folder is not None and own and not pipe.config.fingerprint():
        raise ValueError(f"{pipe.folder}: no base cache for weights without a recorded SHA-256")
    table = pipe._table(requests[0], "base")
    seen = dict(zip(own, _conditions(pipe, [looks[k] for k in own], run), strict=True))
    keys = {
        k: cache_key(
            pipe.config,
            pipe._notes(looks[k]),
            table,
            seen[k],
            pipe._base_place(looks[k]),
            pipe.dtype,
        )
        for k in own
    }
    first: dict[Path, int] = {}  # of those who share a path, by its file
    for k in own:
        first.setdefault(path_file(folder or "", keys[k]), k)
    known = {file: _found(folder, keys[k], pipe) for file, k in first.items()}
    missing = [k for file, k in first.items() if known[file] is None]
    if missing:
        walked = _walked(pipe, [looks[k] for k in missing], table, [seen[k] for k in missing], run)
        for k, path in zip(missing, walked, strict=True):
            kept = path if folder is None else keep_path(folder, keys[k], path)
            known[path_file(folder or "", keys[k])] = kept
    for k in own:
        paths[k] = known[path_file(folder or "", keys[k])]
    return paths, len(missing), len(own) - len(missing)


def _found(
    folder: str | Path | None, key: dict[str, object], pipe: VideoFusionPipeline
) -> BaseTrajectory | None:
    """The path of a key in the folder, whose file is noted as used; a damaged one is no path."""
    if folder is None:
        return None
    file = path_file(folder, key)
    try:
        path = find_path(folder, key)
        if path is None:
            return None
        os.utime(file)
    except FileNotFoundError:  # it was removed meanwhile
        return None
    except ValueError as error:
        if not file.is_file():
            raise
        warnings.warn(f"a base path is walked again: {error}", stacklevel=2)
        return None
    return path.to(pipe.device)


def _walked(
    pipe: VideoFusionPipeline,
    looks: Sequence[SamplingRequest],
    table: SolverTable,
    conditions: Sequence[Condition | Prompts],
    run: Run,
) -> list[BaseTrajectory]:
    """The base paths of requests, walked in one batch."""
    places = [pipe._base_place(look) for look in looks]
    noise: list[Tensor] = [
        pipe._base_noise(look, place) for look, place in zip(looks, places, strict=True)
    ]
    place: NoisePlace = places[0]  # of noise that steps add: eta is 0
    every = looks[0].reuses("base")
    states = pipe._session.base(torch.cat(noise), _joined(conditions), table, place, run, every)
    return [pipe._path(look, states[:, k : k + 1].clone(), table) for k, look in enumerate(looks)]
