"""What the server must know of a model to check a request. Nothing here imports torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

KINDS = ("decomposed", "plain", "text")


@dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """A model that an engine has read; the engine says it, the server reads it.

    name:             by which requests name it
    kind:             one of KINDS: with a base path; a plain video model; a published
                      text-to-video model
    labels:           what a request may name in place of a prompt
    takes_prompts:    whether free text can be shown
    width, height:    pixels of its frames, before they are enlarged
    num_frames, fps:  frames of a clip unless others are asked for, and of a second
    steps, guidance_scale, solver: the defaults
    only_steps, guidance_range, takes_negatives: what a distilled model was made for: the steps that
                      it takes, empty for any; guidance scales; whether a negative prompt
    solvers:          what `solver` can be
    base_paths:       what `base_path` can be; empty for a model without one
    base_path:        its default; None for a model without one
    animates_pictures: whether a picture can be the first thing that is there: its base frame
    has_base:         whether clips have a base frame (thumbnail, remix, extension)
    least_loop:       frames of a loop, at least; None for a model that makes none
    max_batch:        clips that an engine makes at once, at most
    fingerprint:      SHA-256 of the model's files, as `generate --json` says it
    device, dtype:    where it runs, and what its weights are
    """

    name: str
    kind: str
    labels: tuple[str, ...]
    takes_prompts: bool
    width: int
    height: int
    num_frames: int
    fps: float
    steps: int
    only_steps: tuple[int, ...] = ()
    guidance_range: tuple[float, float] = (0, 100)
    takes_negatives: bool = True
    guidance_scale: float
    solver: str
    solvers: tuple[str, ...]
    base_paths: tuple[str, ...]
    base_path: str | None
    animates_pictures: bool
    has_base: bool
    least_loop: int | None
    max_batch: int
    fingerprint: str
    device: str
    dtype: str

    def steps_range(self, limit: int) -> tuple[int, int]:
        """Least and largest num_inference_steps; limit: the server's, where the model has none."""
        return (min(self.only_steps), max(self.only_steps)) if self.only_steps else (1, limit)

    @classmethod
    def of(cls, values: dict[str, Any]) -> ModelInfo:
        """Of its fields, as they come out of JSON. Raises KeyError or TypeError for others."""
        lists = ("labels", "solvers", "base_paths", "only_steps", "guidance_range")
        return cls(**{**values, **{name: tuple(values[name]) for name in lists if name in values}})
