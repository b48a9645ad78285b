"""The settings of `python -m vfengine.train`: its flags, their defaults and help.

Nothing here imports torch.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from ..names import (
    AUTO,
    BASE_PATHS,
    NETWORKS_TRAINED,
    OBJECTIVES,
    PRECISIONS,
    TRAININGS,
)
from ..training.options import LORA_DEFAULTS, OBJECTIVE_DEFAULTS, TrainingOptions
from .flags import SWITCH, Kind, Parser, Setting, UsageError, add_flags, choice, flag, text
from .train_distill import OF_TEACHER, check_distillation
from .train_lora import check_lora

TRAIN = "python -m vfengine.train"
FPS = 10.0  # of rendered clips, and of videos that state no rate


def _floats(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in text.split(","))


def _ints(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


_WHOLE = Kind("whole number", {"metavar": "N", "type": int})
_NUMBER = Kind("number", {"metavar": "X", "type": float})
_PER_LEVEL = Kind("whole numbers, one a level", {"metavar": "N,N,…", "type": _ints})
_FOLDER = text("DIR", Path)
_STEPS = Kind("whole number", {"metavar": "STEPS", "type": int})

_DECOMPOSED = "decomposed models"  # flags that no other objective takes
_MODEL = "model"  # and those that no autoencoder and no text encoder takes
_CLIPS = "clips"
_DISTILLED = "distillation"
_EXECUTION = "execution"  # flags of what `Trainer` trains

# Defaults of models on latents (training/recipes.py), in place of those on pixels.
_ON_LATENTS = {
    "size": 128,
    "patch_size": 1,
    "base_channels": (96, 160, 160),
    "residual_channels": (64, 64, 64),
    "layers_per_block": (1, 1, 1),
    "cell_weight": 3.0,
    "timestep_shift": 0.6,
}
# … and beside a published base network, …
_ON_PUBLISHED = {
    "size": None,
    "patch_size": 1,
    "base_channels": None,
    "residual_channels": (128, 256, 384, 384),
    "layers_per_block": (1, 1, 1, 1),
    "train": "residual",
    "extra_images": 0,
    "learning_rate": 1e-4,
    "cell_weight": 3.0,
}
# … and where clips are a folder's videos, of which neither more base frames nor figures are known.
_OF_FOLDERS = {"cell_weight": 1.0, "base_images": 0}
# What decomposed models alone have of the settings of clips and files.
_OF_DECOMPOSED = ("residual_from", "captions", "base_images", "lora", "model")
# What trainings of an autoencoder or a text encoder have of the settings of models.
_OF_PARTS = ("size", "num_clips")
# What a plain video model has of a decomposed model's options.
_OF_VDM = {"extra_images": 0, "clean_share": 0, "base_jitter": 0}


def _option(name: str, group: str, help: str) -> Setting:
    """A setting that is a field of `TrainingOptions`, with its default."""
    default = getattr(TrainingOptions, name)
    return _differing(name, group, _WHOLE if isinstance(default, int) else _NUMBER, help, default)


def _differing(name: str, group: str, kind: Kind, help: str, default: Any) -> Setting:
    """A setting whose default on latents, or beside a published base network, may be another."""
    told = [_told(default)]
    for given, defaults in (("--autoencoder", _ON_LATENTS), ("--base", _ON_PUBLISHED)):
        if name in defaults:
            told.append(f"with {given} {_told(defaults[name])}")
    return Setting(name, group, kind, help, default, *["; ".join(told)] * (len(told) > 1))


def _told(value: Any) -> str:
    if value is None:
        return "its own"
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


SETTINGS = (
    Setting(
        "objective",
        _MODEL,
        choice(TRAININGS),
        "train a decomposed model; vdm, a plain video model on the base UNet; a part of models on "
        "latents: an autoencoder, a text encoder; or distill a model to few steps",
        "decomposed",
    ),
    Setting(
        "output", "files", _FOLDER, "folder for checkpoint, state, log and samples", required=True
    ),
    Setting("from", _DISTILLED, _FOLDER, "the teacher: distill this decomposed model"),
    Setting(
        "updates",
        _DISTILLED,
        _STEPS,
        "optimizer steps of --objective distill, whose --steps are those of sampling",
        OBJECTIVE_DEFAULTS["distill"]["updates"],
    ),
    Setting(
        "teacher_steps",
        _DISTILLED,
        _STEPS,
        "DDIM steps of the teacher in place of all steps of the student; one that was distilled "
        "itself takes its own",
        0,
        "48",
    ),
    Setting(
        "guidance_range",
        _DISTILLED,
        Kind("two numbers", {"metavar": "S,S", "type": _floats}),
        "least and largest guidance scale to train under",
        (1.0, 4.0),
        "1,4",
    ),
    Setting(
        "autoencoder",
        _DECOMPOSED,
        _FOLDER,
        "train on the latents of this autoencoder, a checkpoint of --objective autoencoder",
    ),
    Setting(
        "text_encoder",
        _DECOMPOSED,
        _FOLDER,
        "train on captions through this text encoder, a checkpoint of --objective text",
    ),
    Setting(
        "base",
        _DECOMPOSED,
        _FOLDER,
        "train a residual network for this text-to-image model, in diffusers' format, on its "
        "latents: its UNet is the base network, which stays as it is unless --train says otherwise",
    ),
    Setting(
        "latents",
        _DECOMPOSED,
        SWITCH,
        "train on latents, as --base, or --autoencoder and --text-encoder, say themselves",
        False,
    ),
    Setting(
        "lora",
        _DECOMPOSED,
        Kind("whole number", {"metavar": "RANK", "type": int}),
        "train a LoRA of this rank of --model, on a folder of videos; --lora of generate takes it",
    ),
    Setting("model", "files", _FOLDER, "with --lora: the model", None, "the shipped model"),
    Setting(
        "data",
        _CLIPS,
        text("NAME"),
        "clips to train on: mocap, or a folder of videos whose sub-folders are the classes",
        "mocap",
    ),
    Setting("num_clips", _CLIPS, _WHOLE, "clips of mocap to render", 12_000),
    Setting(
        "base_images",
        _CLIPS,
        _WHOLE,
        "base frames of so many further clips, with --autoencoder; 0: those of the clips",
        0,
    ),
    Setting("captions", _CLIPS, _WHOLE, "captions of a clip, with --text-encoder", 4),
    Setting(
        "clips_cache", "files", _FOLDER, "folder for rendered clips or latents", None, "--output"
    ),
    Setting("num_frames", _CLIPS, _WHOLE, "frames of a clip", 16),
    _differing("size", _CLIPS, _WHOLE, "height and width in pixels", 64),
    Setting("frame_stride", _CLIPS, _WHOLE, "use every N-th frame of a folder's videos", 1),
    Setting(
        "fps",
        _CLIPS,
        _NUMBER,
        "frames a second at which generated clips play",
        None,
        f"that of the videos; of mocap {FPS:g}",
    ),
    Setting(
        "lam",
        _DECOMPOSED,
        _NUMBER,
        "share of the noise that all frames have in common",
        0.5,
    ),
    _differing(
        "base_channels",
        _MODEL,
        _PER_LEVEL,
        "channels of the base network, or of the plain video model",
        (80, 160, 272),
    ),
    _differing(
        "residual_channels",
        _DECOMPOSED,
        _PER_LEVEL,
        "channels of the residual network",
        (64, 96, 112),
    ),
    _differing("layers_per_block", _MODEL, _PER_LEVEL, "residual blocks of each level", (0, 1, 1)),
    _differing("patch_size", _MODEL, _WHOLE, "pixels or latents of a patch, along each side", 4),
    Setting(
        "base_path",
        _DECOMPOSED,
        choice(BASE_PATHS),
        "base path that the checkpoint names for sampling",
        None,
        "clean, or stepwise with --clean-share 0",
    ),
    _differing(
        "train",
        _DECOMPOSED,
        choice(NETWORKS_TRAINED),
        "train both networks, or one; the other is then that of --init-from or --base",
        TrainingOptions.train,
    ),
    Setting(
        "residual_from",
        "files",
        _FOLDER,
        "start the residual network from this checkpoint, not that of --init-from",
    ),
    Setting(
        "keep_encoder",
        "training",
        SWITCH,
        "train the decoder of --init-from alone, so that latents stay as they are",
        False,
    ),
    _option(
        "adversary",
        "training",
        "weight of an adversary's gradient, beside that of the errors of pixels; 0: none",
    ),
    Setting("max_hours", "training", _NUMBER, "stop after so many hours, with everything saved"),
    Setting("max_minutes", "training", _NUMBER, "the same in minutes"),
    Setting(
        "device",
        "training",
        text("NAME"),
        "device to train on: cpu, cuda, cuda:1 …; under torchrun, cuda is each process's own GPU",
        "cpu",
    ),
    Setting(
        "accumulate",
        _EXECUTION,
        _WHOLE,
        "parts of a batch, taken one after the other to save memory; the steps stay the same",
        1,
    ),
    Setting(
        "shard",
        _EXECUTION,
        SWITCH,
        "under torchrun: leave each process its share of weights, averages and moments (FSDP2)",
        False,
    ),
    Setting(
        "checkpoint_activations",
        _EXECUTION,
        SWITCH,
        "compute stages of the UNets again for the gradient, to save memory",
        False,
    ),
    Setting("compile", _EXECUTION, SWITCH, "make the networks' code with torch.compile", False),
    Setting("capture", _EXECUTION, SWITCH, "with CUDA: replay each step from a CUDA graph", False),
    Setting("resume", "files", SWITCH, "continue from the state in --output", False),
    Setting(
        "init_from",
        "files",
        _FOLDER,
        "start from this checkpoint; a plain video model may start from a base network",
    ),
    Setting("save_every", "files", _STEPS, "save state and checkpoint after so many steps", 500),
    Setting("sample_every", "files", _STEPS, "write a sheet of samples; 0 writes none", 2000),
    Setting("log_every", "files", _STEPS, "write a line of the log", 50),
    _option(
        "steps",
        "training",
        "optimizer steps; of --objective distill, the student's: 1, 2, 4, 8 or 16",
    ),
    _option("batch_size", "training", "clips of a step"),
    _option(
        "extra_images",
        _DECOMPOSED,
        "base frames of more clips, for the base network alone",
    ),
    _option("learning_rate", "training", "learning rate of AdamW, at its highest"),
    _option("warmup", "training", "steps over which the learning rate rises"),
    _option("decay", "training", "share of the steps, the last, over which it falls"),
    _option("weight_decay", "training", "weight decay of AdamW"),
    _option("gradient_clip", "training", "largest norm of the gradient"),
    _option("ema", "training", "decay of the averaged weights, which the checkpoint holds"),
    _option("class_dropout", "training", "share of clips shown without label or caption"),
    _option("clean_share", _DECOMPOSED, "share of clips that are shown the exact base noise"),
    _option("base_jitter", _DECOMPOSED, "largest noise on the base frame of those clips"),
    _option(
        "cell_weight", _DECOMPOSED, "weight of latents that the figure fills, beside 1 of others"
    ),
    _option(
        "timestep_shift",
        "training",
        "above 1, draw more timesteps of much noise: s u / (1 + (s-1) u) of the schedule",
    ),
    Setting(
        "precision",
        "training",
        choice((AUTO, *PRECISIONS)),
        "precision; auto is bf16 where the device computes in it",
        AUTO,
    ),
    _option("seed", "training", "seed of all that is random"),
)


def train_parser(program: str = TRAIN) -> Parser:
    """All flags, None unless they are used."""
    parser = Parser(
        program,
        description="Train a decomposed model on rendered motion capture or on a folder of videos: "
        "on pixels with labels, or, with --autoencoder and --text-encoder, on latents with "
        "captions. With --objective, train these parts first, or VDM*: plain video diffusion, one "
        "network that denoises all frames, which decomposed models are compared with.",
    )
    add_flags(parser, SETTINGS)
    parser.set_defaults(**{setting.name: None for setting in SETTINGS})
    return parser


def read_settings(argv: Sequence[str] | None, program: str = TRAIN) -> argparse.Namespace:
    """All settings, as attributes; those that an objective has not are 0 or None.

    Raises UsageError for unknown flags, bad values, and flags that the objective does not take.
    """
    settings = vars(train_parser(program).parse_args(argv))
    objective = settings["objective"] = settings["objective"] or "decomposed"
    defaults = OBJECTIVE_DEFAULTS.get(objective, {})
    if settings["autoencoder"] is not None:
        defaults = defaults | _ON_LATENTS
    elif settings["base"] is not None:
        defaults = defaults | _ON_PUBLISHED
        settings["train"] = settings["train"] or _ON_PUBLISHED["train"]
    if settings["data"] not in (None, "mocap"):
        defaults = defaults | _OF_FOLDERS
    if settings["lora"] is not None:
        groups = (_MODEL, _DECOMPOSED, _CLIPS)
        check_lora(settings, [setting.name for setting in SETTINGS if setting.group in groups])
        defaults = defaults | LORA_DEFAULTS
    elif settings["model"] is not None:
        raise UsageError("--model is what --lora RANK changes: to train a model, --init-from")
    if settings["train"] == "residual":
        defaults = defaults | {"clean_share": 1.0}
    options = {field.name for field in fields(TrainingOptions)}
    vars_given = {name for name, value in settings.items() if value is not None}
    for setting in SETTINGS:
        name, given = setting.name, settings[setting.name] is not None
        if not _takes(objective, setting):
            if given:
                raise UsageError(f"{flag(name)} has no meaning for --objective {objective}")
            settings[name] = _OF_VDM.get(name, setting.default) if name in options else None
        elif not given:
            settings[name] = defaults.get(name, setting.default)
    if objective in OBJECTIVES and settings["data"] == "mocap" and settings["fps"] is None:
        settings["fps"] = FPS
    if objective == "distill":
        check_distillation(settings, given=vars_given)
    if objective == "decomposed" and settings["base_path"] is None:
        settings["base_path"] = "clean" if settings["clean_share"] > 0 else "stepwise"
    if settings["capture"] and not settings["device"].startswith("cuda"):
        raise UsageError(f"--capture needs --device cuda, got {settings['device']}")
    _check_parts(settings)
    return argparse.Namespace(**settings)


def _takes(objective: str, setting: Setting) -> bool:
    """Whether an objective has a meaning for this setting."""
    if setting.name in ("keep_encoder", "adversary"):
        return objective == "autoencoder"
    if setting.group == _DISTILLED:
        return objective == "distill"
    if setting.name == "capture":
        return objective in OBJECTIVES
    if setting.group == _EXECUTION:
        return objective in (*OBJECTIVES, "distill")
    if objective == "distill":
        return setting.name not in OF_TEACHER
    if objective == "decomposed" or setting.name == "objective":
        return True
    foreign = setting.group == _DECOMPOSED or setting.name in _OF_DECOMPOSED
    if objective != "vdm":
        only_of_models = setting.group in (_MODEL, _CLIPS) and setting.name not in _OF_PARTS
        foreign |= only_of_models or setting.name in ("class_dropout", "timestep_shift")
    if objective == "text":
        foreign |= setting.name in ("size", "sample_every", "clips_cache")
    return not foreign


def _check_parts(settings: dict[str, Any]) -> None:
    """UsageError for flags of latents and prompts without the others that they need."""
    if settings["keep_encoder"] and not (settings["init_from"] or settings["resume"]):
        raise UsageError("--keep-encoder needs --init-from: a fresh encoder is not worth keeping")
    given = [name for name in ("autoencoder", "text_encoder") if settings[name] is not None]
    if settings["base"] is not None:
        for name in (*given, *(["base_channels"] * (settings["base_channels"] is not None))):
            raise UsageError(f"{flag(name)} cannot go with --base, which has its own")
        given = ["base"]
    elif len(given) == 1:
        raise UsageError("--autoencoder and --text-encoder go together: latents have captions")
    if settings["objective"] == "distill":
        given = given or [settings["from"]]  # the teacher decides
    if settings["latents"] and not given:
        raise UsageError("--latents needs --base, or --autoencoder and --text-encoder")
    if given and settings["data"] != "mocap":
        for name in ("cell_weight", "base_images"):
            if settings[name] not in (None, _OF_FOLDERS[name]):
                raise UsageError(f"{flag(name)} needs rendered clips, and --data is a folder")
    if not given and settings["cell_weight"] != 1:
        raise UsageError("--cell-weight needs --autoencoder: pixels weigh alike")
    alone = settings["train"] == "residual" and settings["base"] is None
    if settings["objective"] == "decomposed" and alone and settings["clean_share"] != 1:
        raise UsageError("--train residual without --base: clean_share must be 1")
    for name in ("max_hours", "max_minutes"):
        if settings[name] is not None and not settings[name] >= 0:
            raise UsageError(f"{flag(name)} must not be negative, got {settings[name]}")
