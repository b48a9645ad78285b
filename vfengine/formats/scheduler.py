"""Noise schedules as published: diffusers' scheduler_config.json, and ModelScope's constants.

A scheduler's class names a solver, and the solver is the caller's choice. What is the network's own
is read: its noise levels, what it predicts, which timesteps it is asked at and where the last step
goes. A setting that would change one of these, and that has no counterpart here, is refused by
name. Where a network is sampled as another model is, as a base network, only the first two count.
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
_DDIM = {"clip_sample": True, "set_alpha_to_one": True}
_DDPM = {"clip_sample": True, "variance_type": "fixed_small"}
_LINSPACE = {"timestep_spacing": "linspace"}
_FINAL_SIGMA = _LINSPACE | {"final_sigmas_type": "zero"}
_SIGMAS = _LINSPACE | {"beta_start": 0.00085, "beta_end": 0.012}
_CLASSES: dict[str, dict[str, Any]] = {
    "DDIMScheduler": _DDIM,
    "DDIMParallelScheduler": _DDIM,
    "DDPMScheduler": _DDPM,
    "DDPMParallelScheduler": _DDPM,
    "PNDMScheduler": {"set_alpha_to_one": False},
    "EulerDiscreteScheduler": _FINAL_SIGMA,
    "EulerAncestralDiscreteScheduler": _LINSPACE,
    "DPMSolverMultistepScheduler": _FINAL_SIGMA | {"variance_type": None},
    "DPMSolverSinglestepScheduler": _FINAL_SIGMA | {"variance_type": None},
    "DPMSolverSDEScheduler": _SIGMAS,
    "UniPCMultistepScheduler": _FINAL_SIGMA,
    "DEISMultistepScheduler": _LINSPACE,
    "SASolverScheduler": _LINSPACE | {"variance_type": None},
    "HeunDiscreteScheduler": _SIGMAS | {"clip_sample": False},
    "KDPM2DiscreteScheduler": _SIGMAS,
    "KDPM2AncestralDiscreteScheduler": _SIGMAS,
    "LMSDiscreteScheduler": _LINSPACE,
}
_ENDS_AT_FIRST = ("DEISMultistepScheduler", "SASolverScheduler")  # at ᾱ_0, and no entry says it
# Other classes, by the reason why their networks cannot be sampled here.
_OTHERS = {
    "is of flow matching, whose noise levels are no ᾱ": (
        *("FlowMapEulerDiscrete", "FlowMatchEulerDiscrete", "FlowMatchHeunDiscrete"),
        *("FlowMatchLCM", "Helios", "HeliosDMD", "LTXEulerAncestralRF", "MiniMaxH3", "Piflow"),
    ),
    "is of noise levels σ without a bound (EDM, VE), which are no ᾱ": (
        *("CMStochasticIterative", "CosineDPMSolverMultistep", "EDMDPMSolverMultistep"),
        *("EDMEuler", "KarrasVe", "ScoreSdeVe", "SCM"),
    ),
    "is of distilled networks, which do not predict noise at every timestep": ("LCM", "TCD"),
    "has noise levels of its own": (
        *("CogVideoXDDIM", "CogVideoXDPM", "DDPMWuerstchen", "IPNDM", "RFD4Proteina"),
        *("ScoreSdeVp", "UnCLIP"),
    ),
    "is of tokens, not of noise": (
        *("Amused", "BlockRefinement", "DiscreteDDIM", "EntropyBound", "VQDiffusion"),
    ),
    "goes from a picture to noise, or fills in a part of one": (
        *("DDIMInverse", "DPMSolverMultistepInverse", "RePaint"),
    ),
}
_WHY = {f"{name}Scheduler": why for why, names in _OTHERS.items() for name in names}
# Entries that may only have one of these values: of what the network was trained on …
_OF_THE_NETWORK = {
    "prediction_type": PREDICTION_TYPES,
    "rescale_betas_zero_snr": (False,),
    "shift_terminal": (None,),
    "timestep_type": ("discrete",),
    "use_dynamic_shifting": (False,),
    "use_flow_sigmas": (False,),
}
# … and of how it is sampled …
_OF_SAMPLING = {
    "clip_sample": (False,),
    "final_sigmas_type": ("zero", "sigma_min"),
    "interpolation_type": ("linear",),
    "lambda_min_clipped": (-np.inf,),
    "set_alpha_to_one": (True, False),
    "sigma_max": (None,),
    "sigma_min": (None,),
    "thresholding": (False,),
    "timestep_spacing": SPACINGS,
    "use_beta_sigmas": (False, None),
    "use_exponential_sigmas": (False, None),
    "use_karras_sigmas": (False, None),
    "use_lu_lambdas": (False,),
    "variance_type": (None, "fixed_small", "fixed_small_log"),
}
# … which for a base path is the model's own way.
_OF_A_BASE_PATH = _OF_SAMPLING | {
    "final_sigmas_type": ("zero",),
    "set_alpha_to_one": (True,),
    "steps_offset": (0,),
    "timestep_spacing": SPACINGS[:1],
}
# Of these only a class's own count: a configuration that was another class's keeps what this class
# does not read.
_OF_A_CLASS = ("clip_sample", "final_sigmas_type", "set_alpha_to_one", "variance_type")
# Entries that are read below, and those that change no result here: of solvers, of clipping that is
# off, and of shifts that are off.
_READ = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas")
_IGNORED = (
    *("algorithm_type", "disable_corrector", "euler_at_final", "lower_order_final", "predict_x0"),
    *("skip_prk_steps", "solver_order", "solver_p", "solver_type", "noise_sampler_seed"),
    *("corrector_order", "predictor_order", "tau_func"),
    *("clip_sample_range", "dynamic_thresholding_ratio", "sample_max_value"),
    *("flow_shift", "time_shift_type"),
)


def diffusers_schedule(values: Mapping[str, Any]) -> PublishedSchedule:
    """The schedule of a scheduler_config.json.

    Raises Unsupported, a ValueError that names the entry, for one that is not supported.
    """
    entries = _own_entries(values)
    for entry, value in entries.items():
        _check_network(entry, value)
        if entry in _OF_SAMPLING:
            if value not in _OF_SAMPLING[entry]:
                raise Unsupported(entry, value)
        elif not _is_known(entry):
            raise Unsupported(entry, value, "is an unknown entry")
    offset = entries["steps_offset"]
    if type(offset) is not int or offset < 0:
        raise Unsupported("steps_offset", offset, "must be an int from 0 on")
    to_one = entries.get("set_alpha_to_one", values["_class_name"] not in _ENDS_AT_FIRST)
    if "final_sigmas_type" in entries:
        to_one = entries["final_sigmas_type"] == "zero"
    return PublishedSchedule(
        noise_schedule(entries),
        prediction_type=entries["prediction_type"],
        spacing=entries["timestep_spacing"],
        steps_offset=offset,
        set_alpha_to_one=to_one,
    )


def base_schedule(values: Mapping[str, Any]) -> tuple[NoiseSchedule, str, dict[str, Any]]:
    """What a network was trained on, of a scheduler_config.json: noise levels and prediction type.

    A base path is sampled at a model's own timesteps, without clipping, to a clean sample. The last
    of the results holds the entries that ask for something else; they are for the caller to name.

    Raises as `diffusers_schedule` does, for entries of what the network was trained on.
    """
    entries = dict(values) if "_class_name" not in values else _own_entries(values)
    others = {}
    for entry, value in entries.items():
        _check_network(entry, value)
        if value not in _OF_A_BASE_PATH.get(entry, (value,)) or not _is_known(entry):
            others[entry] = value
    if values.get("_class_name") in _ENDS_AT_FIRST:
        others["_class_name"] = values["_class_name"]
    return noise_schedule(entries), entries.get("prediction_type", "epsilon"), others


def _own_entries(values: Mapping[str, Any]) -> dict[str, Any]:
    """The entries that a class reads, with its defaults; Unsupported for other classes."""
    name = values.get("_class_name")
    if not isinstance(name, str) or name not in _CLASSES:
        known = f"is not one of {', '.join(_CLASSES)}"
        why = _WHY.get(name) if isinstance(name, str) else None
        raise Unsupported("_class_name", name, known if why is None else f"{why}: it {known}")
    own = _SHARED | _CLASSES[name]
    kept = {k: value for k, value in values.items() if k not in _OF_A_CLASS or k in own}
    return {**own, **kept}


def _check_network(entry: str, value: object) -> None:
    if entry in _OF_THE_NETWORK and value not in _OF_THE_NETWORK[entry]:
        why = "is not supported"
        if entry == "rescale_betas_zero_snr":
            why += ": at zero terminal SNR a network's noise says nothing of its sample"
        raise Unsupported(entry, value, why)


def _is_known(entry: str) -> bool:
    known = (*_SHARED, *_OF_THE_NETWORK, *_OF_SAMPLING, *_READ, *_IGNORED)
    return entry in known or entry.startswith("_")


def noise_schedule(values: Mapping[str, Any]) -> NoiseSchedule:
    """The noise levels of a scheduler_config.json, whatever else it says.

    Raises Unsupported, naming the entry, for noise levels that are not supported; ValueError for
    numbers that are none of a schedule.
    """
    _check_network("rescale_betas_zero_snr", values.get("rescale_betas_zero_snr", False))
    count, betas = values.get("num_train_timesteps", 1000), values.get("trained_betas")
    if betas is not None:
        if not isinstance(betas, list) or len(betas) != count or not all(map(_is_number, betas)):
            why = "does not fit trained_betas, which must be as many numbers"
            raise Unsupported("num_train_timesteps", count, why)
        return NoiseSchedule.from_betas(np.array(betas, np.float64))
    name = values.get("beta_schedule", "linear")
    if name == "squaredcos_cap_v2":
        return NoiseSchedule.cosine(count)
    if not isinstance(name, str) or name not in _NAMED:
        raise Unsupported("beta_schedule", name)
    ends = {"beta_start": values.get("beta_start", 1e-4), "beta_end": values.get("beta_end", 2e-2)}
    for entry, value in ends.items():
        if not _is_number(value):
            raise Unsupported(entry, value, "must be a number")
    return _NAMED[name](count, **ends)


def _is_number(value: object) -> bool:
    return type(value) in (int, float)
