"""A request: what a user wants of a model. conflicts.py says which settings go together.

A call from Python and the command line build the same frozen dataclass: `SamplingRequest(**values)`
for a decomposed model, `VideoRequest` for a plain video model, `TextRequest` for a published
text-to-video model. Bad values are refused when it is made, and again by `dataclasses.replace`. Its
pipeline checks what depends on a checkpoint, such as labels and sizes. Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ..arguments import as_float, as_int, keep_plain
from ..names import BASE_PATHS, OUTPUT_TYPES, TEXT_OUTPUT_TYPES
from .conflicts import conflicts
from .reuse_every import ReuseEvery, each_phase, plain_reuse_every

if TYPE_CHECKING:
    from torch import Tensor

    from ..diffusion.base_path import BaseTrajectory
    from ..diffusion.decompose import Lam
    from ..media.pictures import Picture
    from .latents import LatentsFile

MAX_GUIDANCE_SCALE = 100.0
_INTS = (  # fields of requests
    *("num_frames", "height", "width", "num_videos", "num_residuals", "num_inference_steps"),
    *("seed", "base_seed", "residual_seed", "base_offset", "sample_offset"),
    *("window", "window_overlap"),
)
_FLOATS = ("guidance_scale", "eta")
_SWITCHES = ("loop", "overlap_phases", "preview")
# fields that have another name on the command line
_FIELDS = {"base_trajectory": "trajectory", "latents": "finished"}


class _Sampled:
    """What all requests have: phases that take steps, and how often these run their networks."""

    sampled: ClassVar[tuple[str, ...]] = ("video",)
    reuse_every: ReuseEvery

    def reuses(self, phase: str) -> int:
        """N of a phase, whose whole network runs on every N-th step."""
        return each_phase(self.reuse_every, self.sampled)[phase]

    def _keep_reuse_every(self) -> None:
        """Puts reuse_every into its plain form; ValueError for what has none."""
        plain = plain_reuse_every(self.reuse_every, self.sampled)
        object.__setattr__(self, "reuse_every", plain)


@dataclass(frozen=True, kw_only=True, eq=False)
class VideoRequest(_Sampled):
    """The settings of a plain video model; `VideoFusionPipeline.__call__` describes them.

    Raises ValueError for a value that no model can take, and for settings that cannot go together;
    TypeError for a prompt that is no text.
    """

    label: str | Sequence[str] | None = None
    prompt: str | Sequence[str] | None = None
    negative_prompt: str | Sequence[str] = ""
    num_frames: int | None = None
    num_inference_steps: int | None = None
    guidance_scale: float = 2.0
    residual_seed: int = 1
    output_type: str = "np"
    num_videos: int = 1
    solver: str | None = None
    eta: float = 0.0
    sample_offset: int = 0
    reuse_every: ReuseEvery = 1

    def __post_init__(self) -> None:
        keep_plain(self, _INTS, _FLOATS, _SWITCHES)
        self._keep_reuse_every()
        if not isinstance(self.label, Sequence | None):  # it is read more than once
            kind = type(self.label).__name__
            raise TypeError(f"label must be a text or a list of texts, got {kind}")
        _check_choice("output_type", self.output_type, OUTPUT_TYPES)
        _check_counts(self, "num_frames", "num_inference_steps", "num_videos")
        _check_guidance_scale(self.guidance_scale)
        _check_texts(self, *(("prompt",) if self.prompt is not None else ()), "negative_prompt")
        if not self.labels:
            raise ValueError("label is an empty list")
        for conflict in conflicts(vars(self)):
            if conflict.error:
                raise ValueError(conflict.error)

    @property
    def labels(self) -> list[str | None]:
        """The labels, or the prompts that take their place, as a list; None is no condition."""
        shown = self.label if self.prompt is None else self.prompt
        return [shown] if shown is None or isinstance(shown, str) else list(shown)

    @property
    def negatives(self) -> list[str]:
        """The negative prompt of each label or prompt."""
        return _negatives(self)

    @property
    def num_clips(self) -> int:
        """B, the number of clips."""
        return len(self.labels) * self.num_videos

    @property
    def shares_path(self) -> bool:
        """Whether all clips follow one base path."""
        return False

    def part(self, first: int, count: int) -> VideoRequest:
        """The request for clips first … first + count - 1, which are those of the whole request."""
        return replace(self, num_videos=count, sample_offset=self.sample_offset + first)

    def following(self, trajectory: BaseTrajectory | None) -> VideoRequest:
        """The request for later clips: with the first clip's base path, if all clips share one."""
        return self

    @classmethod
    def foreign(cls, names: Iterable[str]) -> list[str]:
        """The names among these that are settings of another kind of model only."""
        return _foreign(cls, names)


@dataclass(frozen=True, kw_only=True, eq=False)
class SamplingRequest(VideoRequest):
    """The settings of a decomposed model; `VideoFusionPipeline.__call__` describes them.

    preview: make the base frames alone, as clips of one frame

    Raises what `VideoRequest` does.
    """

    base_seed: int = 0
    base_offset: int | None = None
    base_path: str | None = None
    num_residuals: int = 1
    lam: Lam | None = None
    trajectory: BaseTrajectory | None = None
    image: Picture | None = None
    base_cache: str | Path | None = None
    window: int | None = None
    window_overlap: int | None = None
    loop: bool = False
    overlap_phases: bool = False
    offload_base: bool | None = None
    preview: bool = False
    sampled: ClassVar[tuple[str, ...]] = ("base", "residual")

    def __post_init__(self) -> None:
        _check_choice("base_path", self.base_path, (None, *BASE_PATHS))
        super().__post_init__()
        path = self.trajectory
        if path is not None and not hasattr(path, "states"):
            raise TypeError(f"trajectory must be a BaseTrajectory, got {type(path).__name__}")
        _check_counts(self, "num_residuals")
        if self.num_residuals > 1 and self.num_paths > 1:
            raise ValueError(
                f"num_residuals={self.num_residuals} needs one base path, but label and num_videos "
                f"make {self.num_paths}"
            )

    @property
    def num_clips(self) -> int:
        """B, the number of clips, those that share a base path included."""
        return max(super().num_clips, self.num_residuals)

    @property
    def num_paths(self) -> int:
        """The number of base paths."""
        return super().num_clips

    @property
    def shares_path(self) -> bool:
        return self.num_residuals > 1

    @property
    def first_base_sample(self) -> int:
        """The sample whose base path the first clip follows."""
        if self.base_offset is not None:
            return self.base_offset
        return 0 if self.shares_path else self.sample_offset

    def part(self, first: int, count: int) -> SamplingRequest:
        if self.shares_path:
            place = {"base_offset": self.first_base_sample}  # also for a part of one clip
            offset = self.sample_offset + first
            return replace(self, num_residuals=count, sample_offset=offset, **place)
        part, path = super().part(first, count), self.trajectory
        if self.base_offset is not None:
            part = replace(part, base_offset=self.base_offset + first)
        if path is not None and path.final.shape[0] > 1:  # a path of one clip serves them all
            path = replace(path, states=path.states[:, first : first + count])
        return replace(part, trajectory=path)

    def following(self, trajectory: BaseTrajectory) -> SamplingRequest:
        return self.along(trajectory) if self.shares_path else self

    def along(self, trajectory: BaseTrajectory) -> SamplingRequest:
        """The request with a base path of its clips, in place of what would make one."""
        given = {"image": None, "base_cache": None, "overlap_phases": False}
        return replace(self, trajectory=trajectory, **given)


@dataclass(frozen=True, kw_only=True, eq=False)
class TextRequest(_Sampled):
    """The settings of a text-to-video model; `TextToVideoPipeline.__call__` describes them.

    finished: latents [B, N, C, h, w] that are to be decoded, without sampling

    Raises ValueError for a value that no model can take, TypeError for a prompt that is no text.
    """

    prompt: str | Sequence[str] | None = None
    negative_prompt: str | Sequence[str] = ""
    num_frames: int | None = None
    height: int | None = None
    width: int | None = None
    num_inference_steps: int = 50
    guidance_scale: float = 9.0
    solver: str = "ddim"
    eta: float = 0.0
    seed: int = 0
    latents: Tensor | None = None
    finished: Tensor | None = None
    save_latents: str | Path | LatentsFile | None = None
    output_type: str = "np"
    num_videos: int = 1
    window: int | None = None
    window_overlap: int | None = None
    loop: bool = False
    sample_offset: int = 0
    reuse_every: ReuseEvery = 1

    def __post_init__(self) -> None:
        keep_plain(self, _INTS, _FLOATS, _SWITCHES)
        self._keep_reuse_every()
        _check_choice("output_type", self.output_type, TEXT_OUTPUT_TYPES)
        _check_counts(self, "num_frames", "height", "width", "num_videos")
        _check_guidance_scale(self.guidance_scale)
        if self.finished is not None:
            return
        _check_texts(self, "prompt", "negative_prompt")

    @property
    def labels(self) -> list[str]:
        """The prompts, which take the place of labels; none where latents are finished."""
        if self.finished is not None:
            return []
        return [self.prompt] if isinstance(self.prompt, str) else list(self.prompt)

    @property
    def negatives(self) -> list[str]:
        """The negative prompt of each prompt."""
        return _negatives(self)

    @property
    def num_clips(self) -> int:
        """B, the number of clips."""
        return len(self.labels) * self.num_videos if self.finished is None else len(self.finished)

    @property
    def shares_path(self) -> bool:
        """Whether all clips follow one base path."""
        return False

    def part(self, first: int, count: int) -> TextRequest:
        """The request for clips first … first + count - 1, which are those of the whole request."""
        own = {
            name: getattr(self, name)[first : first + count]
            for name in ("latents", "finished")
            if getattr(self, name) is not None
        }
        offset = self.sample_offset + first
        return replace(self, num_videos=count, sample_offset=offset, **own)

    def following(self, trajectory: None) -> TextRequest:
        return self

    @classmethod
    def foreign(cls, names: Iterable[str]) -> list[str]:
        """The names among these that are settings of another kind of model only."""
        return _foreign(cls, names)


def _foreign(own: type, names: Iterable[str]) -> list[str]:
    known = field_names(SamplingRequest) | field_names(TextRequest)
    fields = {name: _FIELDS.get(name, name) for name in names}
    return [name for name, field in fields.items() if field in known - field_names(own)]


def changed(values: Mapping[str, Any]) -> list[str]:
    """The settings of a `SamplingRequest` that are not at their defaults, seeds aside.

    Seeds do not count: a call may set both, even where one of them is not used.
    """
    defaults = {field.name: field.default for field in fields(SamplingRequest)}
    return [
        name
        for name, value in values.items()
        if name in defaults and not name.endswith("_seed") and not _same(value, defaults[name])
    ]


def _same(value: Any, default: Any) -> bool:
    return value is None if default is None else value == default


def field_names(kind: type[VideoRequest | TextRequest]) -> set[str]:
    """The settings that requests of this kind have."""
    return {field.name for field in fields(kind)}


def _check_texts(request: VideoRequest | TextRequest, *names: str) -> None:
    """TypeError or ValueError unless the prompts are texts, with a negative one for each or all."""
    for name in names:
        value = getattr(request, name)
        texts = [value] if isinstance(value, str) else value
        if not isinstance(texts, Sequence) or not all(isinstance(text, str) for text in texts):
            raise TypeError(f"{name} must be a text or a list of texts, got {value!r}")
        if not texts:
            raise ValueError(f"{name} is an empty list")
    if len(request.negatives) != len(request.labels):
        raise ValueError(
            f"expected one negative_prompt for all or one for each of {len(request.labels)} "
            f"prompts, got {len(request.negatives)}"
        )


def _negatives(request: VideoRequest | TextRequest) -> list[str]:
    """The negative prompt of each prompt."""
    negative = request.negative_prompt
    return [negative] * len(request.labels) if isinstance(negative, str) else list(negative)


def _check_counts(request: VideoRequest | TextRequest, *names: str) -> None:
    """ValueError for a field that is no count; None is one where it is the default."""
    for name in names:
        value = getattr(request, name)
        left_out = value is None and getattr(type(request), name) is None
        if not left_out and (as_int(value) or 0) < 1:
            raise ValueError(f"{name} must be an int of at least 1, got {value!r}")


def _check_guidance_scale(scale: float) -> None:
    if as_float(scale) is None or not 0.0 <= scale <= MAX_GUIDANCE_SCALE:  # also refuses NaN
        limit = f"[0, {MAX_GUIDANCE_SCALE:g}]"
        raise ValueError(f"guidance_scale must be in {limit}, got {scale!r}")


def _check_choice(name: str, value: str | None, choices: Sequence[str | None]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {choices}, got {value!r}")
