"""Jobs and models as the API shows them."""

from __future__ import annotations

from typing import Any

from .jobs import Job, JobSettings
from .model_info import ModelInfo
from .request_forms import MAX_FPS, Bounds
from .store import Store

MEDIA_TYPES = {
    "mp4": "video/mp4",
    "webm": "video/webm",
    "webp": "image/webp",
    "gif": "image/gif",
}
_AS_THEY_ARE = (
    *("label", "negative_prompt", "base_seed", "residual_seed", "fps", "num_inference_steps"),
    *("guidance_scale", "solver", "eta", "base_path", "loop", "format", "scale"),
)


def video(job: Job, store: Store) -> dict[str, Any]:
    """The Video object of a job; what the official client does not know of comes last."""
    settings, result = job.settings, job.result
    frames = result.get("num_frames", settings.num_frames)
    seconds = job.seconds
    if settings.extends is not None and "num_frames" in result:
        seconds = f"{frames / settings.fps:g}"
    return {
        "id": job.id,
        "object": "video",
        "model": job.model,
        "status": job.status,
        "progress": job.progress,
        "created_at": int(job.created_at),
        "completed_at": _moment(job.completed_at),
        "expires_at": _moment(job.expires_at),
        "seconds": seconds,
        "size": job.size,
        "prompt": settings.label if settings.prompt is None else settings.prompt,
        "remixed_from_video_id": job.remixed_from,
        "error": job.error,
        "phase": job.phase or None,
        "queue_position": store.ahead(job.id) + 1 if job.status == "queued" else None,
        "seed": _seed(settings),
        "num_frames": frames,
        **{name: getattr(settings, name) for name in _AS_THEY_ARE},
        "animates_picture": settings.picture,
        "extends": settings.extends,
        "look": settings.look,
        "has_thumbnail": job.has_base,
        "inference_time_s": result.get("inference_time_s"),
        "peak_memory_mb": result.get("peak_memory_mb"),
        "timings": result.get("timings"),
    }


def _moment(seconds: float | None) -> int | None:
    return None if seconds is None else int(seconds)


def _seed(settings: JobSettings) -> int | None:
    """The one seed that is short for both, if there is such a one."""
    base = settings.base_seed  # that of a text-to-video model is in both places
    return base if settings.residual_seed in (base, base + 1) else None


def model(info: ModelInfo, bounds: Bounds, created: float) -> dict[str, Any]:
    """The Model object, with what its requests may hold."""
    return {
        "id": info.name,
        "object": "model",
        "created": int(created),
        "owned_by": "vfengine",
        "kind": info.kind,
        "labels": list(info.labels),
        "takes_prompts": info.takes_prompts,
        "animates_pictures": info.animates_pictures,
        "has_base": info.has_base,
        "width": info.width,
        "height": info.height,
        "num_frames": info.num_frames,
        "fps": info.fps,
        "num_inference_steps": min(info.steps, bounds.steps),
        "guidance_scale": info.guidance_scale,
        "solver": info.solver,
        "solvers": list(info.solvers),
        "base_path": info.base_path,
        "base_paths": list(info.base_paths),
        "formats": list(MEDIA_TYPES),
        "min_num_inference_steps": info.steps_range(bounds.steps)[0],
        "max_num_inference_steps": info.steps_range(bounds.steps)[1],
        "min_guidance_scale": info.guidance_range[0],
        "max_guidance_scale": info.guidance_range[1],
        "takes_negatives": info.takes_negatives,
        "max_num_frames": bounds.frames(info),
        "max_fps": MAX_FPS,
        "max_scale": bounds.scale,
        "device": info.device,
        "dtype": info.dtype,
        "fingerprint": info.fingerprint,
    }
