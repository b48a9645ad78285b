"""`--lora RANK`: a training of low-rank changes of a model, on a folder of videos."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from .flags import UsageError, flag
from .train_captioned import encoded, read_captioned, tell_left_out

if TYPE_CHECKING:
    from ..formats.checkpoint import CheckpointConfig
    from ..training.lora import LoraTrainer
    from ..training.options import TrainingOptions


# What it takes of the settings of models and clips; the others are those of its model.
_TAKEN = ("objective", "lora", "data", "captions", "frame_stride", "train", "extra_images")
_TAKEN += ("base_jitter",)


def check_lora(settings: Mapping[str, Any], of_models: Iterable[str]) -> None:
    """UsageError for flags that a LoRA does not take; settings: None unless they are given.

    of_models: the settings of models and clips
    """
    if settings["lora"] < 1:
        raise UsageError(f"--lora must be at least 1, got {settings['lora']}")
    if settings["shard"]:
        raise UsageError("--shard cannot go with --lora: its weights are few")
    if settings["data"] in (None, "mocap"):
        raise UsageError("--lora needs --data DIR, a folder of videos")
    for name in (*of_models, "init_from", "residual_from"):
        if settings[name] is not None and name not in _TAKEN:
            raise UsageError(f"{flag(name)} cannot go with --lora: that is the model's")


def lora_training(settings: argparse.Namespace, options: TrainingOptions) -> LoraTrainer:
    """Of the model's own size, length and text encoder; settings.rates: what is said of the clips.

    Raises FileNotFoundError or ValueError for the model, for videos, and for classes that a model
    of labels does not know.
    """
    from ..formats.checkpoint import DEFAULT, read_config
    from ..training.folder import rate_of
    from ..training.lora import LoraTrainer
    from ..training.parts import Coder, Parts
    from ..training.samples import Showcase

    folder = DEFAULT if settings.model is None else settings.model
    config = read_config(folder)
    if getattr(config, "distilled", None):
        raise ValueError(
            f"{folder}: a LoRA of few steps is learnt from its teacher: --model names that"
        )
    height, width = config.picture_size
    if height != width:
        raise ValueError(f"{folder}: --lora trains models of square clips, got {height} x {width}")
    settings.size, settings.num_frames = height, config.num_frames
    place, execution = (folder, config, settings.lora, options), settings.execution
    if config.text_encoder is None:
        clips, labels, rates = execution.team.in_turn(lambda: _labelled(settings, config))
        training = LoraTrainer(*place, clips, labels, settings.device, execution=execution)
    else:
        parts, told = Parts.read(folder, folder), read_captioned(settings)
        coder, rates = Coder(parts, settings.device), told.rates
        latents = execution.team.in_turn(lambda: encoded(told, parts, coder, settings))
        showcase = None
        if settings.sample_every:
            source, numbers = told.shown()
            showcase = Showcase.of(source, coder, numbers)
        how = {"device": settings.device, "showcase": showcase, "execution": execution}
        training = LoraTrainer(*place, latents, **how)
    settings.rates = f"{rate_of(rates)[1]}; the model's play at {config.fps:g}"
    return training


def _labelled(settings: argparse.Namespace, config: CheckpointConfig):
    """Clips as pixels, each with the model's label of its class; and the videos' rates."""
    import numpy as np

    from ..training.folder import read_folder

    shape = (settings.num_frames, settings.size, settings.frame_stride, settings.seed)
    found = read_folder(settings.data, *shape)
    tell_left_out(found.skipped, found.truncated)
    if unknown := sorted(set(found.label_names) - set(config.labels)):
        raise ValueError(
            f"{settings.data}: no label of the model is called {', '.join(unknown)}; they are: "
            f"{', '.join(config.labels)}"
        )
    numbers = np.array([config.labels.index(name) for name in found.label_names], np.int64)
    return found.clips, numbers[found.labels], found.rates
