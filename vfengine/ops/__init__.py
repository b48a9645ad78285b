"""Ops on plain tensors, in place or into `out`, one module per op (see CONTRIBUTING.md)."""

from vfengine.ops.decomposed_noise import decomposed_noise, decomposed_noise_reference
from vfengine.ops.decomposed_step import decomposed_step, decomposed_step_reference
from vfengine.ops.remove_base import remove_base, remove_base_reference
from vfengine.ops.residual_step import residual_step, residual_step_reference

__all__ = [
    "decomposed_noise",
    "decomposed_noise_reference",
    "decomposed_step",
    "decomposed_step_reference",
    "remove_base",
    "remove_base_reference",
    "residual_step",
    "residual_step_reference",
]
