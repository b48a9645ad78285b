"""Which settings of requests go together: rules that Python and the command line share.

Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple


class Conflict(NamedTuple):
    """Two settings that cannot go together.

    reason: why, as in "--image cannot go with --preview: the picture is the base frame"
    error:  error text of a request with both. Empty: a request accepts both, as one may have its
            default; only the command line, which knows what the user wrote, refuses them
    value:  the one value of `other` that conflicts; None: all do
    """

    setting: str
    other: str
    reason: str
    error: str = ""
    value: Any = None


_CACHE = "a cache finds base paths by seed and settings"
_CACHE_ERROR = "base_cache keeps paths that are walked, but one is given"
_IMAGE = "the picture is the base frame"
_IMAGE_ERROR = "an image has a base path of its own: {} cannot go with it"
_STEPWISE_ERROR = _IMAGE_ERROR.format("base_path='stepwise'")
_PREVIEW = "the base frame is all that is made"
_PREVIEW_ERROR = "preview makes the base frame alone: {} has no part in it"
_OVERLAP = "both phases run at once"
_OVERLAP_ERROR = "overlap_phases runs both phases at once, but {}"
_CACHED_ERROR = _OVERLAP_ERROR.format("a base cache keeps finished paths")
_GIVEN_ERROR = _OVERLAP_ERROR.format("a given base path is there already")
_CLEAN_ERROR = _OVERLAP_ERROR.format(
    "base_path='clean' finishes the base frame first; take 'stepwise'"
)
_OFFLOAD_ERROR = _OVERLAP_ERROR.format("offload_base frees the base network between them")
_FINISHED = "the latents are finished"
_LINES = "each line makes clips of its own"
_SHOWN = "each says what to show"
_SAMPLED = (  # settings of text-to-video models that say how to sample
    *("prompt", "negative_prompt", "num_videos", "num_frames", "height", "width"),
    *("guidance_scale", "solver", "eta", "window", "window_overlap", "loop"),
    *("save_latents", "reuse_every", "lora", "num_inference_steps"),
)

# base_trajectory, the file of a trajectory, base_unet, lora, and latents, a file of finished ones,
# are settings of the command line
CONFLICTS = (
    Conflict("num_residuals", "num_videos", "they share one base path"),
    Conflict("base_cache", "base_trajectory", _CACHE),
    Conflict("base_cache", "trajectory", _CACHE, _CACHE_ERROR),
    Conflict("base_cache", "image", _CACHE, _CACHE_ERROR),
    Conflict("base_cache", "overlap_phases", _CACHE, _CACHED_ERROR),
    Conflict("image", "base_trajectory", _IMAGE),
    Conflict("image", "trajectory", _IMAGE, _IMAGE_ERROR.format("a trajectory")),
    Conflict("image", "base_seed", _IMAGE),
    Conflict("image", "base_offset", _IMAGE),
    Conflict("image", "base_path", _IMAGE, _STEPWISE_ERROR, value="stepwise"),
    Conflict("image", "preview", _IMAGE, _PREVIEW_ERROR.format("an image")),
    Conflict("image", "overlap_phases", _IMAGE, _GIVEN_ERROR),
    Conflict("image", "base_unet", _IMAGE),
    Conflict("preview", "num_frames", _PREVIEW, _PREVIEW_ERROR.format("num_frames")),
    Conflict("preview", "num_residuals", _PREVIEW, _PREVIEW_ERROR.format("num_residuals")),
    Conflict("preview", "residual_seed", _PREVIEW),
    Conflict("preview", "window", _PREVIEW, _PREVIEW_ERROR.format("window")),
    Conflict("preview", "window_overlap", _PREVIEW, _PREVIEW_ERROR.format("window_overlap")),
    Conflict("preview", "loop", _PREVIEW, _PREVIEW_ERROR.format("loop")),
    Conflict("preview", "base_path", _PREVIEW, _PREVIEW_ERROR.format("base_path")),
    Conflict("preview", "overlap_phases", _PREVIEW, _PREVIEW_ERROR.format("overlap_phases")),
    Conflict("preview", "offload_base", _PREVIEW, _PREVIEW_ERROR.format("offload_base")),
    Conflict("preview", "lam", _PREVIEW, _PREVIEW_ERROR.format("lam")),
    Conflict("overlap_phases", "trajectory", _OVERLAP, _GIVEN_ERROR),
    Conflict("overlap_phases", "base_path", _OVERLAP, _CLEAN_ERROR, value="clean"),
    Conflict("overlap_phases", "offload_base", _OVERLAP, _OFFLOAD_ERROR, value=True),
    *(Conflict("prompts", other, _LINES) for other in ("latents", "save_latents", "list_labels")),
    Conflict("ray", "overlap_phases", "workers of their own run the phases of different lines"),
    Conflict("ray", "offload_base", "no worker holds both networks"),
    Conflict("ray", "dry_run", "a dry run needs no cluster"),
    Conflict("ray", "base_device", "each worker has a device of its own"),
    Conflict("ray", "residual_device", "each worker has a device of its own"),
    *(Conflict("latents", other, _FINISHED) for other in _SAMPLED),
    Conflict("prompt", "label", _SHOWN, "a prompt cannot go with a label: each says what to show"),
)
_WITHOUT_EFFECT = {
    **{"num_videos": 1, "num_residuals": 1, "reuse_every": 1},
    **{"preview": False, "overlap_phases": False, "loop": False},
}


def effective(written: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that the user wrote, by name, without those that change nothing.

    Those are None, one video, one residual, features never reused, and a switch that is off.
    """
    return {
        name: value
        for name, value in written.items()
        if value is not None and not (name in _WITHOUT_EFFECT and value == _WITHOUT_EFFECT[name])
    }


def conflicts(written: Mapping[str, Any]) -> Iterator[Conflict]:
    """The conflicts among the settings that the user wrote, given by name."""
    values = effective(written)
    for conflict in CONFLICTS:
        if conflict.setting in values and conflict.other in values:
            if conflict.value is None or values[conflict.other] == conflict.value:
                yield conflict
