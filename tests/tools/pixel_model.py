"""The model on pixels that `python -m vfengine.train` makes by default, without its weights."""

from vfengine.cli.train_settings import read_settings
from vfengine.formats.checkpoint import DecomposedConfig
from vfengine.training.mocap import ACTIONS
from vfengine.training.recipes import Shape, pixel_model


def pixel_config() -> DecomposedConfig:
    """16 frames of 64 x 64 pixels, 15 labels; the package carried such a model before prompts."""
    shape = Shape.of(read_settings(["--output", "anywhere"]))
    return pixel_model(shape, tuple(ACTIONS), "decomposed")
