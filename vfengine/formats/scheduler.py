"""Noise schedules as published: diffusers' scheduler_config.json, and ModelScope's constants.

A scheduler's class names a solver, and the solver is the caller's choice. What is the network's own
is read: its noise levels, what it predicts, which timesteps it is asked at and where the last step
goes. A setting that would change one of these, and that has no counterpart here, is refused by
name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..diffusion.schedule import SPACINGS, NoiseSchedule
from ..diffusion.solvers import SolverTable, solver_table
from ..models.denoisers import PREDICTION_TYPES
from .published import Unsupported


@dataclass(frozen=True)
class PublishedSchedule:
    """How a published network is sampled.

    prediction_type:  what it predicts, one of PREDICTION_TYPES
    spacing, steps_offset: see `NoiseSchedule.timesteps`
    set_alpha_to_one: whether the last step goes to ᾱ = 1; otherwise to ᾱ_0
    """

    schedule: NoiseSchedule
    prediction_type: str = "epsilon"
    spacing: str = "leading"
    steps_offset: int = 0
    set_alpha_to_one: bool = True

    def table(self, solver: str, num_inference_steps: int, eta: float = 0.0) -> SolverTable:
        """The table of a named solver on this schedule; see `solver_table`, for errors too."""
        return solver_table(
            solver,
            self.schedule,
            num_inference_steps,
            eta,
            self.spacing,
            self.steps_offset,
            self.set_alpha_to_one,
        )


# The schedule of ModelScope's text-to-video model, which is in its code and in no file: "linear_sd"
# and timesteps 981 … 1. Where the steps do not divide 1000 its own loop takes one more than asked.
MODELSCOPE_SCHEDULE = PublishedSchedule(
    NoiseSchedule.scaled_linear(1000, 0.00085, 0.0120), steps_offset=1, set_alpha_to_one=False
)

_NAMED = {"linear": NoiseSchedule.linear, "scaled_linear": NoiseSchedule.scaled_linear}
# Entries that all classes below have, and that are read, with their defaults.
_SHARED = {"prediction_type": "epsilon", "timestep_spacing": "leading", "steps_offset": 0}
# Classes whose noise levels and timesteps are on the grid of training, and those of their defaults
# that are their own.
_FINAL_SIGMA = {"timestep_spacing": "linspace", "final_sigmas_type": "zero"}
_CLASSES: dict[str, dict[str, Any]] = {
    "DDIMScheduler": {"clip_sample": True, "set_alpha_to_one": True},
    "DDPMScheduler": {"clip_sample": True, "variance_type": "fixed_small"},
    "PNDMScheduler": {"set_alpha_to_one": False},
    "EulerDiscreteScheduler": _FINAL_SIGMA,
    "EulerAncestralDiscreteScheduler": {"timestep_spacing": "linspace"},
    "DPMSolverMultistepScheduler": _FINAL_SIGMA | {"variance_type": None},
    "UniPCMultistepScheduler": _FINAL_SIGMA,
}
# Entries that may only have one of these values.
_ONLY_THESE_VALUES = {
    "clip_sample": (False,),
    "final_sigmas_type": ("zero", "sigma_min"),
    "interpolation_type": ("linear",),
    "lambda_min_clipped": (-np.inf,),
    "prediction_type": PREDICTION_TYPES,
    "rescale_betas_zero_snr": (False,),
    "set_alpha_to_one": (True, False),
    "shift_terminal": (None,),
    "sigma_max": (None,),
    "sigma_min": (None,),
    "thresholding": (False,),
    "timestep_spacing": SPACINGS,
    "timestep_type": ("discrete",),
    "use_beta_sigmas": (False, None),
    "use_dynamic_shifting": (False,),
    "use_exponential_sigmas": (False, None),
    "use_flow_sigmas": (False,),
    "use_karras_sigmas": (False, None),
    "use_lu_lambdas": (False,),
    "variance_type": (None, "fixed_small", "fixed_small_log"),
}
# Of these only a class's own count: a configuration that was another class's keeps what this class
# does not read.
_OF_A_CLASS = ("clip_sample", "final_sigmas_type", "set_alpha_to_one", "variance_type")
# Entries that are read below, and those that change no result here: of solvers, of clipping that is
# off, and of shifts that are off.
_READ = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas")
_IGNORED = (
    *("algorithm_type", "disable_corrector", "euler_at_final", "lower_order_final", "predict_x0"),
    *("skip_prk_steps", "solver_order", "solver_p", "solver_type"),
    *("clip_sample_range", "dynamic_thresholding_ratio", "sample_max_value"),
    *("flow_shift", "time_shift_type"),
)


def diffusers_schedule(values: Mapping[str, Any]) -> PublishedSchedule:
    """The schedule of a scheduler_config.json.

    Raises Unsupported, a ValueError that names the entry, for one that is not supported.
    """
    name = values.get("_class_name")
    if not isinstance(name, str) or name not in _CLASSES:
        raise Unsupported("_class_name", name, f"is not one of {', '.join(_CLASSES)}")
    own = _SHARED | _CLASSES[name]
    entries = {**own, **values}
    for entry, value in entries.items():
        if entry in _OF_A_CLASS and entry not in own:
            continue
        if entry in _ONLY_THESE_VALUES:
            if value not in _ONLY_THESE_VALUES[entry]:
                raise Unsupported(entry, value)
        elif entry not in (*own, *_READ, *_IGNORED) and not entry.startswith("_"):
            raise Unsupported(entry, value, "is an unknown entry")
    offset = entries["steps_offset"]
    if type(offset) is not int or offset < 0:
        raise Unsupported("steps_offset", offset, "must be an int from 0 on")
    to_one = entries["set_alpha_to_one"] if "set_alpha_to_one" in own else True
    if "final_sigmas_type" in own:
        to_one = entries["final_sigmas_type"] == "zero"
    return PublishedSchedule(
        noise_schedule(values),
        prediction_type=entries["prediction_type"],
        spacing=entries["timestep_spacing"],
        steps_offset=offset,
        set_alpha_to_one=to_one,
    )


def noise_schedule(values: Mapping[str, Any]) -> NoiseSchedule:
    """The noise levels of a scheduler_config.json, whatever else it says.

    Raises Unsupported, naming the entry, for noise levels that are not supported; ValueError for
    numbers that are none of a schedule.
    """
    if values.get("rescale_betas_zero_snr", False):
        why = "is not supported: at zero terminal SNR a network's noise says nothing of its sample"
        raise Unsupported("rescale_betas_zero_snr", values["rescale_betas_zero_snr"], why)
    count, betas = values.get("num_train_timesteps", 1000), values.get("trained_betas")
    if betas is not None:
        if not isinstance(betas, list) or len(betas) != count or not all(map(_is_number, betas)):
            why = "does not fit trained_betas, which must be as many numbers"
            raise Unsupported("num_train_timesteps", count, why)
        return NoiseSchedule.from_betas(np.array(betas, np.float64))
    name = values.get("beta_schedule", "linear")
    if name == "squaredcos_cap_v2":
        return NoiseSchedule.cosine(count)
    if name not in _NAMED:
        raise Unsupported("beta_schedule", name)
    ends = {"beta_start": values.get("beta_start", 1e-4), "beta_end": values.get("beta_end", 2e-2)}
    for entry, value in ends.items():
        if not _is_number(value):
            raise Unsupported(entry, value, "must be a number")
    return _NAMED[name](count, **ends)


def _is_number(value: object) -> bool:
    return type(value) in (int, float)
