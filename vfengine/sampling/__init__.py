"""Sampling: from noise to a clip, in two phases."""

from .api import sample, sample_base, sample_residual, sample_video

__all__ = ["sample", "sample_base", "sample_residual", "sample_video"]
