// The native ops: a line here, a header beside this file and a .cpp below csrc/cpu are what an op
// needs; one in CUDA C++ has a line in the second list and a .cu in csrc/cuda too. On a CPU the
// last two of a sampling loop are made of the others.
#pragma once
#include "base_step.h"
#include "conv3x3_weight_gradient.h"
#include "decomposed_noise.h"
#include "decomposed_step.h"
#include "geglu.h"
#include "geglu_backward.h"
#include "group_norm_silu.h"
#include "group_norm_silu_backward.h"
#include "layer_norm.h"
#include "layer_norm_backward.h"
#include "path_step.h"
#include "remove_base.h"
#include "residual_step.h"
#include "row_matmul.h"
#include "spatial_attention.h"
#include "temporal_attention.h"
#include "temporal_attention_backward.h"
#include "transformer.h"
#include "winograd.h"
#include "winograd_weights.h"

// void vf::<instruction set>::<name>_cpu(const <Args>& args, int64_t threads)
#define VF_CPU_OPS(OP)                                           \
  OP(residual_step, FrameArgs)                                   \
  OP(decomposed_step, FrameArgs)                                 \
  OP(remove_base, FrameArgs)                                     \
  OP(decomposed_noise, DecomposedNoiseArgs)                      \
  OP(group_norm_silu, GroupNormSiluArgs)                         \
  OP(group_norm_silu_backward, GroupNormSiluBackwardArgs)        \
  OP(layer_norm, LayerNormArgs)                                  \
  OP(layer_norm_backward, LayerNormBackwardArgs)                 \
  OP(geglu, GegluArgs)                                           \
  OP(geglu_backward, GegluBackwardArgs)                          \
  OP(spatial_attention, SpatialAttentionArgs)                    \
  OP(temporal_attention, TemporalAttentionArgs)                  \
  OP(temporal_attention_backward, TemporalAttentionBackwardArgs) \
  OP(row_matmul, RowMatmulArgs)                                  \
  OP(winograd, WinogradArgs)                                     \
  OP(winograd_weights, WinogradWeightsArgs)                      \
  OP(conv3x3_weight_gradient, Conv3x3WeightGradientArgs)         \
  OP(transformer, TransformerArgs)                               \
  OP(pack_weights, PackWeightsArgs)

// void vf::<name>_cuda(const <Args>& args, int device, void* stream)
#define VF_CUDA_OPS(OP)                     \
  OP(residual_step, FrameArgs)              \
  OP(decomposed_step, FrameArgs)            \
  OP(remove_base, FrameArgs)                \
  OP(path_step, PathStepArgs)               \
  OP(base_step, BaseStepArgs)               \
  OP(decomposed_noise, DecomposedNoiseArgs) \
  OP(group_norm_silu, GroupNormSiluArgs)    \
  OP(temporal_attention, TemporalAttentionArgs)
