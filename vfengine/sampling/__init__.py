"""How a path is walked, from noise to a clip."""

from .api import sample, sample_base, sample_residual, sample_video

__all__ = ["sample", "sample_base", "sample_residual", "sample_video"]
