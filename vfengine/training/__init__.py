"""Training: clips, losses, the loop."""

from .trainer import Trainer, TrainingOptions

__all__ = ["Trainer", "TrainingOptions"]
