"""What the configuration of a model says whose base network is a published one.

Such a model's autoencoder, text encoder and tokenizer are the published ones too, and lie in its
folder as diffusers keeps them. So does its base network, unless it has been trained further.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..diffusion.schedule import SPACINGS
from ..models.denoisers import PREDICTION_TYPES

# the subfolders of diffusers, by our names of networks and parts
FOLDERS = {
    "base": "unet",
    "autoencoder": "vae",
    "text_encoder": "text_encoder",
    "tokenizer": "tokenizer",
}


@dataclass(frozen=True)
class PublishedBase:
    """How a published base network is sampled, and so the whole model.

    prediction_type: what it predicts, "epsilon" or "v_prediction"
    spacing, steps_offset, set_alpha_to_one: see `solver_table`
    trained:         whether it has been trained further: base.safetensors then holds its weights,
                     in our names; else they lie in unet/

    Raises ValueError, naming it, for a field of another type or value.
    """

    prediction_type: str
    spacing: str
    steps_offset: int
    set_alpha_to_one: bool
    trained: bool = False

    def __post_init__(self):
        for name, known in (("prediction_type", PREDICTION_TYPES), ("spacing", SPACINGS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {known}, got {getattr(self, name)!r}")
        if type(self.steps_offset) is not int or not 0 <= self.steps_offset < 2**16:
            raise ValueError(f"steps_offset must be an int from 0 on, got {self.steps_offset!r}")
        for name in ("set_alpha_to_one", "trained"):
            if type(getattr(self, name)) is not bool:
                raise ValueError(f"{name} must be true or false, got {getattr(self, name)!r}")

    @property
    def parts(self) -> tuple[str, ...]:
        """What lies in a folder of diffusers, by our names (FOLDERS)."""
        return tuple(name for name in FOLDERS if not (self.trained and name == "base"))

    @property
    def timesteps(self) -> dict[str, Any]:
        """The arguments of `solver_table` that say which timesteps it is asked at."""
        names = ("spacing", "steps_offset", "set_alpha_to_one")
        return {name: getattr(self, name) for name in names}
