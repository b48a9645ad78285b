"""From a request's fields to the settings of a job: what a model can take, within bounds."""

from __future__ import annotations

import re
import secrets
from dataclasses import dataclass, replace
from typing import Any

from ..names import DEFAULT_STEPS
from .bodies import choice, real, switch, text, whole
from .errors import ApiError, bad, shown
from .jobs import FORMATS, Job, JobSettings
from .model_info import ModelInfo

REQUEST_NAME = "[!-~]([ -~]*[!-~])?"  # pattern of an Idempotency-Key
MAX_PROMPT = 4000  # characters
MAX_FPS = 120
EXTENSIONS = 10  # a clip may become so many times as long as one that is made at once
_SHOWN_NAMES = 30
_MOST_SEED = 2**64 - 1
_LENGTH = ("seconds", "num_frames", "fps")
_WHAT = ("prompt", "label", "negative_prompt")
_HOW = ("num_inference_steps", "guidance_scale", "solver", "eta", "format", "scale", "size")
CREATE_FIELDS = (
    *("model", *_WHAT, "seed", "base_seed", "residual_seed"),
    *(*_LENGTH, *_HOW, "base_path", "loop", "input_reference"),
)
REMIX_FIELDS = ("model", *_WHAT, "seed", "residual_seed", *_LENGTH, "format")
EXTEND_FIELDS = ("model", *_WHAT, "seed", "residual_seed", *_LENGTH, *_HOW, "video")


@dataclass(frozen=True)
class Bounds:
    """Of what one request may ask for.

    seconds: of a clip at the model's frames a second; scale: times that its pictures are enlarged
    """

    steps: int = 200
    seconds: float = 12.0
    scale: int = 4

    def frames(self, info: ModelInfo) -> int:
        """Frames of a clip, at most; its model's own length is always among them."""
        return max(int(self.seconds * info.fps), info.num_frames)


@dataclass(frozen=True, kw_only=True)
class Draft:
    """A job as a request asks for it, without a name."""

    settings: JobSettings
    seconds: str
    size: str
    remixed_from: str | None = None


# -- the three requests ----------------------------------------------------------------------------


def create(values: dict[str, Any], has_picture: bool, info: ModelInfo, bounds: Bounds) -> Draft:
    """A new clip; has_picture: whether an `input_reference` came."""
    _check_names(values, CREATE_FIELDS)
    _check_model(values, info)
    what = _what(values, info)
    if not has_picture and all(values.get(name) is None for name in ("prompt", "label")):
        names = "prompt or label" if info.labels else "prompt"
        raise bad(f"{names} is missing: it says what to show", "prompt", "missing_parameter")
    if has_picture:
        _check_picture(values, info)
    base_path = _base_path(values, info)
    fps, num_frames, seconds = _length(values, info, bounds, info.fps, info.num_frames)
    scale = _scale(values, info, bounds, 1)
    settings = JobSettings(
        **what,
        **_seeds(values, info),
        **_solver(values, info, bounds, None),
        num_frames=num_frames,
        fps=fps,
        loop=_loop(values, info, num_frames),
        base_path=None if has_picture else base_path,
        scale=scale,
        width=info.width,
        height=info.height,
        format=choice(values, "format", FORMATS) or "mp4",
        picture=has_picture,
    )
    return Draft(settings=settings, seconds=seconds, size=_size(settings))


def remix(values: dict[str, Any], source: Job, info: ModelInfo, bounds: Bounds) -> Draft:
    """Another motion of the source's look: its base path, and a new seed for the rest.

    A new prompt is shown to the residual network alone; the base path stays that of the old one.
    A model without base paths makes the clip of the new prompt from the old noise.
    """
    _check_names(values, REMIX_FIELDS)
    _check_model(values, info)
    _check_source(source, info)
    old = source.settings
    length, fps = old.num_frames, old.fps
    if old.extends is not None and any(values.get(name) is not None for name in _LENGTH):
        raise bad("a remix of an extension keeps its length", "seconds")
    fps, num_frames, seconds = _length(values, info, bounds, fps, length)
    _check_loop(old.loop, num_frames, info)
    if num_frames == length and fps == old.fps:
        seconds = source.seconds
    new = replace(old, num_frames=num_frames, fps=fps, **_changed(values, old, info))
    new = replace(new, format=choice(values, "format", FORMATS) or old.format)
    seed = whole(values, "seed", 0, _MOST_SEED - 1)
    residual = whole(values, "residual_seed", 0, _MOST_SEED)
    if info.has_base:
        residual = seed if residual is None else residual
        residual = _other_seed(old.residual_seed) if residual is None else residual
        look = old.look or _look(old)
        same = look == _look(new)
        new = replace(new, residual_seed=residual, look=None if same else look)
    elif seed is not None or residual is not None or _look(new) == _look(old):
        new = replace(new, **_seeds({"seed": seed, "residual_seed": residual}, info))
    return Draft(settings=new, seconds=seconds, size=_size(new), remixed_from=source.id)


def extend(values: dict[str, Any], source: Job | None, info: ModelInfo, bounds: Bounds) -> Draft:
    """A clip that goes on from the last frame of another; source: None for an uploaded one."""
    _check_names(values, EXTEND_FIELDS)
    _check_model(values, info)
    if not (info.has_base and info.animates_pictures):
        raise bad(
            f"{info.name} cannot extend a video: it cannot start from a picture",
            "video",
            "unsupported",
        )
    old = None if source is None else source.settings
    if source is not None:
        _check_source(source, info)
        if source.status != "completed":
            message = f"{source.id} is {source.status}: only a completed video can be extended"
            raise bad(message, "video", "video_not_ready")
    start = _blank(info) if old is None else old
    most = bounds.frames(info)  # of what is added: as much again is made and left out
    default = min(max(info.num_frames // 2, 1), most)
    fps, num_frames, seconds = _length(values, info, bounds, start.fps, default, most)
    if old is not None and fps != old.fps:
        raise bad(f"{source.id} has {old.fps:g} frames a second, and so has its extension", "fps")
    if source is not None:
        total = _frames(source) + num_frames
        limit = EXTENSIONS * bounds.frames(info)
        if total > limit:
            message = f"an extended video may have {limit} frames at most, this one would have"
            raise bad(f"{message} {total}", "seconds")
        seconds = f"{total / fps:g}"
    seed = _seeds({name: value for name, value in values.items() if name != "base_seed"}, info)
    settings = replace(
        start,
        **_changed(values, start, info),
        **seed,
        **_solver(values, info, bounds, start),
        num_frames=num_frames,
        fps=fps,
        base_path=None,
        scale=_scale(values, info, bounds, start.scale),
        format=choice(values, "format", FORMATS) or start.format,
        loop=False,
        picture=False,
        look=None,
        extends="" if source is None else source.id,
    )
    if old is not None and settings.scale != old.scale:
        raise bad(f"{source.id} is {source.size}, and so is its extension", "size")
    return Draft(settings=settings, seconds=seconds, size=_size(settings))


# -- parts -----------------------------------------------------------------------------------------


def _check_names(values: dict[str, Any], known: tuple[str, ...]) -> None:
    for name in values:
        if name not in known:
            message = f"unknown parameter {shown(name)}, expected some of {', '.join(known)}"
            raise bad(message, name[:80], "unknown_parameter")


def _check_model(values: dict[str, Any], info: ModelInfo) -> None:
    name = text(values, "model", 200)
    if name not in (None, "", info.name):
        raise no_model(name, info)


def no_model(name: str, info: ModelInfo) -> ApiError:
    message = f"there is no model {shown(name)}: this server has {info.name}"
    return ApiError(404, message, "model_not_found", "model")


def _check_source(source: Job, info: ModelInfo) -> None:
    old = source.settings
    if source.model != info.name or (old.width, old.height) != (info.width, info.height):
        message = f"{source.id} was made by the model {source.model}, which is not served now"
        raise bad(message, "video_id", "model_mismatch")


def _check_picture(values: dict[str, Any], info: ModelInfo) -> None:
    if not info.animates_pictures:
        message = f"{info.name} cannot animate a picture"
        raise bad(message, "input_reference", "unsupported")
    for name, value in (("base_seed", None), ("base_path", "stepwise")):
        if values.get(name) is not None and value in (None, values[name]):
            raise bad(f"{name} cannot go with input_reference: the picture is the base frame", name)


def _what(values: dict[str, Any], info: ModelInfo) -> dict[str, Any]:
    """label, prompt and negative_prompt; a prompt that is a label, of a model of labels alone."""
    prompt = text(values, "prompt", MAX_PROMPT)
    label = text(values, "label", 200)
    negative = text(values, "negative_prompt", MAX_PROMPT) or ""
    if negative and not info.takes_prompts:
        raise bad(f"{info.name} takes no negative_prompt: it knows labels alone", "negative_prompt")
    prompt = (prompt or "").strip() or None
    if label is not None and label not in info.labels:
        raise bad(f"unknown label {shown(label)}, expected {_names(info)}", "label")
    if prompt is not None and not info.takes_prompts:
        found = [name for name in info.labels if name.casefold() == prompt.casefold()]
        if not found:
            message = f"{info.name} knows no free text: prompt must be {_names(info)}"
            raise bad(f"{message}, got {shown(prompt)}", "prompt")
        if label not in (None, found[0]):
            raise bad("a prompt cannot go with a label: each says what to show", "label")
        label, prompt = found[0], None
    if label is not None and prompt is not None:
        raise bad("a prompt cannot go with a label: each says what to show", "label")
    return {"label": label, "prompt": prompt, "negative_prompt": negative}


def _names(info: ModelInfo) -> str:
    if not info.labels:
        return "none, as this model has no labels"
    names = ", ".join(info.labels[:_SHOWN_NAMES])
    more = len(info.labels) - _SHOWN_NAMES
    return f"one of {names}" + (f" and {more} more" if more > 0 else "")


def _changed(values: dict[str, Any], old: JobSettings, info: ModelInfo) -> dict[str, Any]:
    """label, prompt and negative_prompt: new ones where they are given, else the old ones."""
    what = _what(values, info)
    if what["label"] is None and what["prompt"] is None:
        what |= {"label": old.label, "prompt": old.prompt}
    if values.get("negative_prompt") is None:
        what["negative_prompt"] = old.negative_prompt
    return what


def _look(settings: JobSettings) -> dict[str, Any]:
    return {name: getattr(settings, name) for name in ("label", "prompt", "negative_prompt")}


def _seeds(values: dict[str, Any], info: ModelInfo) -> dict[str, int]:
    """Both seeds; `seed` S is short for S and S + 1; random ones are of 32 bits."""
    seed = whole(values, "seed", 0, _MOST_SEED - 1)
    base = whole(values, "base_seed", 0, _MOST_SEED)
    residual = whole(values, "residual_seed", 0, _MOST_SEED)
    if base is not None and not info.has_base:
        raise bad(f"{info.name} has no base frame: it takes no base_seed", "base_seed")
    if residual is not None and info.kind == "text":
        raise bad(f"{info.name} has one seed: it takes no residual_seed", "residual_seed")
    seed = secrets.randbits(32) if seed is None else seed
    if info.kind == "text":
        return {"base_seed": seed, "residual_seed": seed}
    return {
        "base_seed": seed if base is None else base,
        "residual_seed": seed + 1 if residual is None else residual,
    }


def _other_seed(old: int) -> int:
    while (seed := secrets.randbits(32)) == old:
        pass
    return seed


def _solver(
    values: dict[str, Any], info: ModelInfo, bounds: Bounds, old: JobSettings | None
) -> dict[str, Any]:
    """How to sample: as given, else as the old job, else as the model's default."""
    steps = whole(values, "num_inference_steps", 1, bounds.steps)
    guidance = real(values, "guidance_scale", 0, 100)
    solver = choice(values, "solver", info.solvers)
    eta = real(values, "eta", 0, 1)
    if eta and solver is None and old is None:
        solver = "ddim"
    usual = info.steps if solver in (None, info.solver) else DEFAULT_STEPS
    chosen = {
        "num_inference_steps": min(usual, bounds.steps) if old is None else old.num_inference_steps,
        "guidance_scale": info.guidance_scale if old is None else old.guidance_scale,
        "solver": info.solver if old is None else old.solver,
    }
    given = {"num_inference_steps": steps, "guidance_scale": guidance, "solver": solver}
    chosen |= {name: value for name, value in given.items() if value is not None}
    if eta is None:
        eta = old.eta if old is not None and chosen["solver"] == old.solver else 0.0
    if eta != 0 and chosen["solver"] != "ddim":
        raise bad(f"eta belongs to the solver ddim, not to {chosen['solver']}", "eta")
    _check_distilled(values, info, chosen, eta)
    return {**chosen, "eta": eta}


def _check_distilled(
    values: dict[str, Any], info: ModelInfo, chosen: dict[str, Any], eta: float
) -> None:
    """What a distilled model was not made for."""
    steps, scale = chosen["num_inference_steps"], chosen["guidance_scale"]
    if info.only_steps and steps not in info.only_steps:
        made_for = " or ".join(map(str, info.only_steps))
        raise bad(f"{info.name} takes {made_for} steps, not {steps}", "num_inference_steps")
    least, largest = info.guidance_range
    if not least <= scale <= largest:
        raise bad(
            f"{info.name} takes a guidance_scale from {least:g} to {largest:g}, not {scale:g}",
            "guidance_scale",
        )
    if not info.takes_negatives:
        if values.get("negative_prompt"):
            raise bad(f"{info.name} was distilled: it takes no negative_prompt", "negative_prompt")
        if eta:
            raise bad(f"{info.name} was distilled: its steps add no noise", "eta")


def _base_path(values: dict[str, Any], info: ModelInfo) -> str | None:
    if info.has_base:
        return choice(values, "base_path", info.base_paths) or info.base_path
    if values.get("base_path") is not None:
        raise bad(f"{info.name} has no base path", "base_path")
    return None


def _loop(values: dict[str, Any], info: ModelInfo, num_frames: int) -> bool:
    loop = switch(values, "loop")
    if loop and info.least_loop is None:
        raise bad(f"{info.name} is a plain video model, which makes no loops", "loop")
    _check_loop(loop, num_frames, info)
    return loop


def _check_loop(loop: bool, num_frames: int, info: ModelInfo) -> None:
    if loop and info.least_loop is not None and num_frames < info.least_loop:
        message = f"a loop has {info.least_loop} frames at least, this one would have {num_frames}"
        raise bad(message, "num_frames")


def _length(
    values: dict[str, Any],
    info: ModelInfo,
    bounds: Bounds,
    fps: float,
    num_frames: int,
    most: int | None = None,
) -> tuple[float, int, str]:
    """Frames a second, frames and seconds; the last two are defaults without `most` of them."""
    most = bounds.frames(info) if most is None else most
    fps = real(values, "fps", 1, MAX_FPS) or fps
    seconds = real(values, "seconds", 0, 3600)
    given = whole(values, "num_frames", 1, most)
    if seconds is None:
        count = num_frames if given is None else given
        return fps, count, f"{count / fps:g}"
    count = max(round(seconds * fps), 1) if seconds > 0 else 0
    if given is not None and given != count:
        message = f"{seconds:g} seconds at {fps:g} frames a second are {count} frames, not {given}"
        raise bad(message, "num_frames")
    if not 1 <= count <= most:
        message = f"seconds must be above 0 and at most {most / fps:g} at {fps:g} frames a second"
        raise bad(f"{message}, got {seconds:g}", "seconds")
    return fps, count, f"{seconds:g}"


def _scale(values: dict[str, Any], info: ModelInfo, bounds: Bounds, default: int) -> int:
    """How many times the frames are enlarged, as `scale` or `size` says."""
    scale = whole(values, "scale", 1, bounds.scale)
    size = text(values, "size", 40)
    if size is None:
        return default if scale is None else scale
    sizes = {f"{info.width * n}x{info.height * n}": n for n in range(1, bounds.scale + 1)}
    found = sizes.get(re.sub("[X×]", "x", size.strip()))
    if found is None:
        raise bad(f"size must be one of {', '.join(sizes)}, got {shown(size)}", "size")
    if scale not in (None, found):
        raise bad(f"{size} is {found} times the model's size, not {scale} times", "scale")
    return found


def _size(settings: JobSettings) -> str:
    return f"{settings.width * settings.scale}x{settings.height * settings.scale}"


def _frames(job: Job) -> int:
    """The number of frames in a job's clip."""
    return int(job.result.get("num_frames", job.settings.num_frames))


def _blank(info: ModelInfo) -> JobSettings:
    """A model's defaults, seeds aside."""
    return JobSettings(
        num_frames=info.num_frames,
        num_inference_steps=info.steps,
        guidance_scale=info.guidance_scale,
        solver=info.solver,
        base_seed=0,
        residual_seed=0,
        fps=info.fps,
        width=info.width,
        height=info.height,
    )
