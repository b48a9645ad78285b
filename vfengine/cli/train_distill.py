"""`--objective distill`: what its flags may be, and what its teacher decides in their place.

Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Set
from typing import Any

from ..names import STUDENT_STEPS
from .flags import UsageError

# Settings that a student has of its teacher, or that only trainings without a teacher take.
OF_TEACHER = (
    *("latents", "autoencoder", "text_encoder", "base", "num_frames", "size", "fps", "lam"),
    *("base_channels", "residual_channels", "layers_per_block", "patch_size", "base_path"),
    *("timestep_shift", "lora", "model"),
)


def check_distillation(settings: dict[str, Any], given: Set[str]) -> None:
    """Names the student's steps, and leaves to the teacher what it decides unless it is given.

    Raises UsageError for what no student can have.
    """
    if settings["from"] is None:
        raise UsageError("--objective distill needs --from FOLDER, the teacher")
    if settings["steps"] not in STUDENT_STEPS:
        known = ", ".join(map(str, STUDENT_STEPS))
        raise UsageError(
            f"--steps of --objective distill must be one of {known}: how many the "
            f"student takes; got {settings['steps']}"
        )
    scales = settings["guidance_range"]
    if len(scales) != 2 or not 0 <= scales[0] <= scales[1] <= 100:
        raise UsageError(
            f"--guidance-range must be two scales in 0..100, the least first, got "
            f"{','.join(map(str, scales))}"
        )
    if settings["teacher_steps"] < 2 * settings["steps"]:
        raise UsageError(
            f"--teacher-steps must be at least twice --steps, got {settings['teacher_steps']}"
        )
    settings["student_steps"], settings["steps"] = settings["steps"], settings["updates"]
    for name in ("clean_share", "cell_weight"):
        if name not in given:
            settings[name] = None
