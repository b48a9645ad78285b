"""The settings of `python -m vfengine.train`: its flags, their defaults and help.

Nothing here imports torch.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from ..names import AUTO, BASE_PATHS, OBJECTIVES, PRECISIONS
from ..training.options import TrainingOptions
from .flags import SWITCH, Kind, Parser, Setting, UsageError, add_flags, choice, flag, text


def _ints(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


_WHOLE = Kind("whole number", {"metavar": "N", "type": int})
_NUMBER = Kind("number", {"metavar": "X", "type": float})
_PER_LEVEL = Kind("whole numbers, one a level", {"metavar": "N,N,…", "type": _ints})
_FOLDER = text("DIR", Path)
_STEPS = Kind("whole number", {"metavar": "STEPS", "type": int})

_DECOMPOSED = "decomposed models"  # flags that --objective vdm refuses
_NOT_VDM = "; not with --objective vdm"


def _option(name: str, group: str, help: str) -> Setting:
    """A setting that is a field of `TrainingOptions`, with its default."""
    default = getattr(TrainingOptions, name)
    return Setting(name, group, _WHOLE if isinstance(default, int) else _NUMBER, help, default)


SETTINGS = (
    Setting(
        "objective",
        "model",
        choice(OBJECTIVES),
        "train a decomposed model, or vdm, a plain video model on the base UNet",
        "decomposed",
    ),
    Setting(
        "output", "files", _FOLDER, "folder for checkpoint, state, log and samples", required=True
    ),
    Setting(
        "data",
        "clips",
        text("NAME"),
        "clips to train on: mocap, or a folder of videos whose sub-folders are the classes",
        "mocap",
    ),
    Setting("num_clips", "clips", _WHOLE, "clips of mocap to render", 12_000),
    Setting("clips_cache", "files", _FOLDER, "folder for rendered clips", None, "--output"),
    Setting("num_frames", "clips", _WHOLE, "frames of a clip", 16),
    Setting("size", "clips", _WHOLE, "height and width in pixels", 64),
    Setting("frame_stride", "clips", _WHOLE, "use every N-th frame of a folder's videos", 1),
    Setting("fps", "clips", _NUMBER, "frames a second at which generated clips play", 10.0),
    Setting(
        "lam",
        _DECOMPOSED,
        _NUMBER,
        "share of the noise that all frames have in common" + _NOT_VDM,
        0.5,
    ),
    Setting(
        "base_channels",
        "model",
        _PER_LEVEL,
        "channels of the base network, or of the plain video model",
        (80, 160, 272),
    ),
    Setting(
        "residual_channels",
        _DECOMPOSED,
        _PER_LEVEL,
        "channels of the residual network" + _NOT_VDM,
        (64, 96, 112),
    ),
    Setting("layers_per_block", "model", _PER_LEVEL, "residual blocks of each level", (0, 1, 1)),
    Setting("patch_size", "model", _WHOLE, "pixels of a patch, along each side", 4),
    Setting(
        "base_path",
        _DECOMPOSED,
        choice(BASE_PATHS),
        "base path that the checkpoint names for sampling" + _NOT_VDM,
        None,
        "clean, or stepwise with --clean-share 0",
    ),
    Setting("device", "training", text("NAME"), "device to train on: cpu, cuda, cuda:1 …", "cpu"),
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
    _option("steps", "training", "optimizer steps"),
    _option("batch_size", "training", "clips of a step"),
    _option(
        "extra_images",
        _DECOMPOSED,
        "base frames of more clips, for the base network alone" + _NOT_VDM,
    ),
    _option("learning_rate", "training", "learning rate of AdamW, at its highest"),
    _option("warmup", "training", "steps over which the learning rate rises"),
    _option("decay", "training", "share of the steps, the last, over which it falls"),
    _option("weight_decay", "training", "weight decay of AdamW"),
    _option("gradient_clip", "training", "largest norm of the gradient"),
    _option("ema", "training", "decay of the averaged weights, which the checkpoint holds"),
    _option("class_dropout", "training", "share of clips that are shown without their label"),
    _option(
        "clean_share", _DECOMPOSED, "share of clips that are shown the exact base noise" + _NOT_VDM
    ),
    _option(
        "base_jitter", _DECOMPOSED, "largest noise on the base frame of those clips" + _NOT_VDM
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


def train_parser() -> Parser:
    """All flags; those of decomposed models are None unless they are used."""
    parser = Parser(
        "python -m vfengine.train",
        description="Train a decomposed model on rendered motion capture or on a folder of videos. "
        "With --objective vdm, train VDM* instead: plain video diffusion, one network that "
        "denoises all frames, which decomposed models are compared with.",
    )
    add_flags(parser, SETTINGS)
    defaults = {s.name: None if s.group == _DECOMPOSED else s.default for s in SETTINGS}
    parser.set_defaults(**defaults)
    return parser


def read_settings(argv: Sequence[str] | None) -> argparse.Namespace:
    """All settings, as attributes; those of decomposed models are 0 or None for a VDM*.

    Raises UsageError for unknown flags, bad values, and flags that the objective does not take.
    """
    settings = vars(train_parser().parse_args(argv))
    options = {field.name for field in fields(TrainingOptions)}
    for setting in SETTINGS:
        if setting.group != _DECOMPOSED:
            continue
        name = setting.name
        if settings["objective"] == "vdm":
            if settings[name] is not None:
                raise UsageError(f"{flag(name)} has no meaning for --objective vdm")
            settings[name] = 0 if name in options else None
        elif settings[name] is None:
            settings[name] = setting.default
    if settings["objective"] == "decomposed" and settings["base_path"] is None:
        settings["base_path"] = "clean" if settings["clean_share"] > 0 else "stepwise"
    return argparse.Namespace(**settings)
