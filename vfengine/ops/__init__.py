"""Ops on plain tensors, in place or into `out`, one module per op (see CONTRIBUTING.md)."""

from vfengine.ops.residual_step import residual_step, residual_step_reference

__all__ = ["residual_step", "residual_step_reference"]
