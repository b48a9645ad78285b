"""A job: one clip that somebody has asked the server for. Nothing here imports torch."""

from __future__ import annotations

import json
import secrets
from dataclasses import asdict, dataclass, field
from typing import Any

STATUSES = ("queued", "in_progress", "completed", "failed")
FORMATS = ("mp4", "webm", "webp", "gif")

# Files of a job, by name; the clip's is `JobSettings.video_file`.
THUMBNAIL = "thumbnail.png"  # the base frame, exact; there once `Job.has_base`
SPRITESHEET = "spritesheet.png"  # all frames, exact (serving/frames.py)
UPLOAD = "upload"  # a picture
SOURCE = "source"  # a clip that is to go on: a video of any format, or another job's SPRITESHEET


@dataclass(frozen=True, kw_only=True)
class JobSettings:
    """What the clip of a job shows and how it is made, all of it decided.

    label, prompt: one of the two, or neither; a model takes what its requests take
    scale:         the frames are enlarged so many times
    format:        one of FORMATS
    picture:       whether the job's file "upload" is a picture that becomes the base frame
    height, width: of a text-to-video model's clip, before it is enlarged; 0: what the model makes
    extends:       the clip goes on from the last frame of the one in the job's file "source": the
                   id of the job that made it, or "" for one that was sent; num_frames then counts
                   the frames that are added
    look:          label, prompt and negative_prompt of the base path, where they are not the
                   clip's own: of a remix with another prompt
    """

    num_frames: int
    num_inference_steps: int
    guidance_scale: float
    base_seed: int
    residual_seed: int
    label: str | None = None
    prompt: str | None = None
    negative_prompt: str = ""
    solver: str = "ddim"
    eta: float = 0.0
    base_path: str | None = None
    fps: float = 10.0
    scale: int = 1
    height: int = 0
    width: int = 0
    format: str = "mp4"
    picture: bool = False
    extends: str | None = None
    look: dict[str, Any] | None = None

    @property
    def video_file(self) -> str:
        """The name of the clip's file."""
        return f"video.{self.format}"

    @property
    def shape(self) -> str:
        """Jobs of equal shape can be made in one batch."""
        names = (
            *("num_frames", "num_inference_steps", "guidance_scale", "solver", "eta"),
            *("base_path", "height", "width", "scale"),
        )
        # what starts from a picture, or goes on from a clip, has a base path of its own kind
        given = self.picture or self.extends is not None
        return json.dumps([getattr(self, name) for name in names] + [given])

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> JobSettings:
        return cls(**json.loads(text))


@dataclass(frozen=True, kw_only=True)
class Job:
    """A row of the store.

    status:   one of STATUSES
    phase:    of the pipeline, while it runs: "text", "base", "residual", "video" or "decode"; the
              last is "write", of the files
    progress: 0..100
    has_base: whether the file THUMBNAIL is there
    seconds:  of the clip that was asked for, as the client wrote it ("4"), or of the whole
              extended one
    size:     "WxH" in pixels
    remixed_from: the id of the job whose look it takes
    result:   of a completed job: inference_time_s, peak_memory_mb, timings, bytes …
    error:    of a failed one: {"code", "message"}
    times     unix seconds
    """

    id: str
    settings: JobSettings
    model: str
    seconds: str
    size: str
    created_at: float
    status: str = "queued"
    phase: str = ""
    progress: int = 0
    has_base: bool = False
    attempts: int = 0
    started_at: float | None = None
    completed_at: float | None = None
    expires_at: float | None = None
    remixed_from: str | None = None
    result: dict[str, Any] = field(default_factory=dict)
    error: dict[str, str] | None = None


def new_id() -> str:
    """An id that nobody can guess, safe as a file name."""
    return "video_" + secrets.token_hex(16)
