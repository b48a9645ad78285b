"""Ops on plain tensors, in place or into `out`, one module per op (see CONTRIBUTING.md)."""

from vfengine.ops._clock import Clock
from vfengine.ops.base_step import base_step, base_step_reference
from vfengine.ops.conv3x3 import (
    conv3x3,
    conv3x3_reference,
    conv3x3_weight_gradient,
    conv3x3_weight_gradient_reference,
    differentiable_conv3x3,
)
from vfengine.ops.decomposed_noise import decomposed_noise, decomposed_noise_reference
from vfengine.ops.decomposed_step import decomposed_step, decomposed_step_reference
from vfengine.ops.geglu import geglu, geglu_reference
from vfengine.ops.geglu_backward import (
    differentiable_geglu,
    geglu_backward,
    geglu_backward_reference,
)
from vfengine.ops.group_norm_silu import group_norm_silu, group_norm_silu_reference
from vfengine.ops.group_norm_silu_backward import (
    differentiable_group_norm_silu,
    group_norm_silu_backward,
    group_norm_silu_backward_reference,
)
from vfengine.ops.implicit_gemm import implicit_gemm, implicit_gemm_reference
from vfengine.ops.layer_norm import layer_norm, layer_norm_reference
from vfengine.ops.layer_norm_backward import (
    differentiable_layer_norm,
    layer_norm_backward,
    layer_norm_backward_reference,
)
from vfengine.ops.model_input import model_input, model_input_reference
from vfengine.ops.noise_estimate import noise_estimate, noise_estimate_reference
from vfengine.ops.path_step import path_step, path_step_reference
from vfengine.ops.remove_base import remove_base, remove_base_reference
from vfengine.ops.residual_step import residual_step, residual_step_reference
from vfengine.ops.spatial_attention import spatial_attention, spatial_attention_reference
from vfengine.ops.temporal_attention import temporal_attention, temporal_attention_reference
from vfengine.ops.temporal_attention_backward import (
    differentiable_temporal_attention,
    temporal_attention_backward,
    temporal_attention_backward_reference,
)

__all__ = [
    "Clock",
    "base_step",
    "base_step_reference",
    "conv3x3",
    "conv3x3_reference",
    "conv3x3_weight_gradient",
    "conv3x3_weight_gradient_reference",
    "decomposed_noise",
    "decomposed_noise_reference",
    "decomposed_step",
    "decomposed_step_reference",
    "differentiable_conv3x3",
    "differentiable_geglu",
    "differentiable_group_norm_silu",
    "differentiable_layer_norm",
    "differentiable_temporal_attention",
    "geglu",
    "geglu_backward",
    "geglu_backward_reference",
    "geglu_reference",
    "group_norm_silu",
    "group_norm_silu_backward",
    "group_norm_silu_backward_reference",
    "group_norm_silu_reference",
    "implicit_gemm",
    "implicit_gemm_reference",
    "layer_norm",
    "layer_norm_backward",
    "layer_norm_backward_reference",
    "layer_norm_reference",
    "model_input",
    "model_input_reference",
    "noise_estimate",
    "noise_estimate_reference",
    "path_step",
    "path_step_reference",
    "remove_base",
    "remove_base_reference",
    "residual_step",
    "residual_step_reference",
    "spatial_attention",
    "spatial_attention_reference",
    "temporal_attention",
    "temporal_attention_backward",
    "temporal_attention_backward_reference",
    "temporal_attention_reference",
]
