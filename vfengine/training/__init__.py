"""Training: clips, losses, the loop."""

from typing import Any

from .options import TrainingOptions

__all__ = ["Trainer", "TrainingOptions"]


def __getattr__(name: str) -> Any:
    if name == "Trainer":  # loads torch, which the command line's --help does without
        from .trainer import Trainer

        return Trainer
    raise AttributeError(f"module 'vfengine.training' has no attribute {name!r}")
