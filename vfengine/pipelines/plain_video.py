"""PlainVideoPipeline: clips of a plain video diffusion model, in one phase.

Such a model (VDM* in the paper) is the baseline that decomposed models are compared with. One
network estimates the noise of all frames; there is no base path.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NoReturn

from ..sampling.run import Callback
from .pipeline import CheckpointPipeline, VideoFusionOutput
from .request import VideoRequest, changed


class PlainVideoPipeline(CheckpointPipeline):
    """A plain video model, ready to sample; `VideoFusionPipeline.from_pretrained` makes it."""

    request_type = VideoRequest
    lacks = "a plain video model has no base path"

    def __call__(
        self, label: Any = None, *, callback: Callback | None = None, **settings: Any
    ) -> VideoFusionOutput:
        """Makes num_videos clips of each label.

        settings: the fields of `VideoRequest`, as `VideoFusionPipeline.__call__` describes them.
                  Other keywords of that call are refused unless they have their defaults;
                  base_seed is ignored
        callback: called as callback("video", steps done, steps in all), first with 0 done; "text"
                  and "decode" are phases too, as there

        Raises what `VideoFusionPipeline.__call__` raises, and ValueError for its other keywords.
        """
        self.check_fields(changed(settings))
        without_effect = self.request_type.foreign(settings)
        own = {name: value for name, value in settings.items() if name not in without_effect}
        return self.sample(VideoRequest(label=label, **own), callback)

    def sample(self, request: VideoRequest, callback: Callback | None = None) -> VideoFusionOutput:
        """Runs a request; `__call__` makes one of its keywords."""
        request, run = self.fill_defaults(request), self._run(callback)
        table, place = self._table(request, "video"), self._clip_place(request)
        condition = self._condition(request, run)
        noise = self._clip_noise(request, place)
        every = request.reuses("video")
        video = self._session.video(noise, condition, table, place, run, every)
        return VideoFusionOutput(self._frames(video, request.output_type, run), None, run.timings)

    def fill_defaults(
        self, request: VideoRequest, base_needed_again: bool | None = None
    ) -> VideoRequest:
        """The request, with the checkpoint's values for settings that are None.

        Raises ValueError for a prompt that the model cannot take.
        """
        self._check_prompts(request)
        frames = self.config.num_frames if request.num_frames is None else request.num_frames
        return replace(request, num_frames=frames, **self._chosen_steps(request))

    def _sampled_phases(self, request: VideoRequest) -> tuple[str, ...]:
        return ("video",)

    def _no_base_path(self, *_: Any, **__: Any) -> NoReturn:
        """ValueError: a plain video model has none."""
        raise ValueError(f"{self.folder}: {self.lacks}")

    walk_base = preview = image_path = check_trajectory = _no_base_path
